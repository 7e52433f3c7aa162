"""Let attention read packed codes where its cache came in packed.

Before   sdpa(q, expand(whole_k), expand(whole_v), mask)    After   attend(q, key buffers, value buffers, T, mask)
Needs    sites, originals, buffers, made, stored_uses       Gives    stored_uses, query_uses
Follows  pack_caches                                        Leaves   the output's shape and dtype

A prompt reads its own 16-bit tokens (with prefill="quantized": the packed ones). Where several new tokens come, attend
also gets them at full precision, so that a chunk does not see itself through two bits. Their append then moves behind
the last attention that reads the cache: it overwrites ring slots of earlier tokens, which the chunk's queries must
still see at 16 bits.

Where a call stands for attention that the model wrote out with a softcap or sinks, and does not read codes, the model's
own nodes take its place again.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from akvq_fx.kernels import attend  # noqa: F401 - registers the op
from akvq_fx.passes.patterns.arguments import place_of
from akvq_fx.passes.patterns.attention import Attention
from akvq_fx.passes.patterns.nodes import same_size, shape, value
from akvq_fx.passes.patterns.site import Site
from akvq_fx.passes.state import GraphState, Original, is_single_token
from akvq_fx.report import PassReport

akvq = torch.ops.akvq
FRESH_KEY, FRESH_VALUE = (place_of(akvq.attend.default, name) for name in ("fresh_key", "fresh_value"))


def attend_packed(state: GraphState) -> PassReport:
    report = PassReport("attend_packed")
    for site in state.sites:
        if site.packed:
            key, val = state.buffers[site.key.past], state.buffers[site.value.past]
        elif state.config.prefill == "quantized" and not site.key_layout.lossless and keeps_all(site):
            key, val = state.made[site.key.whole], state.made[site.value.whole]
        else:
            report.miss(site, "a prompt attends to its own 16-bit tokens", site.attention.node)
            continue
        rewrite(state, site, key, val)
        report.match(site)
    for call, original in state.originals.items():
        if call in state.graph.nodes:
            put_back(state, call, original)
    return report


def keeps_all(site: Site) -> bool:
    """The prompt's cache holds every token that its attention reads, and no others: no sliding window cuts it."""
    total = shape(site.key.whole)[2]
    return same_size(shape(site.key.returned)[2], total) and same_size(site.length, total) or site.key.static


def rewrite(state: GraphState, site: Site, key, val) -> None:
    attention = site.attention
    old = attention.node
    with state.before(old):
        length = state.size_node(site.length)
        fresh = (None, None, None)
        if site.packed and site.key.new is not None and not is_single_token(site.key):
            fresh = (site.key.new, site.value.new, state.positions(site.key, site.key.new))
        node = state.call(
            akvq.attend.default,
            attention.query,
            key.nodes,
            val.nodes,
            length,
            attention.mask,
            attention.scale,
            attention.is_causal,
            *fresh,
            str(key.layout),
            str(val.layout),
            *extras_of(attention),
        )
    node.meta = {**old.meta, "example_value": value(old)}
    old.replace_all_uses_with(node)
    state.graph.erase_node(old)
    if original := state.originals.pop(old, None):
        state.effects -= set(original.nodes)
        state.forget(*original.nodes)
    attention.node = node
    if fresh[0] is not None:
        append_after(state, node, site.value.whole, FRESH_VALUE)
        append_after(state, node, site.key.whole, FRESH_KEY)
    state.query_uses.append((site, node))


def extras_of(attention: Attention) -> tuple:
    """attend's arguments behind the layouts, where one of them is not its default."""
    if not attention.softcap and attention.sinks is None:
        return ()
    return False, False, attention.softcap, attention.sinks  # rotate and restore are for fuse_rotations to switch on


def put_back(state: GraphState, call: Node, original: Original) -> None:
    """What the model wrote in place of a call that stands for it."""
    own = original.nodes[-1]
    for site in state.sites:
        if site.attention.node is call:
            site.attention.node = own
    original.result.replace_all_uses_with(own)
    state.forget(original.result)


def append_after(state: GraphState, reader: Node, whole: Node, position: int) -> None:
    """Move the append of `whole` behind an attention that takes the same tokens as its argument `position`.

    Called for each such attention in graph order, so the append ends up behind the last one. The uses of the tokens are
    kept in graph order too: tokens are rotated just before their first use.
    """
    uses = state.stored_uses[whole]
    attends = [use for use in uses if use[0].target is akvq.attend.default]
    appends = [use for use in uses if use not in attends]
    for append, _ in appends:
        reader.append(append)
    state.stored_uses[whole] = [*attends, (reader, position), *appends]


attend_packed.needs = ("sites", "originals", "buffers", "made", "stored_uses")
attend_packed.gives = ("stored_uses", "query_uses")
attend_packed.follows = ("pack_caches",)
attend_packed.required = "folded values would be read as if they were not; without find_sites nothing is packed"
