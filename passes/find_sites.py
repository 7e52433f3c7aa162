"""Find attention over a cache: from each scaled_dot_product_attention outward to the keys' and values' cache writes.

Before   cat(past, rope(k)), cat(past, v) -> expand GQA heads -> sdpa(q, k, v, mask)      After   state.sites
Needs    none                                                                            Gives    sites, refused
Follows  canonicalize                                                                    Leaves   the graph as it was

A call whose keys and values lead back to no cache (a vision tower, a model run without one) is not a site and not a
refusal. A cache in a form that cannot be packed is refused with its reason and node, and stays exactly as it is.
"""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import guard_or_false

from akvq_fx.kernels.layout import DTYPE_NAMES
from akvq_fx.passes.patterns.attention import attention_of, is_attention, prefix_of, ungrouped
from akvq_fx.passes.patterns.cache_write import (
    ALLOCATIONS,
    STATIC_PLAIN,
    CacheWrite,
    cache_like,
    cache_write_of,
)
from akvq_fx.passes.patterns.nodes import NoMatch, op, same_size, shape, value
from akvq_fx.passes.patterns.projection import weight_behind, weight_of, weights_behind
from akvq_fx.passes.patterns.rope import rope_of
from akvq_fx.passes.patterns.site import Site, layer_of
from akvq_fx.passes.patterns.tokens import residual_of
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport

FILL_USERS = (  # ops that may use a static cache that this graph allocates
    "index_copy_", "getitem", "unsqueeze", "expand", "repeat_interleave", "output",
    "scaled_dot_product_attention", "size", "shape", "contiguous", "to",
)  # fmt: skip


def find_sites(state: GraphState) -> PassReport:
    report = PassReport("find_sites")
    writes: dict[Node, CacheWrite] = {}
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
            check(attention, key, val, length, value_length)
        except NoMatch as miss:
            refuse(node, miss, whole)
            continue
        writes[whole], writes[value_whole] = key, val
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
    pending = [(n, why) for n, why in cache_like(state.graph) if n not in writes and n not in refused]
    for whole, why in pending:
        refuse(whole, NoMatch(why, whole), whole, from_cache=True)
    return report


def read_from(argument: Node) -> tuple[Node, object]:
    """The cache behind an attention argument, and how many of its tokens attention sees."""
    node = ungrouped(argument)
    cut, length = prefix_of(node)
    static = op(cut) in ("placeholder", *ALLOCATIONS)
    return (ungrouped(cut), length) if static else (node, shape(node)[2] if len(shape(node)) == 4 else None)


def fix_heads(*writes: CacheWrite | None) -> None:
    """Make the number of heads a plain number, which a layout needs: int() of a symbol adds a guard."""
    for write in writes:
        if write is not None:
            int(shape(write.whole)[1])


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


def check(attention, key: CacheWrite | None, val: CacheWrite | None, length, value_length) -> None:
    """Raises NoMatch where keys and values do not make one packable cache."""
    if key is None or val is None:
        what, which = ("keys", attention.key) if key is None else ("values", attention.value)
        raise NoMatch(f"the {what} reach attention through {op(ungrouped(which))}, not straight from the cache", which)
    if key.kind != val.kind or key.packed != val.packed:
        raise NoMatch(f"keys and values are cached differently ({key.kind} and {val.kind})", attention.node)
    for name, write in (("keys", key), ("values", val)):
        size = shape(write.whole)
        if write.kind == "place" and not write.packed:
            raise NoMatch(STATIC_PLAIN, write.whole)
        if not isinstance(size[3], int) or size[3] % 8:
            raise NoMatch(f"the head dim of the {name} is {size[3]}, accepted: a multiple of 8", write.whole)
        if value(write.whole).dtype not in DTYPE_NAMES:
            raise NoMatch(f"the {name} are {value(write.whole).dtype}, accepted: floating point", write.whole)
        if write.kind == "fill" and not all(u is attention.node or op(u) in FILL_USERS for u in write.whole.users):
            raise NoMatch("the static cache is used by another op too", write.whole)
    heads, kv_heads = shape(attention.query)[1], shape(key.whole)[1]
    if heads % kv_heads or shape(val.whole)[1] != kv_heads:
        raise NoMatch(f"{heads} query heads do not divide into {kv_heads} KV heads", attention.node)
    lengths = shape(key.whole)[2], shape(val.whole)[2]
    # symbols are not compared: each cache input has a length symbol of its own
    if all(isinstance(n, int) for n in lengths) and lengths[0] != lengths[1]:
        raise NoMatch("keys and values differ in length", attention.node)
    if not guard_or_false(shape(attention.query)[0] == shape(key.whole)[0]):
        raise NoMatch("the query's batch is not the cache's", attention.node)
    # two inputs have two length symbols, of which the mask ties down the keys' alone: requiring equality adds a guard
    if key.static and not guard_or_false(length == value_length):
        raise NoMatch("attention sees more of the keys than of the values", attention.node)
    if key.static and attention.mask is None and same_size(length, shape(key.whole)[2]):
        raise NoMatch("a static cache is read without a mask: unwritten slots would be attended to", attention.node)


find_sites.needs = ()
find_sites.gives = ("sites", "refused")
find_sites.follows = ("canonicalize",)
