"""Find attention over a cache: from each scaled_dot_product_attention outward to the keys' and values' cache writes.

Before   cat(past, rope(k)), cat(past, v) -> expand GQA heads -> sdpa(q, k, v, mask)      After   state.sites
Needs    written_out, originals, unexchanged      Gives    sites, refused
Follows  rewrite_attention               Leaves   the graph as it was

A call whose keys and values lead back to no cache (a vision tower, a model run without one) is not a site and not a
refusal. A cache in a form that cannot be packed is refused with its reason and node, and stays exactly as it is.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from akvq_fx.passes.patterns.attention import attention_of, is_attention
from akvq_fx.passes.patterns.cache_write import CacheWrite, cache_like, cache_write_of
from akvq_fx.passes.patterns.cached import check_caches, fix_heads, read_from
from akvq_fx.passes.patterns.nodes import NoMatch, op, outputs
from akvq_fx.passes.patterns.projection import weight_behind, weight_of, weights_behind
from akvq_fx.passes.patterns.rope import rope_of
from akvq_fx.passes.patterns.site import Site, layer_of
from akvq_fx.passes.patterns.tokens import residual_of
from akvq_fx.passes.patterns.unknown_caches import unknown_caches
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport


def find_sites(state: GraphState) -> PassReport:
    report = PassReport("find_sites")
    writes: dict[Node, CacheWrite] = {view: known.write for view, known in state.views.items()}
    refused: dict[Node, None] = {}

    def refuse(node: Node, miss: NoMatch, whole: Node | None, from_cache: bool = False):
        weight = weight_behind(whole if whole is not None and op(whole) != "placeholder" else None)
        layer, label = layer_of(weight, len(state.sites) + len(state.refused))
        known = {(name, "" if from_cache else reason) for name, _, reason, _ in state.refused}
        if (label, "" if from_cache else miss.reason) in known:
            return  # the other half of this layer was refused for the same reason
        state.refused.append((label, layer, miss.reason, miss.node or node))
        report.miss(label, miss.reason, miss.node or node)

    for node in state.graph.nodes:
        if not is_attention(node):
            continue
        whole = None
        try:
            attention = attention_of(node)
            (whole, length), (value_whole, value_length) = read_from(attention.key), read_from(attention.value)
            refused[whole] = refused[value_whole] = None
            key = writes.get(whole) or cache_write_of(whole)
            val = writes.get(value_whole) or cache_write_of(value_whole)
            if key is None and val is None:
                del refused[whole]
                refused.pop(value_whole, None)
                continue
            fix_heads(key, val)
            original = state.originals.get(node)
            check_caches(attention, key, val, length, value_length, dying=original.dying if original else ())
            if key.kept is not None and state.config.simulated:
                raise NoMatch("a simulated recipe reads no sliding window", key.kept)
        except NoMatch as miss:
            refuse(node, miss, whole)
            continue
        writes[whole], writes[value_whole] = key, val
        writes |= {state.buffer_of(node): write for node, write in ((whole, key), (value_whole, val))}
        weights = weight_behind(key.new), weight_behind(val.new)
        if key.kind == "read":
            weights = weight_behind(attention.query), None
        layer, label = layer_of(weights[0], len(state.sites))
        rope = rope_of(key.new) if key.new is not None else "read only"
        site = Site(attention, key, val, length, layer, label, rope)
        if key.kind != "read":
            site.weights, site.owner = weights, are_weights(state, owner_of(attention, key, val))
        state.sites.append(site)
        report.match(site)
    others = unknown_caches(state.graph, state.written_out)
    for whole, miss in (
        *together(state),
        *state.unexchanged.items(),
        *others,
        *cache_like(state.graph, state.written_out),
    ):
        if whole not in writes and whole not in refused:
            refused[whole] = None
            refuse(whole, miss, whole, from_cache=True)
    return report


def together(state: GraphState) -> list[tuple[Node, NoMatch]]:
    """Tensors of several caches that stay as they are (take_apart), each with its reason."""
    results = outputs(state.graph)
    return [(state.apart.nodes(number, results)[0], miss) for number, miss in state.apart.left.items()]


def owner_of(attention, *writes: CacheWrite) -> tuple[Node, ...]:
    """Placeholders of the weights that make the tokens of these writes, norms and adapters among them."""
    key = writes[0].new
    source = residual_of(attention, key) if key is not None else None
    found: dict[Node, None] = {}
    for write in writes:
        if write.new is not None:
            found |= dict.fromkeys(weights_behind(write.new, source))
    return tuple(found)


def are_weights(state: GraphState, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Those of the nodes that are parameters, or that a linear op multiplies by."""
    parameter = lambda n: isinstance(state.weights.get(state.position.get(n, -1)), torch.nn.Parameter)
    return tuple(n for n in nodes if parameter(n) or any(weight_of(user) is n for user in n.users))


find_sites.needs = ("written_out", "originals", "unexchanged")
find_sites.gives = ("sites", "refused")
find_sites.follows = ("rewrite_attention",)
