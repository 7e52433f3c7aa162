"""Give the few ops that patterns look for one spelling.

Before   x[:, :, at] = new                          After   x.index_copy_(2, at, new)
         torch._C._nn.scaled_dot_product_attention          the same node, every argument by name
Needs    none                                       Gives    none
Follows  none                                       Leaves   numbers and shapes as they were

Only exact equivalents: an indexed write into anything but a cache, or whose source has another dtype or shape than its target, is
left alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import Node

from akvq_fx.passes.patterns.attention import ARGUMENTS, is_attention
from akvq_fx.passes.patterns.cache_write import ALLOCATIONS, is_packed
from akvq_fx.passes.patterns.nodes import argument, is_tensor, op, same_size, shape, value
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport


def canonicalize(state: GraphState) -> PassReport:
    report = PassReport("canonicalize")
    for node in list(state.graph.nodes):
        if is_attention(node):
            node.kwargs = {k: v for i, k in enumerate(ARGUMENTS) if (v := argument(node, i, k)) is not None}
            node.args, node.target, node.op = (), F.scaled_dot_product_attention, "call_function"
            report.match(node.name)
        elif op(node) == "setitem" and (at := token_index(node)) is not None:
            with state.before(node):
                target, new = node.args[0], node.args[2]
                copy = state.graph.call_method("index_copy_", (target, 2, at, new))
                copy.meta = {**node.meta, "example_value": value(target)}
            state.effects.add(copy)  # it has no readers either
            node.replace_all_uses_with(copy)
            state.graph.erase_node(node)
            report.match(copy.name)
    return report


def token_index(node: Node) -> Node | None:
    """`at` of x[:, :, at] = new where index_copy_ means the same."""
    target, index, new = node.args
    if not isinstance(index, tuple) or len(index) not in (3, 4) or len(shape(target)) != 4 or not is_tensor(new):
        return None
    at, rest = index[2], (*index[:2], *index[3:])
    exact = (
        # elsewhere a position may be negative, which index_copy_ does not take (sliding windows write at -1)
        (is_packed(target) or op(target) in ALLOCATIONS)
        and all(i == slice(None) for i in rest)
        and is_tensor(at)
        and len(shape(at)) == 1
        and value(at).dtype == torch.int64
        and value(new).dtype == value(target).dtype
        and len(shape(new)) == 4
        and all(same_size(a, b) for i, (a, b) in enumerate(zip(shape(new), shape(target), strict=True)) if i != 2)
        and same_size(shape(new)[2], shape(at)[0])
    )
    return at if exact else None


canonicalize.needs = ()
canonicalize.gives = ()
canonicalize.follows = ()
