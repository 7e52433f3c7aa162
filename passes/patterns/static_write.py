"""Writes of a step's tokens into a buffer, in any spelling.

    x[:, :, at] = new            at: integers [q], one position, or a slice a:b
    x[:, :, a:b].copy_(new)      x.narrow(2, a, q).copy_(new)
    x.scatter_(2, at expanded to new's size, new)
    x.index_put_((at,), new)     along the first axis

All of them are x.index_copy_(axis, at, new). A new spelling is one function here. Everything reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from akvq_fx.passes.patterns.nodes import (
    ALLOCATIONS,
    NoMatch,
    argument,
    dimension,
    index_by_axis,
    is_packed,
    is_returned,
    is_tensor,
    op,
    same_size,
    shape,
    value,
)

POSITIONS = (torch.int64, torch.int32)
UNKNOWN = "the write is not x[:, :, at] = new, nor one of its other spellings"


@dataclass
class Place:
    """Where a write goes. at: a tensor of positions; None where they are start, start + 1, ...

    count   of positions; None where the write takes as many as it is given
    one     it is a single position, and what is written lacks the axis
    """

    axis: int
    at: Node | None
    start: object = None
    count: object = None
    one: bool = False


@dataclass
class StaticWrite:
    """cache.index_copy_(place.axis, place.at, new)"""

    cache: Node
    new: Node
    place: Place


FORMS: dict[str, Callable[[Node], tuple[Node, object, Place]]] = {}


def declare(name: str):
    def put(function):
        FORMS[name] = function
        return function

    return put


def written_cache(node: Node) -> Node | None:
    """The cache that a node writes into: packed, or allocated in this graph and returned; None for anything else.

    In other tensors a position may be negative, which index_copy_ does not take (sliding windows write at -1).
    """
    if op(node) not in FORMS:
        return None
    target = node.args[0]
    if op(node) == "copy_":
        target = target.args[0] if op(target) in ("getitem", "narrow") else None  # all of a buffer is another matter
    if len(shape(target)) not in (3, 4):
        return None
    kept = op(target) in ALLOCATIONS and (len(shape(target)) == 4 or is_kept(target))
    return target if kept or (is_packed(target) and value(target).static) else None


def is_kept(buffer: Node) -> bool:
    """The graph returns it, or the result of a write into it, which is the same tensor."""
    results = [user for user in buffer.users if op(user).endswith("_") and user.args[0] is buffer]
    return any(map(is_returned, (buffer, *results)))


def static_write(node: Node) -> StaticWrite:
    """The write of a node that `written_cache` knows. Raises NoMatch where index_copy_ would not mean the same."""
    cache, new, place = FORMS[op(node)](node)
    sizes = list(shape(cache))
    count = place.count
    if count is None:
        count = shape(new)[place.axis] if len(shape(new)) == len(sizes) else 1
    if place.at is not None and value(place.at).dtype not in POSITIONS:
        raise NoMatch(f"the positions are {value(place.at).dtype}, accepted: torch.int64, torch.int32", node)
    if not is_tensor(new) or value(new).dtype != value(cache).dtype:
        raise NoMatch(f"what is written is no tensor of the cache's dtype {value(cache).dtype}", node)
    sizes[place.axis : place.axis + 1] = [] if place.one else [count]
    if len(shape(new)) != len(sizes) or not all(map(same_size, shape(new), sizes)):
        raise NoMatch(f"what is written is {list(shape(new))}, accepted: {sizes}", node)
    if place.axis != 2 and op(cache) in ALLOCATIONS and not is_kept(cache):
        raise NoMatch("the buffer is not returned", node)
    return StaticWrite(cache, new, place)


def place_of(index, cache: Node, node: Node) -> Place:
    """Of x[index], where one axis is indexed and the others are taken whole."""
    index = index_by_axis(index, len(shape(cache))) or ()
    chosen = [(axis, i) for axis, i in enumerate(index) if not (isinstance(i, slice) and i == slice(None))]
    if len(chosen) != 1:
        raise NoMatch(UNKNOWN, node)
    ((axis, i),) = chosen
    if isinstance(i, slice):
        if i.step not in (None, 1) or i.stop is None:
            raise NoMatch(UNKNOWN, node)
        start = 0 if i.start is None else i.start
        return Place(axis, None, checked(start, node), value(i.stop) - value(start))
    if is_tensor(i) and len(shape(i)) <= 1:
        return Place(axis, i, count=shape(i)[0] if shape(i) else 1, one=not shape(i))
    if isinstance(value(i), (int, torch.SymInt)):
        return Place(axis, None, checked(i, node), 1, one=True)
    raise NoMatch(UNKNOWN, node)


def checked(start, node: Node):
    """A position. Raises NoMatch where it counts from the end; adds a guard where it is a symbol."""
    number = value(start)
    if not isinstance(number, (int, torch.SymInt)) or not bool(number >= 0):
        raise NoMatch("the write begins at a position that counts from the end", node)
    return start


@declare("setitem")
def set_item(node: Node):
    """x[:, :, at] = new"""
    cache, index, new = node.args
    return cache, new, place_of(index, cache, node)


@declare("copy_")
def copied(node: Node):
    """x[:, :, a:b].copy_(new), x.narrow(2, a, q).copy_(new)"""
    view, new = node.args[0], argument(node, 1, "src")
    if op(view) not in ("getitem", "narrow"):
        raise NoMatch(UNKNOWN, node)
    cache = view.args[0]
    if op(view) == "getitem":
        return cache, new, place_of(view.args[1], cache, node)
    axis = dimension(view, 1, len(shape(cache)))
    start, count = checked(argument(view, 2, "start"), node), value(argument(view, 3, "length"))
    return cache, new, Place(axis, None, start, count)


@declare("scatter_")
def scattered(node: Node):
    """x.scatter_(2, at[None, None, :, None].expand(new.shape), new)"""
    cache, index, new = node.args[0], argument(node, 2, "index"), argument(node, 3, "src")
    rank = len(shape(cache))
    axis = dimension(node, 1, rank)
    why = NoMatch("the write is not x.scatter_(dim, at expanded to new's size, new)", node)
    if op(index) not in ("expand", "expand_as") or argument(node, 4, "reduce") is not None or axis is None:
        raise why
    at = index.args[0]
    column = len(shape(at)) == rank and all(same_size(size, 1) for i, size in enumerate(shape(at)) if i != axis)
    while column and len(shape(at)) > 1 and op(at) in ("getitem", "view", "reshape", "unsqueeze"):
        at = at.args[0]  # with q elements before and after, these keep their order
    if not column or len(shape(at)) != 1 or not same_size(shape(at)[0], shape(index)[axis]):
        raise why
    return cache, new, Place(axis, at, count=shape(at)[0])


@declare("index_put_")
def put(node: Node):
    """x.index_put_((at,), new)"""
    cache, indices, new = node.args[0], argument(node, 1, "indices"), argument(node, 2, "values")
    if argument(node, 3, "accumulate", False) or len(indices) != 1 or len(shape(indices[0])) != 1:
        raise NoMatch(UNKNOWN, node)
    return cache, new, Place(0, indices[0], count=shape(indices[0])[0])


__all__ = ["FORMS", "StaticWrite", "static_write", "written_cache"]
