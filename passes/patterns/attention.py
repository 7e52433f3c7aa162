"""An attention call and what stands between it and the cache: grouped-query expansion, masks, the query's own chain."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

import torch
from torch.fx import Node

from akvq_fx.passes.patterns.nodes import (
    NoMatch,
    argument,
    dimension,
    index_by_axis,
    is_returned,
    op,
    same_size,
    shape,
    through_noops,
    value,
)

# the arguments of torch.nn.functional.scaled_dot_product_attention in order
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
LAYOUT_OPS = (
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze",
    "clone", "getitem", "split", "chunk", "detach", "narrow", "select", "mT", "movedim", "tensor_split", "unbind",
)  # fmt: skip


@dataclass
class Attention:
    """One attention call, its arguments by name; softcap: 0.0 for none; sinks: [Hq]."""

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    is_causal: bool
    scale: float | None
    softcap: float = 0.0
    sinks: Node | None = None


def named_arguments(node: Node) -> dict:
    """Arguments of a call by name, wherever they were written, but for those that are None."""
    return {name: x for i, name in enumerate(ARGUMENTS) if (x := argument(node, i, name)) is not None}


def is_attention(node: Node) -> bool:
    """A scaled_dot_product_attention, or kernels.attend.extended_attention, which only rewrite_attention makes."""
    return op(node) in ("scaled_dot_product_attention", "extended_attention")


def attention_of(node: Node) -> Attention:
    """Arguments of an SDPA node. Raises NoMatch for a call that no packed cache can answer."""
    a = {name: argument(node, i, name) for i, name in enumerate(ARGUMENTS)}
    if isinstance(a["dropout_p"], Node):
        raise NoMatch("attention dropout is computed in the graph", node)
    if a["dropout_p"]:
        raise NoMatch(f"attention dropout is on (dropout_p={a['dropout_p']})", node)
    if len(shape(a["query"])) != 4:
        raise NoMatch(f"the query is {len(shape(a['query']))}-d, accepted: [B, H, q, D]", node)
    if isinstance(a["is_causal"], Node):
        raise NoMatch("is_causal is computed in the graph", node)
    return Attention(
        node, a["query"], a["key"], a["value"], a["attn_mask"], bool(a["is_causal"]), a["scale"],
        node.kwargs.get("softcap", 0.0), node.kwargs.get("sinks"),
    )  # fmt: skip


def ungrouped(node: Node) -> Node:
    """The cache tensor behind an SDPA's key or value argument: GQA expansion taken off, heads kept in blocked order.

    Spellings: x[:, :, None].expand(...).reshape(...), x.unsqueeze(2).expand(...).reshape/flatten,
    x.repeat_interleave(n, 1), enable_gqa or plain broadcasting (nothing to take off). Of several nodes that are one
    tensor (a cast to its own dtype) the one that the graph returns is the cache.
    """
    bare = functools.partial(through_noops, stop=is_returned)
    node = bare(node)
    if op(node) == "repeat_interleave" and dimension(node, 2, 4, -1) == 1 and len(shape(node)) == 4:
        return bare(node.args[0])
    if op(node) in ("reshape", "view", "flatten"):
        expanded = bare(node.args[0])
        if op(expanded) == "expand" and len(shape(expanded)) == 5:
            lifted = expanded.args[0]
            if is_new_axis(lifted, 2) and is_merge(shape(expanded), shape(node)):
                return bare(lifted.args[0])
    return node


def prefix_of(node: Node) -> tuple[Node, object]:
    """(x, n) of x[:, :, :n]: a static cache read up to its last token; (node, its length) for anything else."""
    index = node.args[1] if op(node) == "getitem" and isinstance(node, Node) else None
    if isinstance(index, tuple) and len(index) in (3, 4) and len(shape(node)) == 4 and isinstance(index[2], slice):
        rest = (*index[:2], *index[3:])
        if all(i == slice(None) for i in rest) and index[2].start in (None, 0) and index[2].step in (None, 1):
            return node.args[0], shape(node)[2]
    return node, shape(node)[2] if len(shape(node)) == 4 else None


def suffix_of(node: Node) -> tuple[Node, object]:
    """(x, n) where node is the last n tokens of x [B, H, T, D]; (node, its length) for anything else.

    Spellings: x[:, :, -n:], x[..., start:, :], x.narrow(2, T - n, n). A slice without an end is one wherever it starts.
    """
    length = shape(node)[2] if len(shape(node)) == 4 else None
    source = node.args[0] if isinstance(node, Node) and node.args else None
    if length is None or len(shape(source)) != 4:
        return node, length
    if op(node) == "narrow" and dimension(node, 1, 4) == 2:
        start = value(argument(node, 2, "start"))
        negative = isinstance(start, int) and start < 0
        if not isinstance(start, torch.Tensor) and same_size(-start if negative else shape(source)[2] - start, length):
            return source, length
    elif op(node) == "getitem" and (part := token_slice(node.args[1])) is not None:
        end = value(part.stop)
        if part.step in (None, 1) and (end is None or same_size(end, shape(source)[2]) or end == sys.maxsize):
            return source, length
    return node, length


def token_slice(index) -> slice | None:
    """The slice along axis 2 of an index that takes all of the other axes of a 4-d tensor."""
    index = index_by_axis(index, 4)
    if index is None or not all(isinstance(i, slice) for i in index):
        return None
    return index[2] if all(i == slice(None) for i in (*index[:2], index[3])) else None


def is_new_axis(node, axis: int) -> bool:
    """x.unsqueeze(axis) or x[:, :, None, ...] of a 4-d x."""
    if op(node) == "unsqueeze":
        return dimension(node, 1, 5) == axis
    if op(node) != "getitem" or not isinstance(node.args[1], tuple):
        return False
    index = node.args[1]
    return (
        index.count(None) == 1
        and index.index(None) == axis
        and all(i is None or i is Ellipsis or i == slice(None) for i in index)
    )


def is_merge(before: tuple, after: tuple) -> bool:
    """[B, H, n, T, D] -> [B, H*n, T, D]."""
    return (
        len(after) == 4
        and same_size(before[0], after[0])
        and isinstance(before[1], int)
        and isinstance(before[2], int)
        and before[1] * before[2] == after[1]
        and same_size(before[4], after[3])
    )


def layout_only(node: Node) -> bool:
    """Ops that move elements and compute nothing."""
    same_cast = op(node) == "to" and value(node).dtype == value(node.args[0]).dtype
    return same_cast or op(node) in LAYOUT_OPS


__all__ = [
    "Attention",
    "attention_of",
    "is_attention",
    "layout_only",
    "named_arguments",
    "prefix_of",
    "suffix_of",
    "ungrouped",
]
