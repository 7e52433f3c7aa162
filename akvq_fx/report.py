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

    status  "packed" (attention reads codes), "prompt" (the prompt's cache is packed, attention reads its own 16-bit tokens),
            "dequantized" (packed cache, read through a temporary 16-bit copy) or "16-bit" (left alone)
    bits    bits per element of each token class
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


@dataclass
class Capture:
    """What became of one graph under mode="reduce-overhead".

    reason    why no CUDA graph is made of it, "" where one is
    captured  CUDA graphs recorded: one for each set of cache buffers that lives for two steps
    replayed  steps that a recorded one ran
    ran       steps that ran without one: the first over each set of buffers, and every step where there is a reason
    dropped   CUDA graphs given up since, because their buffers died or too many were kept
    """

    reason: str = ""
    captured: int = 0
    replayed: int = 0
    ran: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        if self.reason:
            return f"no CUDA graph: {self.reason}"
        return (
            f"{self.captured} CUDA graphs captured, {self.dropped} of them dropped since; {self.replayed} steps replayed, "
            f"{self.ran} ran without one"
        )


@dataclass
class GraphReport:
    """One compiled graph: its rows and the pass reports behind them."""

    kind: str  # "prefill", "decode" or "no cache"
    rows: list[SiteRow] = field(default_factory=list)
    passes: list[PassReport] = field(default_factory=list)
    capture: Capture | None = None  # None in other modes than "reduce-overhead"


COLUMNS = ("layer", "graph", "status", "pattern", "head dim", "q:kv heads", "policy", "bits", "values", "why")


@dataclass
class Report:
    """Everything known about a model: str() is a table, rows and graphs are the data."""

    graphs: list[GraphReport] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

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
        lines, reasons = [COLUMNS], []
        for graph, r in self.rows:
            why = ""
            if r.reason:
                text = r.reason.split(" [")[0]
                if text not in reasons:
                    reasons.append(text)
                why = f"({reasons.index(text) + 1})"
            lines.append((str(r.layer), graph.kind, r.status, r.pattern, str(r.head_dim or ""), r.heads, r.policy, r.bits,
                          r.values, why))  # fmt: skip
        body = _table(lines) if len(lines) > 1 else "no attention over a cache was compiled"
        footnotes = [f"({i}) {text}" for i, text in enumerate(reasons, 1)]
        captures = dict.fromkeys(f"{graph.kind}: {graph.capture}" for graph in self.graphs if graph.capture is not None)
        return "\n".join([body, *footnotes, *captures, *(f"note: {hint}" for hint in self.hints)])

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)


def _table(lines: list[tuple]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    draw = lambda line: "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    return "\n".join([draw(lines[0]), "  ".join("-" * width for width in widths), *map(draw, lines[1:])])
