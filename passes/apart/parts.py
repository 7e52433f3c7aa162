"""Nodes for the parts of a tensor that holds several caches, made where the tensor is (take_apart).

stack([k, v])                   k, v
cat([past, stack([k, v])], 3)   cat([past.unbind(0)[0], k], 2), cat([past.unbind(0)[1], v], 2)
zeros(2, B, H, T, D)            zeros(B, H, T, D) twice
"""

from __future__ import annotations

import contextlib
import operator

import torch
from torch.fx import Graph, Node

from akvq_fx.passes.patterns.attention import is_attention
from akvq_fx.passes.patterns.axes import permutation
from akvq_fx.passes.patterns.cache_write import is_made_anew, made_anew
from akvq_fx.passes.patterns.nodes import (
    ALLOCATIONS,
    NOOPS,
    NoMatch,
    argument,
    dimension,
    op,
    shape,
    tensors_of_cat,
    value,
)
from akvq_fx.passes.patterns.together import Level, index_of, is_part_of_each
from akvq_fx.passes.patterns.unknown_caches import PARTS
from akvq_fx.passes.patterns.written_attention import PRODUCTS


class Parts:
    """Parts of the tensors of one graph.

    wholes  nodes that stand for packed arguments
    own     nodes that read a whole for its parts, here or in the model's code
    """

    def __init__(self, graph: Graph):
        self.graph, self.wholes, self.own = graph, [], set()
        self.made: dict[tuple[Node, Level], list[Node]] = {}

    def of(self, node: Node, level: Level) -> list[Node]:
        """The parts of a whole, each a node that is made where the whole is."""
        key = node, level
        if key not in self.made:
            self.made[key] = self.new_parts(node, level)
        return self.made[key]

    def new_parts(self, node: Node, level: Level) -> list[Node]:
        rank, count = len(shape(node)), len(level.sizes)
        tensors = tensors_of_cat(node) if op(node) in ("stack", "cat") else []
        along = dimension(node, 1, rank) if tensors else None
        own = level.how == ("stack" if op(node) == "stack" else "cat") and along == level.axis
        if own and len(tensors) == count and (level.how == "stack" or sizes_along(tensors, along) == level.sizes):
            return list(tensors)
        if 0 in shape(node) and rank == 1:
            return [node] * count  # torch.tensor([]), which cat takes for anything
        if op(node) == "cat" and along not in (None, level.axis):
            rows = zip(*(self.of(x, level) for x in tensors), strict=True)
            with self.behind(node):
                return [self.call(torch.cat, list(row), level.inner(along)) for row in rows]
        if op(node) in NOOPS and node.op == "call_method":
            parts = self.of(node.args[0], level)
            with self.behind(node):
                return [self.method(node.target, part, *node.args[1:], **node.kwargs) for part in parts]
        if node.args and isinstance(node.args[0], Node) and is_part_of_each(node, node.args[0], level):
            parts = self.of(node.args[0], level)
            with self.behind(node):
                return [self.part_of_each(node, part, level) for part in parts]
        if (order := permutation(node)) is not None:
            return self.permuted(node, level, order)
        if op(node) in ALLOCATIONS:
            return self.allocated(node, level)
        if is_made_anew(node) or self.is_made_of_packed(node):
            raise NoMatch(f"{PARTS}, and {made_anew(node).reason}", node)  # its tokens would be quantized again
        with self.behind(node):
            if level.how == "stack":
                whole = self.method("unbind", node, level.axis)
            else:
                whole = self.method("split", node, list(level.sizes), level.axis)
            self.own.add(whole)
            return [self.call(operator.getitem, whole, i) for i in range(count)]

    def is_made_of_packed(self, node: Node) -> bool:
        """Its elements are those of a packed cache, moved or changed; products make other tokens."""
        queue, seen = [node], set()
        while queue:
            node = queue.pop()
            if node in self.wholes:
                return True
            if node not in seen and not is_attention(node) and op(node) not in ("linear", *PRODUCTS):
                seen.add(node)
                queue += node.all_input_nodes
        return False

    def part_of_each(self, node: Node, part: Node, level: Level) -> Node:
        """Some tokens or rows of a part, which `node` takes of the whole."""
        if op(node) == "narrow":
            dim, start, length = (argument(node, i, name) for i, name in ((1, "dim"), (2, "start"), (3, "length")))
            return self.method("narrow", part, level.inner(dim % len(shape(node))), start, length)
        return self.call(operator.getitem, part, level.rest_of(index_of(node, node.args[0])))

    def permuted(self, node: Node, level: Level, order: tuple[int, ...]) -> list[Node]:
        source = Level(level.how, order[level.axis], level.sizes)
        dims = [source.inner(dim) for dim in order if level.how == "cat" or dim != source.axis]
        dims = [source.axis if dim is None else dim for dim in dims]
        parts = self.of(node.args[0], source)
        with self.behind(node):
            return [self.method("permute", part, *dims) for part in parts]

    def allocated(self, node: Node, level: Level) -> list[Node]:
        """As many buffers as there are parts. Raises NoMatch where the size is given in another way."""
        first = 1 if op(node).startswith("new_") else 0
        size, place = node.kwargs.get("size"), "size"
        rest = ()
        if size is None:
            given = node.args[first:]
            listed = bool(given) and isinstance(given[0], (tuple, list))
            size, rest = (given[0], given[1:]) if listed else (given, ())
            place = "args"
        if op(node) == "zeros_like" or len(size) != len(shape(node)):
            raise NoMatch(f"a buffer of several caches is made by {op(node)}, accepted: zeros of a size", node)
        parts = []
        with self.behind(node):
            for number in level.sizes:
                own = (*size[: level.axis], *((number,) if level.how == "cat" else ()), *size[level.axis + 1 :])
                args = node.args[:first] if place == "size" else (*node.args[:first], own, *rest)
                kwargs = {**node.kwargs, **({"size": own} if place == "size" else {})}
                made = self.graph.create_node(node.op, node.target, args, kwargs)
                sizes = shape(node)[: level.axis], (number,) * (level.how == "cat"), shape(node)[level.axis + 1 :]
                with fake_mode_of(value(node)):
                    made.meta["example_value"] = torch.empty(
                        sum(sizes, ()), dtype=value(node).dtype, device=value(node).device
                    )
                parts.append(made)
        return parts

    @contextlib.contextmanager
    def behind(self, node: Node):
        following = node.next
        while following.op == "placeholder":
            following = following.next
        with self.graph.inserting_before(following):
            yield

    def call(self, target, *args, **kwargs) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        return self.valued(node, target, args, kwargs)

    def method(self, name: str, x: Node, *args, **kwargs) -> Node:
        node = self.graph.call_method(name, (x, *args), kwargs)
        return self.valued(node, getattr(torch.Tensor, name), (x, *args), kwargs)

    def valued(self, node: Node, function, args, kwargs) -> Node:
        """The node with what dynamo would have seen there."""
        seen = torch.fx.node.map_arg((args, kwargs), lambda n: plain(value(n)))
        with fake_mode_of(seen):
            node.meta["example_value"] = function(*seen[0], **seen[1])
        return node


def plain(seen):
    """A tensor of this shape that is no packed one."""
    leaf = seen.leaves[0] if hasattr(seen, "leaves") else seen
    if not hasattr(leaf, "layout_text"):
        return seen
    with leaf.codes.fake_mode:
        return torch.empty(seen.shape, dtype=seen.dtype, device=seen.device)


def fake_mode_of(seen):
    """The mode in which fake tensors are made, of the first of them."""
    tensors = (x for x in torch.utils._pytree.tree_leaves(seen) if hasattr(x, "fake_mode"))
    return next((x.fake_mode for x in tensors), contextlib.nullcontext())


def sizes_along(tensors: list, axis: int) -> tuple:
    return tuple(shape(x)[axis] if len(shape(x)) > axis else None for x in tensors)


__all__ = ["Parts", "plain"]
