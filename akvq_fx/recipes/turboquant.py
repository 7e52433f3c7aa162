"""TurboQuant (Zandieh et al., arXiv 2504.19874): rotated unit vectors, coordinates quantized as a normal's. Simulated.

y = H x / |x|; code = nearest Lloyd-Max centroid of N(0, 1/D); stored: codes, and one fp16 length per token and head,
chosen so that what is read has x's length. Without the QJL residual, random signs, and layers kept at 16 bits. 2 bits
for both halves.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from akvq_fx.recipes.arithmetic import half, rotate, wide
from akvq_fx.recipes.recipe import SIMULATORS, Context, Recipe, Simulator


@functools.cache
def centroids(bits: int) -> tuple[float, ...]:
    """Lloyd-Max levels of a standard normal, ascending."""
    density = lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    below = lambda z: (1 + math.erf(z / math.sqrt(2))) / 2
    count = 2**bits
    levels = [-2 + 4 * (i + 0.5) / count for i in range(count)]
    for _ in range(2000):
        edges = [-math.inf, *((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)), math.inf]
        cells = zip(edges, edges[1:], strict=False)
        levels = [(density(lo) - density(hi)) / (below(hi) - below(lo)) for lo, hi in cells]
    return tuple(levels)


def read(x: Tensor, context: Context, bits: int) -> Tensor:
    past = wide(x[..., : context.past, :])
    length = past.norm(dim=-1, keepdim=True)
    levels = past.new_tensor(centroids(bits))
    rotated = rotate(past / length.clamp_min(torch.finfo(past.dtype).tiny)) * x.shape[-1] ** 0.5
    nearest = levels[torch.bucketize(rotated.contiguous(), (levels[1:] + levels[:-1]) / 2)]
    stored = half(length / nearest.norm(dim=-1, keepdim=True))
    return torch.cat([(rotate(nearest) * stored).to(x.dtype), x[..., context.past :, :]], -2)


def bits_of(head_dim: int, heads: int, tokens: int, vision: float, bits: int) -> float:
    return bits + 16 / head_dim


SIMULATORS["turboquant"] = Simulator(read, bits_of)
TURBOQUANT = Recipe(
    "turboquant", "arXiv 2504.19874, without QJL", keys="turboquant(bits=2)", values="turboquant(bits=2)"
)
