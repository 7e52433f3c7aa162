"""Records: what was compiled for which weights, kept for report(model) by weak references to the weights."""

from __future__ import annotations

import dataclasses
import re
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.fx import Node

from akvq_fx import events, torch_internals, which_kernel
from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.patterns.cache_write import is_packed
from akvq_fx.passes.patterns.nodes import argument, dimension, op, outputs, shape, tensors_of_cat, value
from akvq_fx.passes.patterns.site import Site
from akvq_fx.passes.state import GraphState
from akvq_fx.report import GaveUp, GraphReport, Report, SiteRow

TORCH = str(Path(torch.__file__).parent)  # lines in these files are not the user's
LIMIT = 4096  # graphs remembered


class Record:
    """One compiled graph, the weights and modules that it ran with, and per row the key projections of its layers.

    Where weights are moved in and out (offloading), a parameter lives for one call; the module that the function
    belongs to stays.
    """

    def __init__(
        self, report: GraphReport, key_weights: list[int | None], code=None, modules: Iterable[nn.Module] = ()
    ):
        self.report, self.key_weights, self.code = report, key_weights, code
        self.modules = [weakref.ref(module) for module in modules]
        self.weights: list[weakref.ref] = []
        self.keys: list[list[weakref.ref]] = [[] for _ in report.rows]

    def add_weights(self, args) -> None:
        remember(self.weights, [a for a in args if isinstance(a, nn.Parameter)])
        for refs, position in zip(self.keys, self.key_weights, strict=True):
            if position is not None:
                remember(refs, [args[position]])

    def add_images(self, told: bool) -> None:
        self.report.told_images = told or bool(self.report.told_images)

    def leave(self, number: int, why: str) -> None:
        """Buffers that were to be packed behind the graph, those of the row of this number, stay as they are."""
        row = self.report.rows[number]
        why = f"a static buffer of the caller's stays as it is: {why}"
        left = left_alone(row.layer, row.label, "16-bit", "16", "as they are", why, "")
        if left not in self.report.rows:
            self.report.rows.append(left)
            self.keys.append(self.keys[number])
            self.key_weights.append(self.key_weights[number])

    @property
    def alive(self) -> bool:
        return any(ref() is not None for ref in (*self.weights, *self.modules))

    def concerns(self, parameters: set[int], modules: set[int]) -> bool:
        """Whether it belongs to a model, given the ids of its parameters and of its modules."""
        known = ((self.weights, parameters), (self.modules, modules))
        return any(ref() is not None and id(ref()) in ids for refs, ids in known for ref in refs)

    def rows(self, names: dict[int, str], modules: dict[int, str]) -> list[SiteRow]:
        """One row for each layer that ran the graph. names, modules: id of a parameter, of a module -> its name."""
        found, prefix = [], next((modules[id(ref())] for ref in self.modules if id(ref()) in modules), "")
        for row, refs in zip(self.report.rows, self.keys, strict=True):
            labels = [names[id(ref())] for ref in refs if id(ref()) in names]
            found += [renamed(row, label.rsplit(".", 2)[0]) for label in labels] or [inside(row, prefix)]
        return found


def remember(refs: list[weakref.ref], weights: list) -> None:
    refs[:] = [ref for ref in refs if ref() is not None]
    known = {id(ref()) for ref in refs}
    refs += [weakref.ref(w) for w in weights if id(w) not in known]


def renamed(row: SiteRow, label: str) -> SiteRow:
    """The row under a module's name, with the layer's number in it."""
    numbers = [int(part) for part in label.split(".") if part.isdigit()]
    return dataclasses.replace(row, layer=numbers[0] if numbers else row.layer, label=label)


def inside(row: SiteRow, prefix: str) -> SiteRow:
    """The row of a graph that belongs to the module of this name."""
    return renamed(row, row.label if row.label.startswith(prefix) else f"{prefix}.{row.label}") if prefix else row


RECORDS: list[Record] = []
_lock = threading.Lock()


def add(state: GraphState, example_inputs: list) -> Record:
    weights = [state.position.get(site.weights[0]) for site in (*state.exchanges, *state.sites)]
    keys = weights + [None] * (len(state.refused) + len(state.dequantized))
    seen, report = torch_internals.compiling(), graph_report(state)
    if seen is not None:
        report.function, report.recompiled = seen.code.co_name, torch_internals.guard_of(seen.reason)
    record = Record(report, keys, seen and seen.code, events.modules_among(seen.locals) if seen else ())
    record.add_weights(example_inputs)
    with _lock:
        RECORDS[:] = [r for r in RECORDS if r.alive][-LIMIT:]
        RECORDS.append(record)
    return record


def of(model: nn.Module) -> Report:
    """Reports of the graphs compiled for a model, oldest first, and what dynamo gave up on."""
    names = {id(p): name for name, p in model.named_parameters()}
    modules = {id(part): name for name, part in model.named_modules()}
    mine = [record for record in RECORDS if record.concerns(names.keys(), modules.keys())]
    codes = {id(record.code) for record in mine if record.code is not None}
    return Report(
        [dataclasses.replace(r.report, rows=r.rows(names, modules)) for r in mine],
        gave_up=[gave_up_report(event, model) for event in events.EVENTS if event.concerns(modules.keys(), codes)],
    )


def gave_up_report(event: events.Event, model: nn.Module) -> GaveUp:
    """The event, and, for a layer's function, how many of the model's layers have a graph."""
    kind = type(next((ref() for ref in event.modules if ref() is not None), None))
    parts = [part for part in model.modules() if type(part) is kind]
    served = {id(ref()) for record in RECORDS if record.code is event.code for ref in record.modules}
    compiled = sum(id(part) in served for part in parts)
    return dataclasses.replace(
        event.gave_up, reached=f"{compiled} of {len(parts)} {kind.__name__}" if len(parts) > 1 else ""
    )


def layers_packed(code) -> int:
    """How many layers' caches the graphs of this code pack. Layers are told apart by key weights, else by module."""
    found = set()
    for record in RECORDS:
        if record.code is code:
            for row, refs in zip(record.report.rows, record.keys, strict=True):
                if row.status in ("packed", "prompt"):
                    weights = [id(ref()) for ref in refs if ref() is not None]
                    owners = weights or [id(ref()) for ref in record.modules[:1]]
                    found.update((row.label, i) for i in owners)
    return len(found)


def graph_report(state: GraphState) -> GraphReport:
    rows = [row_of(site, state) for site in (*state.exchanges, *state.sites)]
    decode = state.program.packed or any(s.key.kind == "grow" for s in state.sites) or continues_a_cache(state.graph)
    kind = "decode" if decode else "prefill" if rows or state.refused else "no cache"
    for label, layer, reason, node in state.refused:
        rows.append(left_alone(layer, label, "16-bit", "16", "as they are", reason, node))
    for label, layer, reason, node in state.dequantized:
        rows.append(left_alone(layer, label, "dequantized", "as packed", "as packed", reason, node))
    return GraphReport(kind, rows, list(state.reports), state.capture, kernels=which_kernel.calls_of(state))


def left_alone(layer: int, label: str, status: str, bits: str, values: str, reason: str, node) -> SiteRow:
    return SiteRow(layer, label, status, "", 0, "", "", bits, values, reason, str(node), source_of(node))


def source_of(node) -> str:
    """'file:line: code' of the user's line that made a node, or first used an input; "" where dynamo kept none."""
    if not isinstance(node, Node):
        return ""
    for made in (node, *node.users):
        lines = [line.strip() for line in (made.meta.get("stack_trace") or "").splitlines()]
        places = [i for i, line in enumerate(lines) if line.startswith('File "') and TORCH not in line]
        if places:
            file, line = re.match(r'File "(.*)", line (\d+)', lines[places[-1]]).groups()
            code = lines[places[-1] + 1] if places[-1] + 1 < len(lines) else ""
            return f"{file}:{line}: {code}"
    return ""


def continues_a_cache(graph: torch.fx.Graph) -> bool:
    """The graph continues a filled 16-bit cache: it returns cat([past, new]), whole or sliced, or writes one new token
    into a buffer. A prompt that writes into a buffer looks the same as a chunk of one, so it counts as a prompt."""
    returned = {n for n in outputs(graph) if isinstance(n, Node)}
    for node in graph.nodes:
        if op(node) == "cat" and isinstance(argument(node, 0, "tensors"), (tuple, list)) and len(shape(node)) == 4:
            past, new = tensors_of_cat(node)[0], tensors_of_cat(node)[-1]
            dim = dimension(node, 1, 4)
            kept = node in returned or any(op(u) == "getitem" and u in returned for u in node.users)
            if kept and filled(past) and dim and isinstance(new, Node) and len(shape(new)) == 4:
                return True
        elif op(node) in ("index_copy_", "setitem", "copy_") and node.args and filled(node.args[0]):
            new = argument(node, {"index_copy_": 3, "setitem": 2, "copy_": 1}[op(node)], "source")
            if isinstance(new, Node) and len(shape(new)) == 4 and shape(new)[2] == 1:
                return True
    return False


def filled(node) -> bool:
    """A graph input that is a plain [B, H, T, D] tensor with tokens in it, and no weight."""
    if op(node) != "placeholder" or is_packed(node) or isinstance(value(node), torch.nn.Parameter):
        return False
    return len(shape(node)) == 4 and 0 not in shape(node)


def row_of(site: Site, state: GraphState) -> SiteRow:
    layout = site.key_layout
    status = "packed" if site.packed or state.config.prefill == "quantized" and not site.in_buffers else "prompt"
    why = f": {site.value_reason}" if site.value_rotation == "online" and site.value_reason else ""
    values = site.value_rotation + why
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
    rest = "rest: 4, 2, 0 by channel of keys, 2" if keys.uneven else f"rest: {keys.body_bits}"
    return ", ".join([*parts, rest])
