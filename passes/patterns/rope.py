"""Which rotary embedding a key went through, read from the ops between its projection and the cache.

Only a description: rotation after RoPE is legal for every form, so no form refuses. A spelling that is not known here
is called "other".
"""

from __future__ import annotations

from torch.fx import Node

from akvq_fx.passes.patterns.nodes import dimension, op, shape, tensors_of_cat
from akvq_fx.passes.patterns.projection import weight_of


def chain_of(key: Node, limit: int = 80) -> list[Node]:
    """Nodes with a key-like last axis between key and its projection, nearest first."""
    seen, queue, chain = set(), [key], []
    while queue and len(chain) < limit:
        node = queue.pop(0)
        if node in seen or node.op in ("placeholder", "get_attr"):
            continue
        seen.add(node)
        chain.append(node)
        if weight_of(node) is None:
            queue.extend(n for n in node.all_input_nodes if len(shape(n)) >= len(shape(key)) - 1)
    return chain


def rope_of(key: Node) -> str:
    """E.g. "rope half", "rope interleaved, partial", "no rope", each with ", key norm" where the key is normalised."""
    chain = chain_of(key)
    names = {op(n) for n in chain}
    rotated = "mul" in names and bool({"neg", "sub"} & names) and bool({"cat", "stack"} & names)
    half_cat = [n for n in chain if joins_channels(n)]
    if "view_as_complex" in names:
        form = "rope complex"
    elif not rotated:
        form = "no rope"
    elif "stack" in names or any(is_strided(n) for n in chain):
        form = "rope interleaved"
    elif half_cat:
        form = "rope half"
    else:
        form = "rope other"
    if form.startswith("rope") and any(is_partial(n) for n in half_cat):
        form += ", partial"
    normed = {"rsqrt", "layer_norm", "rms_norm"} & names
    return form + (", key norm" if normed else "")


def pairs_of(key: Node, form: str) -> tuple[int, int]:
    """(distance, n) of a form that rope_of told: channels i and i + distance of the first n are turned together.

    (0, 0) where the pairs are not known, or where they are not the first channels of a head.
    """
    chain = chain_of(key)
    head = shape(key)[-1]
    if form.startswith("rope half"):
        turned = {shape(n)[-1] for n in chain if is_halves(n)}
    elif form.startswith("rope interleaved"):
        turned = {2 * shape(n)[-1] for n in chain if is_strided(n)} | {2 * shape(n)[-2] for n in chain if is_pairs(n)}
    elif form.startswith("rope complex"):
        turned = {2 * shape(n)[-1] for n in chain if op(n) == "view_as_complex"}
    else:
        turned = set()
    if len(turned) != 1:
        return 0, 0
    (turned,) = turned
    first = {shape(tensors_of_cat(n)[0])[-1] for n in chain if joins_channels(n) and is_partial(n)}
    if not isinstance(turned, int) or turned % 2 or first - {turned} or turned != head and not first:
        return 0, 0
    return (turned // 2 if form.startswith("rope half") else 1), turned


def joins_channels(node: Node) -> bool:
    """cat(..., -1)"""
    return op(node) == "cat" and dimension(node, 1, max(len(shape(node)), 1)) == len(shape(node)) - 1


def is_halves(node: Node) -> bool:
    """cat of two halves along the last axis: cat([-x2, x1], -1), or the two turned halves themselves."""
    if not joins_channels(node) or is_partial(node):
        return False
    parts = tensors_of_cat(node)
    return len(parts) == 2 and shape(parts[0])[-1] == shape(parts[1])[-1]


def is_pairs(node: Node) -> bool:
    """stack([a, b], -1)"""
    return op(node) == "stack" and len(shape(node)) > 1 and shape(node)[-1] == 2


def is_strided(node: Node) -> bool:
    """x[..., ::2]"""
    index = node.args[1] if op(node) == "getitem" else None
    return isinstance(index, tuple) and any(isinstance(i, slice) and i.step == 2 for i in index)


def is_partial(node: Node) -> bool:
    """cat([rotated, pass], -1) whose second part is a plain slice of the head."""
    parts = tensors_of_cat(node)
    return len(parts) == 2 and op(parts[1]) == "getitem" and op(parts[0]) in ("add", "to", "cat", "type_as")
