"""Return the packed buffers, drop what nothing reads any more, and check the graph.

Before   return (logits, cat_k, cat_v)       After   return (logits, buffers..., )
Needs    sites, exchanges, buffers, made, classes, vision, appended, program, kept_axes   Gives    program
Follows  read_unmatched   Leaves   a linted graph of plain tensors, and state.program
"""

from __future__ import annotations

import torch
from torch.fx import Node

from akvq_fx.passes.exchange_buffers import exchange_of, kept_for
from akvq_fx.passes.patterns.cache_write import is_packed
from akvq_fx.passes.patterns.nodes import outputs, value
from akvq_fx.passes.state import GraphState, is_single_token
from akvq_fx.report import PassReport


def clean_up(state: GraphState) -> PassReport:
    report = PassReport("clean_up")
    program = state.program
    writes = {w.returned: (w, site) for site in reversed(state.sites) for w in (site.key, site.value)}
    results, made = [], {}
    for node in outputs(state.graph):
        write, site = writes.get(node, (None, None)) if isinstance(node, Node) else (None, None)
        if write is not None and write.whole in state.made:
            if node not in made:
                made[node] = state.packed_output(write, site)
                results.extend(state.made[write.whole].nodes)
            program.outputs.append(made[node])
            report.match(node.name)
        elif isinstance(node, Node) and node in state.appended:
            program.outputs.append(state.appended[node])
            report.match(node.name)
        else:
            program.outputs.append(None)
            results.append(in_own_axes(state, node))
    extra = list(dict.fromkeys(n for site in state.exchanges for n in kept_for(site) if n is not None))
    places = {node: place for place, node in enumerate(extra)}
    program.exchanges, program.extra = [exchange_of(state, site, places) for site in state.exchanges], len(extra)
    results.extend(extra)
    if state.vision is not None and not state.sites and not state.exchanges and program.vision is None:
        program.vision = "make"
        results.append(state.vision)
    state.graph.output_node().args = (tuple(results),)
    state.graph.eliminate_dead_code(lambda n: n in state.effects or n.is_impure())
    for node in state.placeholders:
        if is_packed(node) and state.position[node] not in program.unpacked:
            program.packed.append(state.position[node])
            if node.users:
                raise AssertionError(f"akvq: {node.name} is still read by {list(node.users)}")
            state.graph.erase_node(node)
    taken = {past: rows for past, rows in state.taken_rows.items() if past in state.buffers}
    program.rows = {state.position[past]: state.size(rows) for past, rows in taken.items()}
    for past, node in state.dropped.items():
        program.firsts.append(state.position[past])
        [n for n in state.graph.nodes if n.op == "placeholder"][-1].append(node)  # behind all others
    bound = {n: (state.position[past], i) for past, b in state.buffers.items() for i, n in enumerate(b.nodes)}
    told = set(state.dropped.values())
    for node in state.graph.nodes:
        if node.op == "placeholder" and str(node.target) != "vision_tokens" and node not in told:
            program.inputs.append(state.position[node] if node in state.position else bound[node])
    if program.inference:
        drop_grad_modes(state)
    program.step = bool(state.sites) and all(
        site.key.kind == "read" or is_single_token(site.key) for site in state.sites
    )
    state.graph.lint()
    state.gm.recompile()
    return report


def in_own_axes(state: GraphState, node):
    """A result that is no packed cache, in the axes that the caller expects."""
    axes = state.kept_axes.get(node) if isinstance(node, Node) else None
    if axes is None:
        return node
    with state.before(state.graph.output_node()):
        return state.moved(node, [*axes.from_standard(), ("contiguous",)], value(node))


def drop_grad_modes(state: GraphState) -> None:
    """Remove the graph's own grad-mode switches: codes have no gradient, so the runtime uses no_grad."""
    for node in list(state.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            state.graph.erase_node(node)


clean_up.needs = ("sites", "exchanges", "buffers", "made", "classes", "vision", "appended", "program", "kept_axes")
clean_up.gives = ("program",)
clean_up.follows = ("read_unmatched",)
clean_up.required = "the graph would still take packed tensors where the runtime passes buffers"
