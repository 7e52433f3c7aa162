"""The cost model: bytes and bits of packed caches as sympy expressions, from the table that allocates them.

B batch, H KV heads, C capacity, Ct text slots, T tokens. `bytes_of` with real sizes put in equals what
`Layout.allocate` makes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
import torch

from akvq_fx.config import AKVQConfig
from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.plan_layers import layout_of
from akvq_fx.recipes import RECIPES

B, H, C, CT, T = sympy.symbols("B H C Ct T", positive=True, integer=True)


@functools.cache
def bytes_of(layout: Layout) -> sympy.Expr:
    """Bytes of one packed key or value tensor, an expression in B, H, C and Ct."""
    total = sympy.Integer(0)
    for name in layout.fields:
        shape, dtype = layout.buffer(name, B, H, C, CT)
        total += sympy.prod(shape) * dtype.itemsize
    return sympy.expand(total)


def bits_per_element(layout: Layout, heads: int, text_fraction: float = 0.0) -> sympy.Expr:
    """Bits per cached number at T tokens with no spare capacity, batch 1; an expression in T.

    text_fraction: share of tokens that are text; a text overlay holds their bits beyond body_bits.
    """
    exact = bytes_of(layout).subs({B: 1, H: heads, C: T, CT: text_fraction * T})
    return sympy.simplify(8 * exact / (heads * T * layout.head_dim))


def limit_bits(layout: Layout, heads: int) -> float:
    """Bits per element of a long cache: what the 16-bit overlays cost vanishes."""
    return float(sympy.limit(bits_per_element(layout, heads), T, sympy.oo))


def bits_at(layout: Layout, heads: int, tokens: int, vision: float = 0.0) -> float:
    """Bits per cached number of one sequence of `tokens` tokens with no spare capacity, `vision` of them vision tokens.

    Of a simulated layout: what a real cache of the method takes, not what the simulation keeps.
    """
    if layout.simulation is not None:
        return layout.simulation.bits(layout.head_dim, heads, tokens, vision)
    sizes = {B: 1, H: heads, C: tokens, CT: round((1 - vision) * tokens)}
    return float(8 * bytes_of(layout).subs(sizes) / (heads * tokens * layout.head_dim))


def recipe_bits(
    name: str, head_dim: int, heads: int, tokens: int, vision: float, layers: int, dtype: torch.dtype = torch.float16
) -> float:
    """bits_at of a recipe with its own options, averaged over keys, values and layers (the first may be TSA)."""
    config = AKVQConfig(recipe=name)
    tsa = sum(layer < layers for layer in config.tsa_layers) if vision and not config.simulated else 0

    def mean(is_tsa: bool) -> float:
        halves = (layout_of(config, half, head_dim, dtype, is_tsa, vision > 0) for half in ("keys", "values"))
        return sum(bits_at(layout, heads, tokens, vision) for layout in halves) / 2

    return (tsa * mean(True) + (layers - tsa) * mean(False)) / layers


@dataclass(frozen=True)
class RecipeRow:
    """how: "packed" into low-bit buffers, or "simulated", quantized and dequantized on every read of a 16-bit cache."""

    name: str
    how: str
    bits: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class RecipeTable:
    """bits: per cached number at each of `tokens`, every overhead counted; str() is a Markdown table."""

    tokens: tuple[int, ...]
    about: str
    rows: tuple[RecipeRow, ...]

    def __str__(self) -> str:
        lines = [("recipe", "cache", *(f"bits at {count:,}" for count in self.tokens), "source")]
        lines += [("---",) * len(lines[0])]
        lines += [(f"`{row.name}`", row.how, *(f"{bits:.2f}" for bits in row.bits), row.source) for row in self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{self.about}"


def recipe_table(
    head_dim: int = 128, heads: int = 32, vision: float = 0.9, layers: int = 32, tokens: tuple[int, ...] = (1024, 4096)
) -> RecipeTable:
    """Every recipe with what it costs in a 16-bit model; vision is the share of vision tokens."""
    about = (
        f"Heads of {head_dim} channels, {heads} KV heads, {layers} layers, {vision:.0%} vision tokens, one sequence."
    )
    rows = []
    for name, recipe in RECIPES.items():
        bits = tuple(recipe_bits(name, head_dim, heads, count, vision, layers) for count in tokens)
        rows.append(RecipeRow(name, "simulated" if recipe.simulated else "packed", bits, recipe.source))
    return RecipeTable(tokens, about, tuple(rows))
