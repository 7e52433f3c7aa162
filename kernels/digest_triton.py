"""Sums of weights for akvq_fx/digest.py on a GPU: one launch for any number of weights, each read once.

The numbers are those of akvq_fx.digest.sums to the bit, since 64-bit integer sums wrap around in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # words of 8 bytes a program


@triton.jit
def sums_kernel(
    table, out, STEP: tl.constexpr, MIX0: tl.constexpr, MIX1: tl.constexpr, MIX2: tl.constexpr, BLOCK: tl.constexpr
):
    """table [n, 2]: address and words of each weight; out [n, 2], zeros."""
    weight = tl.program_id(1)
    words = tl.load(table + 2 * weight + 1)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < words:
        base = tl.load(table + 2 * weight).to(tl.pointer_type(tl.int64))
        place = first + tl.arange(0, BLOCK)
        inside = place < words
        some = tl.load(base + place, mask=inside, other=0)
        step = (place + 1) * STEP
        mixed = (some ^ step) * MIX0
        mixed = mixed ^ (mixed >> 32)
        mixed = mixed * MIX1
        one = tl.sum(tl.where(inside, mixed ^ (mixed >> 29), 0))
        mixed = (mixed + step) * MIX2
        other = tl.sum(tl.where(inside, mixed ^ (mixed >> 32), 0))
        tl.atomic_add(out + 2 * weight, one)
        tl.atomic_add(out + 2 * weight + 1, other)


def sums(parts: list[Tensor], step: int, mix: tuple[int, int, int]) -> Tensor:
    """[n, 2] int64 for tensors [words] int64 of one device."""
    device = parts[0].device
    table = torch.tensor([(part.data_ptr(), part.numel()) for part in parts], dtype=torch.int64, device=device)
    out = torch.zeros(len(parts), 2, dtype=torch.int64, device=device)
    longest = max(part.numel() for part in parts)
    if longest:
        grid = triton.cdiv(longest, BLOCK), len(parts)
        sums_kernel[grid](table, out, STEP=step, MIX0=mix[0], MIX1=mix[1], MIX2=mix[2], BLOCK=BLOCK)
    return out
