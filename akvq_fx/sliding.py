"""Sliding windows: packed caches that keep their last tokens only.

A window's tokens lie in slots [first, end). A token that it drops keeps its slot for a while: `first` goes up, and
attention masks the slots before it (passes/mask_dropped.py), so that a decode step moves nothing. When more than SLACK
slots are dropped, the codes move to the front by whole blocks of 64 positions, in place: addresses stay, so CUDA graphs
do, and blocks keep their means. No token is quantized again, and nothing waits for the device.
"""

from __future__ import annotations

import torch

from akvq_fx.kernels.layout import BLOCK, SLACK, STATE_RING, blocks_of, unwritten
from akvq_fx.packed_ops import at_front
from akvq_fx.storage import Storage, axis_of

TELLS = ("classes", "text_at")  # whose free slots say that they are free; those of the others hold anything


def move_to_front(packed):
    """The same tokens of a sliding window, in slots nearer to the front where they have come too far from it."""
    count = packed.first // BLOCK * BLOCK
    if packed.first <= SLACK:
        return packed
    storage = packed.storage
    compacted = storage.layout.text_bits and storage["text_at"].shape[1] != storage.capacity
    if storage.layout.moved or compacted:  # the slots of its blocks or of its text do not follow the position
        return at_front(packed)
    views = [view for ref in storage.views if (view := ref()) is not None]
    if any(view.first < count for view in views):  # one that still has tokens which would be overwritten
        storage = storage.clone()
        views = [packed := packed.view_of(storage, packed.length, packed.first)]
    shift(storage, count, packed.end)
    for view in views:
        view.begin_at(view.first - count)
    shrink(storage, packed.length)
    return packed.view_of(storage, packed.length, packed.first)


def shift(storage: Storage, count: int, end: int) -> None:
    """Move the tokens in slots [count, end) to the front, in place; count is a multiple of 64."""
    for name, b in storage.named():
        axis = axis_of(name)
        if name == "means":
            first, last = count // BLOCK, blocks_of(end)
            b[:, :, : last - first].copy_(b[:, :, first:last].clone())
        elif axis is not None:
            b.narrow(axis, 0, end - count).copy_(b.narrow(axis, count, end - count).clone())
            if name in TELLS:
                b.narrow(axis, end - count, b.shape[axis] - end + count).fill_(unwritten(name))
        elif name == "ring":
            b.copy_(b.roll(-count, 2))
        if name in ("text_at", "pivot_at"):
            b.copy_(torch.where(b >= count, b - count, -1))
        elif name == "state":
            b[: STATE_RING + 1] -= count  # the end, and what the ring holds
            b[STATE_RING].clamp_(min=0)
    storage.end = end - count


def shrink(storage: Storage, length: int) -> None:
    """Give back the room of a long chunk of tokens, where the window has at most half of the slots."""
    needed = -(-(length + SLACK + 1) // SLACK) * SLACK
    if storage.capacity < 2 * needed:
        return
    for name in storage.layout.fields:
        axis = axis_of(name)
        if axis is not None:
            size = blocks_of(needed) if name == "means" else needed
            storage[name] = storage[name].narrow(axis, 0, size).clone()
    storage.mark_dynamic()
