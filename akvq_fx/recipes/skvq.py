"""SKVQ (Duanmu et al., arXiv 2405.06219): recent and first tokens at 16 bits, clipped groups with fp8 ranges. Simulated.

Per token, groups of `group` channels of the heads laid side by side, so a group may span heads: minimum and maximum times
`clip`, both stored as e4m3. The `sink` first tokens and the last `window` stay at 16 bits. 2 bits for both halves.
Two differences: no reordering of channels (it takes a calibration per model), and keys after RoPE, where the cache has them.
"""

from __future__ import annotations

from torch import Tensor

from akvq_fx.recipes.arithmetic import e4m3, round_trip_channels
from akvq_fx.recipes.recipe import SIMULATORS, Context, Recipe, Simulator


def read(x: Tensor, context: Context, bits: int, group: int, window: int, sink: int, clip: float) -> Tensor:
    heads, head_dim = x.shape[-3], x.shape[-1]
    middle, out = slice(sink, max(sink, context.past - window)), x.clone()
    side_by_side = x[..., middle, :].transpose(-3, -2).flatten(-2)
    quantized = round_trip_channels(side_by_side, bits, members(head_dim, heads, group), clip, e4m3)
    out[..., middle, :] = quantized.unflatten(-1, (heads, head_dim)).transpose(-3, -2).to(x.dtype)
    return out


def members(head_dim: int, heads: int, group: int) -> int:
    """Channels of a group: as asked where they divide the heads laid side by side, else a head's."""
    return group if heads * head_dim % group == 0 else head_dim


def bits_of(
    head_dim: int, heads: int, tokens: int, vision: float, bits: int, group: int, window: int, sink: int, clip: float
) -> float:
    middle = max(0, tokens - window - sink)
    return (16 * (tokens - middle) + middle * (bits + 16 / members(head_dim, heads, group))) / tokens


SIMULATORS["skvq"] = Simulator(read, bits_of)
NUMBERS = "skvq(bits=2,group=128,window=128,sink=5,clip=0.92)"
SKVQ = Recipe("skvq", "arXiv 2405.06219, without reordering, after RoPE", keys=NUMBERS, values=NUMBERS)
