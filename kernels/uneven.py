"""Unequal bits per channel: of a head's channels the quarter that moves scores most gets 4 bits, the last quarter none.

A channel's part of a score's variance goes with lambda = std(key) * rms(query), which is uneven: in SmolLM2 16 of 64
channels hold 64 %, the last 16 hold 7 %, and one Hadamard transform over the head spreads the noise of the large ones
over all. So `key_affine` orders the channels of each head by lambda for each prompt. In the stored space they are:

part    channels  bits  rotated by
first   D / 4     4     the Walsh-Hadamard transform of the part
middle  D / 2     2     that of this part
last    D / 4     0     nothing: read as the centre

A 4-bit code is 4 * high + low, two 2-bit codes, so the D slots of a token have 2 bits each: high codes and low codes of
the first part, then the codes of the middle. With levels around zero, x = scale * (code - 1.5) in the middle and
4 * scale * (high - 1.5) + scale * (low - 1.5) in the first part. So attention over codes asks the D slots with
(4 q, q, q) of the first part and the middle, and two groups of D / 2 slots have one scale each.

A part whose size n is no power of two has Hadamard blocks of its largest power of two, n & -n; its channels are dealt
to the blocks in turn, so that blocks are alike. Source: docs/recipes.md.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from akvq_fx.kernels import quantizer

FIRST_BITS, MIDDLE_BITS = 4, 2


def parts(head_dim: int) -> tuple[int, int, int]:
    """Channels of the first, the middle and the last part."""
    return head_dim // 4, head_dim // 2, head_dim // 4


def blocks(size: int) -> tuple[int, int]:
    """(order, number) of the Hadamard blocks of a part."""
    order = size & -size
    return order, size // order


@functools.cache
def dealt(head_dim: int, device: torch.device) -> Tensor:
    """For each channel of the stored space, its rank by lambda: [D] int64."""
    ranks, start = [], 0
    first, middle, last = parts(head_dim)
    for size in (first, middle):
        order, number = blocks(size)
        ranks += [start + j * number + block for block in range(number) for j in range(order)]
        start += size
    return torch.tensor([*ranks, *range(start, start + last)], device=device)


def channel_order(weight: Tensor) -> Tensor:
    """weight [..., D], lambda of each channel -> [..., D] int64: which channel each one of the stored space is."""
    ranked = weight.nan_to_num(0.0).sort(dim=-1, descending=True, stable=True).indices
    return ranked[..., dealt(weight.shape[-1], weight.device)]


@functools.cache
def matrix(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[D, D]: the transforms of the parts on the diagonal; symmetric and its own inverse."""
    made = []
    first, middle, last = parts(head_dim)
    for size in (first, middle):
        order, number = blocks(size)
        h = torch.ones(1, 1, dtype=dtype, device=device)
        while h.shape[0] < order:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
        made += [h * order**-0.5] * number
    return torch.block_diag(*made, torch.eye(last, dtype=dtype, device=device))


def to_stored(x: Tensor, order: Tensor) -> Tensor:
    """x [B, H, T, D] in the model's channels -> the stored space; order [B, H, D] int64."""
    sorted_ = x.gather(-1, order.unsqueeze(2).expand(x.shape))
    return sorted_ @ matrix(x.shape[-1], x.dtype, x.device)


def from_stored(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of to_stored."""
    mixed = x @ matrix(x.shape[-1], x.dtype, x.device)
    return torch.empty_like(mixed).scatter_(-1, order.unsqueeze(2).expand(x.shape), mixed)


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] in the stored space -> codes of its slots [..., D] int32 below 4, scales [..., 2] fp16."""
    first, middle, _ = parts(x.shape[-1])
    fine, fine_scale = quantizer.encode_symmetric(x[..., :first], FIRST_BITS, 1)
    coarse, coarse_scale = quantizer.encode_symmetric(x[..., first : first + middle], MIDDLE_BITS, 1)
    codes = torch.cat([fine >> MIDDLE_BITS, fine & 2**MIDDLE_BITS - 1, coarse], -1)
    return codes, torch.cat([fine_scale, coarse_scale], -1)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of encode: [..., D] in dtype; the last part reads as 0."""
    first, middle, last = parts(codes.shape[-1])
    high, low, coarse = codes.split((first, first, middle), -1)
    fine = quantizer.decode_symmetric(high << MIDDLE_BITS | low, scales[..., :1], FIRST_BITS, dtype)
    coarse = quantizer.decode_symmetric(coarse, scales[..., 1:], MIDDLE_BITS, dtype)
    return torch.cat([fine, coarse, coarse.new_zeros((*coarse.shape[:-1], last))], -1)
