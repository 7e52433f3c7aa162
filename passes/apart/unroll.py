"""Have a graph return a static window that it overwrites as a whole: as a growing cache whose last tokens are kept.

Before   rolled = past.roll(-1, 2); rolled[:, :, [-1]] = new; past.copy_(rolled); sdpa(q, past, ...)
After    kept = cat([past, new], 2)[:, :, -W:]; sdpa(q, kept, ...); return kept

Before   buffer = zeros(B, H, W, D); buffer.copy_(every[:, :, -W:]); sdpa(q, every, ...); return buffer
After    sdpa(q, every, ...); return every[:, :, -W:]

The passes then see a sliding window of a growing cache (akvq_fx/sliding.py). A buffer that came in stays the object
that its caller has: akvq_fx/in_place.py puts what is returned in its place. Where that is not packed in the end, the
graph is rewritten anew with the buffer as it was.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from akvq_fx.exchange import refusal
from akvq_fx.passes.apart.parts import Parts
from akvq_fx.passes.patterns.attention import suffix_of, token_slice
from akvq_fx.passes.patterns.cache_write import TOKENS, written_views
from akvq_fx.passes.patterns.nodes import (
    ALLOCATIONS,
    ancestors,
    argument,
    dimension,
    index_by_axis,
    is_packed,
    is_tensor,
    op,
    outputs,
    same_size,
    shape,
    tensors_of_cat,
    value,
)

FULL = slice(None)


@dataclass
class Windows:
    """A graph without windows that are overwritten as a whole.

    positions  of the arguments in whose place its last results are put, in this order
    made       numbers of the results that were buffers made in the graph
    contact    a window that is packed as a static cache comes in, so that the graph runs once for it
    """

    gm: GraphModule
    positions: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    contact: bool = False

    @property
    def changed(self) -> bool:
        return bool(self.positions or self.made)


def unroll(gm: GraphModule, inputs: list, left: frozenset[str]) -> Windows:
    """inputs: examples, of which plain tensors are the caller's own.
    left: names of nodes that stay as they are, arguments and buffers made in the graph."""
    if not any(op(n) == "copy_" for n in gm.graph.nodes):
        return Windows(gm)
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    windows, kept = Windows(GraphModule(gm, graph)), {}
    places = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    for copy in [n for n in graph.nodes if op(n) == "copy_"]:
        buffer = copy.args[0]
        if buffer in places and type(inputs[places[buffer]]) is Tensor and refusal(inputs[places[buffer]]):
            continue
        if is_window(buffer, copy) and buffer.name not in left and (last := unrolled(copy)) is not None:
            kept[buffer] = last
    results = list(outputs(graph))
    windows.made = [i for i, n in enumerate(results) if n in kept.values()]
    windows.positions = [places[n] for n in kept if n in places]
    graph.output_node().args = ((*results, *(last for n, last in kept.items() if n in places)),)
    windows.contact = any(is_packed(n) and value(n).static for n in kept)
    graph.lint()
    windows.gm.recompile()
    return windows if windows.changed else Windows(gm)


def not_packed(state) -> frozenset[str]:
    """Names of the buffers that were unrolled in vain: what is returned for them is not packed after the passes."""
    windows, packed = state.windows, state.program.outputs
    inputs = state.placeholders
    new = packed[len(packed) - len(windows.positions) :]
    failed = {inputs[place].name for place, how in zip(windows.positions, new, strict=True) if how is None}
    if any(packed[i] is None for i in windows.made):
        failed |= {n.name for n in state.apart.gm.graph.nodes if op(n) in ALLOCATIONS}
    return frozenset(failed)


def is_window(buffer, copy: Node) -> bool:
    """A cache that came in or is made here, [B, H, W, D], into which only this copy_ writes."""
    if not is_tensor(buffer) or op(buffer) not in ("placeholder", *ALLOCATIONS) or len(shape(buffer)) != 4:
        return False
    if not value(buffer).is_floating_point() or [user for user, _ in written_views(buffer)] != [copy]:
        return False
    source = copy.args[1] if len(copy.args) == 2 else None
    return is_tensor(source) and alike(source, buffer) and value(source).dtype == value(buffer).dtype


def alike(one: Node, other: Node) -> bool:
    """Of one shape. Guards on that, as copy_ does: dynamo knows the size of a packed window as a symbol."""
    sizes = zip(value(one).shape, value(other).shape, strict=False)
    return len(shape(one)) == len(shape(other)) and all(bool(a == b) for a, b in sizes)


def unrolled(copy: Node) -> Node | None:
    """What the buffer holds after copy_, as the last tokens of a tensor that attention reads, put in place of all that
    reads the buffer behind it; None, and nothing is changed, for another use of copy_."""
    buffer, source = copy.args
    order = {n: i for i, n in enumerate(copy.graph.nodes)}
    later = [user for user in buffer.users if order[user] > order[copy]]
    earlier = {user for user in buffer.users if order[user] < order[copy]}
    rolled, grown = rolled_by(source, buffer, copy), grown_by(source, buffer)
    if rolled is not None:
        roll, write, new = rolled
        own, before, dead = {roll}, copy, [write, roll]
    elif grown is not None:
        whole, part, start, new = grown
        own, before, dead = {part}, whole, [source, whole, part]
    elif buffer not in ancestors(source) and suffix_of(source)[0] is not source:
        own, before, dead, new = set(), None, [], None
    else:
        return None
    if not all(user in own or is_size(user) for user in earlier):
        return None
    if before is not None:
        with copy.graph.inserting_before(before):
            both = Parts(copy.graph).call(torch.cat, [buffer, new], TOKENS)
            last = tokens_from(both, minus_size(buffer))
            if grown is not None:
                source.replace_all_uses_with(last)
                whole.replace_all_uses_with(last if alike(whole, buffer) else tokens_from(both, start))
        source = last
    for user in [*later, *copy.users]:
        user.replace_input_with(buffer, source)
        user.replace_input_with(copy, source)
    copy.graph.erase_node(copy)
    for node in dict.fromkeys(dead):
        if not node.users:
            copy.graph.erase_node(node)
    return source


def tokens_from(x: Node, start) -> Node:
    return Parts(x.graph).call(operator.getitem, x, (FULL, FULL, slice(start, None)))


def minus_size(buffer: Node):
    """-W, as a number where it is one."""
    size = shape(buffer)[TOKENS]
    if isinstance(size, int):
        return -size
    parts = Parts(buffer.graph)
    return parts.call(operator.neg, parts.method("size", buffer, TOKENS))


def is_size(user: Node) -> bool:
    return op(user) in ("size", "shape", "dim", "device", "dtype", "getattr") and not is_tensor(user)


def rolled_by(source: Node, buffer: Node, copy: Node) -> tuple[Node, Node, Node] | None:
    """(roll, write, new) where source = buffer.roll(-1, 2) with the token `new` written over its last one."""
    if op(source) != "roll" or source.args[0] is not buffer or len(source.users) != 2:
        return None
    shifts, dims = argument(source, 1, "shifts"), argument(source, 2, "dims")
    one = lambda x: x[0] if isinstance(x, (list, tuple)) and len(x) == 1 else x
    if one(shifts) != -1 or one(dims) not in (TOKENS, TOKENS - 4):
        return None
    (write,) = set(source.users) - {copy}
    if op(write) != "setitem" or write.args[0] is not source or write.users or not is_last(write.args[1]):
        return None
    new = write.args[2]
    if not is_tensor(new) or len(shape(new)) != 4 or value(new).dtype != value(buffer).dtype:
        return None
    sizes = [1 if i == TOKENS else size for i, size in enumerate(shape(buffer))]
    return (source, write, new) if all(map(same_size, shape(new), sizes)) else None


def is_last(index) -> bool:
    """x[:, :, [-1]], x[:, :, -1:], or with a tensor of that number; the other axes whole."""
    index = index_by_axis(index, 4)
    if index is None or any(i != FULL for i in (*index[:2], index[3])):
        return False
    at = index[2].args[0] if op(index[2]) == "tensor" else index[2]
    return at == slice(-1, None) or at == [-1]


def grown_by(source: Node, buffer: Node) -> tuple[Node, Node, int, Node] | None:
    """(whole, part, start, new) where source is the last tokens of whole = cat([part, new], 2) with part =
    buffer[:, :, start:]."""
    whole = suffix_of(source)[0]
    parts = tensors_of_cat(whole) if op(whole) == "cat" and dimension(whole, 1, 4) == TOKENS else []
    if len(parts) != 2 or not all(map(is_tensor, parts)) or op(parts[0]) != "getitem" or parts[0].args[0] is not buffer:
        return None
    part, new = parts
    taken = token_slice(part.args[1])
    start = None if taken is None else taken.start
    if not isinstance(start, int) or start <= 0 or taken.stop is not None or taken.step not in (None, 1):
        return None
    return (whole, part, start, new) if value(new).dtype == value(buffer).dtype else None


__all__ = ["Windows", "not_packed", "unroll"]
