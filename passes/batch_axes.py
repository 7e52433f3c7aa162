"""Give attention calls of three or five axes the four that patterns look for.

Before   sdpa(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))      After   sdpa(q, k, v).flatten(0, 1)
         sdpa(q [B, G, R, q, D], k[:, :, None], v[:, :, None])        sdpa(q.flatten(1, 2), k, v, enable_gqa=True)
Needs    none                                                         Gives    none
Follows  canonicalize                                Leaves   numbers as they were, but for their rounding; other calls

Only of calls that read what may be a cache. Which axes are rows, heads and repeats is told by what keys and values were
moved from (patterns/axes.py), not by sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from akvq_fx.passes.patterns.attention import is_attention
from akvq_fx.passes.patterns.axes import Axes, Axis, flat, new_axes
from akvq_fx.passes.patterns.cache_write import ALLOCATIONS
from akvq_fx.passes.patterns.kept import way_back
from akvq_fx.passes.patterns.nodes import NoMatch, is_returned, op, same_size, shape, value
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport


@dataclass
class FourAxes:
    """Keys or values as [B, H, T, D], and how often each of their heads is repeated for queries."""

    node: Node
    repeats: int


def batch_axes(state: GraphState) -> PassReport:
    report = PassReport("batch_axes")
    for node in [n for n in state.graph.nodes if is_attention(n) and len(shape(n)) in (3, 5)]:
        key, val = (cached(node.kwargs.get(name)) for name in ("key", "value"))
        if key is None or val is None:
            continue
        try:
            report.match(call_of_four(state, node, key, val).name)
        except NoMatch as miss:
            report.miss(node.name, miss.reason, miss.node)
    return report


def cached(argument: Node) -> FourAxes | None:
    """The first tensor of four axes that the argument is moved from; None where it leads to no cache, or to none."""
    axes = new_axes(argument)
    *lead, tokens, channels = axes
    path = list(way_back(argument, axes))
    kept = any(is_returned(part) for node, _ in path for part in (node, *node.users))  # or a slice of it
    if op(path[-1][0]) not in ("placeholder", "cat", *ALLOCATIONS) and not kept:
        return None
    for node, groups in path:
        if len(groups) == 4 and (flat(groups[2]), flat(groups[3])) == (flat(tokens), flat(channels)):
            rest = after(leaves(lead), leaves(groups[:2]))
            if rest is not None and all(isinstance(axis.size, int) for axis in rest):
                repeats = 1
                for axis in rest:
                    repeats *= axis.size
                return FourAxes(node, repeats)
    return None


def leaves(groups: Axes) -> list[Axis]:
    return [axis for group in groups for axis in flat(group) if axis.size != 1]


def after(whole: list[Axis], first: list[Axis]) -> list[Axis] | None:
    """What follows `first` in `whole`, None where that does not begin with it."""
    return whole[len(first) :] if whole[: len(first)] == first else None


def call_of_four(state: GraphState, node: Node, key: FourAxes, val: FourAxes) -> Node:
    """Raises NoMatch where queries or the mask do not go with keys and values."""
    rows, kv_heads = shape(key.node)[:2]
    heads = int(kv_heads) * key.repeats  # int() of a symbol adds a guard
    if key.repeats != val.repeats or not all(map(same_size, shape(val.node)[:2], (rows, kv_heads))):
        raise NoMatch("keys and values are not batched alike", node)
    query, mask, three = node.kwargs["query"], node.kwargs.get("attn_mask"), len(shape(node)) == 3
    parts = (-1, heads) if three else tuple(map(int, shape(node)[1:3]))
    if not three and (not same_size(shape(query)[0], rows) or parts[0] * parts[1] != heads):
        raise NoMatch("queries are not batched as keys are", node)
    with state.before(node):
        split = ("unflatten", 0, parts) if three else ("flatten", 1, 2)
        arguments = {**node.kwargs, "query": state.moved(query, [split], value(query))}
        arguments |= {"key": key.node, "value": val.node}
        if mask is not None:
            arguments["attn_mask"] = mask_of_four(state, mask, shape(node), heads)
        if key.repeats > 1:
            arguments["enable_gqa"] = True
        call = state.call(node.target, **arguments)
        seen = value(query)
        call.meta = {**node.meta}
        call.meta["example_value"] = state.fake(seen, (rows, heads, *shape(node)[-2:]), seen.dtype)
        joined = ("flatten", 0, 1) if three else ("unflatten", 1, parts)
        out = state.moved(call, [joined], value(call))
    node.replace_all_uses_with(out)
    state.forget(node)
    return call


def mask_of_four(state: GraphState, mask: Node, sizes: tuple, heads: int) -> Node:
    """Raises NoMatch where a mask is given for some of the merged axes only."""
    lead = shape(mask)[:-2]
    if not lead:
        return mask
    if len(sizes) == 3:
        one = same_size(lead[0], 1)
        return state.moved(mask, [("unsqueeze", 0) if one else ("unflatten", 0, (-1, heads))], value(mask))
    apart = lead[-2:] if len(lead) > 1 else (1, *lead)
    if not (all(same_size(n, 1) for n in apart) or all(map(same_size, apart, sizes[1:3]))):
        raise NoMatch("the mask differs along one of the axes of heads alone", mask)
    return state.moved(mask, [("flatten", len(lead) - 2, len(lead) - 1)] if len(lead) > 1 else [], value(mask))


batch_axes.needs = ()
batch_axes.gives = ()
batch_axes.follows = ("canonicalize",)
