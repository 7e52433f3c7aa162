"""What was done and why not: pass reports for developers, a Report table for users. Returned, never printed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Miss:
    """A site that a pass left as it was."""

    site: str
    reason: str
    node: str


@dataclass
class PassReport:
    """One pass over one graph: the sites it changed and the ones it left alone, each with a reason and a node."""

    name: str
    matched: list[str] = field(default_factory=list)
    missed: list[Miss] = field(default_factory=list)

    def match(self, site) -> None:
        self.matched.append(str(site))

    def miss(self, site, reason: str, node=None) -> None:
        self.missed.append(Miss(str(site), reason, str(node) if node is not None else ""))

    def __str__(self) -> str:
        misses = "; ".join(f"{m.site}: {m.reason} [{m.node}]" for m in self.missed)
        return f"{self.name}: {len(self.matched)} matched, {len(self.missed)} missed{' - ' + misses if misses else ''}"


@dataclass(frozen=True)
class SiteRow:
    """One attention call in one graph.

    status  "packed" (attention reads codes), "prompt" (the prompt's cache is packed, attention reads its own 16-bit
            tokens), "dequantized" (packed cache, read through a temporary 16-bit copy) or "16-bit" (left alone)
    bits    bits per cached number of each token class
    reason  why it was left alone, or notes; node and source: the graph's node that says so, and the line of code that
            made it
    """

    layer: int
    label: str
    status: str
    pattern: str
    head_dim: int
    heads: str
    policy: str
    bits: str
    values: str
    reason: str
    node: str = field(default="", compare=False)  # graphs of one function name their nodes each in its own way
    source: str = field(default="", compare=False)


@dataclass
class Capture:
    """What became of one graph whose steps are captured in CUDA graphs.

    reason    why no CUDA graph is made of it, "" where one is
    captured  CUDA graphs recorded: one for each set of sizes, and more where caches of one size are alive together
    replayed  steps that a recorded one ran
    ran       steps that ran without one: the first of each set of sizes, and every step where there is a reason
    dropped   CUDA graphs given up since, because their buffers died or too many were kept
    reused    times that caches were moved into buffers that a CUDA graph had kept
    kept      bytes of cache buffers, inputs and results that the CUDA graphs keep
    """

    reason: str = ""
    captured: int = 0
    replayed: int = 0
    ran: int = 0
    dropped: int = 0
    reused: int = 0
    kept: int = field(default=0, compare=False)

    def __str__(self) -> str:
        if self.reason:
            return f"no CUDA graph: {self.reason}"
        return (
            f"{self.captured} CUDA graphs captured, {self.dropped} of them dropped since; "
            f"{self.replayed} steps replayed, {self.ran} ran without one; "
            f"{self.kept:,} bytes kept, into which caches moved {self.reused} times"
        )


@dataclass(frozen=True)
class Regions:
    """How one graph went to the inner compiler (akvq_fx/regions.py).

    layers   attention calls in it
    count    regions that it was cut into, 0 where it was compiled whole
    kinds    of regions, each compiled once
    reason   why it was compiled whole, "" where it was cut
    """

    layers: int
    count: int = 0
    kinds: int = 0
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"compiled whole: {self.reason}"
        return f"{self.layers} layers in {self.count} regions of {self.kinds} kinds, each kind compiled once"


@dataclass(frozen=True)
class KernelAnswer:
    """Which implementation answers an op of a graph on its device.

    kernel       a module of akvq_fx.kernels, "" for the plain PyTorch reference
    passed_over  faster ones that do not take the call, each with its reason
    """

    op: str
    device: str
    kernel: str
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        why = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over)
        return f"{self.op} on {self.device}: {self.kernel or 'the reference'}{f' ({why})' if why else ''}"


@dataclass(frozen=True)
class GaveUp:
    """A function that dynamo compiles no more.

    function  its name, the class of the module that it was called with, and where it stands
    option    of torch._dynamo.config, because of which: "torch._dynamo.config.recompile_limit"
    value     of that option, or graphs that this backend allows a function where nobody chose one
    reason    why the function was to be compiled once more
    reached   where the function is a layer's: how many of a model's layers have a graph, "8 of 12 DecoderLayer"
    """

    function: str
    option: str
    value: int | bool
    reason: str
    reached: str = ""

    def __str__(self) -> str:
        last = f" (it was called anew because of: {self.reason})" if self.reason else ""
        reached = f" {self.reached} have a graph." if self.reached else ""
        if isinstance(self.value, bool):
            return (
                f"dynamo gave up on {self.function}: the backend failed{last}, and {self.option} is on, so it runs "
                "uncompiled, its cache at 16 bits. Turn that option off to see the error."
            )
        return (
            f"dynamo gave up on {self.function}: it has {self.value} graphs, which is the limit. Calls that none of "
            f"them fits run uncompiled from now on, any cache of theirs at 16 bits{last}.{reached} "
            f"Raise the limit before the first call, e.g. {self.option} = {8 * self.value}; "
            "torch._dynamo.reset() starts anew."
        )


@dataclass
class GraphReport:
    """One compiled graph: its rows and the pass reports behind them."""

    kind: str  # "prefill", "decode" or "no cache"
    rows: list[SiteRow] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)
    capture: Capture | None = None  # None where none is captured
    regions: Regions | None = None  # None where like layers are not looked for
    function: str = ""  # whose graph it is
    recompiled: str = ""  # why the function was compiled again (the guard that failed), "" for its first graph
    # calls of ops, which explain and report replace by the KernelAnswer of each
    kernels: list = field(default_factory=list)
    # where an earlier graph of a call is to say which tokens are images: whether one ever did; None before a call
    told_images: bool | None = None


PLACES = 3  # lines of code shown for one reason
COLUMNS = ("layer", "graph", "status", "pattern", "head dim", "q:kv heads", "policy", "bits", "values", "why")


@dataclass
class Report:
    """Everything known about a model: str() is a table, rows and graphs are the data."""

    graphs: list[GraphReport] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    gave_up: list[GaveUp] = field(default_factory=list)

    @property
    def rows(self) -> list[tuple[GraphReport, SiteRow]]:
        """Rows of all graphs, by layer, prompt before decode, repeats of recompiled graphs left out."""
        order = {"prefill": 0, "decode": 1}
        seen: dict = {}
        for graph in self.graphs:
            for row in graph.rows:
                seen.setdefault((row.layer, order.get(graph.kind, 2), row), graph)
        return [(graph, key[2]) for key, graph in sorted(seen.items(), key=lambda item: item[0][:2])]

    @property
    def packed(self) -> list[SiteRow]:
        """Sites whose cache is packed."""
        return [row for _, row in self.rows if row.status != "16-bit"]

    @property
    def refused(self) -> list[SiteRow]:
        """Sites that stay at 16 bits, each with its reason."""
        return [row for _, row in self.rows if row.status == "16-bit"]

    def __str__(self) -> str:
        lines, reasons = [COLUMNS], {}
        for graph, r in self.rows:
            why = ""
            if r.reason:
                reasons.setdefault(r.reason, [])
                place = " at ".join(part for part in (r.node and f"node {r.node}", r.source) if part)
                if place and place not in reasons[r.reason]:
                    reasons[r.reason].append(place)
                why = f"({list(reasons).index(r.reason) + 1})"
            cells = (r.status, r.pattern, str(r.head_dim or ""), r.heads, r.policy, r.bits, r.values)
            lines.append((str(r.layer), graph.kind, *cells, why))
        body = _table(lines) if len(lines) > 1 else "no attention over a cache was compiled"
        footnotes = []
        for i, (text, places) in enumerate(reasons.items(), 1):
            footnotes += [f"({i}) {text}", *(f"    {place}" for place in places[:PLACES])]
            footnotes += [f"    and {len(places) - PLACES} more"] if len(places) > PLACES else []
        kernels = dict.fromkeys(f"{graph.kind}: {answer}" for graph in self.graphs for answer in graph.kernels)
        captures = dict.fromkeys(f"{graph.kind}: {graph.capture}" for graph in self.graphs if graph.capture is not None)
        regions = dict.fromkeys(f"{graph.kind}: {graph.regions}" for graph in self.graphs if graph.regions is not None)
        hints = (f"note: {hint}" for hint in self.hints)
        facts = [*self._counts(), *regions, *kernels, *captures]
        return "\n".join([body, *footnotes, *facts, *map(str, self.gave_up), *hints])

    def _counts(self) -> list[str]:
        """How many graphs there are of each kind, and why there is more than one of a function."""
        if not self.graphs:
            return []
        kinds = [graph.kind for graph in self.graphs]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        again = [graph.recompiled for graph in self.graphs if graph.recompiled]
        return [f"graphs: {counts}; {len(again)} of them recompiled" + (f", last because {again[-1]}" if again else "")]

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)


def _table(lines: list[tuple]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    draw = lambda line: "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    return "\n".join([draw(lines[0]), "  ".join("-" * width for width in widths), *map(draw, lines[1:])])
