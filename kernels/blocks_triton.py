"""Means of blocks (kernels/blocks.py) as one Triton kernel: the means of the blocks that begin in a write.

x       [B, H, q, D] float16 | bfloat16 | float32 of any strides, in the stored space
buffers those of kernels/layout.py, contiguous; the ring and its tokens' classes as they were before the write. block_of
        is None where no token moved

Grid (B * H, blocks of 64 positions that q tokens may begin). A program makes one mean of one head. Where its block does
not begin, which in a decode step only the device knows, it returns at once. Programs read what others do not write: of
means, the one before the first of this write. Nothing waits for the device, so a call may be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from akvq_fx.kernels import blocks, layout
from akvq_fx.kernels.layout import Layout, blocks_of

BLOCK, ENOUGH = tl.constexpr(layout.BLOCK), tl.constexpr(blocks.ENOUGH)
PADDING = tl.constexpr(layout.PADDING)
STATE_END, STATE_RING = tl.constexpr(layout.STATE_END), tl.constexpr(layout.STATE_RING)
STATE_BLOCK = tl.constexpr(layout.STATE_BLOCK)


@triton.jit
def finite_sum(rows, step, real, D: tl.constexpr, DP: tl.constexpr):
    """Sum of the `real` [BLOCK] of the tokens at pointers `rows` [BLOCK], whose channels lie `step` apart, -> [DP]."""
    channel = tl.arange(0, DP)
    inside = real[:, None] & (channel < D)[None, :]
    x = tl.load(rows[:, None] + channel[None, :] * step, mask=inside, other=0).to(tl.float32)
    return tl.sum(tl.where(tl.abs(x) < float("inf"), x, 0.0), 0)


@triton.jit
def begin_kernel(
    x, at, kinds, state, classes, ring, means, block_of,
    heads, tokens, capacity, slots, stride_b, stride_h, stride_t, stride_d, kinds_b, kinds_t,
    D: tl.constexpr, DP: tl.constexpr, WINDOW: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    lead = tl.program_id(0).to(tl.int64)
    batch, head = lead // heads, lead % heads
    start = tl.load(at).to(tl.int32)
    end = start + tokens
    shift = 0
    if block_of is not None:
        shift = tl.load(state + STATE_BLOCK)
    block = (start + shift + BLOCK - 1) // BLOCK + tl.program_id(1)
    begin = block * BLOCK - shift
    if (begin < end) & (block < slots):  # the kernel cannot raise, and must not write elsewhere
        position = tl.minimum(begin + BLOCK, end) - BLOCK + tl.arange(0, BLOCK)
        token = (position - start).to(tl.int64)
        real = token >= 0
        if kinds is not None:
            kind = tl.load(kinds + batch * kinds_b + token * kinds_t, mask=real, other=PADDING)
            real = real & (kind != PADDING)
        total = finite_sum(x + batch * stride_b + head * stride_h + token * stride_t, stride_d, real, D, DP)
        count = tl.sum(real.to(tl.int32), 0)
        if WINDOW:
            written = tl.load(state + STATE_END)
            held = position >= tl.maximum(tl.load(state + STATE_RING), written - WINDOW)
            held = held & (position < tl.minimum(start, written))
            held = held & (tl.load(classes + batch * capacity + position, mask=held, other=PADDING) != PADDING)
            total += finite_sum(ring + (lead * WINDOW + position % WINDOW) * D, 1, held, D, DP)
            count += tl.sum(held.to(tl.int32), 0)

        channel = tl.arange(0, DP)
        rows = means + lead * slots * D + channel
        last = tl.maximum(start - 1, 0)
        if block_of is not None:
            last = tl.load(block_of + batch * capacity + last)
        else:
            last = last // BLOCK
        before = tl.load(rows + last * D, mask=channel < D, other=0).to(tl.float32)
        before = tl.where(start > 0, before, 0.0)
        mean = tl.div_rn(total, tl.full([DP], 1, tl.float32) * tl.maximum(count, 1).to(tl.float32))
        mean = tl.minimum(tl.maximum(mean, -LIMIT), LIMIT)
        mean = tl.where(count < ENOUGH, before, mean)
        tl.store(rows + block * D, mean.to(means.dtype.element_ty), mask=channel < D)


def begin_blocks(b: dict[str, Tensor], x: Tensor, at: Tensor, classes: Tensor | None, layout: Layout) -> None:
    """kernels/blocks.py's begin_blocks: write the means of blocks that begin among the tokens x, before these are."""
    B, H, q, D = x.shape
    padded = max(16, triton.next_power_of_2(D))
    kinds_strides = (0, 0) if classes is None else classes.stride()
    with torch.cuda.device_of(x):
        begin_kernel[(B * H, blocks_of(q))](
            x, at, classes, b["state"], b["classes"], b.get("ring"), b["means"], b.get("block_of"),
            H, q, b["codes"].shape[2], b["means"].shape[2], *x.stride(), *kinds_strides,
            D=D, DP=padded, WINDOW=layout.window, LIMIT=torch.finfo(layout.dtype).max, num_warps=8, num_stages=1,
        )  # fmt: skip
