"""Writes of tokens into a buffer at positions that a tensor gives, and what index_copy_ would be called with.

x[:, :, at] = new, or x.scatter_(2, at expanded to new's size, new)      x.index_copy_(2, at, new)
"""

from __future__ import annotations

import torch
from torch.fx import Node

from akvq_fx.passes.patterns.nodes import NoMatch, argument, is_tensor, op, same_size, shape, value

WRITES = ("setitem", "scatter_")


def written(node: Node):
    """What is written into the cache."""
    return node.args[2] if op(node) == "setitem" else argument(node, 3, "src")


def token_index(node: Node) -> Node:
    """`at` [q] of the write, int64 or int32. Raises NoMatch where x.index_copy_(2, at, new) would not mean the same."""
    target, new = node.args[0], written(node)
    at = set_positions(node) if op(node) == "setitem" else scattered_positions(node)
    if value(at).dtype not in (torch.int64, torch.int32):
        raise NoMatch(f"the positions are {value(at).dtype}, accepted: torch.int64, torch.int32", node)
    if not is_tensor(new) or value(new).dtype != value(target).dtype:
        raise NoMatch(f"what is written is no tensor of the cache's dtype {value(target).dtype}", node)
    expected = (*shape(target)[:2], shape(at)[0], shape(target)[3])
    if len(shape(new)) != 4 or not all(map(same_size, shape(new), expected)):
        raise NoMatch(f"what is written is {list(shape(new))}, accepted: {list(expected)}", node)
    return at


def set_positions(node: Node) -> Node:
    """`at` of x[:, :, at] = new."""
    index = node.args[1]
    if not isinstance(index, tuple) or len(index) not in (3, 4):
        raise NoMatch("the write is not x[:, :, at] = new", node)
    at, rest = index[2], (*index[:2], *index[3:])
    if any(i != slice(None) for i in rest) or not is_tensor(at) or len(shape(at)) != 1:
        raise NoMatch("the write is not x[:, :, at] = new", node)
    return at


def scattered_positions(node: Node) -> Node:
    """`at` of x.scatter_(2, index, new), where index is at[None, None, :, None] expanded to new's size."""
    dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
    if dim not in (2, -2) or op(index) not in ("expand", "expand_as") or argument(node, 4, "reduce") is not None:
        raise NoMatch("the write is not x.scatter_(2, at expanded to new's size, new)", node)
    at = index.args[0]
    column = len(shape(at)) == 4 and (*shape(at)[:2], shape(at)[3]) == (1, 1, 1)
    while column and len(shape(at)) > 1 and op(at) in ("getitem", "view", "reshape", "unsqueeze"):
        at = at.args[0]  # with q elements before and after, these keep their order
    if not column or len(shape(at)) != 1 or not same_size(shape(at)[0], shape(index)[2]):
        raise NoMatch("the write is not x.scatter_(2, at expanded to new's size, new)", node)
    return at


__all__ = ["WRITES", "token_index", "written"]
