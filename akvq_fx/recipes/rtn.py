"""RTN: round to nearest, per token, asymmetric, groups of 128 channels; every token alike, no rotation. Packed.

The baseline of every paper in this folder. `rtn` is the same arithmetic for methods that change the tokens first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx.recipes.arithmetic import round_trip_channels, width
from akvq_fx.recipes.recipe import SIMULATORS, Context, Recipe, Simulator

# every token and every layer is treated alike
PLAIN = {"window": 0, "pivots": 0, "tsa_layers": (), "center_keys": False, "balance_keys": False, "group": 128}
RTN2, RTN4 = (
    Recipe(f"rtn{bits}", "none", {**PLAIN, "rotate": False, "body_bits": bits, "body_clip": 1.0}) for bits in (2, 4)
)


def read(x: Tensor, context: Context, bits: int, group: int) -> Tensor:
    past = round_trip_channels(x[..., : context.past, :], bits, group).to(x.dtype)
    return torch.cat([past, x[..., context.past :, :]], -2)


def bits_of(head_dim: int, heads: int, tokens: int, vision: float, bits: int, group: int) -> float:
    return bits + 32 / width(head_dim, group)


SIMULATORS["rtn"] = Simulator(read, bits_of)
