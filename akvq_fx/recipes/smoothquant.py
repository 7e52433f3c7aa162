"""SmoothQuant on a cache (Xiao et al., arXiv 2211.10438): K/s and Q*s per channel, then RTN at 2 bits. Simulated.

s_j = max_t |K_tj|^alpha / max_t |Q_tj|^(1 - alpha), alpha 0.5, over the prompt, after RoPE, where it is exact for any
s; the query heads of a group share a key head's s. Reading s * RTN(K / s) with plain queries is the same scores. It is
a baseline of arXiv 2501.15021, which gives no code; the definition is ours. Values are RTN: their smoothing is folded
into weights, which a cache does not see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx.recipes.arithmetic import round_trip_channels, wide
from akvq_fx.recipes.recipe import SIMULATORS, Context, Recipe, Simulator
from akvq_fx.recipes.rtn import bits_of as rtn_bits


def read_keys(x: Tensor, context: Context, bits: int, group: int, alpha: float) -> Tensor:
    s = context.gains[:, :, None].to(wide(x).dtype)
    s = s.where(s > 0, 1.0)  # tokens that no prompt's graph wrote have no gains
    past = wide(x[..., : context.past, :]) / s
    return torch.cat([(round_trip_channels(past, bits, group) * s).to(x.dtype), x[..., context.past :, :]], -2)


def key_bits(head_dim: int, heads: int, tokens: int, vision: float, bits: int, group: int, alpha: float) -> float:
    return rtn_bits(head_dim, heads, tokens, vision, bits, group) + 32 / tokens  # s, float32


SIMULATORS["smoothquant_keys"] = Simulator(read_keys, key_bits)
SMOOTHQUANT = Recipe(
    "smoothquant",
    "arXiv 2211.10438",
    keys="smoothquant_keys(bits=2,group=128,alpha=0.5)",
    values="rtn(bits=2,group=128)",
)
