"""Tensors that are kept like caches and attended to like caches, in a form that no other pattern reads.

Only evidence for a report: a cat with what came in that is returned, or a write into a buffer that came in, which leads
over ops that only move elements to a softmax of products or to scaled_dot_product_attention.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from akvq_fx.passes.patterns.attention import LAYOUT_OPS, is_attention
from akvq_fx.passes.patterns.axes import CASTS
from akvq_fx.passes.patterns.cache_write import ALLOCATIONS, SLICED, is_empty, why_unread
from akvq_fx.passes.patterns.nodes import NoMatch, dimension, is_returned, op, shape, tensors_of_cat, value
from akvq_fx.passes.patterns.written_attention import PRODUCTS, SCORES

WRITES = ("setitem", "index_copy_", "copy_", "scatter_", "index_put_")
MOVES = (*LAYOUT_OPS, *CASTS, "expand", "repeat_interleave", "repeat", "index_copy_", "getattr")
ACCEPTED = (
    "accepted: the tokens of batch, heads, tokens, channels in any order, or of [batch, tokens, heads * channels]"
)


def unknown_caches(graph: Graph, written_out: dict[Node, NoMatch]) -> list[tuple[Node, NoMatch]]:
    """Each such tensor with the reason to give.

    written_out: why a written-out attention was not made a call, by its softmax.
    """
    found: dict[Node, NoMatch] = {}
    for node in graph.nodes:
        if grows(node) and is_read(node):
            why = f"the cache grows along axis {dimension(node, 1, len(shape(node)))} of {len(shape(node))}, {ACCEPTED}"
            found[node] = NoMatch(SLICED, node) if not is_returned(node) else NoMatch(why, node)
            refused = why_unread(node, written_out)
            if is_returned(node) and refused.node is not node:
                found[node] = refused
        elif op(node) in WRITES and (cache := buffer_behind(node.args[0])) and is_read(cache):
            why = f"the cache is a tensor of {len(shape(cache))} axes that {op(node)} writes, {ACCEPTED}"
            found.setdefault(cache, NoMatch(why, node))
    return list(found.items())


def grows(node: Node) -> bool:
    """cat([past, new]) that is returned, along any axis but the last, along which convolutions keep their state."""
    kept = is_returned(node) or any(is_slice_kept(user) for user in node.users)
    parts = tensors_of_cat(node) if op(node) == "cat" and kept and len(shape(node)) >= 3 else []
    if not parts or dimension(node, 1, len(shape(node))) == len(shape(node)) - 1:
        return False
    return op(parts[0]) == "placeholder" or is_empty(parts[0])


def is_slice_kept(node: Node) -> bool:
    return op(node) == "getitem" and is_returned(node)


def buffer_behind(view: Node) -> Node | None:
    """The buffer that a view is of, where it could hold keys or values: it came in, or is allocated here."""
    while op(view) in LAYOUT_OPS and isinstance(view.args[0], Node):
        view = view.args[0]
    kept = op(view) in ("placeholder", *ALLOCATIONS) and len(shape(view)) >= 3
    return view if kept and value(view).is_floating_point() else None


def is_read(cache: Node, reach: int = 60) -> bool:
    """Attention reads it, over ops that only move elements and, where it is written out, a product and its scores."""
    queue, seen = [(cache, False)], set()
    while queue and len(seen) < reach:
        node, scores = queue.pop(0)
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if is_attention(user) or (scores and op(user) == "softmax"):
                return True
            if op(user) in PRODUCTS and not scores:
                queue.append((user, True))
            elif op(user) in (SCORES if scores else MOVES):
                queue.append((user, scores))
    return False
