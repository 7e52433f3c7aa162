"""Parts of a buffer that a graph writes or reads by number, in the axes of the model.

    x[:rows, a:b] = new    x[:rows, at] = new    x[:rows].narrow(1, a, q).copy_(new)    x[:rows].index_copy_(1, at, new)
    x[:rows, :n]           x[:rows][:, :n]       x.narrow(1, 0, n)

Slices one after the other are one part. Everything reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from akvq_fx.kernels.cache_axes import CacheAxes
from akvq_fx.passes.patterns.axes import is_reshape
from akvq_fx.passes.patterns.cache_write import is_buffer, written_views
from akvq_fx.passes.patterns.nodes import (
    NoMatch,
    argument,
    dimension,
    index_by_axis,
    is_tensor,
    op,
    same_size,
    shape,
    value,
)
from akvq_fx.passes.patterns.static_write import FORMS, POSITIONS, UNKNOWN, checked


@dataclass(frozen=True)
class Span:
    """Of one axis: start up to stop (None: the end), or positions `at`; one: a single position, without the axis."""

    start: object = 0
    stop: object = None
    at: Node | None = None
    one: bool = False

    @property
    def is_prefix(self) -> bool:
        return self.at is None and not self.one and isinstance(self.start, int) and self.start == 0


Spans = dict[int, Span]


@dataclass
class TokenWrite:
    """buffer.index_copy_(tokens, at or start, start + 1, ..., new), of the first `rows` rows; None for all of them."""

    node: Node
    buffer: Node
    new: Node
    span: Span
    rows: object = None


def spans_of(index, rank: int) -> Spans | None:
    """The axes that x[index] does not take whole; None for another kind of index."""
    found: Spans = {}
    if (index := index_by_axis(index, rank)) is None:
        return None
    for axis, i in enumerate(index):
        if isinstance(i, slice):
            if i.step not in (None, 1):
                return None
            if i != slice(None):
                found[axis] = Span(0 if i.start is None else i.start, i.stop)
        elif is_tensor(i):
            if len(shape(i)) > 1 or value(i).dtype not in POSITIONS:
                return None
            found[axis] = Span(at=i, one=not shape(i))
        elif isinstance(value(i), (int, torch.SymInt)):
            found[axis] = Span(i, one=True)
        else:
            return None
    return found


def slice_of(node: Node) -> tuple[Node, Spans] | None:
    """(x, the axes that are cut) of x[:rows, :n] or x.narrow(1, 0, n); None for anything else."""
    if not isinstance(node, Node) or op(node) not in ("getitem", "narrow") or not shape(node.args[0]):
        return None
    source, rank = node.args[0], len(shape(node.args[0]))
    if op(node) == "narrow":
        axis, start, length = dimension(node, 1, rank), argument(node, 2, "start"), argument(node, 3, "length")
        if axis is None or is_tensor(start):
            return None
        return source, {axis: Span(start, value(start) + value(length))}
    spans = None if is_reshape(node) else spans_of(node.args[1], rank)
    plain = spans and not any(span.one or span.at is not None for span in spans.values())
    return (source, spans) if plain else None


def part_of(node: Node) -> tuple[Node, Spans] | None:
    """(the tensor that slices, one after the other, are of; the axes that they cut); None where one axis is cut twice
    from another slot than the first."""
    found: Spans = {}
    while (cut := slice_of(node)) is not None:
        node, spans = cut
        for axis, span in spans.items():
            if axis in found and not span.is_prefix:
                return None
            found.setdefault(axis, span)
    return node, found


def cuts_of(buffer: Node) -> Iterator[tuple[Node, Spans]]:
    """Every slice of a buffer, and slices of slices, in no order."""
    queue = [buffer]
    while queue:
        for user in queue.pop().users:
            if slice_of(user) is not None and (part := part_of(user)) is not None and part[0] is buffer:
                yield user, part[1]
                queue.append(user)


def write_of(node: Node, axes: CacheAxes) -> TokenWrite:
    """The write of a node into a buffer of these axes. Raises NoMatch where it is none of tokens."""
    name = op(node)
    target, new = node.args[0], argument(node, 1, "src")
    spans: Spans | None = {}
    if name == "setitem":
        spans, new = spans_of(node.args[1], len(shape(target))), node.args[2]
    elif name == "index_copy_":
        axis, at, new = dimension(node, 1, len(shape(target))), argument(node, 2, "index"), argument(node, 3, "source")
        spans = {axis: Span(at=at)}
    elif name in FORMS and name != "copy_":
        target, new, place = FORMS[name](node)
        spans = {place.axis: Span(0 if place.start is None else place.start, None, place.at, place.one)}
    elif name != "copy_":
        raise NoMatch(f"the cache is written by {name}", node)
    part = part_of(target)
    if spans is None or part is None or set(spans) & set(part[1]):
        raise NoMatch(UNKNOWN, node)
    buffer, spans = part[0], part[1] | spans
    tokens, rows = spans.pop(axes.tokens, None), spans.pop(axes.rows, None)
    if spans or tokens is None or not is_buffer(buffer):
        raise NoMatch("the write is not of tokens of all heads and channels", node)
    if rows is not None and not rows.is_prefix:
        raise NoMatch("the write is of some rows of the buffer, and not of its first ones", node)
    if tokens.at is None:
        checked(tokens.start, node)
    write = TokenWrite(node, buffer, new, tokens, None if rows is None else value(rows.stop))
    check(write, axes)
    return write


def check(write: TokenWrite, axes: CacheAxes) -> None:
    """Raises NoMatch where what is written has not the size of its part, or another dtype."""
    buffer, new, node = write.buffer, write.new, write.node
    if not is_tensor(new) or value(new).dtype != value(buffer).dtype:
        raise NoMatch(f"what is written is no tensor of the cache's dtype {value(buffer).dtype}", node)
    sizes = list(shape(buffer))
    sizes[axes.rows] = sizes[axes.rows] if write.rows is None else write.rows
    if len(shape(new)) == len(sizes):
        at, stop = write.span.at, write.span.stop
        count = shape(new)[axes.tokens]
        if at is not None:
            count = shape(at)[0] if shape(at) else 1
        elif stop is not None:
            count = value(stop) - value(write.span.start)
        sizes[axes.tokens] = count
    if write.span.one:
        del sizes[axes.tokens]
    if len(shape(new)) != len(sizes) or not all(map(same_size, shape(new), sizes)):
        raise NoMatch(f"what is written is {list(shape(new))}, accepted: {sizes}", node)


def writes_of(buffer: Node, axes: CacheAxes) -> list[TokenWrite]:
    """Writes of tokens, in the graph's order. Raises NoMatch where the buffer is written in another way, or read
    before."""
    order = {node: i for i, node in enumerate(buffer.graph.nodes)}
    found = [write_of(node, axes) for node, _ in written_views(buffer)]
    found.sort(key=lambda write: order[write.node])
    writing = {write.node for write in found}
    views = {view for _, view in written_views(buffer)}
    read = {user for view in (buffer, *[cut for cut, _ in cuts_of(buffer)]) for user in view.users}
    early = [u for u in read - writing - views if is_tensor(u) and found and order[u] < order[found[-1].node]]
    if any(slice_of(user) is None for user in early):
        raise NoMatch("the cache is read before it is written", min(early, key=order.get))
    return found


def rows_of(buffer: Node, axes: CacheAxes, writes: list[TokenWrite]):
    """How many rows of a buffer this graph writes and reads: its first ones; None for all of them.

    Raises NoMatch where it is not the same for each write and read.
    """
    cuts = list(cuts_of(buffer))
    if any(axes.rows in spans and not spans[axes.rows].is_prefix for _, spans in cuts):
        raise NoMatch("some rows of a static buffer are read, and not its first ones", cuts[0][0])
    of_cuts = [shape(cut)[axes.rows] for cut, _ in cuts if not only_cut(cut)]
    found = [write.rows for write in writes] + of_cuts
    whole = shape(buffer)[axes.rows]
    found = [None if rows is None or same_size(rows, whole) else rows for rows in found]
    taken = {cut for cut, _ in cuts} | {write.node for write in writes}
    rest = [u for u in buffer.users if u not in taken and op(u) != "output" and is_tensor(u)]
    if any(rows is not None for rows in found):
        if rest or any(rows is None or not same_size(rows, found[0]) for rows in found):
            raise NoMatch("not all that is written and read of a static buffer has as many rows", cuts[0][0])
        return found[0]
    return None


def only_cut(node: Node) -> bool:
    """A slice of which only slices and writes are made."""
    return bool(node.users) and all(slice_of(u) is not None or op(u) in ("index_copy_", *FORMS) for u in node.users)


__all__ = [
    "Span",
    "TokenWrite",
    "cuts_of",
    "only_cut",
    "part_of",
    "rows_of",
    "slice_of",
    "writes_of",
]
