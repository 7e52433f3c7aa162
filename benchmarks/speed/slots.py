"""Requests that come and go: completed a minute in a memory budget, `akvq_fx.Slots` beside 16-bit static rows.

    python benchmarks/speed/slots.py --budget-gb 24,63 --seconds 220 --rows slots.jsonl
    python benchmarks/speed/slots.py --table slots.jsonl [--markdown FILE]
    python benchmarks/speed/slots.py --tiny --device cpu --inner eager

LLaVA-1.5-7B's width with random bf16 weights. Prompts of 1, 2, 4 or 8 images arrive as a Poisson process of --rate a
minute, the same ones for every peer, and are answered with 16 to 512 tokens, greedily. A loop admits the oldest one
that waits where a row is free, one before each step, and decodes a token of every row. Each peer and budget runs in a
process of its own, with the memory held by torch.cuda.set_per_process_memory_fraction; GB is 1e9 bytes, weights
included.

A peer has as many rows as its budget holds, found beforehand: what the largest prompt takes while it runs, and what a
full row takes, are measured with one row, and --spare is left for CUDA graphs and fragments. Where memory runs out all
the same it begins anew with fewer. --seconds bound a process, building and compiling included. What is counted begins
when all rows have been in use and a first round of requests has ended. At a rate above what a peer can serve, requests
wait in a queue that grows: "first token" is then told from admission too. Lines of JSON go to --rows as they come.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from slot_peers import PEERS
from timing import Table, machine, peers_asked_for, reason_of, wait
from vision_models import build, prompt

GB = 1e9
TEXT, OUT, OUT_TINY = (16, 64), (16, 512), (4, 12)  # least and most tokens of a request
WHAT = ("peer", "budget_gb", "layers", "rate", "tiny", "machine")  # names a run


@dataclasses.dataclass
class Asked:
    """A request of the benchmark; times are those of time.perf_counter, None before."""

    images: int
    text: int
    out: int
    due: float = 0.0  # when it arrived
    admitted: float | None = None
    tokens: list[float] = dataclasses.field(default_factory=list)  # when each was there


class Loop:
    """Admits requests to one peer's rows and decodes. At first rows are filled as soon as they are free, which
    compiles; from `begun` on requests arrive at a rate of a minute."""

    def __init__(self, run: Run, peer, rate: float, seed: int = 0):
        self.run, self.peer, self.rate, self.draw = run, peer, rate, random.Random(seed)
        self.queue: collections.deque[Asked] = collections.deque()
        self.running: dict = {}
        self.ended: list[Asked] = []
        self.busy: list[int] = []  # rows in use in each step, since `begun`
        self.begun: float | None = None
        self.unseen = list(run.args.images)  # each number of images once, as another one is another graph
        self.coming = self.another()

    def another(self, due: float = 0.0) -> Asked:
        images = self.unseen.pop() if self.unseen else self.draw.choice(self.run.args.images)
        return Asked(images, self.draw.randint(*TEXT), self.draw.randint(*self.run.out), due)

    def begin(self) -> None:
        self.begun = time.perf_counter()
        self.coming.due = self.begun + self.draw.expovariate(self.rate / 60)

    def arrive(self) -> None:
        """Those that are due now wait; before `begun` always one."""
        if self.begun is None:
            if not self.queue:
                self.queue.append(self.coming)
                self.coming = self.another()
            return
        while self.coming.due <= time.perf_counter():
            self.queue.append(self.coming)
            self.coming = self.another(self.coming.due + self.draw.expovariate(self.rate / 60))

    def turn(self) -> None:
        self.arrive()
        if self.queue and len(self.running) < self.peer.rows:
            asked = self.queue.popleft()
            asked.admitted = time.perf_counter()
            self.running[self.peer.insert(self.run.inputs(asked.images, asked.text), asked.out)] = asked
            self.note()
        if self.running:
            if self.begun is not None:
                self.busy.append(len(self.running))
            self.peer.step()
            self.note()
        else:
            time.sleep(0.001)

    def note(self) -> None:
        """Stamp tokens that came, and let requests go that have all of theirs."""
        now = time.perf_counter()
        for handle, asked in list(self.running.items()):
            asked.tokens += [now] * (len(handle.tokens) - len(asked.tokens))
            if handle.done:
                if handle.state != "ended" or len(asked.tokens) != asked.out:
                    raise RuntimeError(f"a request ended as {handle.state} ({handle.error}) after {len(asked.tokens)}")
                self.ended.append(asked)
                del self.running[handle]

    def go(self, until: float, most: int) -> None:
        """Run until a time, or until so many requests have ended since `begun` (0: no matter how many)."""
        while time.perf_counter() < until:
            self.turn()
            if self.begun is None and len(self.ended) >= max(self.peer.rows, len(self.run.args.images)):
                self.begin()
            elif most and self.begun is not None and len(self.counted()) >= most:
                return

    def counted(self) -> list[Asked]:
        return [asked for asked in self.ended if self.begun is not None and asked.tokens[-1] >= self.begun]


class Run:
    """One peer with one budget in this process."""

    def __init__(self, args, began: float):
        self.args, self.began, self.device = args, began, torch.device(args.device, 0)
        self.out = OUT_TINY if args.tiny else OUT
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.budget * GB / total), self.device)
        self.model, self.image = build("llava-1.5-7b", args.layers, args.tiny, self.device)
        self.weights = sum(p.nbytes for p in self.model.parameters())
        self.longest = self.inputs(max(args.images), TEXT[1])["input_ids"].shape[1] + self.out[1]

    def inputs(self, images: int, text: int) -> dict:
        vocab = self.model.config.get_text_config().vocab_size
        return prompt(self.image, 1, images, text, vocab, self.device, self.model.dtype)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.cuda else 0

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def rows_that_fit(self, kind) -> tuple[int, dict]:
        """As many rows as the budget holds, and how that was found."""
        peer = kind(self.model, 1, self.longest, self.args.inner, self.args.options)
        taken = self.inputs(max(self.args.images), TEXT[1])
        self.free()
        before = self.allocated()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        peer.insert(taken, 2)
        peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else 0
        row = peer.row_bytes()
        peer.close()
        del peer, taken
        self.free()
        prompt_bytes = max(0, peak - before)  # all of a prompt's, its own cache included
        room = self.args.budget * GB - self.weights - prompt_bytes - self.args.spare * GB
        rows = self.args.slots or (max(0, int(room / row)) if self.cuda else 3)
        return rows, {"row_gb": row / GB, "prompt_gb": prompt_bytes / GB, "longest": self.longest}

    def facts(self):
        """Yields what is known, as it is known."""
        args, kind = self.args, PEERS[self.args.peer]
        yield {"weights_gb": self.weights / GB}
        rows, found = self.rows_that_fit(kind)
        yield {"slots": rows, "ready_s": time.perf_counter() - self.began, **found}
        tried = []
        while rows:
            tried.append(rows)
            peer = kind(self.model, rows, self.longest, args.inner, args.options)
            loop = Loop(self, peer, args.rate)
            try:
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats(self.device)
                loop.go(self.began + args.seconds, args.requests)
                peak = (torch.cuda.max_memory_allocated(self.device) - self.weights) / GB if self.cuda else None
                yield {"slots": rows, "tried": tried, "peak_gb": peak, **peer.facts(), **seen(loop)}
                return
            except torch.OutOfMemoryError:
                rows = int(0.85 * rows)
            peer.close()
            del peer, loop
            self.free()
        raise torch.OutOfMemoryError(f"no row fits {args.budget} GB")


def seen(loop: Loop) -> dict:
    """What the loop showed since requests arrive."""
    begin, end = loop.begun, time.perf_counter()
    if begin is None:
        return {"error": "not run: the time ended before each row had been used once"}
    everyone = [*loop.ended, *loop.running.values()]
    first = [asked for asked in everyone if asked.due and asked.tokens]
    gaps = [1e3 * (b - a) for asked in everyone for a, b in zip(asked.tokens, asked.tokens[1:], strict=False)
            if a >= begin]  # fmt: skip
    return {
        "counted_s": end - begin,
        "ended": len(loop.counted()),
        "requests_per_minute": 60 * len(loop.counted()) / (end - begin),
        "tokens_per_s": sum(t >= begin for asked in everyone for t in asked.tokens) / (end - begin),
        "busy": statistics.mean(loop.busy) if loop.busy else 0.0,
        "waiting": len(loop.queue),
        **quantiles("first_from_arrival_s", [asked.tokens[0] - asked.due for asked in first]),
        **quantiles("first_from_admission_s", [asked.tokens[0] - asked.admitted for asked in first]),
        **quantiles("between_ms", gaps),
    }


def quantiles(name: str, values: list[float]) -> dict:
    """The middle and the 95th percentile, by name."""
    if not values:
        return {}
    ordered = sorted(values)
    return {f"{name}_p50": statistics.median(ordered), f"{name}_p95": ordered[math.ceil(0.95 * len(ordered)) - 1]}


def measure(args) -> None:
    """One peer and budget in this process; what it shows goes to args.rows."""
    began = time.perf_counter()
    whole = dict(peer=args.peer, budget_gb=args.budget, layers=args.layers or "all", rate=args.rate, tiny=args.tiny,
                 machine=machine(torch.device(args.device)))  # fmt: skip
    try:
        for facts in Run(args, began).facts():
            whole.update(facts, process_s=time.perf_counter() - began)
            print(f"[{whole['process_s']:.0f} s] {args.peer}, {args.budget:g} GB: {shown(facts)}", flush=True)
            write(args.rows, whole)
        wait(torch.device(args.device))
    except Exception as error:
        write(args.rows, {**whole, "error": reason_of(error)})
        raise


def shown(facts: dict) -> str:
    return ", ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in facts.items())


def write(path: str, row: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(paths: list[str]) -> list[dict]:
    """Rows of the files; of lines about the same run only the last, which knows most."""
    lines = [json.loads(line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return list({tuple(row[name] for name in WHAT): row for row in lines}.values())


COLUMNS = ["budget GB", "cache", "rows", "requests a minute", "of 16 bits", "tokens/s", "ms between tokens: p50", "p95",
           "first token s, from admission: p50", "p95 ", "from arrival: p50", "p95  ", "rows in use",
           "peak above weights GB", "note"]  # fmt: skip


def tables(rows: list[dict]) -> list[Table]:
    found: dict[str, Table] = {}
    for row in sorted(rows, key=lambda row: (row["budget_gb"], row["peer"] != "static")):
        sizes = "tiny" if row["tiny"] else f"{row['layers']} layers"
        title = f"speed/slots.py: {sizes}, {row['rate']:g} requests a minute offered; {row['machine']}"
        table = found.setdefault(title, Table(title, COLUMNS))
        same = [x for x in rows if x["peer"] == "static" and all(x[name] == row[name] for name in WHAT[1:])]
        base = same[0].get("requests_per_minute") if same else None
        mine = row.get("requests_per_minute")
        of = lambda name, row=row: "" if row.get(name) is None else f"{row[name]:.3g}"
        note = (
            [f"{row['ended']} ended in {row['counted_s']:.0f} s, {row['waiting']} wait"] if "counted_s" in row else []
        )
        note += [x for x in (row.get("note", ""), row.get("error", "")) if x]
        if len(row.get("tried", ())) > 1:
            note.append(f"out of memory with {', '.join(map(str, row['tried'][:-1]))} rows")
        table.rows.append([
            f"{row['budget_gb']:g}", PEERS[row["peer"]].title, str(row.get("slots", "")), of("requests_per_minute"),
            f"{mine / base:.2f}" if mine and base and row["peer"] != "static" else "", of("tokens_per_s"),
            of("between_ms_p50"), of("between_ms_p95"), of("first_from_admission_s_p50"),
            of("first_from_admission_s_p95"), of("first_from_arrival_s_p50"), of("first_from_arrival_s_p95"),
            of("busy"), of("peak_gb"), "; ".join(note),
        ])  # fmt: skip
    return list(found.values())


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="static,akvq", help=f"comma-separated, of {', '.join(PEERS)}")
    parser.add_argument("--budget-gb", default="24", help="comma-separated, weights included")
    numbers = lambda text: [int(x) for x in text.split(",")]
    parser.add_argument("--images", type=numbers, default=[1, 2, 4, 8],
                        help="of a prompt; some versions of transformers make a graph for each number")  # fmt: skip
    parser.add_argument("--rate", type=float, default=600.0, help="requests a minute that arrive")
    parser.add_argument("--seconds", type=float, default=220.0, help="of each process, all included")
    parser.add_argument("--requests", type=int, default=0, help="end when so many were counted, in place of the time")
    parser.add_argument("--slots", type=int, default=0, help="rows, in place of as many as fit")
    parser.add_argument("--spare", type=float, default=0.7, help="GB left for CUDA graphs and fragments")
    parser.add_argument("--layers", type=int, help="fewer layers of the language model")
    parser.add_argument("--inner", help="compiler of decode steps: inductor where not given")
    parser.add_argument("--options", type=json.loads, default={}, help="akvq's options, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that the script runs")
    parser.add_argument("--rows", metavar="FILE", help="JSON lines are added there")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there too")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="only print the table of these files of JSON lines")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)  # a peer and a budget
    args = parser.parse_args(given)
    if args.here:
        args.peer, args.budget = args.here[0], float(args.here[1])
        measure(args)
        return
    peers = peers_asked_for(parser, args.peer, PEERS)
    if not args.rows:
        args.rows = str(Path(tempfile.mkdtemp(), "rows.jsonl"))
    if not args.table:
        for budget in args.budget_gb.split(","):
            for peer in peers:
                command = [sys.executable, __file__, *given, "--rows", args.rows, "--here", peer, budget]
                subprocess.run(command, env=dict(os.environ), check=False)
    text = "\n\n".join(table.markdown() for table in tables(read(args.table or [args.rows]))) + "\n"
    print("\n" + text, flush=True)
    if args.markdown:
        Path(args.markdown).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
