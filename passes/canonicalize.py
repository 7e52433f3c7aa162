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
from akvq_fx.passes.patterns.indexed_write import WRITES, token_index, written
from akvq_fx.passes.patterns.nodes import NoMatch, argument, op, shape, value
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
                if value(at).dtype != torch.int64:  # the only one that index_copy_ takes
                    seen, at = value(at), state.graph.call_method("to", (at, torch.int64))
                    with seen.fake_mode:
                        at.meta["example_value"] = seen.to(torch.int64)
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
    Buffers of the caller's are written as the model does it (exchange_buffers).
    """
    target = node.args[0] if op(node) in WRITES else None
    return len(shape(target)) == 4 and (is_packed(target) or op(target) in ALLOCATIONS)


canonicalize.needs = ()
canonicalize.gives = ()
canonicalize.follows = ()
