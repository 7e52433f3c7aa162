"""Means of blocks: keys whose codes are differences from the mean of the 64 positions around them.

The mean key of a head does not stay: rotary embeddings turn it with the position, the slower the channel the further
from what it was in the prompt. So a prompt's one centre is stale some hundred tokens later, and codes have to hold the
distance. Here each block of BLOCK positions has a mean of its own, in the stored space:

    code = quantize(x - mean[position // BLOCK]),   x is read as dequantized + mean[position // BLOCK]

The mean is fixed when the block's first token is written: it is that of the BLOCK newest tokens known by then, of which
the write's own end with the block. In a prompt that is the block itself, and in a decode step the tokens that the ring
holds. No token is quantized twice. Scores gain q . mean, one number for a query and a block.

Where fewer than ENOUGH real tokens are known it is the mean of the block before the write, where a cache begins that
is 0: a token alone is no mean. What is not finite counts as 0, so that a broken token does not reach its neighbours.

A token that moves to another position keeps its block. Of a cache whose tokens moved (Layout.moved), `block_of` has the
block of each position, in each row: of the tokens that are there, and of those to come, so that a write reads it and
nothing waits for the device. A token appended at position t is in block (t + state[STATE_BLOCK]) // BLOCK in every row.
The first of these may be the block of the last token that moved; later ones have numbers that no other token has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx.kernels.layout import BLOCK, PADDING, STATE_BLOCK, STATE_END, STATE_RING, Layout, blocks_of

ENOUGH = 16  # a quarter of a block; chosen, not measured


def begin_blocks(b: dict[str, Tensor], x: Tensor, at: Tensor, kinds: Tensor, layout: Layout) -> None:
    """Write the means of the blocks that begin among the tokens x [B, H, q, D] in the stored space, before these are
    written; at [q] int64 their consecutive positions, kinds [B, q] uint8 their classes."""
    q, W, means = x.shape[2], layout.window, b["means"]
    start, end = at[0], at[-1] + 1
    shift = b["state"][STATE_BLOCK] if layout.moved else 0
    block = blocks_of(start + shift) + torch.arange(blocks_of(q), device=x.device)  # [n], may begin here
    begin = block * BLOCK - shift
    newest = torch.minimum(begin + BLOCK, end)  # the end of what is known of each
    position = newest[:, None] - BLOCK + torch.arange(BLOCK, device=x.device)  # [n, BLOCK]
    own = (position - start).clamp(0, q - 1)
    real = (position >= start) & (kinds[:, own] != PADDING)  # [B, n, BLOCK]
    tokens = x[:, :, own].float()  # [B, H, n, BLOCK, D]
    if W:
        written, ring = b["state"][STATE_END], b["state"][STATE_RING]
        held = (position < torch.minimum(start, written)) & (position >= torch.maximum(ring, written - W))
        classes = b["classes"][:, position.clamp(0, b["classes"].shape[1] - 1)]
        held = held & (classes != PADDING)
        tokens = torch.where((position < start)[:, :, None], b["ring"][:, :, position % W].float(), tokens)
        real = real | held
    tokens = torch.where(real[:, None, ..., None], tokens, 0.0).nan_to_num(0.0, 0.0, 0.0)
    count = real.sum(-1)[:, None, :, None]  # [B, 1, n, 1]
    limit = largest(layout)
    mean = (tokens.sum(3) / count.clamp_min(1)).clamp(-limit, limit).to(layout.dtype)
    before = means_at(b, (at[:1] - 1).clamp_min(0))
    before = torch.where(start > 0, before, torch.zeros_like(before))
    mean = torch.where(count < ENOUGH, before, mean)
    slot = block % means.shape[2]  # distinct, since q tokens fit; those that do not begin stay as they are
    means.index_copy_(2, slot, torch.where((begin < end)[:, None], mean, means.index_select(2, slot)))


def largest(layout: Layout) -> float:
    """The largest number that float32, in which means are computed and added, and the layout's dtype both have."""
    return min(torch.finfo(layout.dtype).max, torch.finfo(torch.float32).max)


def means_at(b: dict[str, Tensor], at: Tensor) -> Tensor:
    """Means of the blocks of the tokens at positions at [q] or [B, q], from named buffers: [B, H, q, D]."""
    means, block = b["means"], at // BLOCK
    if "block_of" in b:
        block_of = b["block_of"].long()
        block = block_of.index_select(1, at) if at.dim() == 1 else block_of.gather(1, at)
    if block.dim() == 1:
        return means.index_select(2, block)
    return means.gather(2, block[:, None, :, None].expand(-1, means.shape[1], -1, means.shape[3]))


def differences(k: Tensor, valid: Tensor | None) -> Tensor:
    """A prompt's keys [B, H, T, D] less the mean of their block: what their codes will hold. valid [B, T] bool."""
    B, H, T, D = k.shape
    short = -T % BLOCK
    split = lambda x, fill: torch.nn.functional.pad(x, (0, 0, 0, short), value=fill).unflatten(-2, (-1, BLOCK))
    tokens = split(k.float().nan_to_num(0.0, 0.0, 0.0), 0.0)  # [B, H, n, BLOCK, D]
    real = torch.ones(B, T, device=k.device) if valid is None else valid.float()
    weight = split(real[:, None, :, None], 0.0)
    mean = (tokens * weight).sum(3, keepdim=True) / weight.sum(3, keepdim=True).clamp_min(1.0)
    return (split(k.float(), 0.0) - mean).flatten(2, 3)[:, :, :T].to(k.dtype)
