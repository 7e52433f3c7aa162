"""Caches that a model keeps in one tensor: how they lie in it, told by how the graph reads them.

    stacked    torch.stack([k, v]) returned, both[0] and both[1] read; both.unbind(0); layers: torch.stack(all)
    joined     torch.cat([k, v], -1) returned, both.chunk(2, -1) read; both[..., :D]

A level is (how, axis, sizes): "stack" or "cat", the axis of the whole along which the parts lie, and the size of each
part along it (1 where they are stacked). Several levels lie in each other: [L, 2, B, H, T, D]. Everything here reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from akvq_fx.passes.patterns.axes import is_reshape, permutation
from akvq_fx.passes.patterns.cache_write import is_mutation
from akvq_fx.passes.patterns.nodes import (
    NOOPS,
    NoMatch,
    argument,
    dimension,
    index_by_axis,
    is_tensor,
    op,
    same_size,
    shape,
    tensors_of_cat,
    value,
)
from akvq_fx.passes.patterns.static_write import StaticWrite, static_write
from akvq_fx.passes.patterns.unknown_caches import is_read_of, read_as


@dataclass(frozen=True)
class Level:
    how: str
    axis: int
    sizes: tuple[int, ...]

    def inner(self, dim: int) -> int | None:
        """An axis of the whole as a part has it, None for the one along which the parts lie."""
        if dim == self.axis:
            return None
        return dim - 1 if self.how == "stack" and dim > self.axis else dim

    def rest_of(self, index: list | None) -> tuple | None:
        """What x[index] takes of each part, where it takes all parts; else None."""
        if index is None or index[self.axis][1] != slice(None):
            return None
        return tuple(i for axis, i in index if self.how == "cat" or axis != self.axis)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where each part begins and ends along the axis."""
        ends = [sum(self.sizes[:i]) for i in range(len(self.sizes) + 1)]
        return list(zip(ends, ends[1:], strict=False))


@dataclass
class Reads:
    """A node that reads one part of a whole: part number `part`, then what `rest` indexes of it (None: all of it)."""

    node: Node
    part: int
    rest: tuple | None = None


def level_of(whole: Node) -> Level | None:
    """How caches lie in a tensor that the graph returns; None where it is no tensor of several caches."""
    rank = len(shape(whole))
    if not is_tensor(whole) or rank < 3 or not value(whole).is_floating_point():
        return None
    if op(whole) == "stack":
        axis, count = dimension(whole, 1, rank), len(tensors_of_cat(whole))
        return Level("stack", axis, (1,) * count) if axis is not None and is_read_of(whole) else None
    if read_as(whole) != "part":
        return None
    users = users_of(whole)
    levels = {level for user in users if (level := level_read(user, whole)) is not None}
    slices = [place for user in users if (place := slice_read(user, whole)) is not None]
    if not levels and slices and (level := level_of_slices(whole, slices)):
        return level
    levels |= {level for user in users if (level := level_behind(user, whole)) is not None}
    return levels.pop() if len(levels) == 1 else None


def level_behind(user: Node, whole: Node) -> Level | None:
    """The level that is told by what reads some tokens of the whole, or the whole with its axes moved."""
    if not user.args or written_into(user.args[0]) is not whole:
        return None
    order = permutation(user)
    if order is None and op(user) not in NOOPS and not is_slices(user):
        return None
    level = level_of(user)
    return level if level is None or order is None else Level(level.how, order[level.axis], level.sizes)


def written_into(node: Node) -> Node:
    """The tensor that a write in place gives back, else the node itself."""
    while isinstance(node, Node) and node.args and isinstance(node.args[0], Node) and is_mutation(node, node.args[0]):
        node = node.args[0]
    return node


def users_of(whole: Node) -> list[Node]:
    """Users of a tensor, and of what writes in place give back of it."""
    found, queue = [], [whole]
    while queue:
        node = queue.pop()
        found += node.users
        queue += [user for user in node.users if is_mutation(user, node)]
    return found


def level_read(user: Node, whole: Node) -> Level | None:
    """The level that an op takes a part of, where it says so alone."""
    rank, name = len(shape(whole)), op(user)
    if not user.args or written_into(user.args[0]) is not whole:
        return None
    if name in ("unbind", "select"):
        axis = dimension(user, 1, rank)
        return stacked(whole, axis)
    if name in ("chunk", "split", "split_with_sizes", "tensor_split"):
        axis = dimension(user, 2, rank)
        parts = value(user)
        if axis is None or not isinstance(parts, (tuple, list)):
            return None
        sizes = tuple(part.shape[axis] for part in parts)
        return Level("cat", axis, tuple(map(int, sizes))) if all(isinstance(n, int) for n in sizes) else None
    if name == "getitem":
        numbers = [axis for axis, i in index_of(user, whole) or () if is_number(i)]
        return stacked(whole, numbers[0]) if numbers and not is_reshape(user) else None
    return None


def stacked(whole: Node, axis: int | None) -> Level | None:
    count = None if axis is None else shape(whole)[axis]
    return Level("stack", axis, (1,) * count) if isinstance(count, int) else None


def is_number(i) -> bool:
    return isinstance(i, int) and not isinstance(i, bool)


def slice_read(user: Node, whole: Node) -> tuple[int, int, int] | None:
    """(axis, begin, end) of x[..., a:b] and x.narrow(axis, a, b - a), where the numbers are known."""
    if not user.args or written_into(user.args[0]) is not whole or not shape(user):
        return None
    if op(user) == "narrow":
        axis, begin, count = (
            dimension(user, 1, len(shape(whole))),
            argument(user, 2, "start"),
            argument(user, 3, "length"),
        )
        return (axis, begin, begin + count) if axis is not None and is_number(begin) and is_number(count) else None
    if op(user) != "getitem":
        return None
    chosen = [(axis, i) for axis, i in index_of(user, whole) or () if i != slice(None)]
    if len(chosen) != 1 or not isinstance(chosen[0][1], slice):
        return None
    ((axis, i),) = chosen
    size = shape(whole)[axis]
    if not isinstance(size, int) or not all(x is None or is_number(x) for x in (i.start, i.stop, i.step)):
        return None
    begin, end, step = i.indices(size)
    return (axis, begin, end) if step == 1 and len(shape(user)) == len(shape(whole)) else None


def level_of_slices(whole: Node, slices: list[tuple[int, int, int]]) -> Level | None:
    """Slices that cover an axis and do not overlap."""
    (axis, *others), places = {axis for axis, _, _ in slices}, sorted({(a, b) for _, a, b in slices})
    ends = [0, *(b for _, b in places)]
    whole_axis = not others and [a for a, _ in places] == ends[:-1] and same_size(ends[-1], shape(whole)[axis])
    return Level("cat", axis, tuple(b - a for a, b in places)) if whole_axis and len(places) > 1 else None


def index_of(user: Node, whole: Node) -> list[tuple[int, object]] | None:
    """(axis, index) for each axis of x[index]; None where it adds axes or does not say."""
    index = index_by_axis(user.args[1], len(shape(whole)))
    return None if index is None else list(enumerate(index))


def reads_of(user: Node, whole: Node, level: Level) -> list[Reads] | None:
    """The parts that a user of the whole reads, None where it does anything else with it."""
    name, rank = op(user), len(shape(whole))
    if name in ("getitem", "setitem"):
        return indexed(user, whole, level)
    if name == "select" and dimension(user, 1, rank) == level.axis and level.how == "stack":
        number = argument(user, 2, "index")
        return [Reads(user, number % len(level.sizes))] if is_number(number) else None
    if name in ("unbind", "chunk", "split", "split_with_sizes", "tensor_split"):
        own = level_read(user, whole)
        parts = [u for u in user.users if op(u) == "getitem" and is_number(u.args[1])]
        if own != level or len(parts) != len(user.users):
            return None
        return [Reads(u, u.args[1] % len(level.sizes)) for u in parts]
    place = slice_read(user, whole) if name == "narrow" else None
    return sliced(user, place, level)


def indexed(user: Node, whole: Node, level: Level) -> list[Reads] | None:
    index = index_of(user, whole)
    if index is None:
        return None
    if level.how == "cat":
        return sliced(user, slice_read(user, whole), level) if op(user) == "getitem" else None
    number = index[level.axis][1]
    if not is_number(number):
        return None
    rest = tuple(i for axis, i in index if axis != level.axis)
    all_of_it = op(user) == "getitem" and all(i == slice(None) for i in rest if not isinstance(i, Node))
    all_of_it = all_of_it and not any(isinstance(i, Node) for i in rest)
    return [Reads(user, number % len(level.sizes), None if all_of_it else rest)]


def sliced(user: Node, place: tuple | None, level: Level) -> list[Reads] | None:
    if place is None or level.how != "cat" or place[0] != level.axis or place[1:] not in level.places:
        return None
    return [Reads(user, level.places.index(place[1:]))]


def is_slices(node: Node) -> bool:
    """x[:, :, a:b], x.narrow(2, a, n): as many axes as x has."""
    source = node.args[0] if node.args else None
    if op(node) not in ("getitem", "narrow") or len(shape(node)) != len(shape(source)):
        return False
    index = index_of(node, source) if op(node) == "getitem" else []
    return index is not None and all(isinstance(i, slice) for _, i in index)


def is_part_of_each(node: Node, whole: Node, level: Level) -> bool:
    """Slices of some axes, which take the same of every part."""
    if not is_slices(node) or node.args[0] is not whole:
        return False
    if op(node) == "narrow":
        return dimension(node, 1, len(shape(whole))) not in (None, level.axis)
    return level.rest_of(index_of(node, whole)) is not None


def sizes_read(user: Node) -> list[tuple[Node, int]]:
    """(node, axis) of each size that x.size() and x.shape, or x.size(axis), read."""
    if op(user) == "size" and isinstance(dim := argument(user, 1, "dim"), int):
        return [(user, dim)]
    whole = op(user) == "size" or op(user) == "getattr" and user.args[1] == "shape"
    parts = [u for u in user.users if op(u) == "getitem" and is_number(u.args[1])] if whole else []
    return [(u, u.args[1]) for u in parts] if len(parts) == len(user.users) else []


def write_of(node: Node) -> StaticWrite | None:
    """A write at positions that a tensor gives."""
    try:
        write = static_write(node)
    except NoMatch:
        return None
    return write if write.place.at is not None and not write.place.one else None


__all__ = [
    "Level",
    "Reads",
    "index_of",
    "is_part_of_each",
    "is_slices",
    "level_of",
    "reads_of",
    "sizes_read",
    "users_of",
    "write_of",
    "written_into",
]
