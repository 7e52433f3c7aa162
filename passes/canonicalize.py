"""Give the few ops that patterns look for one spelling.

Before   x[:, :, at] = new                          After   x.index_copy_(2, at, new)
         x.scatter_(2, at expanded to new's size, new)      the same
         torch._C._nn.scaled_dot_product_attention          the same node, every argument by name
Needs    none                                       Gives    none
Follows  none                                       Leaves   numbers and shapes as they were

Only exact equivalents: an indexed write into anything but a cache is left alone; one into a cache that means something
else is left alone and reported.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import Node

from akvq_fx.passes.patterns.attention import ARGUMENTS, is_attention
from akvq_fx.passes.patterns.cache_write import ALLOCATIONS, is_packed
from akvq_fx.passes.patterns.nodes import NoMatch, argument, is_tensor, op, same_size, shape, value
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport


def canonicalize(state: GraphState) -> PassReport:
    report = PassReport("canonicalize")
    for node in list(state.graph.nodes):
        if is_attention(node):
            node.kwargs = {k: v for i, k in enumerate(ARGUMENTS) if (v := argument(node, i, k)) is not None}
            node.args, node.target, node.op = (), F.scaled_dot_product_attention, "call_function"
            report.match(node.name)
        elif writes_cache(node):
            try:
                at = token_index(node)
            except NoMatch as miss:
                report.miss(node.name, miss.reason, miss.node)
                continue
            with state.before(node):
                target, new = node.args[0], written(node)
                copy = state.graph.call_method("index_copy_", (target, 2, at, new))
                copy.meta = {**node.meta, "example_value": value(target)}
            state.effects.add(copy)  # it has no readers either
            node.replace_all_uses_with(copy)
            state.graph.erase_node(node)
            report.match(copy.name)
    return report


def writes_cache(node: Node) -> bool:
    """node is x[...] = new or x.scatter_(...) for a 4-d x that is a PackedKV or allocated in this graph.

    In other tensors a position may be negative, which index_copy_ does not take (sliding windows write at -1).
    """
    target = node.args[0] if op(node) in ("setitem", "scatter_") else None
    return len(shape(target)) == 4 and (is_packed(target) or op(target) in ALLOCATIONS)


def written(node: Node):
    """What is written into the cache."""
    return node.args[2] if op(node) == "setitem" else argument(node, 3, "src")


def token_index(node: Node) -> Node:
    """`at` [q] of the write. Raises NoMatch where x.index_copy_(2, at, new) would not mean the same."""
    target, new = node.args[0], written(node)
    at = set_positions(node) if op(node) == "setitem" else scattered_positions(node)
    if value(at).dtype != torch.int64:
        raise NoMatch(f"the positions are {value(at).dtype}, accepted: torch.int64", node)
    if not is_tensor(new) or value(new).dtype != value(target).dtype:
        raise NoMatch(f"what is written is no tensor of the cache's dtype {value(target).dtype}", node)
    expected = (*shape(target)[:2], shape(at)[0], shape(target)[3])
    if len(shape(new)) != 4 or not all(map(same_size, shape(new), expected)):
        raise NoMatch(f"what is written is {list(shape(new))}, accepted: {list(expected)}", node)
    return at


def set_positions(node: Node) -> Node:
    """`at` of x[:, :, at] = new."""
    index = node.args[1]
    if not isinstance(index, tuple) or len(index) not in (3, 4):
        raise NoMatch("the write is not x[:, :, at] = new", node)
    at, rest = index[2], (*index[:2], *index[3:])
    if any(i != slice(None) for i in rest) or not is_tensor(at) or len(shape(at)) != 1:
        raise NoMatch("the write is not x[:, :, at] = new", node)
    return at


def scattered_positions(node: Node) -> Node:
    """`at` of x.scatter_(2, index, new), where index is at[None, None, :, None] expanded to new's size."""
    dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
    if dim not in (2, -2) or op(index) not in ("expand", "expand_as") or argument(node, 4, "reduce") is not None:
        raise NoMatch("the write is not x.scatter_(2, at expanded to new's size, new)", node)
    at = index.args[0]
    column = len(shape(at)) == 4 and (*shape(at)[:2], shape(at)[3]) == (1, 1, 1)
    while column and len(shape(at)) > 1 and op(at) in ("getitem", "view", "reshape", "unsqueeze"):
        at = at.args[0]  # with q elements before and after, these keep their order
    if not column or len(shape(at)) != 1 or not same_size(shape(at)[0], shape(index)[2]):
        raise NoMatch("the write is not x.scatter_(2, at expanded to new's size, new)", node)
    return at


canonicalize.needs = ()
canonicalize.gives = ()
canonicalize.follows = ()
