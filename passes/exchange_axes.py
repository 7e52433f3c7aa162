"""Have the graph see every cache as [B, H, T, D], where the model keeps its axes in another order.

Before   whole = cat([past, k], 1); sdpa(q, whole.transpose(1, 2), ...); return whole
After    whole = cat([past, k.transpose(1, 2)], 2); sdpa(q, whole, ...); return whole
Needs    none                        Gives    kept_axes, unexchanged
Follows  canonicalize, batch_axes    Leaves   graphs with no such cache as they were, numbers as they were

A cache that came in packed says what its axes are. One that did not is told by how attention reads it
(patterns/kept.py), and exchanged only where it can be packed. What the caller sees keeps its axes: clean_up has the
runtime make packed tensors of them, and puts them back in order where a cache was not packed after all. Attention that
is written out exchanges the axes of its caches when it becomes a call (rewrite_attention).
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from akvq_fx.kernels.cache_axes import STANDARD, CacheAxes
from akvq_fx.passes.parts_of_buffers import (
    last_of,
    packed_parts,
    prefix,
    read_in_parts,
    view_of_plain,
    written_in_order,
)
from akvq_fx.passes.patterns.attention import attention_of, is_attention, prefix_of
from akvq_fx.passes.patterns.cache_write import CacheWrite, cache_write_of, is_packed
from akvq_fx.passes.patterns.cached import check_caches, fix_heads, read_from
from akvq_fx.passes.patterns.kept import (
    Kept,
    Path,
    Roles,
    axes_as,
    kept_behind,
    moved_to,
    path_of,
    through_slices,
    way_back,
)
from akvq_fx.passes.patterns.nodes import (
    NoMatch,
    dimension,
    is_returned,
    is_tensor,
    op,
    same_size,
    shape,
    tensors_of_cat,
    value,
)
from akvq_fx.passes.patterns.parts import TokenWrite
from akvq_fx.passes.state import GraphState, View
from akvq_fx.report import PassReport


@dataclasses.dataclass
class Exchanged:
    """A cache as the graph now sees it; `kept` is None where this was done before."""

    whole: Node
    write: CacheWrite | None
    kept: Kept | None
    read: Node | None = None  # its first tokens, which are all that attention reads; None for the whole cache


def exchange_axes(state: GraphState) -> PassReport:
    report = PassReport("exchange_axes")
    for past in filter(is_packed, state.placeholders):
        parts = packed_parts(past)
        if parts is None or (value(past).axes, parts[1]) == (STANDARD, None):
            continue  # where it is in the model's axes it goes back to 16 bits (read_unmatched)
        bring_in(state, past, *parts)
        report.match(past.name)
    for node in [n for n in state.graph.nodes if is_attention(n)]:
        try:
            if read_in_order(state, node):
                report.match(node.name)
        except NoMatch as miss:
            report.miss(node.name, miss.reason, miss.node)
    return report


def bring_in(state: GraphState, past: Node, writes: list[TokenWrite], rows) -> None:
    """A packed cache: the placeholder stands for [B, H, T, D], tokens come along axis 2, others read it as it was.

    rows    it stands for so many of its rows, the first ones; None for all
    """
    packed = value(past)
    axes, standard = packed.axes, packed.in_standard_axes(rows)
    heads, channels = int(standard.shape[1]), standard.shape[3]  # int() of a symbol adds a guard
    groups, roles = axes_as(past, axes, heads, channels)
    growths, queue = [], [(past, groups)]
    while queue:
        node, groups = queue.pop(0)
        for user in node.users:
            parts = tensors_of_cat(user) if op(user) == "cat" else []
            if len(parts) == 2 and parts[0] is node and not is_packed(parts[1]):
                order = roles.axes_of(groups)
                if order and dimension(user, 1, order.rank) == order.tokens:
                    growths.append((user, groups, order))
            elif (moved := moved_to(user, node, groups)) is not None:
                queue.append((user, moved))
    readers = [u for u in past.users if is_tensor(u) or not isinstance(value(u), (int, bool, torch.Size, torch.SymInt))]
    grown = []
    for cat, groups, order in growths:
        with state.before(cat):
            new = in_order(state, tensors_of_cat(cat)[1], order, heads, channels)
            size = shape(past)[axes.rows], heads, shape(cat)[order.tokens], channels
            grown.append((joined(state, past, new, size, value(cat).dtype), cat, groups))
    last = None
    past.meta["example_value"] = standard
    state.kept_axes[past] = axes
    if rows is not None:
        state.taken_rows[past] = rows
    for write in writes:
        put = lambda new: in_order(state, new, axes, heads, channels)
        last = written_in_order(state, past, write, axes, put)
    read_in_parts(state, past, axes)
    readers = [u for u in readers if u in past.users and not (is_write(u, past) or is_prefix(u, past))]
    after_inputs = next(n for n in state.graph.nodes if n.op != "placeholder")
    with state.before(after_inputs if last is None else last.next):
        back = state.moved(past, axes.from_standard(), state.fake(packed, standard.shape))
    for user in readers:
        if op(user) != "output" and user not in [whole for whole, _, _ in grown]:
            user.replace_input_with(past, back)
    unread = [back]
    for whole, cat, groups in grown:
        returned = returned_as(cat, groups, roles, axes)
        if returned is not None:
            state.graph.output_node().replace_input_with(returned, whole)
        with state.graph.inserting_before(whole.next):
            order = roles.axes_of(groups)
            old = state.moved(whole, order.from_standard(), value(whole))
        cat.replace_all_uses_with(old)
        state.kept_axes[whole] = axes
        unread += [cat, old]
    state.forget(*unread)


def returned_as(node: Node, groups, roles: Roles, wanted: CacheAxes) -> Node | None:
    """The node, or a move of it, that the graph returns in the axes in which the cache came in."""
    queue = [(node, groups)]
    while queue:
        node, groups = queue.pop(0)
        if is_returned(node) and roles.axes_of(groups) == wanted:
            return node
        queue += [(u, moved) for u in node.users if (moved := moved_to(u, node, groups)) is not None]
    return None


def read_in_order(state: GraphState, node: Node) -> bool:
    """Have a call of attention read its caches as [B, H, T, D]; False where nothing is in another order.

    Raises NoMatch, and leaves the graph as it was, where the caches cannot be packed.
    """
    arguments = {name: node.kwargs.get(name) for name in ("key", "value")}
    paths = {name: path_of(x) for name, x in arguments.items()}
    there = set(state.graph.nodes)
    kept = {name: path and kept_or_said(state, *path) for name, path in paths.items()}
    if all(kept.values()) and kept["key"].whole is kept["value"].whole:
        return False  # keys that are values are a residual stream
    try:
        found = {name: exchanged(state, *path, kept[name]) for name, path in paths.items() if path}
        if not any(found.values()):
            return False
        if any(half and half.kept for half in found.values()):
            check(state, node, found)
    except NoMatch as miss:
        state.forget(*[n for n in state.graph.nodes if n not in there])
        for half in filter(None, kept.values()):
            state.unexchanged[half.whole] = miss
        raise
    for name, half in found.items():
        if half:
            with state.before(node):
                new = grouped(state, half.read or half.whole, shape(arguments[name])[1])
            node.kwargs = {**node.kwargs, name: new}
            if half.kept:
                state.kept_axes.update(committed(state, half))
            state.forget(arguments[name])
    return True


def kept_or_said(state: GraphState, path: Path, roles: Roles) -> Kept | None:
    """kept_behind; where it raises NoMatch the report has the reason."""
    try:
        return kept_behind(path, roles)
    except NoMatch as miss:
        state.unexchanged[through_slices(path, roles)[0][-1][0]] = miss
        raise


def exchanged(state: GraphState, path: Path, roles: Roles, kept: Kept | None) -> Exchanged | None:
    """The cache behind an argument of attention as [B, H, T, D]; None where it is no cache, or has these axes."""
    path, cut = through_slices(path, roles)
    for node, axes in path:
        if (known := state.exchanged.get(node)) and roles.axes_of(axes) == known[1]:
            return Exchanged(known[0], None, None, part_read(state, known[0], known[1], cut))
        if len(path) > 1 and node in state.kept_axes and roles.axes_of(axes) == STANDARD:
            return Exchanged(node, None, None, cut)
    return built(state, kept, *(size_of(roles.letters[letter]) for letter in "hd")) if kept else None


def size_of(axes: tuple) -> int | None:
    """The size of a group of axes, None where it is no plain number."""
    size = 1
    for axis in axes:
        size = size * axis.size
    return int(size) if getattr(size, "is_Integer", isinstance(size, int)) else None


def built(state: GraphState, kept: Kept, heads: int | None, channels: int | None) -> Exchanged:
    """Nodes for a cache as [B, H, T, D], which nothing reads yet. Raises NoMatch where heads are no plain number."""
    if heads is None or channels is None:
        raise NoMatch("its heads or channels are no fixed number", kept.whole)
    if kept.write is not None:
        put = lambda new: in_order(state, new, kept.axes, heads, channels)
        whole, read, write = view_of_plain(state, kept, heads, channels, put)
        return Exchanged(whole, write, kept, read)
    if kept.copy is not None:
        return filled(state, kept, heads, channels)
    if kept.past is None:
        with state.before(kept.new.next):
            whole = state.moved(kept.new, kept.new_axes.to_standard(heads, channels), value(kept.new))
        return Exchanged(whole, CacheWrite("first", None, whole, whole), kept)
    with state.before(kept.whole):
        past = state.moved(kept.past, kept.axes.to_standard(heads, channels), value(kept.past))
        new = in_order(state, kept.new, kept.new_axes, heads, channels)
        length = shape(kept.whole)[kept.new_axes.tokens]
        size = (shape(past)[0], heads, length, channels)
        whole = joined(state, past, new, size, value(kept.whole).dtype)
    return Exchanged(whole, CacheWrite("grow", past, new, whole), kept)


def is_write(node: Node, past: Node) -> bool:
    return op(node) == "index_copy_" and node.args[0] is past


def is_prefix(node: Node, past: Node) -> bool:
    """What read_in_parts has put in place of a slice."""
    return prefix_of(node)[0] is past


def filled(state: GraphState, kept: Kept, heads: int, channels: int) -> Exchanged:
    """Another buffer in place of one that the graph allocates, and the same write into it."""
    sizes = dict(zip(kept.axes.groups, shape(kept.whole), strict=True)) | {"h": heads, "d": channels}
    size = tuple(sizes[letter] for letter in "bhtd")
    at = kept.copy.args[2]
    with state.before(kept.copy):
        new = in_order(state, kept.copy.args[3], kept.axes, heads, channels)
        seen = state.fake(value(kept.whole), size)
        whole = state.call(torch.zeros, tuple(map(state.size_node, size)), dtype=seen.dtype, device=seen.device)
        whole.meta["example_value"] = seen
        copy = state.graph.call_method("index_copy_", (whole, 2, at, new))
        copy.meta["example_value"] = seen
    read = part_read(state, whole, kept.axes, kept.cut)
    return Exchanged(whole, CacheWrite("fill", None, new, whole, at), kept, read)


def part_read(state: GraphState, whole: Node, axes: CacheAxes, cut: Node | None) -> Node | None:
    """The first tokens of a cache that attention reads from a slice of it in these axes."""
    if cut is None:
        return None
    length = shape(cut)[axes.tokens]
    with state.before(last_of(whole, cut).next):
        return prefix(state, whole, state.size_node(length), length)


def in_order(state: GraphState, node: Node, order: CacheAxes, heads: int, channels: int) -> Node:
    """A tensor of these axes as [B, H, T, D]: what it was made of where that has them, else moves of it."""
    groups, roles = axes_as(node, order, heads, channels)
    for source, axes in way_back(node, groups):
        if roles.axes_of(axes) == STANDARD and not is_packed(source):
            return source
    return state.moved(node, order.to_standard(heads, channels), value(node))


def joined(state: GraphState, past: Node, new: Node, size: tuple, dtype: torch.dtype) -> Node:
    whole = state.call(torch.cat, [past, new], 2)
    whole.meta["example_value"] = state.fake(value(new), size, dtype)
    return whole


def grouped(state: GraphState, whole: Node, heads) -> Node:
    """Heads repeated for grouped queries, as the argument that this is put in place of had them."""
    own = shape(whole)[1]
    if same_size(own, heads):
        return whole
    return state.moved(
        whole, [("repeat_interleave", int(heads) // int(own), 1)], state.fake(value(whole), shape(whole))
    )


def check(state: GraphState, node: Node, found: dict[str, Exchanged | None]) -> None:
    """Raises NoMatch where the call's caches could not be packed."""
    attention, writes, lengths = attention_of(node), {}, {}
    for name, half in found.items():
        if half:
            setattr(attention, name, half.whole)
            length = shape(half.read or half.whole)[2]
            writes[name], lengths[name] = half.write or cache_write_of(half.whole), length
    for name in {"key", "value"} - writes.keys():
        whole, lengths[name] = read_from(getattr(attention, name))
        writes[name] = cache_write_of(whole)
    fix_heads(*writes.values())
    check_caches(attention, writes["key"], writes["value"], lengths["key"], lengths["value"])


def committed(state: GraphState, half: Exchanged) -> dict[Node, CacheAxes]:
    """Have the graph return the cache that attention now reads; its axes outside of the graph."""
    kept = half.kept
    if kept.write is not None:
        state.views.setdefault(half.whole, View(kept.whole, kept.axes, half.write))
        return {}
    state.graph.output_node().replace_input_with(kept.returned, half.whole)
    state.exchanged[kept.whole] = half.whole, kept.new_axes
    if kept.copy is not None:
        state.effects.update(user for user in half.whole.users if op(user) == "index_copy_")
        if set(kept.whole.users) == {kept.copy}:
            state.effects.discard(kept.copy)
            state.graph.erase_node(kept.copy)
    state.forget(kept.returned)
    return {half.whole: kept.axes}


exchange_axes.needs = ()
exchange_axes.gives = ("kept_axes", "unexchanged")
exchange_axes.follows = ("canonicalize", "batch_axes")
exchange_axes.required = "packed caches that keep their model's own axes would be read in other ones"
