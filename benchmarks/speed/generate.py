"""What users do: `model.generate` of whole vision-language models, images in, beside transformers' own caches.

    python benchmarks/speed/generate.py --model llava-1.5-7b [--peer dynamic,static,akvq] [--layers N] [--batch 1]
        [--second-batch 4] [--images 1] [--text 64] [--tokens-out 128] [--again] [--rows FILE] [--markdown FILE]
    python benchmarks/speed/generate.py --table FILE... [--markdown FILE]
    python benchmarks/speed/generate.py --tiny --device cpu

Every peer runs in a process of its own, with an empty folder for what compilers keep; `--again` runs each that compiles
in a second process, with the first one's folder. A process generates four times, greedily, to the last of --tokens-out
tokens:

1. the first call of the process, which compiles; a stopping criterion notes the time of every token
2. the same again: first token, and milliseconds a step; the criterion waits for the device at every token
3. without the criterion: tokens a second of the whole call, prompt included, and peak memory above the weights
4. --second-batch rows (0: none): how long a batch that was not seen before takes

The second process of --again does only the first call. What is known after each call goes as a JSON line to --rows at
once, so a run that is cut short leaves what it had. GB is 1e9 bytes; the driver's own memory is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo.utils
import transformers
from timing import Table, machine, peers_asked_for, reason_of, wait
from vision_models import MODELS, build, prompt

import akvq_fx

PEERS = {
    "dynamic": "DynamicCache, uncompiled",
    "static": 'cache_implementation="static"',
    "akvq": 'model.compile(backend="akvq")',
    "inductor": "model.compile()",
}
UNCOMPILED = ("dynamic",)
CACHE_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
GB = 1e9
WHAT = ("model", "layers", "batch", "images", "prompt_tokens", "tokens_out", "peer", "process")  # names a row


class Stamps(transformers.StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def __call__(self, input_ids, scores, **kwargs):
        wait(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=self.device)


class Run:
    """One peer's model in this process."""

    def __init__(self, args, peer: str):
        self.args, self.peer, self.device = args, peer, torch.device(args.device)
        self.model, self.image = build(args.model, args.layers, args.tiny, self.device)
        self.weights = sum(p.nbytes for p in self.model.parameters())
        if peer == "akvq":
            options = {**args.options, **({"inner": args.inner} if args.inner else {})}
            self.model.compile(backend="akvq", **({"options": options} if options else {}))
        elif peer == "inductor":
            self.model.compile()
        self.how = {"cache_implementation": "static"} if peer == "static" else {}

    def prompt(self, batch: int) -> dict:
        args, text = self.args, self.model.config.get_text_config()
        return prompt(self.image, batch, args.images, args.text, text.vocab_size, self.device, self.model.dtype)

    def generate(self, inputs: dict, stamped: bool = True) -> tuple[float, list[float], object]:
        """(seconds of the call, seconds from its begin to each token, its cache)."""
        stamps = Stamps(self.device)
        how = {**self.how, "stopping_criteria": [stamps]} if stamped else self.how
        wait(self.device)
        begin = time.perf_counter()
        out = self.model.generate(**inputs, **how, max_new_tokens=self.args.tokens_out, return_dict_in_generate=True)
        wait(self.device)
        seconds = time.perf_counter() - begin
        made = out.sequences.shape[1] - inputs["input_ids"].shape[1]
        assert made == self.args.tokens_out, f"{made} tokens came out, not {self.args.tokens_out}"
        return seconds, [t - begin for t in stamps.times], out.past_key_values

    def peak(self) -> float | None:
        """GB above the weights since memory was last reset; None on a CPU."""
        return (torch.cuda.max_memory_allocated() - self.weights) / GB if self.device.type == "cuda" else None

    def reset_peak(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def facts(self):
        """Yields what each call showed, as it is known."""
        args, inputs = self.args, self.prompt(self.args.batch)
        title = MODELS[args.model][0]
        yield {"weights_gb": self.weights / GB, "title": f"{title}, tiny" if args.tiny else title}
        self.reset_peak()
        seconds, times, cache = self.generate(inputs)
        yield {"first_token_s": times[0], "first_generate_s": seconds, "first_peak_gb": self.peak(),
               "graphs": graphs_compiled(), **held_in(cache)}  # fmt: skip
        if args.process == "warm compile cache":
            return
        del cache  # and none of a later call is kept: its buffers would not be free for the next
        seconds, times = self.generate(inputs)[:2]
        steps = [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]
        yield {"next_token_s": times[0], "step_ms": statistics.median(steps), "worst_step_ms": max(steps)}
        self.reset_peak()
        seconds = self.generate(inputs, stamped=False)[0]
        yield {"generate_s": seconds, "tokens_per_s": args.batch * args.tokens_out / seconds, "peak_gb": self.peak(),
               "graphs": graphs_compiled(), **self.captures()}  # fmt: skip
        if args.second_batch:
            seconds, times = self.generate(self.prompt(args.second_batch))[:2]
            yield {"second_batch": args.second_batch, "second_batch_first_token_s": times[0],
                   "second_batch_generate_s": seconds, "graphs_after": graphs_compiled()}  # fmt: skip

    def captures(self) -> dict:
        if self.peer != "akvq":
            return {}
        report = akvq_fx.report(self.model)
        of = [graph.capture for graph in report.graphs if graph.capture is not None]
        total = lambda name: sum(getattr(capture, name) for capture in of)
        return {
            **({name: total(name) for name in ("captured", "replayed", "ran", "dropped")} if of else {}),
            "no_capture": sorted({capture.reason for capture in of if capture.reason}),
            "refused": sorted({row.reason for row in report.refused}),
            "gave_up": [str(one) for one in report.gave_up],
        }


def graphs_compiled() -> int:
    """Graphs that dynamo has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def held_in(cache) -> dict:
    stats = akvq_fx.cache_stats(cache)
    return {
        "cache_gb": (stats.packed_bytes + stats.plain_bytes) / GB,
        "packed": stats.packed_tensors,
        "plain": stats.plain_tensors,
        "bits": stats.bits_per_element,
    }


def measure(args) -> None:
    """One peer in this process; what it shows goes to args.rows after every call."""
    begin = time.perf_counter()
    whole = dict(model=args.model, layers=args.layers or "all", batch=args.batch, images=args.images, prompt_tokens=0,
                 tokens_out=args.tokens_out, peer=args.peer, process=args.process,
                 machine=machine(torch.device(args.device)))  # fmt: skip
    try:
        run = Run(args, args.peer)
        whole["prompt_tokens"] = run.prompt(1)["input_ids"].shape[1]
        for facts in run.facts():
            whole.update(facts, process_s=time.perf_counter() - begin)
            told = ", ".join(f"{name} {shown(x)}" for name, x in facts.items() if x not in (None, "", [], 0))
            print(f"[{whole['process_s']:.0f} s] {args.model} {args.peer} {args.process}: {told}", flush=True)
            write(args.rows, whole)
    except Exception as error:
        write(args.rows, {**whole, "error": reason_of(error)})
        raise


def write(path: str, row: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def run_all(args) -> list[dict]:
    """Each peer in processes of its own, one after another; the rows that they wrote."""
    for peer in args.peers:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            places = {name: str(Path(folder, name.lower())) for name in CACHE_FOLDERS}
            processes = ["cold"] + ["warm compile cache"] * (args.again and peer not in UNCOMPILED)
            for process in processes:
                command = [sys.executable, __file__, *args.given, "--rows", args.rows, "--here", peer, process]
                subprocess.run(command, env={**os.environ, **places}, check=False)
    return read([args.rows])


def read(paths: list[str]) -> list[dict]:
    """Rows of the files; of lines about the same call only the last, which knows most."""
    lines = [json.loads(line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return list({tuple(row[name] for name in (*WHAT, "machine")): row for row in lines}.values())


COLUMNS = ["model", "peer", "batch", "prompt", "first token s: cold", "warm compile cache", "warm process",
           "first generate s: cold", "warm compile cache ", "tokens/s", "ms a step", "worst step ms",
           "peak above weights GB", "cache GB", "CUDA graphs", "another batch: first generate s", "note"]  # fmt: skip


def tables(rows: list[dict]) -> list[Table]:
    """One table for each machine; a row for each peer, its two processes joined."""
    found: dict[str, Table] = {}
    joined: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (row["machine"], *(row[name] for name in WHAT if name not in ("process", "prompt_tokens")))
        joined.setdefault(key, {})[row["process"]] = row
    for key, processes in joined.items():
        table = found.setdefault(key[0], Table(f"speed/generate.py: {key[0]}", COLUMNS))
        table.rows.append(cells(processes.get("cold", {}), processes.get("warm compile cache", {})))
    return list(found.values())


def cells(cold: dict, warm: dict) -> list[str]:
    some = cold or warm
    cut = "" if some["layers"] == "all" else f", {some['layers']} layers"
    of = lambda row, name: shown(row.get(name))
    captures = f"{cold['captured']}: {cold['replayed']} steps replayed, {cold['ran']} not" if "captured" in cold else ""
    another = f"{of(cold, 'second_batch_generate_s')} (batch {cold['second_batch']})" if "second_batch" in cold else ""
    packed = f"{some['packed']} of {some['packed'] + some['plain']} tensors packed" if some.get("packed") else ""
    reasons = [*cold.get("no_capture", ()), *cold.get("refused", ()), *cold.get("gave_up", ())]
    graphs = f"graphs compiled: {cold['graphs']}" if cold.get("graphs") else ""
    if cold.get("graphs_after", 0) > cold.get("graphs", 0):
        graphs += f", {cold['graphs_after']} after the other batch"
    note = "; ".join(filter(None, [packed, graphs, *reasons, cold.get("error", ""), warm.get("error", "")]))
    return [
        some.get("title", some["model"]) + cut, PEERS[some["peer"]], str(some["batch"]),
        f"{some['prompt_tokens']} tokens, {some['images']} images; {some['tokens_out']} out",
        of(cold, "first_token_s"), of(warm, "first_token_s"), of(cold, "next_token_s"),
        of(cold, "first_generate_s"), of(warm, "first_generate_s"), of(cold, "tokens_per_s"), of(cold, "step_ms"),
        of(cold, "worst_step_ms"), of(cold, "peak_gb"), of(some, "cache_gb"), captures, another, note,
    ]  # fmt: skip


def shown(x) -> str:
    """Three digits after the point of small numbers, fewer of large ones; "" of None."""
    if x is None:
        return ""
    if isinstance(x, float):
        return f"{x:.3f}" if abs(x) < 1 else f"{x:.2f}" if abs(x) < 100 else f"{x:.1f}"
    return str(x)


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-1.5-7b", choices=tuple(MODELS))
    parser.add_argument("--peer", default="dynamic,static,akvq", help=f"comma-separated, of {', '.join(PEERS)}")
    parser.add_argument("--layers", type=int, help="fewer layers of the language model; Gemma's: a multiple of six")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--second-batch", type=int, default=4, help="a batch to generate once at the end, 0 for none")
    parser.add_argument("--images", type=int, default=1, help="of each row")
    parser.add_argument("--text", type=int, default=64, help="random tokens after the images")
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--again", action="store_true", help="a second process with the first one's compile cache")
    parser.add_argument("--inner", help="akvq's option of that name: inductor where not given")
    parser.add_argument("--options", type=json.loads, default={}, help="akvq's options, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that the script runs")
    parser.add_argument("--rows", metavar="FILE", help="JSON lines are added there")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there too")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="only print the table of these files of JSON lines")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)  # a peer and the state of its compile cache
    args = parser.parse_args(given)
    if args.here:
        args.peer, args.process = args.here
        measure(args)
        return
    args.given, args.peers = given, peers_asked_for(parser, args.peer, PEERS)
    if not args.rows:
        args.rows = str(Path(tempfile.mkdtemp(), "rows.jsonl"))
    rows = read(args.table) if args.table else run_all(args)
    text = "\n\n".join(table.markdown() for table in tables(rows)) + "\n"
    print("\n" + text, flush=True)
    if args.markdown:
        Path(args.markdown).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
