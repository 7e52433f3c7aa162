"""Caches that a model keeps in other axes than [B, H, T, D], told by how attention reads them.

first    k [B, T, H, D] returned, k.transpose(1, 2) read
fill     zeros [B, T, H, D] returned, zeros.index_copy_(1, at, k), zeros.transpose(1, 2) read
grow     cat([past, k], 1) returned, its transpose read; or past.transpose(1, 2) grows, and its transpose is returned

Everything between is followed by what it does to axes (patterns/axes.py), so spellings do not matter, and no axis is
known by its size. What cannot be followed is no cache here; patterns/unknown_caches.py gives it a row in the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from akvq_fx.kernels.cache_axes import STANDARD, CacheAxes
from akvq_fx.passes.patterns.attention import LAYOUT_OPS
from akvq_fx.passes.patterns.axes import Axes, Axis, after, before, flat, is_reshape, new_axes
from akvq_fx.passes.patterns.cache_write import (
    ALLOCATIONS,
    is_buffer,
    is_made_anew,
    is_mutation,
    is_packed,
    written_views,
)
from akvq_fx.passes.patterns.nodes import NoMatch, dimension, is_returned, op, shape, tensors_of_cat, value
from akvq_fx.passes.patterns.parts import TokenWrite, part_of, rows_of, writes_of

Path = list[tuple[Node, Axes]]
REACH = 6  # ops between a cache and the tensor that the graph returns of it


@dataclass
class Roles:
    """Which axes of a tensor are its batch, KV heads, tokens and channels: groups of `Axis`."""

    batch: tuple
    heads: tuple
    tokens: tuple
    channels: tuple

    @property
    def letters(self) -> dict[str, tuple]:
        return dict(zip("bhtd", map(flat, (self.batch, self.heads, self.tokens, self.channels)), strict=True))

    def axes_of(self, groups: Axes) -> CacheAxes | None:
        """The order of a tensor's axes; None where it is no order that a cache may have."""
        known = self.letters
        known["hd"] = known["h"] + known["d"]
        one_head = all(axis.size == 1 for axis in known["h"])
        names = []
        for group in map(flat, groups):
            real = tuple(axis for axis in group if axis.size != 1) or group
            name = next((name for name, axes in known.items() if axes in (group, real)), None)
            names.append("h" if one_head and not group else name)
        if one_head and "h" not in names:  # an axis of one head may be anywhere, so it is nowhere
            names = ["hd" if name == "d" else name for name in names]
        try:
            return CacheAxes(tuple(names))
        except (TypeError, ValueError):
            return None


@dataclass
class Kept:
    """One cache tensor of a graph that the model keeps in axes of its own.

    axes      of the tensor that the graph returns, which is `returned`, and of the past one
    whole     what attention reads it from
    past      the placeholder of the tokens so far; None where there are none, or they are part of `new`
    new       the tokens to cache, whose axes are `new_axes`
    copy      the index_copy_ of `new` into `whole`, a buffer that is allocated here; None where the cache grows
    write     the write of `new` into `whole`, a static buffer of the caller's; None for other caches
    cut       the slice of `whole`, its first tokens, that attention reads; None where it reads all of them
    """

    axes: CacheAxes
    returned: Node
    whole: Node
    past: Node | None
    new: Node
    new_axes: CacheAxes
    copy: Node | None = None
    write: TokenWrite | None = None
    cut: Node | None = None


def path_of(argument: Node) -> tuple[Path, Roles] | None:
    """From an attention call's key or value back to what may be a cache: each node on the way with its axes.

    None where a way back is not found, or heads are repeated in tiled order.
    """
    if len(shape(argument)) != 4:
        return None
    batch, heads, tokens, channels = axes = new_axes(argument)
    path = list(way_back(argument, axes))
    there = {axis for group in path[-1][1] for axis in flat(group)}
    own = tuple(axis for axis in flat(heads) if axis in there)
    if flat(heads)[: len(own)] != own or any(axis not in there for axis in (*flat(batch), *flat(tokens))):
        return None  # repeats stand before heads, or rows are repeated
    return path, Roles(batch, own or (Axis(1),), tokens, channels)  # where no axis is left, one head was repeated


def way_back(node: Node, axes: Axes) -> Iterator[tuple[Node, Axes]]:
    """The node and what it is moved from, as long as nothing but axes change."""
    while True:
        yield node, axes
        if is_returned(node) or op(node) in ("placeholder", "cat"):
            return
        source = moved_from(node, axes)
        if source is None:
            return
        node, axes = node.args[0], source


def moved_from(node: Node, axes: Axes) -> Axes | None:
    """Axes of an op's argument, None where it computes something."""
    try:
        source = before(node, axes)
    except NoMatch:
        return None
    return source if source is not None and value(node.args[0]).dtype == value(node).dtype else None


def kept_behind(path: Path, roles: Roles) -> Kept | None:
    """The cache at the end of the way back from attention; None where it is none, or one of the standard axes."""
    path, cut = through_slices(path, roles)
    node, axes = path[-1]
    order = roles.axes_of(axes)
    if op(node) == "placeholder" and not is_packed(node) and order is not None and written_views(node):
        return in_buffer(node, order, cut)
    if order is not None and op(node) == "cat" and dimension(node, 1, len(shape(node))) == order.tokens:
        return grown(node, axes, order, roles)
    for node, axes in path:
        if writes := [user for user in node.users if is_mutation(user, node)]:
            kept = filled(node, roles.axes_of(axes), writes)
            if kept is not None:
                kept.cut = cut
            return kept
        if is_slice_of_cache(node) or is_made_anew(node):
            return None
        returned, kept = returned_of(node, axes, roles)
        order = roles.axes_of(axes)
        if kept is not None and order is not None:
            return None if kept == STANDARD else Kept(kept, returned, node, None, node, order)
    return None


def through_slices(path: Path, roles: Roles) -> tuple[Path, Node | None]:
    """The way back on to a static buffer of which attention reads the first tokens, of its first rows or all; and the
    slice, None where it reads the whole buffer."""
    node, axes = path[-1]
    if (part := part_of(node)) is None or part[0] is node or not is_buffer(part[0]):
        return path, None
    order = roles.axes_of(axes)
    ours = order is not None and all(
        axis in (order.tokens, order.rows) and span.is_prefix for axis, span in part[1].items()
    )
    return ([*path, (part[0], axes)], node) if ours else (path, None)


def in_buffer(buffer: Node, order: CacheAxes, cut: Node | None) -> Kept | None:
    """A static buffer of the caller's; None where cache_write_of knows it: [B, H, T, D], positions in a tensor.

    Raises NoMatch where it cannot be packed.
    """
    writes = writes_of(buffer, order)
    if len(writes) > 1:
        raise NoMatch("the cache is written twice in one step", writes[1].node)
    (write,) = writes
    if (write.rows, order) == (None, STANDARD) and write.span.at is not None and write.node.args[0] is buffer:
        return None
    write.rows = rows_of(buffer, order, writes)
    return Kept(order, buffer, buffer, buffer, write.new, order, write=write, cut=cut)


def is_slice_of_cache(node: Node) -> bool:
    """Some tokens of a cache, which every step would take for new ones."""
    if op(node) not in ("getitem", "narrow") or is_reshape(node):
        return False
    while op(node) in LAYOUT_OPS:
        node = node.args[0]
    return op(node) in ("cat", "placeholder")


def filled(buffer: Node, order: CacheAxes | None, writes: list[Node]) -> Kept | None:
    """A buffer that this graph allocates, returns, and writes once along its tokens."""
    (copy, *others) = writes
    known = order not in (None, STANDARD) and op(buffer) in ALLOCATIONS and is_returned(buffer)
    if not known or others or op(copy) != "index_copy_" or dimension(copy, 1, order.rank) != order.tokens:
        return None
    return Kept(order, buffer, buffer, None, copy.args[3], order, copy)


def grown(cat: Node, axes: Axes, order: CacheAxes, roles: Roles) -> Kept | None:
    parts = tensors_of_cat(cat)
    returned, kept = returned_of(cat, axes, roles)
    if len(parts) != 2 or kept is None or not all(isinstance(part, Node) for part in parts):
        return None
    past, past_axes = placeholder_behind(parts[0], order)
    if (kept, order) == (STANDARD, STANDARD) and past_axes in (None, STANDARD):
        return None
    if 0 in shape(parts[0]):
        return Kept(kept, returned, cat, None, parts[1], order)
    if past is not None and is_packed(past):
        return None  # one that exchange_axes left as it is, since the graph writes into it
    if past_axes == kept:
        return Kept(kept, returned, cat, past, parts[1], order)
    return Kept(kept, returned, cat, None, cat, order)


def returned_of(node: Node, axes: Axes, roles: Roles, reach: int = REACH) -> tuple[Node | None, CacheAxes | None]:
    """(the node itself or a move of it that the graph returns, its axes as a cache)."""
    queue = [(node, axes)]
    while queue and reach:
        node, axes = queue.pop(0)
        if is_returned(node) and (order := roles.axes_of(axes)) is not None:
            return node, order
        reach -= 1
        for user in node.users:
            if (moved := moved_to(user, node, axes)) is not None:
                queue.append((user, moved))
    return None, None


def moved_to(user: Node, node: Node, axes: Axes) -> Axes | None:
    """Axes of a user of a node, None where it does more than move elements."""
    if not shape(user) or not user.args or user.args[0] is not node or value(user).dtype != value(node).dtype:
        return None
    try:
        return after(user, axes)
    except NoMatch:
        return None


def placeholder_behind(node: Node, order: CacheAxes) -> tuple[Node | None, CacheAxes | None]:
    """(the placeholder that a node of these axes is moved from, its own axes)."""
    if len(shape(node)) != order.rank or "hd" in order.groups and op(node) != "placeholder":
        return None, None
    if op(node) == "placeholder":
        return node, order
    groups = new_axes(node)
    roles = Roles(*(groups[order.groups.index(letter)] for letter in "bhtd"))
    source, axes = list(way_back(node, groups))[-1]
    return (source, roles.axes_of(axes)) if op(source) == "placeholder" else (None, None)


def axes_as(node: Node, order: CacheAxes, heads: int, channels: int) -> tuple[Axes, Roles]:
    """Axes of a tensor that is known to have this order."""
    sizes = dict(zip(order.groups, shape(node), strict=True)) | {"h": heads, "d": channels}
    axis = {letter: (Axis(sizes[letter]),) for letter in "bhtd"}
    groups = tuple(tuple(leaf for letter in group for leaf in axis[letter]) for group in order.groups)
    return groups, Roles(*(axis[letter] for letter in "bhtd"))


__all__ = ["Kept", "Roles", "axes_as", "kept_behind", "moved_to", "path_of", "through_slices"]
