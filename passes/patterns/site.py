"""Site: one attention call over a packable cache, with everything that the passes need to know of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch.fx import Node

from akvq_fx.config import AKVQConfig
from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.patterns.attention import Attention
from akvq_fx.passes.patterns.cache_write import CacheWrite
from akvq_fx.passes.patterns.nodes import shape
from akvq_fx.passes.patterns.rope import pairs_of

LAYER = re.compile(r"modules_(\d+)_")  # dynamo's name of an element of a ModuleList


@dataclass
class Site:
    """Layers may share key and value (they read one cache); length is what attention sees of them."""

    attention: Attention
    key: CacheWrite
    value: CacheWrite
    length: object
    layer: int
    label: str
    rope: str = "none"
    key_layout: Layout | None = None
    value_layout: Layout | None = None
    policy: str = ""
    value_rotation: str = "off"  # folded, online or off
    value_reason: str = ""
    weights: tuple[Node | None, Node | None] = (None, None)  # placeholders of the K and V projections
    owner: tuple[Node, ...] = ()  # placeholders of all weights that make the keys and values
    notes: list[str] = field(default_factory=list)

    @property
    def head_dim(self) -> int:
        return shape(self.key.whole)[3]

    @property
    def pairs(self) -> tuple[int, int]:
        """Distance of the channels that the rotary embedding turns into each other, and how many it turns."""
        return (0, 0) if self.key.new is None else pairs_of(self.key.new, self.rope)

    @property
    def packed(self) -> bool:
        return self.key.packed and self.value.packed

    @property
    def in_buffers(self) -> bool:
        """Its cache is the caller's plain static buffers, which are packed behind the graph."""
        return self.key.kind == "place" and not self.packed

    @property
    def groups(self) -> str:
        """Query heads : KV heads."""
        return f"{shape(self.attention.query)[1]}:{shape(self.key.whole)[1]}"

    def __str__(self) -> str:
        return f"{self.label} ({self.attention.node.name})"


def affine_choice(site: Site, config: AKVQConfig) -> tuple:
    """Arguments of akvq::key_affine behind its tensors."""
    layout, simulation = site.key_layout, site.key_layout.simulation
    last = () if simulation is None else (simulation.alpha,)
    if layout.uneven or layout.blocks:
        last = (None, layout.uneven, layout.blocks)
    if layout.uneven and config.share_pairs:
        last += site.pairs
    return config.center_keys, config.balance_keys, *last


def layer_of(weight: Node | None, position: int) -> tuple[int, str]:
    """(decoder layer, label): the first number in the parameter's path, else the site's place in the graph.

    A path never decides whether a site matches. It labels the rows of a report, and gives the layer's number, which
    tsa_layers goes by: a model that is compiled in parts has graphs whose first site is not layer 0.
    """
    if weight is None:
        return position, f"attention {position}"
    path = str(weight.target)
    found = LAYER.search(path)
    name = re.sub(r"_+(modules|parameters)_+", ".", path)
    name = re.sub(r"^[lL]_\w*?self_*\.?", "", name).strip("._").rsplit(".", 2)[0]
    return (int(found.group(1)) if found else position), name
