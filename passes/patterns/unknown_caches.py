"""Tensors that are kept like caches and attended to like caches, in a form that no other pattern reads.

Only evidence for a report: a cat with what came in that is returned, a buffer that a step makes anew or writes into, or
a stack that is returned, which leads over ops that only move elements to a softmax of products or to
scaled_dot_product_attention.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from akvq_fx.passes.patterns.attention import LAYOUT_OPS, is_attention
from akvq_fx.passes.patterns.axes import CASTS, is_reshape
from akvq_fx.passes.patterns.cache_write import (
    ROLLS,
    SLICED,
    STATIC_PLAIN,
    TOKENS,
    is_buffer,
    is_empty,
    is_made_anew,
    made_anew,
    overwrites,
    viewed,
    why_unread,
)
from akvq_fx.passes.patterns.nodes import NoMatch, dimension, is_returned, op, same_size, shape, tensors_of_cat
from akvq_fx.passes.patterns.static_write import FORMS, static_write, written_cache
from akvq_fx.passes.patterns.written_attention import PRODUCTS, SCORES

WRITES = ("index_copy_", *FORMS)
MOVES = (*LAYOUT_OPS, *CASTS, "expand", "repeat_interleave", "repeat", "getattr", *WRITES)
PARTS = "keys and values, or several layers, are parts of one tensor"
UNTOLD = (
    f"{PARTS}, accepted: a stack or cat of them, read as x[i], or by unbind, chunk, split or slices that do not overlap"
)
OWNED = f"{PARTS}, accepted of a buffer that the caller owns: a tensor for each"
ACCEPTED = (
    "accepted: the tokens of batch, heads, tokens, channels in any order, or of [batch, tokens, heads * channels]"
)


def unknown_caches(graph: Graph, written_out: dict[Node, NoMatch]) -> list[tuple[Node, NoMatch]]:
    """Each such tensor with the reason to give.

    written_out: why a written-out attention was not made a call, by its softmax.
    """
    found: dict[Node, NoMatch] = {}
    for node in graph.nodes:
        if grows(node) and (how := read_as(node)):
            found[node] = NoMatch(UNTOLD, node) if how == "part" else why_not_grown(node, written_out)
        elif op(node) == "stack" and is_returned(node) and is_read_of(node):
            found[node] = NoMatch(UNTOLD, node)
        elif is_made_anew(node) and is_returned(node) and read_as(node):
            found[node] = made_anew(node)
        elif op(node) in WRITES and (cache := buffer_behind(node.args[0])) and (how := read_as(cache)):
            found.setdefault(cache, why_not_written(cache, node, how))
    return list(found.items())


def why_not_grown(cache: Node, written_out: dict[Node, NoMatch]) -> NoMatch:
    if not is_returned(cache):
        return NoMatch(SLICED, cache)
    refused = why_unread(cache, written_out)
    if refused.node is not cache or (len(shape(cache)) == 4 and dimension(cache, 1, 4) == TOKENS):
        return refused
    return NoMatch(
        f"the cache grows along axis {dimension(cache, 1, len(shape(cache)))} of {len(shape(cache))}, {ACCEPTED}", cache
    )


def why_not_written(cache: Node, write: Node, how: str) -> NoMatch:
    if how == "part":
        return NoMatch(OWNED if op(cache) == "placeholder" else UNTOLD, write)
    if op(cache) == "placeholder":
        return NoMatch(ROLLS if overwrites(write, cache) else STATIC_PLAIN, write)
    if written_cache(write) is not None:  # canonicalize has left it
        try:
            static_write(write)
        except NoMatch as miss:
            return miss
    if cut := next((user for user in cache.users if op(user) == "getitem" and not is_reshape(user)), None):
        return NoMatch("attention reads a slice of a static cache, accepted: x[:, :, :n] of [B, H, T, D], or all", cut)
    return NoMatch(f"the cache is a tensor of {len(shape(cache))} axes that {op(write)} writes, {ACCEPTED}", write)


def is_read_of(stack: Node) -> bool:
    """Attention reads the stack, or one of its parts, which may be slices of what it reads."""
    whole = lambda part: part.args[0] if op(part) in ("getitem", "narrow") else part
    return bool(read_as(stack)) or any(read_as(part) or read_as(whole(part)) for part in tensors_of_cat(stack))


def grows(node: Node) -> bool:
    """cat([past, new]) that is returned."""
    kept = is_returned(node) or any(is_slice_kept(user) for user in node.users)
    parts = tensors_of_cat(node) if op(node) == "cat" and kept and len(shape(node)) >= 3 else []
    return bool(parts) and (op(parts[0]) == "placeholder" or is_empty(parts[0]))


def is_slice_kept(node: Node) -> bool:
    return op(node) == "getitem" and is_returned(node)


def buffer_behind(view: Node) -> Node | None:
    """The buffer that a view is of."""
    return viewed(view) if is_buffer(viewed(view)) else None


def read_as(cache: Node, reach: int = 60) -> str:
    """How attention reads it, over ops that only move elements and, where it is written out, a product and its scores:
    "whole", in "part" (one of keys and values, or of layers), or "" where it does not."""
    queue, seen = [(cache, False, "whole")], set()
    while queue and len(seen) < reach:
        node, scores, how = queue.pop(0)
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if is_attention(user) or (scores and op(user) == "softmax"):
                return how
            if op(user) in PRODUCTS and not scores:
                queue.append((user, True, how))
            elif op(user) in (SCORES if scores else MOVES):
                queue.append((user, scores, "part" if not scores and takes_part(user) else how))
    return ""


def takes_part(node: Node) -> bool:
    """x[0], x[..., :D] and the like: what is left out is another cache."""
    if op(node) in ("chunk", "split", "unbind", "tensor_split", "select"):
        return True
    if op(node) != "getitem" or not shape(node.args[0]):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    sizes, taken_from = shape(node), shape(node.args[0])
    by_number = any(isinstance(i, int) and not isinstance(i, bool) for i in index)
    return by_number or (len(sizes) == len(taken_from) and not same_size(sizes[-1], taken_from[-1]))
