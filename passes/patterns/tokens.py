"""What the graph says about the prompt's tokens: which came from an image, and the residual stream."""

from __future__ import annotations

from torch.fx import Graph, Node

from akvq_fx.passes.patterns.attention import Attention
from akvq_fx.passes.patterns.nodes import ancestors, argument, is_shared, is_tensor, op, same_size, shape, value
from akvq_fx.passes.patterns.projection import weight_of

# mode, floor and ratio of akvq::find_pivots: no activation reaches the floor, so only the first real token is kept
FIRST_TOKEN = ("massive", 3.0e38, 0.0)
ADDS = ("add", "add_", "iadd")


def vision_masks(graph: Graph) -> list[Node]:
    """Bool nodes [B, T] or [B, T, E] that are True at vision tokens.

    Read from akvq_fx.mark_vision, from image features scattered into embeddings (masked_scatter, index_put, x[mask] =
    ...) and from an input named mm_token_type_ids (transformers' standard name; 0 is text).
    """
    marked = [n.args[1] for n in graph.nodes if op(n).startswith("mark_vision")]
    if marked:
        return marked
    found = []
    for node in graph.nodes:
        if op(node) in ("masked_scatter", "masked_scatter_") and len(shape(node)) == 3:
            found.append(node.args[1])
        elif op(node) in ("setitem", "index_put", "index_put_") and len(shape(node.args[0])) == 3:
            index = node.args[1][0] if isinstance(node.args[1], (tuple, list)) else node.args[1]
            found.append(index)
    found = [m for m in found if is_tensor(m) and str(value(m).dtype) == "torch.bool" and len(shape(m)) in (2, 3)]
    if found:
        return list(dict.fromkeys(found))
    return [
        n for n in graph.nodes if op(n) == "placeholder" and "mm_token_type_ids" in str(n.target) and len(shape(n)) == 2
    ]


def starts_a_call(graph: Graph) -> bool:
    """The graph looks token ids up in an embedding: a new forward begins here."""
    return any(op(n) == "embedding" for n in graph.nodes)


def looked_up(graph: Graph) -> tuple[int, int] | None:
    """Positions of the inputs that are the token ids [B, T] and the weight [V, E] of the graph's one embedding.

    None where there are several, or where ids or weight are computed in the graph.
    """
    nodes = [n for n in graph.nodes if op(n) == "embedding" and len(shape(n)) == 3]
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    pair = [argument(nodes[0], 0, "input"), argument(nodes[0], 1, "weight")] if len(nodes) == 1 else []
    if not pair or any(n not in inputs or is_shared(value(n)) for n in pair):
        return None
    return inputs.index(pair[0]), inputs.index(pair[1])


def residual_of(attention: Attention, key: Node) -> Node | None:
    """The residual stream [B, q, E] at the layer's input.

    It is what the layer adds the attention output to: the first add after attention whose other operand the keys
    were computed from.
    """
    projection = next((n for n in ancestors(key) if weight_of(n) is not None), None)
    if projection is None:
        return None
    behind = set(ancestors(projection))
    seen, queue = set(), [attention.node]
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if op(node) in ADDS and len(shape(node)) == 3:
            for operand in node.args[:2]:
                if isinstance(operand, Node) and operand in behind and len(shape(operand)) == 3:
                    return operand
        queue.extend(node.users)
    return None


def covers(node: Node, batch, count) -> bool:
    """node is a plain tensor [batch, count, ...]."""
    return not is_shared(value(node)) and same_size(shape(node)[0], batch) and same_size(shape(node)[1], count)
