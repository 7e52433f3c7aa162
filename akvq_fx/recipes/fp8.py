"""fp8: every cached number as e4m3 without a scale, clipped at 448, as uncalibrated serving systems do. Simulated."""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx.recipes.arithmetic import e4m3
from akvq_fx.recipes.recipe import SIMULATORS, Context, Recipe, Simulator


def read(x: Tensor, context: Context) -> Tensor:
    return torch.cat([e4m3(x[..., : context.past, :]), x[..., context.past :, :]], -2)


def bits_of(head_dim: int, heads: int, tokens: int, vision: float) -> float:
    return 8.0


SIMULATORS["fp8"] = Simulator(read, bits_of)
FP8 = Recipe("fp8", "arXiv 2209.05433 (the format)", keys="fp8()", values="fp8()")
