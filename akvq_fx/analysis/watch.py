"""Watch: run dynamo's graphs node by node, and give a callback every attention call over a prompt's cache.

The graphs are read by the same patterns as in the backend, and computed as they are: nothing is rotated, packed or
compiled. The model need not return attention weights, and no tensor [B, H, T, T] is made here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from akvq_fx.config import AKVQConfig
from akvq_fx.passes.apart.take_apart import take_apart
from akvq_fx.passes.patterns.nodes import shape
from akvq_fx.passes.patterns.site import Site
from akvq_fx.passes.patterns.tokens import covers, residual_of, vision_masks
from akvq_fx.passes.plan_layers import vision_tokens
from akvq_fx.policy import prompt_site, sites_of
from akvq_fx.together import Together


@dataclass
class AttentionCall:
    """One attention call over a prompt of q tokens. C is the length that attention reads: q, or a static cache's.

    query, key      [B, Hq, q, D], [B, Hq or H, C, D] as attention gets them
    mask            [B or 1, 1 or Hq, q, C] bool or additive, None where is_causal says enough
    scale           None for 1/sqrt(D)
    new_key, new_value   [B, H, q, D] before they meet the cache
    residual        [B, q, E] at the layer's input, None where the graph does not show it
    vision          [B, q] bool, None where the call has no image
    at              [q] slots that the tokens are written to
    """

    layer: int
    label: str
    query: Tensor
    key: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float | None
    new_key: Tensor
    new_value: Tensor
    residual: Tensor | None
    vision: Tensor | None
    at: Tensor


class Watch:
    """A dynamo backend that calls `look(AttentionCall)` for each attention call of a prompt, layer by layer.

    names    id of a parameter -> its name in the model: it says for which layer a shared graph runs
    refused  label -> reason, of attention that the backend would leave at 16 bits
    weights  parameters of the graphs that hold attention over a cache
    """

    def __init__(self, config: AKVQConfig, names: dict[int, str], look: Callable[[AttentionCall], None]):
        self.config, self.names, self.look = config, names, look
        self.refused: dict[str, str] = {}
        self.weights: dict[int, nn.Parameter] = {}
        self.vision: Tensor | None = None  # of this call; graph breaks may put it in an earlier graph than the layers

    def backend(self, gm: torch.fx.GraphModule, example_inputs: list):
        apart = take_apart(gm, example_inputs, {})
        state = sites_of(apart.gm, apart.inputs, self.config)
        self.refused |= {label: reason for label, _, reason, _ in state.refused}
        vision = vision_tokens(state) if vision_masks(state.graph) else None
        sites = {site.attention.node: site for site in state.sites if prompt_site(site)}
        if not sites and vision is None:
            return gm.forward

        def run(*args):
            if sites:
                self.weights |= {id(a): a for a in args if isinstance(a, nn.Parameter)}
            return Walk(self, state, sites, vision, args).run(*args)

        return Together(run, apart) if apart.changed else run

    def name(self, site: Site, weight) -> tuple[int, str]:
        """(layer, label) by the parameter that ran; by the graph's own names where the model does not know it."""
        name = self.names.get(id(weight))
        if name is None:
            return site.layer, site.label
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        return (numbers[0] if numbers else site.layer), name.rsplit(".", 2)[0]


class Walk(torch.fx.Interpreter):
    """One run of one graph, which keeps a site's tensors until its attention has been looked at."""

    def __init__(self, watch: Watch, state, sites: dict[Node, Site], vision: Node | None, args: tuple):
        super().__init__(state.gm)
        self.watch, self.state, self.sites, self.vision, self.args_given = watch, state, sites, vision, args
        self.residuals = {node: residual_node(site) for node, site in sites.items()}
        kept = [vision, *self.residuals.values()]
        for site in sites.values():
            kept += [site.key.new, site.value.new, site.key.at]
        self.wanted = {node for node in kept if node is not None}
        self.kept: dict[Node, Tensor] = {}

    def run_node(self, node: Node):
        result = super().run_node(node)
        if node in self.wanted:
            self.kept[node] = result
        if node is self.vision:
            self.watch.vision = result
        if node in self.sites:
            self.hand_over(node, self.sites[node])
        return result

    def hand_over(self, node: Node, site: Site) -> None:
        _, given = self.fetch_args_kwargs_from_env(node)
        new_key = self.kept[site.key.new]
        weights = [self.args_given[self.state.position[w]] if w in self.state.position else None for w in site.weights]
        layer, label = self.watch.name(site, weights[0])
        count = new_key.shape[2]
        vision = self.watch.vision
        self.watch.look(
            AttentionCall(
                layer=layer,
                label=label,
                query=given["query"],
                key=given["key"],
                mask=given.get("attn_mask"),
                is_causal=site.attention.is_causal,
                scale=site.attention.scale,
                new_key=new_key,
                new_value=self.kept[site.value.new],
                residual=self.kept.get(self.residuals[node]),
                vision=vision if vision is not None and tuple(vision.shape) == (len(new_key), count) else None,
                at=self.kept[site.key.at] if site.key.at is not None else torch.arange(count, device=new_key.device),
            )
        )
        later = list(self.sites)[list(self.sites).index(node) + 1 :]
        for done in {site.key.new, site.value.new} - {
            w.new for n in later for w in (self.sites[n].key, self.sites[n].value)
        }:
            del self.kept[done]


def residual_node(site: Site) -> Node | None:
    """[B, q, E] where the graph shows it for the tokens that the site caches."""
    found = residual_of(site.attention, site.key.new)
    size = shape(site.key.new)
    return found if found is not None and covers(found, size[0], size[2]) else None
