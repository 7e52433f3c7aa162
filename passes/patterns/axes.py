"""What the axes of a tensor stand for, followed through ops that only move elements.

A tensor's axes are a tuple with one group per axis; a group is a tuple of `Axis` in the order in which they are merged:
[B * H, q, D] is ((b, h), (q,), (d,)). An axis of size one along which the tensor is broadcast is the empty group. A
reshape may cut an axis in two, in every tensor that has it: always read a group through `flat`.
"""

from __future__ import annotations

from torch.fx import Node

from akvq_fx.passes.patterns.nodes import NoMatch, argument, dimension, op, same_size, shape, value
from akvq_fx.passes.patterns.values import expression

RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
SAME = ("contiguous", "clone", "detach", "alias")
CASTS = ("to", "float", "half", "bfloat16", "type")
UNKNOWN = "a reshape in which axes cannot be told apart"


class Axis:
    """One axis, known by identity. size: a number, or an expression of size symbols."""

    def __init__(self, size):
        self.size, self.parts = expression(size), ()


Axes = tuple[tuple[Axis, ...], ...]


def flat(group) -> tuple[Axis, ...]:
    """The axes of a group; those that were cut are replaced by their parts."""
    return tuple(leaf for axis in group for leaf in (flat(axis.parts) if axis.parts else (axis,)))


def new_axes(tensor: Node) -> Axes:
    return tuple((Axis(size),) for size in shape(tensor))


def divided(size, by):
    """size / by where that is a whole number, else None."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    ratio = size / by
    if not ratio.is_integer:  # size symbols are known to be whole numbers
        return None
    return int(ratio) if ratio.is_Integer else ratio


def regrouped(axes: Axes, sizes: tuple, node: Node) -> Axes:
    """The axes of a tensor after a reshape to these sizes. Raises NoMatch where they cannot be told apart."""
    left = [axis for group in axes for axis in flat(group)]
    groups = [taken(left, expression(size), node) for size in sizes]
    if any(axis.size != 1 for axis in left) or (left and not groups):
        raise NoMatch(UNKNOWN, node)
    return (*groups[:-1], (*groups[-1], *left)) if left else tuple(groups)


def taken(left: list[Axis], size, node: Node) -> tuple[Axis, ...]:
    """Take axes of this size together off the front of `left`; the last one is cut if it is too large."""
    if size == 1:
        return (left.pop(0),) if left and left[0].size == 1 else ()
    group = []
    while size != 1:
        if not left:
            raise NoMatch(UNKNOWN, node)
        axis = left.pop(0)
        rest = divided(size, axis.size)
        if rest is None:
            second = divided(axis.size, size)
            if second is None:
                raise NoMatch(UNKNOWN, node)
            axis.parts = (head, tail) = Axis(size), Axis(second)
            left.insert(0, tail)
            axis, rest = head, 1
        group.append(axis)
        size = rest
    return tuple(group)


def permutation(node: Node) -> tuple[int, ...] | None:
    """p where axis i of the result is axis p[i] of the argument; None for an op that is no permutation."""
    source = node.args[0] if node.args else None
    rank = len(shape(node))
    order = list(range(rank))
    name = node.args[1] if op(node) == "getattr" else op(node)  # dynamo has x.mT in one of two ways
    if name in ("mT", "T", "numpy_T") and rank >= 2:
        return (*order[:-2], order[-1], order[-2]) if name == "mT" else tuple(order[::-1])
    if name == "transpose" or (name == "t" and rank == 2):
        dims = (0, 1) if name == "t" else tuple(argument(node, i, f"dim{i - 1}") for i in (1, 2))
        if not all(isinstance(dim, int) for dim in dims):
            return None
        order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
        return tuple(order)
    if name == "permute":
        dims = argument(node, 1, "dims")
        dims = tuple(dims) if isinstance(dims, (tuple, list)) else tuple(node.args[1:])
        plain = all(isinstance(dim, int) for dim in dims) and len(dims) == rank == len(shape(source))
        return tuple(dim % rank for dim in dims) if plain else None
    return None


def is_reshape(node: Node) -> bool:
    """A reshape by any name: x[:, None], x[..., None], and x[:, 0] of one head are reshapes too."""
    if op(node) == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        before_dots = index[: index.index(Ellipsis)] if Ellipsis in index else index
        sizes = iter(shape(node.args[0]))
        taken_out = [i for i in before_dots if i is not None and next(sizes, None) == 1 and isinstance(i, int)]
        whole = [i for i in index if i is None or i is Ellipsis or i == slice(None)]
        return len(taken_out) + len(whole) == len(index) and bool(shape(node))
    return op(node) in RESHAPES


def after(node: Node, axes: Axes) -> Axes | None:
    """Axes of an op's result, from those of its first argument; None for an op that does more than move elements."""
    order = permutation(node)
    if order is not None:
        return tuple(axes[i] for i in order)
    if is_reshape(node):
        return regrouped(axes, shape(node), node)
    return axes if op(node) in SAME or op(node) in CASTS else None


def before(node: Node, axes: Axes) -> Axes | None:
    """Axes of an op's first argument, from those of its result; None for an op that does more than move or repeat.

    Along an axis that the op repeats, its argument has the empty group.
    """
    source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if not shape(source):
        return None
    order = permutation(node)
    if order is not None:
        return tuple(axes[order.index(i)] for i in range(len(order)))
    if is_reshape(node):
        return regrouped(axes, shape(source), node)
    if op(node) == "expand":
        axes = axes[len(axes) - len(shape(source)) :]
        same = map(same_size, shape(source), shape(node)[len(shape(node)) - len(shape(source)) :])
        return tuple(group if kept else () for group, kept in zip(axes, same, strict=True))
    if op(node) in ("repeat_interleave", "repeat"):
        return before_repeat(node, source, axes)
    widened = op(node) in CASTS and value(source).is_floating_point()
    return axes if op(node) in SAME or widened else None


def before_repeat(node: Node, source: Node, axes: Axes) -> Axes | None:
    """The repeated axis is (kept, times) after repeat_interleave, and (times, kept) after repeat."""
    rank = len(shape(node))
    changed = [i for i in range(rank) if not same_size(shape(node)[i], shape(source)[i])] if rank == len(axes) else []
    if op(node) == "repeat_interleave":
        dim = dimension(node, 2, rank, -1) if isinstance(argument(node, 1, "repeats"), int) else None
        changed = [dim] if argument(node, 2, "dim") is not None and dim in changed else []
    if len(changed) != 1 or len(shape(source)) != rank:
        return None
    (dim,) = changed
    kept, whole = shape(source)[dim], shape(node)[dim]
    times = divided(expression(whole), expression(kept))
    sizes = (kept, times) if op(node) == "repeat_interleave" else (times, kept)
    first, second = regrouped((axes[dim],), sizes, node)
    return (*axes[:dim], first if op(node) == "repeat_interleave" else second, *axes[dim + 1 :])
