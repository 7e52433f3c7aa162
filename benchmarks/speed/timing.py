"""Shared by the benchmarks: how a call is timed, what the machine is, how a table is kept, when a run ends.

A CUDA call is timed as replays of one CUDA graph that holds many launches, between events, over input sets that
together exceed the L2 cache several times, so that every launch reads device memory. What cannot be captured is
launched one by one and the cell says so. CPU calls alternate, so that other load on the machine affects all of them
alike. All figures are medians. No figure is meant to be compared between runs: the ratios of one run are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

L2_TIMES = 4  # input sets together are this many times the L2 cache
L2_FALLBACK = 60 << 20  # bytes: an H200's, the larger of the two Hopper parts
GRAPH_SECONDS = 3e-3  # one graph holds about this much work, so that an event's microsecond does not count
GRAPH_CALLS = 400  # and no more launches than this
MIN_REPLAYS, MAX_REPLAYS = 7, 60
COPY_BYTES = 2 << 30  # size of the copy that measures bandwidth
SM_CLOCK = 1.98e9  # Hz, a Hopper SXM part's highest, where the driver does not report it
LANES = 128  # fp32 lanes of a multiprocessor (compute capability 8.9 and 9.0)


class OutOfTime(BaseException):
    """The time budget ended; no library's `except Exception` may swallow it."""


class Budget:
    """Seconds that a script may take. Inside `guard()` the deadline interrupts whatever Python code runs."""

    def __init__(self, seconds: float):
        self.begin, self.seconds = time.monotonic(), seconds

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        def stop(*_):
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3))
        try:
            yield
        finally:
            signal.signal(signal.SIGALRM, before)
            nested = callable(before)  # inside another guard, which continues
            signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3) if nested else 0)


@dataclasses.dataclass
class Timing:
    """Median seconds of one call; spread: quartile distance over median; how: "graph", "launches" or "cpu"."""

    seconds: float
    spread: float
    how: str

    @property
    def micros(self) -> float:
        return 1e6 * self.seconds

    def __str__(self) -> str:
        text = f"{self.micros:.1f}" if self.micros < 1e5 else f"{self.micros:.0f}"
        return text + (" (launched, no graph)" if self.how == "launches" else "")


def timing_of(samples: list[float], how: str) -> Timing:
    middle = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (middle, middle, middle)
    return Timing(middle, (high - low) / middle if middle else 0.0, how)


def reason_of(error: BaseException) -> str:
    """One short line for a table's cell."""
    if isinstance(error, OutOfTime):
        return "not run: the time budget ended"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    own = [line for line in lines if "raised:" not in line and not line.startswith("The above")]
    return f"{type(error).__name__}: {(own or lines)[0][:110]}"


def attempt(budget: Budget, work: Callable, *args):
    """(result, "") or (None, reason): one failing peer leaves the others alone."""
    if budget.left() <= 0:
        return None, reason_of(OutOfTime())
    try:
        with budget.guard():
            return work(*args), ""
    except (Exception, OutOfTime) as error:
        if not isinstance(error, (OutOfTime, torch.OutOfMemoryError)):
            traceback.print_exc(limit=-4)  # the table's cell holds only one line of it
        return None, reason_of(error)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or L2_FALLBACK


def sets_needed(bytes_of_one: int, device: torch.device) -> int:
    """Number of input sets to cycle through: several times the L2 cache, and at least two."""
    return max(2, math.ceil(L2_TIMES * l2_bytes(device) / max(bytes_of_one, 1))) if device.type == "cuda" else 1


def clones(tensors: list[Tensor], count: int) -> list[list[Tensor]]:
    """`count` sets of the same tensors at addresses of their own; the first is the given one."""
    return [tensors, *([t.clone() for t in tensors] for _ in range(count - 1))]


def measure(calls: list[Callable], device: torch.device, seconds: float = 0.25) -> Timing:
    """Median seconds of one call; `calls` do the same on different input sets."""
    if device.type != "cuda":
        return measure_in_turns({"": calls}, seconds)[""]
    for call in calls:
        call()
    wait(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    wait(device)
    rough = max(start.elapsed_time(end) / 1e3 / len(calls), 1e-6)  # host time too where launches are slow
    rounds = max(1, min(math.ceil(GRAPH_SECONDS / rough), GRAPH_CALLS) // len(calls))
    launch_all = lambda: [call() for _ in range(rounds) for call in calls] and None
    graph, how = capture(launch_all), "graph"
    if graph is None:
        how = "launches"
    run = launch_all if graph is None else graph.replay
    run()
    samples, begin = [], time.monotonic()
    while len(samples) < MIN_REPLAYS or (time.monotonic() - begin < seconds and len(samples) < MAX_REPLAYS):
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3 / (rounds * len(calls)))
        if time.monotonic() - begin > 8 * seconds:
            break
    if graph is not None:
        graph.reset()
    return timing_of(samples, how)


def capture(work: Callable):
    """A CUDA graph of the work, or None where it cannot be captured (it waits for the device)."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def measure_in_turns(named: dict[str, list[Callable]], seconds: float) -> dict[str, Timing]:
    """CPU: every contestant in turn, round after round, `seconds` for all of them together."""
    for calls in named.values():
        calls[0]()
    samples: dict[str, list[float]] = {name: [] for name in named}
    begin, rounds = time.monotonic(), 0
    while rounds < 3 or (time.monotonic() - begin < seconds and rounds < MAX_REPLAYS):
        for name, calls in named.items():
            call = calls[rounds % len(calls)]
            before = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - before)
        rounds += 1
    return {name: timing_of(values, "cpu") for name, values in samples.items()}


def copy_bandwidth(device: torch.device, size: int = COPY_BYTES) -> float:
    """Bytes a second of a large device-to-device copy, bytes read plus bytes written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = measure([lambda: target.copy_(source)], device, 0.1)
    return 2 * size / timing.seconds


def lane_rate(device: torch.device) -> float:
    """32-bit lane operations a second, all multiprocessors together at the driver's highest clock."""
    import triton

    units = torch.cuda.get_device_properties(device).multi_processor_count
    clock = triton.runtime.driver.active.utils.get_device_properties(device.index or 0).get("sm_clock_rate", 0)  # kHz
    return units * LANES * (1e3 * clock if clock else SM_CLOCK)


def kernel_names(call: Callable) -> list[str]:
    """CUDA kernels that one call launches, as the profiler names them."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [event.key for event in seen.key_averages() for _ in range(event.count) if event.device_type.name == "CUDA"]


def machine(device: torch.device) -> str:
    """One line: device, versions, threads."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    with contextlib.suppress(ImportError):
        import triton

        versions += f", triton {triton.__version__}"
    with contextlib.suppress(ImportError):
        import transformers

        versions += f", transformers {transformers.__version__}"
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        size = f"{of.total_memory / 2**30:.0f} GiB, {of.multi_processor_count} multiprocessors"
        size += f", L2 {l2_bytes(device) >> 20} MiB"
        return f"{of.name} ({size}), CUDA {torch.version.cuda}, {versions}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads, {versions}"


class Table:
    """Rows that are printed as they come, and printed again together at the end as Markdown."""

    def __init__(self, title: str, columns: list[str], notes: str = ""):
        self.title, self.columns, self.notes = title, columns, notes
        self.rows: list[list[str]] = []

    def add(self, *cells) -> None:
        row = [str(cell) for cell in cells]
        assert len(row) == len(self.columns), f"{self.title}: {len(row)} cells, {len(self.columns)} columns"
        self.rows.append(row)
        print("  ".join(f"{name}: {cell}" for name, cell in zip(self.columns, row, strict=True) if cell), flush=True)

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in self.rows]
        return "\n".join(lines + (["", self.notes] if self.notes else []))


def finish(tables: list[Table], device: torch.device, path: str | None) -> None:
    """Print the tables once more, short and last, and write them to `path`."""
    text = "\n\n".join([f"Machine: {machine(device)}.", *(t.markdown() for t in tables if t.rows)]) + "\n"
    print("\n" + text, flush=True)
    if path:
        Path(path).write_text(text)


def peers_asked_for(parser, text: str, known) -> list[str]:
    """The names in a list with commas; ends with an error where one is not known."""
    asked = text.split(",")
    if unknown := set(asked) - set(known):
        parser.error(f"--peer: {', '.join(sorted(unknown))} is not known, accepted: {', '.join(known)}")
    return asked


def standard_arguments(parser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that the script runs")
    parser.add_argument("--seconds", type=float, default=240.0, help="the script ends within about this time")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables there too")
