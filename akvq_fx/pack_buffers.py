"""Pack what static buffers of the caller's hold, behind a graph that wrote to them as they were (exchange_buffers).

How many tokens there are, and which of them are padding, is on the device: this waits for it, once for a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx import exchange, torch_internals
from akvq_fx.kernels.cache_axes import CacheAxes, moved
from akvq_fx.packed_kv import PackedKV, Storage
from akvq_fx.program import Exchange

akvq = torch.ops.akvq


def pack_buffers(exchanges: list[Exchange], args, extra: list, owners) -> list[tuple[int, str]]:
    """Exchange the buffers of each pair for packed ones. Returns those that are left as they are: (number, reason).

    args     of the original graph
    extra    what the graph returned for this: positions, queries, masks
    """
    left = []
    for number, pair in enumerate(exchanges):
        buffers = [args[pair.key], args[pair.value]]
        why = next(filter(None, map(exchange.refusal, buffers)), "")
        if not why:
            mask = None if pair.mask is None else extra[pair.mask]
            end, valid, why = tokens_of(extra[pair.at], mask, pair.length(args), extra[pair.query].shape[0])
        if not why:
            keys, values = packed_pair(pair, *buffers, end, valid, extra[pair.query], owners[pair.owner])
            try:
                exchange.exchange(buffers[0], keys)
                exchange.exchange(buffers[1], values)
            except RuntimeError as error:
                why = f"PyTorch: {error}"
                if isinstance(buffers[0], PackedKV):
                    torch_internals.exchange_inside(buffers[0], keys)
        if why:
            left.append((number, why))
            for buffer in buffers:
                exchange.leave(buffer, why)
    return left


def tokens_of(at: Tensor, mask: Tensor | None, length: int, rows: int) -> tuple[int, Tensor | None, str]:
    """(tokens that the buffer holds, [rows, tokens] bool: those that some query sees, why they cannot be told)."""
    positions = at.tolist()
    start, end = positions[0], positions[-1] + 1
    if start < 0 or positions != list(range(start, end)):
        return 0, None, "positions do not follow each other"
    if end > length:
        return 0, None, "attention does not see the tokens that are written"
    if mask is None:
        return end, None, "" if length == end else "attention sees slots that nobody wrote"
    valid = akvq.valid_tokens(mask, rows, length)
    if bool(valid[:, end:].any()):
        return 0, None, "attention sees tokens behind those that are written"
    return end, valid[:, :end], ""


def packed_pair(
    pair: Exchange, keys: Tensor, values: Tensor, end: int, valid: Tensor | None, query: Tensor, owner
) -> tuple[PackedKV, PackedKV]:
    """The first `end` tokens of keys and values, in the caller's axes, as static packed caches of T tokens.

    Where this step takes the first rows of the buffers only, the others are packed too, as if all asked as these do.
    """
    layout, total = pair.key_layout, keys.shape[pair.axes[0].tokens]
    keys, values = (
        standard(x, axes, pair.key_layout.head_dim if x is keys else pair.value_layout.head_dim)[:, :, :end]
        .detach()
        .contiguous()
        for x, axes in zip((keys, values), pair.axes, strict=True)
    )
    rows = len(keys)
    if len(query) < rows:
        query = query[torch.arange(rows, device=query.device) % len(query)]
        valid = valid if valid is None else torch.nn.functional.pad(valid, (0, 0, 0, rows - len(valid)), value=True)
    at = torch.arange(end, device=keys.device)
    classes = akvq.token_classes(keys, valid, None)
    first = akvq.find_pivots(keys[:, 0], valid, *pair.pivots) if layout.pivots else None
    affine = None if pair.affine is None else akvq.key_affine(keys, query, valid, *pair.affine)
    made = []
    for x, rows, layout, axes in (
        (keys, affine, pair.key_layout, pair.axes[0]),
        (values, None, pair.value_layout, pair.axes[1]),
    ):
        pivots = first if layout.pivots else None
        buffers = akvq.pack(x, at, classes, pivots, rows, total, str(layout), True)
        storage = Storage(layout, buffers, None, end, owner, axes)
        storage.mark_dynamic()
        made.append(PackedKV.view_of(storage, total))
    return made[0], made[1]


def standard(x: Tensor, axes: CacheAxes, channels: int) -> Tensor:
    """A buffer in these axes as [B, H, T, D], a view of it."""
    heads = x.numel() // (x.shape[axes.rows] * x.shape[axes.tokens] * channels)
    return moved(x, axes.to_standard(heads, channels))
