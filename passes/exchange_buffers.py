"""Caches in static buffers of the caller's that still hold 16-bit tokens: what is needed to pack them behind the graph.

Before   buffer.index_copy_(2, at, new); sdpa(q, buffer, ...)        After   the same; also return at, the mask and q
Needs    sites                     Gives    sites, exchanges, refused
Follows  plan_layers               Leaves   the graph as it was: its numbers are the uncompiled model's

A graph cannot put another tensor in place of one that its caller holds, and how many tokens there are is on the device.
So this graph runs as it is, once. Then the runtime packs what the buffers hold and has the tensors themselves become
PackedKV (akvq_fx/exchange.py): dynamo traces the next step anew, as one over packed static caches.
"""

from __future__ import annotations

import dataclasses
import itertools

from torch.fx import Node

from akvq_fx.exchange import refusal
from akvq_fx.kernels.cache_axes import STANDARD
from akvq_fx.passes.patterns.nodes import NoMatch, ancestors, op
from akvq_fx.passes.patterns.site import Site, affine_choice
from akvq_fx.passes.patterns.tokens import FIRST_TOKEN
from akvq_fx.passes.state import GraphState
from akvq_fx.program import Exchange
from akvq_fx.report import PassReport

OWN_ORDER = ("remainder", "fmod", "mod", "where", "clamp", "clamp_min", "clamp_max", "roll", "sort", "flip")
REACH = 30  # nodes behind the positions that are looked at
PACKED_BEHIND = "static buffers of the caller's: packed in place after this graph has run"
NO_RESIDUAL = "no residual stream of the prompt is known: the pivot is the first real token"


def exchange_buffers(state: GraphState) -> PassReport:
    report = PassReport("exchange_buffers")
    taken: dict[Node, Site] = {}
    for site in [site for site in state.sites if site.in_buffers]:
        state.sites.remove(site)
        try:
            check(state, site, taken)
        except NoMatch as miss:
            state.refused.append((site.label, site.layer, miss.reason, miss.node or site.attention.node))
            report.miss(site, miss.reason, miss.node)
            continue
        key, val = buffers_of(state, site)
        if key not in taken:
            taken[key] = taken[val] = site
            plan(state, site)
            state.exchanges.append(site)
            state.effects |= {n for n in kept_for(site) if n is not None}
        report.match(site)
    return report


def buffers_of(state: GraphState, site: Site) -> tuple[Node, Node]:
    """The placeholders of its keys and values."""
    return state.buffer_of(site.key.whole), state.buffer_of(site.value.whole)


def plan(state: GraphState, site: Site) -> None:
    """What plan_layers leaves open: how values are rotated, which no fold does here; notes for the report."""
    rotated = site.value_layout.rotated and state.config.value_rotation != "off"
    site.value_layout = dataclasses.replace(site.value_layout, rotated=rotated)
    site.value_rotation = "online" if rotated else "off"
    site.notes.append(PACKED_BEHIND)
    site.notes += [NO_RESIDUAL] if site.key_layout.pivots else []


def kept_for(site: Site) -> tuple[Node, Node, Node | None]:
    """What the graph returns in addition."""
    return site.key.at, site.attention.query, site.attention.mask


def check(state: GraphState, site: Site, taken: dict[Node, Site]) -> None:
    """Raises NoMatch where the buffers must stay as they are."""
    key, val = buffers_of(state, site)
    if key is val:
        raise NoMatch("keys and values are one buffer", key)
    before = {taken.get(key), taken.get(val)} - {None}
    if any(buffers_of(state, other) != (key, val) for other in before):
        raise NoMatch("layers share a buffer of keys and not that of values, or the other way round", key)
    for buffer in (key, val):
        why = refusal(state.weights[state.position[buffer]])
        if why:
            raise NoMatch(f"a static buffer of the caller's stays as it is: {why}", buffer)
    for source in itertools.islice(ancestors(site.key.at), REACH):
        if op(source) in OWN_ORDER:
            raise NoMatch(f"positions in a static buffer come of {op(source)}: they may not follow the tokens", source)


def exchange_of(state: GraphState, site: Site, results: dict[Node, int]) -> Exchange:
    """How the runtime packs a site's buffers. results: places of `kept_for` among what the graph returns more."""
    at, query, mask = kept_for(site)
    key, val = buffers_of(state, site)
    axes = [state.views[x.whole].axes if x.whole in state.views else STANDARD for x in (site.key, site.value)]
    return Exchange(
        key=state.position[key],
        value=state.position[val],
        axes=tuple(axes),
        key_layout=site.key_layout,
        value_layout=site.value_layout,
        at=results[at],
        query=results[query],
        mask=None if mask is None else results[mask],
        length=state.size(site.length),
        affine=affine_choice(site, state.config) if "affine" in site.key_layout.fields else None,
        pivots=(site.key_layout.pivots, *FIRST_TOKEN),
        owner=state.owner(site),
    )


exchange_buffers.needs = ("sites",)
exchange_buffers.gives = ("sites", "exchanges", "refused")
exchange_buffers.follows = ("plan_layers",)
exchange_buffers.required = "the passes after it take every site for one whose cache the graph returns or has packed"
