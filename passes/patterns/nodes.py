"""Reading FX nodes: one name per op whatever its spelling, shapes, and refusals that carry their node."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.fx import Node


class NoMatch(Exception):
    """A site that cannot be handled: the reason, and the node that it is about."""

    def __init__(self, reason: str, node: Node | None = None):
        super().__init__(reason)
        self.reason, self.node = reason, node


VIEW = "view of a static buffer"  # in the meta of a node that stands for one of the caller's, as [B, H, T, D]
ALLOCATIONS = ("zeros", "new_zeros", "zeros_like", "full", "new_full")
SPELLINGS = {"concat": "cat", "concatenate": "cat", "permute": "permute", "swapaxes": "transpose", "type_as": "to"}


def op(node) -> str:
    """Canonical op name: torch.cat, Tensor.reshape and operator.getitem are "cat", "reshape" and "getitem"."""
    if not isinstance(node, Node):
        return ""
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return SPELLINGS.get(name, name)


def value(node):
    """What dynamo saw at this node: a (fake) tensor, a number or a symbol."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def is_tensor(node) -> bool:
    return isinstance(value(node), torch.Tensor)


def is_packed(node) -> bool:
    """The node is a placeholder that dynamo saw as a PackedKV."""
    return op(node) == "placeholder" and type(value(node)).__name__ == "PackedKV"


def is_shared(x: torch.Tensor | None) -> bool:
    """A DTensor: several processes have it together, each a part of it or a copy."""
    return type(x).__name__ == "DTensor"  # PyTorch may be built without torch.distributed


def shape(node) -> tuple:
    """The node's shape, () if it is no tensor; symbols that stand for one number are that number."""
    return tuple(map(settled, value(node).shape)) if is_tensor(node) else ()


def settled(size):
    """A size whose symbol was specialized, as a plain number."""
    known = isinstance(size, torch.SymInt) and size.node.expr.is_Integer
    return int(size.node.expr) if known else size


def argument(node: Node, position: int, name: str, default=None):
    """One argument of a call, wherever it was written."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def dimension(node: Node, position: int, rank: int, default: int = 0) -> int | None:
    """A `dim` argument as a number in 0..rank-1, None if it is not a plain number."""
    dim = argument(node, position, "dim", default)
    return dim % rank if isinstance(dim, int) else None


def tensors_of_cat(node: Node) -> list:
    return list(argument(node, 0, "tensors", ()))


def index_by_axis(index, rank: int) -> list | None:
    """What x[index] has for each axis of an x of this rank; None where it adds axes, or does not say."""
    index = index if isinstance(index, tuple) else (index,)
    dots = [n for n, i in enumerate(index) if i is Ellipsis]
    if any(i is None or isinstance(i, bool) for i in index) or len(dots) > 1 or len(index) - len(dots) > rank:
        return None
    at = dots[0] if dots else len(index)
    return [*index[:at], *[slice(None)] * (rank - len(index) + len(dots)), *index[at + 1 :]]


def ancestors(node: Node) -> Iterator[Node]:
    """The node and everything it is computed from, nearest first."""
    seen, queue = set(), [node]
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        yield current
        queue.extend(current.all_input_nodes)


def outputs(graph: torch.fx.Graph) -> tuple:
    """The values that the graph returns."""
    result = graph.output_node().args[0]
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def same_size(a, b) -> bool:
    """Provably equal without adding a guard: equal numbers or the same symbolic expression."""
    expr = lambda x: x.node.expr if isinstance(x, torch.SymInt) else x
    return expr(a) == expr(b)


NOOPS = ("contiguous", "clone", "detach", "alias")


def is_returned(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def through_noops(node, stop: Callable[[Node], bool] = lambda node: False):
    """Skip ops that leave values and shape alone: contiguous, a cast or a reshape to what it is already.

    stop    no node is skipped of which this is true
    """
    while isinstance(node, Node) and not stop(node):
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if source is None or not is_tensor(source) or not is_tensor(node):
            return node
        same = len(shape(node)) == len(shape(source)) and all(map(same_size, shape(node), shape(source)))
        cast = op(node) in ("to", "float", "half", "bfloat16") and value(node).dtype == value(source).dtype
        still = op(node) in ("reshape", "view", "expand", "flatten") and same
        if not (op(node) in NOOPS or cast or still):
            return node
        node = source
    return node
