"""CalibQuant (Han et al., arXiv 2502.14882): vision tokens at 1 bit, per channel, and their scores squeezed. Simulated.

Per channel over all vision tokens: minimum and maximum times `shrink` (0.5 for keys, 0.3 for values), 2^b levels. Text
is at 16 bits. Post-scaling, which applies a channel's scale to the query and to the output instead of to each code,
gives the same numbers. Calibration: scores a of the vision tokens, per query head, become (a - min) / (max - min) *
(max - shift - min) + min with shift 3 as released, before mask and softmax. Where scores differ by less than 3 this
reverses their order; so does the released code. Vision tokens that a later prompt brings join the ranges; in the
released code only the first prompt has any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx.recipes.arithmetic import round_trip
from akvq_fx.recipes.recipe import SIMULATORS, Context, Recipe, Simulator


def read_values(x: Tensor, context: Context, bits: int, shrink: float) -> Tensor:
    past, vision = x[..., : context.past, :], context.vision[:, None, : context.past, None]
    if not context.past:
        return x
    quantized = torch.where(vision, round_trip(past, bits, -2, shrink, among=vision).to(x.dtype), past)
    return torch.cat([quantized, x[..., context.past :, :]], -2)


def read_keys(x: Tensor, context: Context, bits: int, shrink: float, shift: float) -> Tensor:
    return read_values(x, context, bits, shrink)


def squeeze(scores: Tensor, seen: Tensor, bits: int, shrink: float, shift: float) -> Tensor:
    chosen = seen[:, None, None]
    low = scores.where(chosen, torch.inf).amin((2, 3), keepdim=True)
    high = scores.where(chosen, -torch.inf).amax((2, 3), keepdim=True)
    squeezed = (scores - low) / (high - low + 1e-8) * (high - shift - low) + low
    return torch.where(chosen, squeezed, scores)


def value_bits(head_dim: int, heads: int, tokens: int, vision: float, bits: int, shrink: float) -> float:
    ranges = 32 / tokens if vision else 0.0  # a scale and a minimum per channel
    return 16 * (1 - vision) + vision * bits + ranges + 8 / (heads * head_dim)  # and a token's class


def key_bits(head_dim: int, heads: int, tokens: int, vision: float, bits: int, shrink: float, shift: float) -> float:
    return value_bits(head_dim, heads, tokens, vision, bits, shrink)


SIMULATORS["calibquant_keys"] = Simulator(read_keys, key_bits, squeeze)
SIMULATORS["calibquant_values"] = Simulator(read_values, value_bits)
CALIBQUANT = Recipe(
    "calibquant",
    "arXiv 2502.14882",
    keys="calibquant_keys(bits=1,shrink=0.5,shift=3)",
    values="calibquant_values(bits=1,shrink=0.3)",
)
