"""Whole decoders: akvq beside transformers' own caches on the same weights, in one process.

    python benchmarks/speed/end_to_end.py --do speed,equal-batch,largest-batch,cache-bytes
        [--shape llava-1.5-7b] [--layers N] [--contestants static,akvq-graphs,...]
        [--budget-gb 24,63] [--tokens-in 512,4096] [--markdown FILE]
    python benchmarks/speed/end_to_end.py --device cpu --small

speed          B=1, 512 tokens in, 128 out           equal-batch  B=40, the same: peak memory above the weights
largest-batch  the largest batch whose weights, cache and activations fit a budget, and its speed there
cache-bytes    bytes of a cache of 4096 tokens, as the cost model computes and as allocated, with and without images

The first WARM of the tokens out compile and warm up; the rest are timed apart from the prompt. Memory is what PyTorch's
allocator hands out; a budget is held by torch.cuda.set_per_process_memory_fraction. GB is 1e9 bytes. In largest-batch a
prompt is taken a few rows at a time (--rows) by all contestants, so that activations do not decide; elsewhere it is
taken whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time

import torch
import torch._dynamo.utils
from cache_sizes import cache_sizes
from contestants import CONTESTANTS, Contestant, cache_bytes
from decoders import SHAPES, Decoder, build
from timing import Budget, Table, attempt, finish, standard_arguments, wait

WARM = 8  # decode steps that are not timed
GB = 1e9
RESERVE = 0.01  # share of a memory budget that probing leaves to graphs and workspaces of the decode step
MARGIN = 0.05  # a batch larger by this share must not fit
PROBES = 14  # attempts to find the largest batch
PART_TOKENS = 2048  # tokens of a prompt taken at a time in largest-batch: enough to fill the chip
EAGER_PEERS = ("dynamic", "hqq2", "hqq4", "quanto2", "quanto4")
DEFAULTS = {
    "speed": ("static", "akvq-graphs", "akvq-static", "akvq", *EAGER_PEERS),
    "equal-batch": ("static", "akvq-graphs", "dynamic", "hqq2"),
    "largest-batch": ("static", "akvq-graphs"),
}


class Meter:
    """Device memory above the weights, and a limit on all of it. On a CPU only the cache is held against the limit."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.limit_bytes = decoder, None
        self.cuda = decoder.device.type == "cuda"

    def limit(self, count: float | None) -> None:
        self.limit_bytes = count
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(self.decoder.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(count / total, 1.0) if count else 1.0)

    def start(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self, cache) -> int:
        """Most bytes above the weights since `start`."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.decoder.weight_bytes
        size = cache_bytes(cache)
        if self.limit_bytes and size + self.decoder.weight_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError
        return size


@dataclasses.dataclass
class Result:
    batch: int
    prefill: float  # seconds
    compiling: float  # seconds of the first part of a prompt and the first WARM steps
    tokens_per_second: float
    step: float  # median seconds
    peak: int
    cache: int
    note: str


def run(contestant: Contestant, ids, tokens_out: int, rows: int, meter: Meter) -> Result:
    """Prompt, then tokens_out greedy tokens a row."""
    batch, capacity, device = len(ids), ids.shape[1] + tokens_out, ids.device
    compiled_before = graphs_compiled()
    wait(device)
    begin = time.perf_counter()
    contestant.prefill(ids[:rows], capacity, rows)
    wait(device)
    compiling = time.perf_counter() - begin
    meter.start()
    begin = time.perf_counter()
    logits, cache = contestant.prefill(ids, capacity, rows)
    wait(device)
    prefill = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(WARM):
        logits, cache = contestant.step(logits.argmax(-1, keepdim=True), cache)
    wait(device)
    compiling += time.perf_counter() - begin
    steps, marks = tokens_out - 1 - WARM, []
    begin = time.perf_counter()
    for _ in range(steps):
        logits, cache = contestant.step(logits.argmax(-1, keepdim=True), cache)
        marks.append(mark(device))
    wait(device)
    seconds = time.perf_counter() - begin
    assert logits.isfinite().all(), "logits are not finite"
    gaps = [between(a, b) for a, b in zip(marks, marks[1:], strict=False)]
    result = Result(batch, prefill, compiling, batch * steps / seconds, statistics.median(gaps), 0, 0, "")
    result.peak, result.cache = meter.peak(cache), cache_bytes(cache)
    graphs = graphs_compiled() - compiled_before
    result.note = "; ".join(filter(None, (contestant.check(cache), f"graphs compiled: {graphs}" if graphs else "")))
    return result


def graphs_compiled() -> int:
    """Graphs that dynamo has made; more than one for prompts and one for each form of step means recompilation."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def mark(device: torch.device):
    """A point in time on the device, taken without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(a, b) -> float:
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3


COLUMNS = ["cache", "batch", "prompt s", "tokens/s", "/ StaticCache", "ms a step", "peak above weights GB",
           "StaticCache /", "cache GB", "compiling s", "note"]  # fmt: skip


def add_row(table: Table, title: str, result: Result | None, base: Result | None, reason: str, extra: str = "") -> None:
    if result is None:
        table.add(title, *[""] * (len(COLUMNS) - 2), reason)
        return
    ratio = f"{result.tokens_per_second / base.tokens_per_second:.2f}" if base else ""
    less = f"{base.peak / result.peak:.2f}" if base and result.peak > 0 else ""
    notes = "; ".join(filter(None, (result.note, extra)))
    times = f" ({result.batch / base.batch:.2f} times)" if base and result.batch != base.batch else ""
    table.add(
        title,
        f"{result.batch}{times}",
        f"{result.prefill:.3f}",
        f"{result.tokens_per_second:.1f}",
        ratio,
        f"{1e3 * result.step:.2f}",
        f"{result.peak / GB:.3f}",
        less,
        f"{result.cache / GB:.3f}",
        f"{result.compiling:.0f}",
        notes,
    )


def with_contestant(args, decoder: Decoder, name: str, work):
    """(result of work(contestant), reason where it failed); the contestant is made before and closed after."""
    holder: list[Contestant] = []

    def whole():
        holder.append(CONTESTANTS[name](decoder, args.compiler))
        return work(holder[0])

    result = attempt(args.budget, whole)
    for contestant in holder:
        contestant.close()
    return result


def fixed_batch(args, decoder: Decoder, what: str, batch: int, tokens: int, names) -> Table:
    title = f"{what}: {described(decoder)}, B={batch}, {tokens} tokens in, {args.tokens_out} out"
    table, meter, base = Table(title, COLUMNS), Meter(decoder), None
    ids = decoder.prompt(batch, tokens)
    for name in names:
        work = lambda contestant: run(contestant, ids, args.tokens_out, batch, meter)
        result, reason = with_contestant(args, decoder, name, work)
        base = result if name == "static" else base
        add_row(table, CONTESTANTS[name].title, result, base, reason)
    return table


def largest_batch(args, decoder: Decoder, budget: float, tokens: int, names) -> Table:
    title = f"largest-batch: {described(decoder)}, {budget / GB:g} GB in all, {tokens} tokens in, {args.tokens_out} out"
    table, meter = Table(title, COLUMNS), Meter(decoder)
    rows = args.rows or max(1, PART_TOKENS // tokens)
    base = None
    for name in names:
        meter.limit(budget)

        def work(contestant):
            batch, failed = search(args, contestant, decoder, meter, budget, tokens, rows)
            for _ in range(3):
                try:
                    return run(contestant, decoder.prompt(batch, tokens), args.tokens_out, rows, meter), failed
                except torch.OutOfMemoryError:
                    failed, granule = batch, rows if contestant.whole_rows else 1
                batch = max(min(int(batch * (1 - MARGIN / 2)), batch - granule) // granule * granule, granule)
            raise torch.OutOfMemoryError

        found, reason = with_contestant(args, decoder, name, work)
        meter.limit(None)
        result, failed = found or (None, 0)
        base = result if name == "static" else base
        add_row(
            table,
            CONTESTANTS[name].title,
            result,
            base,
            reason,
            f"{failed} do not fit" if failed else "not the largest: nothing failed" if found else "",
        )
    return table


def search(args, contestant: Contestant, decoder: Decoder, meter: Meter, budget: float, tokens: int, rows: int):
    """(largest batch that fits, smallest seen not to fit or None): doubled until one fails, then halved between."""
    granule, capacity = rows if contestant.whole_rows else 1, tokens + args.tokens_out

    def fits(batch: int) -> bool:
        cache = None
        meter.start()
        try:
            spare = torch.empty(int(RESERVE * budget), dtype=torch.uint8, device=decoder.device)
            cache = contestant.probe(decoder.prompt(batch, tokens), capacity, rows)
            meter.peak(cache)
            del spare
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            print(f"  {contestant.title}: {batch} rows probed, {args.budget.left():.0f} s left", flush=True)

    best, failed = 0, None
    batch = 3 * granule
    for _ in range(PROBES):
        if fits(batch):
            best = batch
        else:
            failed = batch
        if failed is not None and failed - best <= max(granule, int(MARGIN * failed)):
            break
        batch = 2 * best if failed is None else (best + failed) // 2 // granule * granule
        batch = max(batch, granule)
    if not best:
        raise torch.OutOfMemoryError
    return best, failed


def described(decoder: Decoder) -> str:
    cut = f" cut to {decoder.layers} layers" if decoder.layers != decoder.shape.layers else ""
    return f"{decoder.shape.title}{cut} (weights {decoder.weight_bytes / GB:.2f} GB)"


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    standard_arguments(parser)
    parser.add_argument(
        "--do", default="speed,equal-batch,largest-batch,cache-bytes", help="comma-separated, in this order"
    )
    parser.add_argument("--shape", default=None, choices=tuple(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument(
        "--contestants", type=lambda t: t.split(","), help=f"of {', '.join(CONTESTANTS)}; StaticCache first"
    )
    parser.add_argument("--batch", type=int, help="batch of speed and equal-batch")
    parser.add_argument("--tokens-in", type=numbers, help="prompt tokens; several for largest-batch")
    parser.add_argument("--tokens-out", type=int)
    parser.add_argument("--budget-gb", type=numbers, help="of largest-batch, 1e9 bytes")
    parser.add_argument("--rows", type=int, help="prompt rows taken at a time in largest-batch")
    parser.add_argument(
        "--compiler", help="inductor, aot_eager or eager: of akvq's graphs and of the compiled StaticCache"
    )
    args = parser.parse_args()
    small = args.small
    args.budget = Budget(args.seconds)
    args.compiler = args.compiler or ("eager" if small else "inductor")
    args.tokens_in = [int(t) for t in args.tokens_in or ([160] if small else [512])]
    args.tokens_out = args.tokens_out or (16 if small else 128)
    args.budget_gb = args.budget_gb or ([2e-3] if small else [24])
    device = torch.device(args.device)
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
        tables = run_all(args, device)
    finish(tables, device, args.markdown)


def run_all(args, device: torch.device) -> list[Table]:
    """Every wanted table; batches differ between runs of one process, and a symbolic batch would not be packed."""
    shape = SHAPES[args.shape or ("tiny" if args.small else "llava-1.5-7b")]
    decoder = build(shape, args.layers, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    print(f"{described(decoder)} built, {args.budget.left():.0f} s left", flush=True)
    tables: list[Table] = []
    for what in args.do.split(","):
        names = args.contestants or DEFAULTS.get(what, ())
        if what in ("speed", "equal-batch"):
            batch = args.batch or (1 if what == "speed" else 2 if args.small else 40)
            tables.append(fixed_batch(args, decoder, what, batch, args.tokens_in[0], names))
        elif what == "largest-batch":
            for gb in args.budget_gb:
                for tokens in args.tokens_in:
                    tables.append(largest_batch(args, decoder, gb * GB, tokens, names))
        elif what == "cache-bytes":
            table, reason = attempt(args.budget, cache_sizes, decoder, 256 if args.small else 4096)
            tables += [table] if table else []
            if reason:
                print(f"cache-bytes: {reason}", flush=True)
        else:
            raise ValueError(f"--do: {what!r} is not known, accepted: {', '.join(DEFAULTS)}, cache-bytes")
    return tables


if __name__ == "__main__":
    main()
