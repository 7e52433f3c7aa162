"""Give the few ops that patterns look for one spelling.

Before   x[:, :, at] = new, in any spelling         After   x.index_copy_(2, at, new), whose result nothing reads
         torch._C._nn.scaled_dot_product_attention          the same node, every argument by name
Needs    none                                       Gives    none
Follows  none                                       Leaves   numbers and shapes as they were

Only exact equivalents: an indexed write into anything but a cache is left alone; one into a cache that means something
else is left alone and reported.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

from akvq_fx.passes.patterns.attention import is_attention, named_arguments
from akvq_fx.passes.patterns.cache_write import written_views
from akvq_fx.passes.patterns.nodes import NoMatch, op, shape, value
from akvq_fx.passes.patterns.static_write import StaticWrite, static_write, written_cache
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport


def canonicalize(state: GraphState) -> PassReport:
    report = PassReport("canonicalize")
    for node in list(state.graph.nodes):
        if is_attention(node):
            node.kwargs = named_arguments(node)
            node.args, node.target, node.op = (), F.scaled_dot_product_attention, "call_function"
            report.match(node.name)
        elif written_cache(node) is not None:
            try:
                write = static_write(node)
            except NoMatch as miss:
                report.miss(node.name, miss.reason, miss.node)
                continue
            report.match(index_copy(state, node, write).name)
        elif is_same_buffer(node):
            node.replace_all_uses_with(node.args[0])
            report.match(node.name)
            state.graph.erase_node(node)
        elif op(node) == "index_copy_":  # its result is the tensor that it writes into
            node.replace_all_uses_with(node.args[0])
            state.effects.add(node)
    return report


def is_same_buffer(node: Node) -> bool:
    """self.cache = self.cache.to(x), which is what came in, of a tensor that the graph writes into."""
    source = node.args[0] if op(node) == "to" else None
    if op(source) != "placeholder" or node.kwargs.get("copy") or not written_views(node):
        return False
    seen, given = value(node), value(source)
    return (seen.dtype, seen.device, seen.stride()) == (given.dtype, given.device, given.stride())


def index_copy(state: GraphState, node: Node, write: StaticWrite) -> Node:
    """The write of a node as index_copy_, in its place."""
    cache, new, place = write.cache, write.new, write.place
    with state.before(node):
        if place.one:
            new = state.moved(new, [("unsqueeze", place.axis)], value(new))
        at = place.at
        if at is None:
            at = positions_from(state, place.start, shape(new)[place.axis], cache)
        elif place.one:
            at = state.moved(at, [("reshape", 1)], value(at))
        if value(at).dtype != torch.int64:  # the only one that index_copy_ takes
            at = state.moved(at, [("to", torch.int64)], value(at))
        copy = state.graph.call_method("index_copy_", (cache, place.axis, at, new))
        copy.meta = {**node.meta, "example_value": value(cache)}
    state.effects.add(copy)  # it has no readers either
    node.replace_all_uses_with(cache if op(node) != "copy_" else node.args[0])
    state.effects.discard(node)
    view = node.args[0]
    state.graph.erase_node(node)
    if view is not cache:
        state.forget(view)
    return copy


def positions_from(state: GraphState, start, count, cache: Node) -> Node:
    """[count] int64 from `start` on; one node for all writes of as many tokens there."""

    def make():
        end = state.graph.call_function(operator.add, (start, state.size_node(count)))
        end.meta["example_value"] = value(start) + count
        at = state.call(torch.arange, start, end, device=value(cache).device, dtype=torch.int64)
        at.meta["example_value"] = state.fake(value(cache), (count,), torch.int64)
        return at

    return state.share(("written at", start, str(count)), make)


canonicalize.needs = ()
canonicalize.gives = ()
canonicalize.follows = ()
