"""Records: what was compiled for which weights, kept so that report(model) can tell. Weak: a model that goes away
takes them along."""

from __future__ import annotations

import dataclasses
import threading
import weakref

import torch
from torch.fx import Node

from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.patterns.cache_write import is_packed
from akvq_fx.passes.patterns.nodes import argument, dimension, op, outputs, shape, tensors_of_cat, value
from akvq_fx.passes.patterns.site import Site
from akvq_fx.passes.state import GraphState
from akvq_fx.report import GraphReport, Report, SiteRow

LIMIT = 4096  # graphs remembered; a process that compiles more has other worries


class Record:
    """One compiled graph, the weights it ran with, and per row the key projections: layers and models may share a graph."""

    def __init__(self, report: GraphReport, key_weights: list[int | None]):
        self.report, self.key_weights = report, key_weights
        self.weights: list[weakref.ref] = []
        self.keys: list[list[weakref.ref]] = [[] for _ in report.rows]

    def add_weights(self, args) -> None:
        remember(self.weights, [a for a in args if isinstance(a, torch.nn.Parameter)])
        for refs, position in zip(self.keys, self.key_weights, strict=True):
            if position is not None:
                remember(refs, [args[position]])

    def concerns(self, ids: set[int]) -> bool:
        return any(id(w) in ids for w in (ref() for ref in self.weights) if w is not None)

    def rows(self, names: dict[int, str]) -> list[SiteRow]:
        """The rows, one for each of the model's layers that ran them; names: id of a parameter -> its name."""
        found = []
        for row, refs in zip(self.report.rows, self.keys, strict=True):
            labels = [names[id(ref())] for ref in refs if id(ref()) in names]
            found += [renamed(row, label) for label in labels] or [row]
        return found


def remember(refs: list[weakref.ref], weights: list) -> None:
    known = {id(ref()) for ref in refs}
    refs += [weakref.ref(w) for w in weights if id(w) not in known]


def renamed(row: SiteRow, parameter: str) -> SiteRow:
    """The row under the name of the module that owns its key projection."""
    numbers = [int(part) for part in parameter.split(".") if part.isdigit()]
    return dataclasses.replace(row, layer=numbers[0] if numbers else row.layer, label=parameter.rsplit(".", 2)[0])


RECORDS: list[Record] = []
_lock = threading.Lock()


def add(state: GraphState, example_inputs: list) -> Record:
    keys = [state.position.get(site.weights[0]) for site in state.sites] + [None] * (
        len(state.refused) + len(state.dequantized)
    )
    record = Record(graph_report(state), keys)
    record.add_weights(example_inputs)
    with _lock:
        RECORDS[:] = [r for r in RECORDS if any(ref() is not None for ref in r.weights)][-LIMIT:]
        RECORDS.append(record)
    return record


def of(model: torch.nn.Module) -> Report:
    """Reports of the graphs compiled for a model, oldest first."""
    names = {id(p): name for name, p in model.named_parameters()}
    mine = [record for record in RECORDS if record.concerns(names.keys())]
    return Report([GraphReport(r.report.kind, r.rows(names), r.report.passes, r.report.capture) for r in mine])


def graph_report(state: GraphState) -> GraphReport:
    decode = state.program.packed or any(s.key.kind == "grow" for s in state.sites) or continues_a_cache(state.graph)
    kind = "decode" if decode else "prefill" if state.sites or state.refused else "no cache"
    rows = [row_of(site, state) for site in state.sites]
    for label, layer, reason, node in state.refused:
        rows.append(SiteRow(layer, label, "16-bit", "", 0, "", "", "16", "as they are", f"{reason} [{node}]"))
    for label, layer, reason, node in state.dequantized:
        rows.append(SiteRow(layer, label, "dequantized", "", 0, "", "", "as packed", "as packed", f"{reason} [{node}]"))
    return GraphReport(kind, rows, list(state.reports), state.capture)


def continues_a_cache(graph: torch.fx.Graph) -> bool:
    """A 16-bit cache that came in filled goes on here: cat([past, new]) that is returned, whole or a slice of it, or one new token
    written into a buffer. A prompt that writes into a buffer looks like a chunk of one, and counts as a prompt."""
    returned = {n for n in outputs(graph) if isinstance(n, Node)}
    for node in graph.nodes:
        if op(node) == "cat" and isinstance(argument(node, 0, "tensors"), (tuple, list)) and len(shape(node)) == 4:
            past, new = tensors_of_cat(node)[0], tensors_of_cat(node)[-1]
            dim = dimension(node, 1, 4)
            kept = node in returned or any(op(u) == "getitem" and u in returned for u in node.users)
            if kept and filled(past) and dim and isinstance(new, Node) and len(shape(new)) == 4:
                return True
        elif op(node) in ("index_copy_", "setitem", "copy_") and node.args and filled(node.args[0]):
            new = argument(node, 2 if op(node) != "copy_" else 1, "source")
            if isinstance(new, Node) and len(shape(new)) == 4 and shape(new)[2] == 1:
                return True
    return False


def filled(node) -> bool:
    """A plain [B, H, T, D] tensor with tokens in it that the graph was called with, and no weight."""
    if op(node) != "placeholder" or is_packed(node) or isinstance(value(node), torch.nn.Parameter):
        return False
    return len(shape(node)) == 4 and 0 not in shape(node)


def row_of(site: Site, state: GraphState) -> SiteRow:
    layout = site.key_layout
    status = "packed" if site.packed or state.config.prefill == "quantized" else "prompt"
    values = site.value_rotation + (
        f": {site.value_reason}" if site.value_rotation == "online" and site.value_reason else ""
    )
    return SiteRow(site.layer, site.label, status, site.rope, layout.head_dim, site.groups, site.policy,
                   bits_of(layout, site.value_layout), values,
                   "; ".join(dict.fromkeys(site.notes)))  # fmt: skip


def bits_of(keys: Layout, values: Layout) -> str:
    """E.g. "recent 64: 16, pivots 15: 16, keys of text: 4, rest: 2"."""
    if keys.lossless:
        return "16"
    parts = [f"recent {keys.window}: 16"] if keys.window else []
    parts += [f"pivots {keys.pivots}: 16"] if keys.pivots else []
    if keys.text_bits:
        parts.append(f"{'text' if values.text_bits else 'keys of text'}: {keys.text_bits}")
    return ", ".join([*parts, f"rest: {keys.body_bits}"])
