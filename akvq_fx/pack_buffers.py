"""Pack what static buffers of the caller's hold, behind a graph that wrote to them as they were (exchange_buffers).

How many tokens there are, and which of them are padding, is on the device: this waits for it, once for a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx import exchange, torch_internals
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
            end, valid, why = tokens_of(extra[pair.at], mask, pair.length(args), buffers[0])
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


def tokens_of(at: Tensor, mask: Tensor | None, length: int, buffer: Tensor) -> tuple[int, Tensor | None, str]:
    """(tokens that the buffer holds, [B, tokens] bool: those that some query sees, why they cannot be told)."""
    positions = at.tolist()
    start, end = positions[0], positions[-1] + 1
    if start < 0 or positions != list(range(start, end)):
        return 0, None, "positions do not follow each other"
    if end > length:
        return 0, None, "attention does not see the tokens that are written"
    if mask is None:
        return end, None, "" if length == end else "attention sees slots that nobody wrote"
    valid = akvq.valid_tokens(mask, buffer.shape[0], length)
    if bool(valid[:, end:].any()):
        return 0, None, "attention sees tokens behind those that are written"
    return end, valid[:, :end], ""


def packed_pair(
    pair: Exchange, keys: Tensor, values: Tensor, end: int, valid: Tensor | None, query: Tensor, owner
) -> tuple[PackedKV, PackedKV]:
    """The first `end` tokens of keys and values [B, H, T, D] as static packed caches of T tokens."""
    layout, total = pair.key_layout, keys.shape[2]
    keys, values = keys[:, :, :end].detach().contiguous(), values[:, :, :end].detach().contiguous()
    at = torch.arange(end, device=keys.device)
    classes = akvq.token_classes(keys, valid, None)
    first = akvq.find_pivots(keys[:, 0], valid, *pair.pivots) if layout.pivots else None
    affine = None if pair.affine is None else akvq.key_affine(keys, query, valid, *pair.affine)
    made = []
    for x, rows, layout in ((keys, affine, pair.key_layout), (values, None, pair.value_layout)):
        pivots = first if layout.pivots else None
        buffers = akvq.pack(x, at, classes, pivots, rows, total, str(layout), True)
        storage = Storage(layout, buffers, None, end, owner)
        storage.mark_dynamic()
        made.append(PackedKV.view_of(storage, total))
    return made[0], made[1]
