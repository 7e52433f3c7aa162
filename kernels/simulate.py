"""simulated, squeezed: what attention reads of a cache that keeps original tokens and quantizes them on every read.

The arithmetic is akvq_fx.recipes'. Here padding and unwritten slots are removed before it: a row is quantized as if it
stood alone, at the positions among its own real tokens, so neither padding nor the other rows of a batch have any
influence.
It waits for the device and reads its numbers: a simulation is for measuring quality, not speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx.kernels.layout import GAIN, PADDING, STATE_END, VISION, Layout
from akvq_fx.recipes import Context


def simulated(b: dict[str, Tensor], length: int, layout: Layout, past: int | None) -> Tensor:
    """The first `length` tokens [B, H, length, D] of named buffers, from position `past` on as they are."""
    x = b["codes"][:, :, :length]
    past = length if past is None else past
    real = real_tokens(b, length)
    vision = b["classes"][:, :length] == VISION
    gains = b["affine"][:, GAIN].float() if "affine" in b else None
    patterns, which = real.unique(dim=0, return_inverse=True)
    out = x.clone()
    for i, pattern in enumerate(patterns):
        at, rows = pattern.nonzero()[:, 0], (which == i).nonzero()[:, 0]
        context = Context(int((at < past).sum()), vision[rows][:, at], None if gains is None else gains[rows])
        read = layout.simulation.read(x[rows][:, :, at], context)
        out[rows[:, None], :, at] = read.transpose(1, 2)
    return out


def real_tokens(b: dict[str, Tensor], length: int) -> Tensor:
    """[B, length] bool: written, and no padding."""
    written = torch.arange(length, device=b["classes"].device) < b["state"][STATE_END]
    return (b["classes"][:, :length] != PADDING) & written


def squeezed(
    q: Tensor, k: Tensor, b: dict[str, Tensor], layout: Layout, past: int, mask, scale, is_causal: bool, softcap: float
):
    """The mask that changes scores as the recipe does: q [B, Hq, q, D], k [B, H, T, D] -> float [B, Hq, q, T].

    The recipe's new scores minus the old ones are a bias, which is what a mask of floats adds.
    """
    if layout.simulation.simulator.scores is None:
        return mask, is_causal
    T = k.shape[2]
    seen = real_tokens(b, T) & (b["classes"][:, :T] == VISION) & (torch.arange(T, device=k.device) < past)
    keys = k.to(q.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ keys.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    bias = torch.where(seen[:, None, None], layout.simulation.scores(scores, seen) - scores, 0.0).to(q.dtype)
    if is_causal:
        bias = bias.masked_fill(~bias.new_ones(bias.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
    return bias, False
