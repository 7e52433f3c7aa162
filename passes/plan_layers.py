"""Decide per site how its cache is packed: token classes, bits, and the layout of its buffers.

Before   state.sites                                After   site.policy, site.key_layout, site.value_layout
Needs    sites        Gives    sites, refused, vision, program
Follows  find_sites   Leaves   the graph as it was, but for one node with the vision tokens

TSA (first layers, where vision tokens can be told apart): text at text_bits, vision at body_bits. PSA (all others):
pivots at 16 bits, keys of text at psa_text_key_bits where it can be told apart, the rest at body_bits. The most recent
tokens are at 16 bits in both. A cache that arrives packed keeps its layout.
A layer's number is in its parameters' path, else it is the site's place in the graph (patterns/site.py): tsa_layers
goes by it. A simulated recipe keeps every token as it is; its layout says how reads quantize them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from akvq_fx.config import ALWAYS, AKVQConfig
from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.patterns.nodes import op, shape, value
from akvq_fx.passes.patterns.tokens import covers, starts_a_call, vision_masks
from akvq_fx.passes.state import GraphState
from akvq_fx.recipes import RECIPES
from akvq_fx.report import PassReport


def plan_layers(state: GraphState) -> PassReport:
    report = PassReport("plan_layers")
    config = state.config
    state.vision = vision_tokens(state)
    if len(state.sites) == 1 and state.vision is None and not starts_a_call(state.graph) and not state.sites[0].packed:
        state.sites[0].notes.append("a graph of one layer may serve several: no TSA, as the layer is unknown")
    for site in state.sites:
        if site.packed:
            site.key_layout = Layout.parse(value(site.key.past).layout_text)
            site.value_layout = Layout.parse(value(site.value.past).layout_text)
            site.policy = site.key_layout.policy
            report.match(site)
            continue
        has_vision = state.vision is not None and prompt_sized(state, site)
        tsa = has_vision and site.layer in config.tsa_layers
        if tsa and config.text_bits == 16 and not config.lossless and not config.simulated:
            reason = "text_bits=16 keeps TSA layers at 16 bits"
            report.miss(site, reason, site.attention.node)
            state.refused.append((site.label, site.layer, reason, site.attention.node))
            continue
        key, val = site.key.whole, site.value.whole
        site.key_layout = layout_of(config, "keys", shape(key)[3], value(key).dtype, tsa, has_vision)
        site.value_layout = layout_of(config, "values", shape(val)[3], value(val).dtype, tsa, has_vision)
        site.policy = site.key_layout.policy
        report.match(site)
    state.sites = [site for site in state.sites if site.key_layout is not None]
    return report


def layout_of(config: AKVQConfig, half: str, head_dim: int, dtype: torch.dtype, tsa: bool, has_vision: bool) -> Layout:
    """How the "keys" or the "values" of a layer are packed, before anything is known of the values' rotation.

    has_vision   vision tokens can be told apart from text
    tsa          the layer attends to text first (which only matters where text gets more bits)
    """
    recipe = RECIPES[config.recipe]
    if recipe.simulated:
        return Layout(head_dim, dtype, simulate=recipe.keys if half == "keys" else recipe.values)
    mapped = config.center_keys or config.balance_keys or config.uneven_keys
    affine = half == "keys" and config.rotate and mapped
    base = Layout(
        head_dim,
        dtype,
        body_bits=config.body_bits,
        rotated=config.rotate,
        affine=affine,
        shares_classes=half == "values",
    )
    if config.lossless:
        return base
    tsa = tsa and config.text_bits > config.body_bits
    text_bits = config.text_bits if tsa else 0
    if has_vision and not tsa and half == "keys" and config.keeps_psa_text_keys:
        text_bits = config.psa_text_key_bits
    overlay = tsa or has_vision and config.keeps_psa_text_keys  # of the keys; then values have minima as they have
    symmetric = (config.uneven_keys if half == "keys" else config.symmetric_values) and not overlay
    return dataclasses.replace(
        base,
        text_bits=text_bits,
        window=config.window,
        pivots=0 if tsa else config.pivots,
        group=config.group,
        symmetric=symmetric,
        uneven=symmetric and half == "keys",
        blocks=half == "keys" and (config.center_blocks == ALWAYS or bool(config.center_blocks) and not overlay),
        body_clip=1.0 if symmetric else config.body_clip,
        text_clip=config.text_clip,
    )


def vision_tokens(state: GraphState) -> Node | None:
    """One bool node [B, T] for the prompt of this graph, or None where the graph has no sign of vision tokens."""
    masks = vision_masks(state.graph)
    if not masks:
        # a graph that holds only a prompt's layers: an earlier graph of this or a later call may place images
        prompt = any(site.key.kind in ("first", "fill") for site in state.sites)
        matters = state.config.tsa_layers or state.config.keeps_psa_text_keys
        if prompt and len(state.sites) > 1 and not starts_a_call(state.graph) and matters:
            last = [n for n in state.graph.nodes if n.op == "placeholder"][-1]
            with state.graph.inserting_after(last):
                size = shape(state.sites[0].attention.query)
                state.program.vision = "take"
                state.program.vision_size = state.size(size[0]), state.size(size[2])
                given = [n for n in state.placeholders if is_hidden(n, size)]
                state.program.embeddings = state.position[given[0]] if len(given) == 1 else None
                return state.graph.placeholder("vision_tokens")
        return None
    flat = None
    for mask in masks:
        following = mask.next
        while following.op == "placeholder":
            following = following.next
        with state.before(following):
            node = mask
            if op(mask) == "placeholder" and value(mask).dtype != torch.bool:
                node = state.call(torch.ne, mask, 0)
            if len(shape(mask)) == 3:
                node = state.call(torch.select, mask, 2, 0)
            node.meta.setdefault("example_value", value(mask)[..., 0] if len(shape(mask)) == 3 else value(mask))
        if flat is not None:
            later = max((flat, node), key=list(state.graph.nodes).index)
            with state.graph.inserting_after(later):
                both = state.call(torch.logical_or, flat, node)
            both.meta["example_value"] = flat.meta["example_value"]
            node = both
        flat = node
    return flat


def is_hidden(node: Node, query) -> bool:
    """An input [B, T, E] of floats, no parameter, for queries of shape [B, H, T, D]."""
    x = value(node)
    if not isinstance(x, torch.Tensor) or isinstance(x, torch.nn.Parameter):
        return False
    return x.is_floating_point() and x.dim() == 3 and covers(node, query[0], query[2])


def prompt_sized(state: GraphState, site) -> bool:
    """Whether the vision mask covers just the tokens that this site caches.

    A carried mask ("take") is only asked for by graphs of several layers: one layer's graph may be shared among layers.
    Buffers of the caller's may hold tokens of before.
    """
    if state.program.vision == "take":
        return site.key.kind in ("first", "fill")
    new = site.key.new if site.key.kind != "grow" and not site.in_buffers else None
    return new is not None and covers(state.vision, shape(new)[0], shape(new)[2])


plan_layers.needs = ("sites",)
plan_layers.gives = ("sites", "refused", "vision", "program")
plan_layers.follows = ("find_sites",)
plan_layers.required = "the passes after it read the layouts that it chooses"
