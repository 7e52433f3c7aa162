"""Static buffers of which a graph writes and reads parts by number, as whole tensors [B, H, T, D]: for exchange_axes.

packed   cache[:b, s:e] = k; cache[:b, :n].transpose(1, 2)    cache.index_copy_(2, arange(s, e), k'); cache[:, :, :n]
plain    the same                                             the same, read as a view [B, H, T, D] of cache[:b]

A packed placeholder then stands for its first b rows (GraphState.bind narrows its buffers). A plain one stays what it
is, written by the model's own ops; exchange_buffers packs it behind the graph.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from akvq_fx.kernels.cache_axes import CacheAxes
from akvq_fx.passes.canonicalize import positions_from
from akvq_fx.passes.patterns.cache_write import CacheWrite
from akvq_fx.passes.patterns.kept import Kept
from akvq_fx.passes.patterns.nodes import VIEW, NoMatch, op, same_size, shape, value
from akvq_fx.passes.patterns.parts import TokenWrite, cuts_of, only_cut, rows_of, writes_of
from akvq_fx.passes.state import GraphState

ALL = slice(None)


def packed_parts(past: Node) -> tuple[list[TokenWrite], object] | None:
    """(writes of tokens into a packed cache, its first rows that this graph takes, None for all of them); None where
    the graph writes or reads it in another way."""
    try:
        writes = writes_of(past, value(past).axes)
        return writes, rows_of(past, value(past).axes, writes) if value(past).static else None
    except NoMatch:
        return None


def written_in_order(state: GraphState, past: Node, write: TokenWrite, axes: CacheAxes, in_order) -> Node:
    """The write as past.index_copy_(2, at, new); past stands for [B, H, T, D] already, which is its value."""
    node = write.node
    with state.before(node):
        new, at = tokens_of(state, write, axes)
        new = in_order(new)
        if op(node) == "index_copy_" and node.args[0] is past:
            node.args = (past, 2, at, new)
        else:
            copy = state.graph.call_method("index_copy_", (past, 2, at, new))
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(node.args[0])
            state.effects.discard(node)
            state.effects.add(copy)
            target = node.args[0]
            state.graph.erase_node(node)
            if target is not past:
                state.forget(target)
            node = copy
    node.meta["example_value"] = value(past)
    return node


def tokens_of(state: GraphState, write: TokenWrite, axes: CacheAxes) -> tuple[Node, Node]:
    """(new tokens, with their axis; positions [q] int64)."""
    new, span = write.new, write.span
    if span.one:
        new = state.moved(new, [("unsqueeze", axes.tokens)], value(new))
    if span.at is None:
        return new, positions_from(state, span.start, shape(new)[axes.tokens], write.buffer)
    at = span.at
    if span.one:
        at = state.moved(at, [("reshape", 1)], value(at))
    if value(at).dtype != torch.int64:
        at = state.moved(at, [("to", torch.int64)], value(at))
    return new, at


def read_in_parts(state: GraphState, past: Node, axes: CacheAxes) -> None:
    """Slices of a packed cache in the model's axes as slices of [B, H, T, D], moved to these."""
    order = {node: i for i, node in enumerate(state.graph.nodes)}
    for cut, spans in sorted(cuts_of(past), key=lambda pair: -order[pair[0]]):
        if not cut.users or only_cut(cut):
            continue
        tokens = spans.get(axes.tokens)
        with state.before(cut):
            if tokens is not None and tokens.is_prefix:
                new = prefix(state, past, tokens.stop, shape(cut)[axes.tokens])
                new = state.moved(new, axes.from_standard(), value(new))
            else:
                plain = state.fake(value(past), shape(past))
                new = state.moved(past, axes.from_standard(), plain)
                rest = {axis: span for axis, span in spans.items() if axis != axes.rows}
                if rest:
                    index = tuple(slice(rest[i].start, rest[i].stop) if i in rest else ALL for i in range(axes.rank))
                    new = state.call(operator.getitem, new, index)
            new.meta["example_value"] = value(cut)
        cut.replace_all_uses_with(new)
    state.forget(*[cut for cut, _ in cuts_of(past)])


def prefix(state: GraphState, whole: Node, stop, length) -> Node:
    """whole[:, :, :stop], which has so many tokens."""
    cut = state.call(operator.getitem, whole, (ALL, ALL, slice(None, stop), ALL))
    size = shape(whole)
    cut.meta["example_value"] = state.fake(value(whole), (*size[:2], length, size[3]))
    return cut


def view_of_plain(state: GraphState, kept: Kept, heads: int, channels: int, in_order) -> tuple[Node, Node, CacheWrite]:
    """(a plain buffer's rows as [B, H, T, D], its first tokens that attention reads, the write of this step)."""
    buffer, axes, rows = kept.whole, kept.axes, kept.write.rows

    def make() -> Node:
        size = list(shape(buffer))
        size[axes.rows] = size[axes.rows] if rows is None else rows
        with state.before(kept.write.node):
            node = state.call(torch.narrow, buffer, axes.rows, 0, state.size_node(size[axes.rows]))
            node.meta["example_value"] = state.fake(value(buffer), tuple(size))
            view = state.moved(node, axes.to_standard(heads, channels), value(node))
        view.meta[VIEW] = True
        return view

    view = state.share(("view", buffer), make)
    with state.before(last_of(kept.write.node, kept.cut).next):
        new, at = tokens_of(state, kept.write, axes)
        write = CacheWrite("place", view, in_order(new), view, at)
        length = shape(view)[2] if kept.cut is None else shape(kept.cut)[axes.tokens]
        read = view if same_size(length, shape(view)[2]) else prefix(state, view, state.size_node(length), length)
    return view, read, write


def last_of(one: Node, other: Node | None) -> Node:
    """The later of two nodes of a graph."""
    return one if other is None or one > other else other


__all__ = ["packed_parts", "read_in_parts", "view_of_plain", "written_in_order"]
