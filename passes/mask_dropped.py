"""Count attention's tokens by the slots of a packed cache, where slots before its first token are to be left out.

Before   sdpa(q, cat([past, k], 2), .., mask)      After   the site sees first + T slots, `first` of them masked
Needs    sites                                     Gives   sites
Follows  fold_values                               Leaves  the graph as it was, but for masks that nothing reads yet

A sliding window's tokens begin at slot `first` of its buffers (akvq_fx/sliding.py). Where attention reads the last
tokens of the cache only (x[:, :, -n:]), those before are left out in the same way.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from akvq_fx.passes.patterns.attention import Attention
from akvq_fx.passes.patterns.nodes import shape, value
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport


def mask_dropped(state: GraphState) -> PassReport:
    report = PassReport("mask_dropped")
    for site in state.sites:
        hidden = 0 if site.key.static else shape(site.key.whole)[2] - site.length
        if site.packed:
            hidden = hidden + state.first_slot(site.key.past)
        if isinstance(hidden, int) and hidden == 0 or str(hidden) == "0":
            continue
        with state.before(site.attention.node):
            site.attention.mask = masked(state, site.attention, hidden, site.length)
        site.attention.is_causal = False
        site.length = hidden + site.length
        report.match(site)
    return report


def masked(state: GraphState, attention: Attention, hidden, length) -> Node:
    """The mask of attention over `length` tokens, with `hidden` columns in front that nothing sees."""
    count, total = shape(attention.query)[2], hidden + length
    key = ("dropped", attention.mask, attention.is_causal and str(count), str(hidden), str(length))
    if attention.mask is not None:
        return state.share(key, lambda: extended(state, attention.mask, hidden, length))
    size, dtype, device = (1, 1, count if attention.is_causal else 1, total), torch.bool, value(attention.query).device

    def make() -> Node:
        before, slots = state.size_node(hidden), state.call(torch.arange, state.size_node(total), device=device)
        mask = state.call(torch.ge, slots, before)
        if attention.is_causal:  # as torch's: aligned to the top left of what is seen
            rows = state.call(torch.arange, state.size_node(count), device=device)
            last = state.call(torch.unsqueeze, state.call(torch.add, rows, before), 1)
            mask = state.call(torch.logical_and, mask, state.call(torch.le, slots, last))
        mask = state.call(torch.reshape, mask, tuple(map(state.size_node, size)))
        return given(state, mask, size, dtype, device)

    return state.share(key, make)


def extended(state: GraphState, mask: Node, hidden, length) -> Node:
    """A mask broadcastable to [B, Hq, q, length], with columns in front."""
    seen, rows = value(mask), shape(mask)[:-1]
    if shape(mask)[-1:] in ((), (1,)):
        mask = state.graph.call_method("expand", (mask, *[-1] * len(rows), state.size_node(length)))
    fill = False if seen.dtype == torch.bool else -torch.inf
    node = state.call(torch.nn.functional.pad, mask, (state.size_node(hidden), 0), value=fill)
    return given(state, node, (*rows, hidden + length), seen.dtype, seen.device)


def given(state: GraphState, node: Node, size, dtype, device) -> Node:
    """The node, with what later passes ask of it."""
    with value(state.sites[0].attention.query).fake_mode:
        node.meta["example_value"] = torch.empty(size, dtype=dtype, device=device)
    return node


mask_dropped.needs = ("sites",)
mask_dropped.gives = ("sites",)
mask_dropped.follows = ("fold_values",)
mask_dropped.required = "attention would see tokens that a sliding window has dropped"
