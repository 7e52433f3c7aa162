"""KIVI (Liu et al., arXiv 2402.02750): keys per channel, values per token, recent tokens at 16 bits. Simulated.

Keys, after RoPE: groups of `group` consecutive tokens share a range per channel. They are quantized in blocks of
`residual` tokens, when a block is full and has been used; the tokens of the block that is filling stay at 16 bits.
Values: per token, groups of `group` channels; the last `residual` tokens stay at 16 bits.
A constant group, which has no range in the released code, reads as its constant.
"""

from __future__ import annotations

from torch import Tensor

from akvq_fx.recipes.arithmetic import round_trip, round_trip_channels, width
from akvq_fx.recipes.recipe import SIMULATORS, Context, Recipe, Simulator


def read_keys(x: Tensor, context: Context, bits: int, group: int, residual: int) -> Tensor:
    settled, out = context.past // residual * residual, x.clone()
    blocks = x[..., :settled, :].unflatten(-2, (settled // group, group))
    out[..., :settled, :] = round_trip(blocks, bits, -2).flatten(-3, -2).to(x.dtype)
    return out


def read_values(x: Tensor, context: Context, bits: int, group: int, residual: int) -> Tensor:
    settled, out = max(0, context.past - residual), x.clone()
    out[..., :settled, :] = round_trip_channels(x[..., :settled, :], bits, group).to(x.dtype)
    return out


def key_bits(head_dim: int, heads: int, tokens: int, vision: float, bits: int, group: int, residual: int) -> float:
    settled = tokens // residual * residual
    return (16 * (tokens - settled) + settled * (bits + 32 / group)) / tokens


def value_bits(head_dim: int, heads: int, tokens: int, vision: float, bits: int, group: int, residual: int) -> float:
    settled = max(0, tokens - residual)
    return (16 * (tokens - settled) + settled * (bits + 32 / width(head_dim, group))) / tokens


SIMULATORS["kivi_keys"] = Simulator(read_keys, key_bits)
SIMULATORS["kivi_values"] = Simulator(read_values, value_bits)


def kivi(name: str, source: str, group: int) -> Recipe:
    numbers = f"(bits=2,group={group},residual=128)"
    return Recipe(name, source, keys=f"kivi_keys{numbers}", values=f"kivi_values{numbers}")


KIVI = kivi("kivi", "arXiv 2402.02750", 32)
KIVI_G128 = kivi("kivi-g128", "arXiv 2402.02750, group as in arXiv 2501.15021", 128)
