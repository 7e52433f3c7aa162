"""Keep packed codes where the graph kept 16-bit keys and values.

Before   whole = cat([past, new], 2); return whole      After   append(buffers, new, at); return the same cache, longer
         whole = cat([empty, new], 2); return whole             buffers = pack(new, at, classes, pivots); return them
Needs    sites, vision, program   Gives    buffers, made, classes, affine, stored_uses, program
Follows  fold_values, mask_dropped   Leaves   what attention reads (attend_packed)

A prompt's own attention still reads its 16-bit tokens, which are freed after the layer. A plain cache that is not empty
is packed whole when it first gets new tokens.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from akvq_fx.kernels import cache, salience  # noqa: F401 - registers the ops
from akvq_fx.passes.patterns.arguments import place_of
from akvq_fx.passes.patterns.cache_write import CacheWrite
from akvq_fx.passes.patterns.nodes import is_shared, same_size, shape, value
from akvq_fx.passes.patterns.site import Site, affine_choice
from akvq_fx.passes.patterns.tokens import FIRST_TOKEN, covers, residual_of
from akvq_fx.passes.state import Buffers, GraphState, is_single_token
from akvq_fx.report import PassReport

akvq = torch.ops.akvq
PACKED, APPENDED = (place_of(target, "x") for target in (akvq.pack.default, akvq.append.default))


def pack_caches(state: GraphState) -> PassReport:
    report = PassReport("pack_caches")
    done: set[Node] = set()
    for site in state.sites:
        for write, layout in ((site.key, site.key_layout), (site.value, site.value_layout)):
            if write.whole in done:
                continue
            done.add(write.whole)
            with state.before(site.attention.node):
                if write.packed:
                    state.program.owners[state.position[write.past]] = state.owner(site)
                    extend(state, site, write)
                else:
                    begin(state, site, write, layout)
        report.match(site)
    return report


def begin(state: GraphState, site: Site, write: CacheWrite, layout) -> None:
    """Pack the prompt, or a plain cache met for the first time."""
    x = write.whole if write.kind == "grow" else write.new
    at = state.positions(write, x)
    valid = valid_tokens(state, site, write, at)
    classes = token_classes(state, site, x, valid)
    pivots = pivot_tokens(state, site, x, valid) if layout.pivots else None
    affine = affine_map(state, site, x, valid) if "affine" in layout.fields else None
    if write.kept is not None and not same_size(shape(write.kept)[2], shape(x)[2]):
        x, at, classes, pivots = last_tokens(state, x, classes, pivots, shape(write.kept)[2])
    capacity = state.capacity(write)
    packed = state.call(akvq.pack.default, x, at, classes, pivots, affine, capacity, str(layout))
    nodes = [state.call(operator.getitem, packed, i) for i in range(len(layout.fields))]
    state.made[write.whole] = Buffers(layout, nodes)
    state.stored_uses[write.whole] = [(packed, PACKED)]
    state.classes[write.whole], state.affine[write.whole] = classes, affine


def last_tokens(state: GraphState, x: Node, classes: Node, pivots: Node | None, count) -> tuple:
    """(x, at, classes, pivots) of the last `count` tokens of a prompt, all that its sliding window keeps."""
    total = shape(x)[2]
    start, device = total - count, value(x).device
    part = lambda node, dim: state.call(torch.narrow, node, dim, state.size_node(start), state.size_node(count))
    key = ("last", str(count), str(total), device)
    at = state.share(key, lambda: state.call(torch.arange, state.size_node(count), device=device, dtype=torch.int64))
    classes = state.share((*key, classes), lambda: part(classes, 1))
    if pivots is not None:
        place = lambda: state.call(torch.clamp_min, state.call(torch.sub, pivots, state.size_node(start)), -1)
        pivots = state.share((*key, pivots), place)
    return part(x, 2), at, classes, pivots


def extend(state: GraphState, site: Site, write: CacheWrite) -> None:
    """Take a packed cache's buffers as inputs and, unless it is only read (kind "read"), append to them."""
    buffers = state.bind(write.past)
    state.affine[write.whole] = buffers["affine"] if buffers.layout.affine else None
    state.stored_uses[write.whole] = []
    if write.kind != "read":
        append(state, site, write, buffers)


def append(state: GraphState, site: Site, write: CacheWrite, buffers: Buffers) -> None:
    layout, x = buffers.layout, write.new
    at = state.positions(write, x)
    classes = pivots = None
    if not is_single_token(write):
        valid = valid_tokens(state, site, write, at)
        classes = token_classes(state, site, x, valid)
        if write.static and not layout.lossless:
            pivots = pivot_tokens(state, site, x, valid) if layout.pivots else None
            affine = affine_map(state, site, x, valid) if "affine" in layout.fields else None
            state.call(akvq.restart.default, buffers.nodes, at, affine, str(layout))
    node = state.call(akvq.append.default, buffers.nodes, x, at, classes, pivots, str(layout))
    state.stored_uses[write.whole].append((node, APPENDED))
    if write.kind == "grow":
        state.program.appends.append((state.position[write.past], state.size(shape(x)[2])))


def affine_map(state: GraphState, site: Site, x: Node, valid: Node | None) -> Node:
    """[B, rows, H, D]: centre, gains and order of the keys' channels, from this prompt's own keys and queries."""
    choice = affine_choice(site, state.config)
    return state.call(akvq.key_affine.default, x, site.attention.query, valid, *choice)


def valid_tokens(state: GraphState, site: Site, write: CacheWrite, at: Node) -> Node | None:
    """[B, q] bool: which of the tokens at these positions a query may see; None where there is no mask: all."""
    mask = site.attention.mask
    if mask is None:
        return None
    batch = shape(write.whole)[0]
    one_for_all = shape(mask)[-1:] in ((), (1,))
    tokens = (state.size_node(site.length),) if one_for_all else ()
    make = lambda: state.call(akvq.valid_tokens.default, mask, state.size_node(batch), *tokens)
    seen = state.share(("valid", mask, str(batch)), make)
    whole = not write.static and not write.packed
    if whole:
        return seen
    return state.share(("valid", mask, str(batch), at), lambda: state.call(torch.index_select, seen, 1, at))


def token_classes(state: GraphState, site: Site, x: Node, valid: Node | None) -> Node:
    vision = state.vision
    if vision is not None and state.program.vision != "take" and not covers(vision, shape(x)[0], shape(x)[2]):
        vision = None
    make = lambda: state.call(akvq.token_classes.default, x, valid, vision)
    return state.share(("classes", str(shape(x)[2]), valid, vision), make)


def pivot_tokens(state: GraphState, site: Site, x: Node, valid: Node | None) -> Node:
    """[B, P] int32, from the residual stream at the layer's input; where there is none, the first real token."""
    config = state.config
    residual = residual_of(site.attention, site.key.new) if site.key.new is not None else None
    if residual is not None and site.key.kind != "grow" and covers(residual, shape(x)[0], shape(x)[2]):
        key = ("pivots", residual, valid)
        args = (config.pivots, config.pivot_mode, float(config.massive_floor), float(config.massive_ratio))
        return state.share(key, lambda: state.call(akvq.find_pivots.default, residual, valid, *args))
    shared = residual is not None and is_shared(value(residual))
    why = "the residual stream is a DTensor" if shared else "no residual stream in this graph"
    site.notes.append(f"{why}: the pivot is the first real token")

    def make():
        flat = state.call(torch.select, x, 1, 0)
        return state.call(akvq.find_pivots.default, flat, valid, config.pivots, *FIRST_TOKEN)

    return state.share(("pivots", "first", valid, str(shape(x)[2])), make)


pack_caches.needs = ("sites", "vision", "program")
pack_caches.gives = ("buffers", "made", "classes", "affine", "stored_uses", "program")
pack_caches.follows = ("fold_values", "mask_dropped")
pack_caches.required = "attention would read codes that nobody wrote; without find_sites nothing is packed"
