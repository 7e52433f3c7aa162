"""Records: what was compiled for which weights, kept so that report(model) can tell. Weak: a model that goes away takes them along."""

from __future__ import annotations

import threading
import weakref

import torch

from akvq_fx.passes.patterns.cache_write import is_packed
from akvq_fx.passes.patterns.nodes import shape
from akvq_fx.passes.patterns.site import Site
from akvq_fx.passes.state import GraphState
from akvq_fx.report import GraphReport, SiteRow

LIMIT = 4096  # graphs remembered; a process that compiles more has other worries


class Record:
    """One compiled graph and the weights it ran with."""

    def __init__(self, report: GraphReport, weights):
        self.report = report
        self.weights: list[weakref.ref] = []
        self.add_weights(weights)

    def add_weights(self, weights) -> None:
        known = {id(ref()) for ref in self.weights}
        self.weights += [weakref.ref(w) for w in weights if id(w) not in known]

    def concerns(self, ids: set[int]) -> bool:
        return any(id(w) in ids for w in (ref() for ref in self.weights) if w is not None)


RECORDS: list[Record] = []
_lock = threading.Lock()


def add(state: GraphState, example_inputs: list) -> Record:
    parameters = [x for x in example_inputs if isinstance(x, torch.nn.Parameter)]
    record = Record(graph_report(state), parameters)
    with _lock:
        RECORDS[:] = [r for r in RECORDS if any(ref() is not None for ref in r.weights)][-LIMIT:]
        RECORDS.append(record)
    return record


def of(model: torch.nn.Module) -> list[Record]:
    """Records of the graphs compiled for a model, oldest first."""
    ids = {id(p) for p in model.parameters()}
    return [record for record in RECORDS if record.concerns(ids)]


def graph_report(state: GraphState) -> GraphReport:
    decode = state.program.packed or any(s.key.kind == "grow" for s in state.sites)
    kind = "decode" if decode else "prefill" if state.sites or state.refused else "no cache"
    if not decode and any(not is_packed(n) and "past_key_values" in str(n.target) and len(shape(n)) == 4 and shape(n)[2]
                          for n in state.placeholders):  # fmt: skip
        kind = "decode"
    rows = [row_of(site, state) for site in state.sites]
    for label, layer, reason, node in state.refused:
        rows.append(SiteRow(layer, label, "16-bit", "", 0, "", "", "16", "as they are", f"{reason} [{node}]"))
    return GraphReport(kind, rows, list(state.reports))


def row_of(site: Site, state: GraphState) -> SiteRow:
    layout = site.key_layout
    status = "packed" if site.packed or state.config.prefill == "quantized" else "prompt"
    values = site.value_rotation + (f": {site.value_reason}" if site.value_rotation == "online" and site.value_reason else "")
    return SiteRow(site.layer, site.label, status, site.rope, layout.head_dim, site.groups, site.policy, bits_of(layout), values,
                   "; ".join(dict.fromkeys(site.notes)))  # fmt: skip


def bits_of(layout) -> str:
    """E.g. "recent 128: 16, pivots 15: 16, rest: 2"."""
    if layout.lossless:
        return "16"
    parts = [f"recent {layout.window}: 16"] if layout.window else []
    parts += [f"pivots {layout.pivots}: 16"] if layout.pivots else []
    parts += [f"text: {layout.text_bits}, vision: {layout.body_bits}"] if layout.text_bits else [f"rest: {layout.body_bits}"]
    return ", ".join(parts)
