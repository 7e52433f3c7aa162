"""Rows of a growing cache are replaced in place, as codes: a request that ended makes way for another one's prompt.

    pool.index_copy_(0, rows, cache)    pool[rows] = cache

Both caches have as many tokens; a shorter one is padded in front first. Buffers keep their addresses, so that a CUDA
graph that was recorded over them goes on, but where the new rows need more room among text slots or means of blocks.
All rows share one ring state: what the ring did not hold of the last tokens is read from the body, in all rows.

Called between steps; it may wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from akvq_fx import torch_internals
from akvq_fx.kernels.layout import BLOCK, STATE_BLOCK, STATE_RING, STATE_TEXT, blocks_of
from akvq_fx.packed_ops import alike, is_growing, tokens_of
from akvq_fx.packed_tokens import Tokens
from akvq_fx.storage import Storage, used_blocks


def replace_rows(pool, rows: Tensor, given):
    """Put the rows of `given` at the numbers `rows` [m] int64 of pool; NotImplemented where codes cannot say it."""
    if not (is_growing(pool) and is_growing(given)) or pool.storage.slides or given.storage.slides:
        return NotImplemented
    if pool.end != pool.storage.end or not alike([pool, given], "length"):
        return NotImplemented
    if rows.dim() != 1 or len(rows) != given.storage.rows[0]:
        raise ValueError(
            f"akvq: {given.storage.rows[0]} rows of a packed cache cannot go to the {list(rows.shape)} given numbers; "
            "accepted: a number for each row"
        )
    rows, new = rows.to(pool.device), tokens_of(given).with_whole_ring()
    pool.storage.release_borrowers()
    if new.layout.moved and not pool.storage.layout.moved:
        pool.hold(tokens_of(pool).numbered().stored())
    storage = pool.storage
    if storage.layout.moved:
        new = new.numbered()
    held = tokens_of(pool).with_whole_ring().parts["ring"] if storage.layout.window else None
    put_tokens(storage, rows, new)
    if held is not None:
        put_recent(storage, rows, new, held)
    if storage.layout.text_bits:
        put_text(storage, rows, new)
    if storage.layout.blocks:
        put_blocks(storage, rows, new)
    storage.prompt, storage.loaded = new.count, storage.loaded or given.storage.loaded
    storage.move_to(storage.held)  # views learn of buffers that were enlarged
    return pool


def put_tokens(storage: Storage, rows: Tensor, new: Tokens) -> None:
    """What stands at a token's position, and pivots."""
    for name in new.parts.keys() & {"codes", "range"}:
        storage[name][:, :, : new.count].index_copy_(0, rows, new.parts[name])
    if "classes" in new.parts:
        storage["classes"][:, : new.count].index_copy_(0, rows, new.parts["classes"])
    if "affine" in new.parts and torch_internals.users_of_memory(storage["affine"]) > 1:
        storage["affine"] = storage["affine"].clone()  # caches that were chosen from one share its map
    for name in new.parts.keys() & {"pivots", "pivot_at", "affine"}:
        storage[name].index_copy_(0, rows, new.parts[name])


def put_recent(storage: Storage, rows: Tensor, new: Tokens, held: Tensor) -> None:
    """held [B, H, n, D]: the pool's own last tokens, which its ring may not have held."""
    first = new.count - held.shape[2]
    slots = torch.arange(first, new.count, device=rows.device) % storage.layout.window
    storage["ring"].index_copy_(2, slots, held.index_copy(0, rows, new.parts["ring"]))
    storage["state"][STATE_RING] = first


def put_text(storage: Storage, rows: Tensor, new: Tokens) -> None:
    """Text slots before the ones of tokens to come are anyone's; there are more of them where the new rows need it."""
    at, codes, n = new.parts["text_at"], new.parts["text_codes"], new.count
    used = storage.used_text_slots(n)
    more = max(0, at.shape[1] - used)
    if more:
        whole = storage["text_codes"]
        storage["text_codes"] = torch.cat([pad(whole[:, :, :used], (0, 0, 0, more)), whole[:, :, used:]], 2)
        whole = storage["text_at"]
        storage["text_at"] = torch.cat([pad(whole[:, :used], (0, more), value=-1), whole[:, used:]], 1)
        storage["state"][STATE_TEXT] += more
    free = used + more - at.shape[1]
    storage["text_at"][:, : used + more].index_copy_(0, rows, pad(at, (0, free), value=-1))
    storage["text_codes"][:, :, : used + more].index_copy_(0, rows, pad(codes, (0, 0, 0, free)))


def put_blocks(storage: Storage, rows: Tensor, new: Tokens) -> None:
    """Means of blocks. Where tokens moved, the new rows' blocks are numbered to end with the last one of the pool."""
    means, n = new.parts["means"], new.count
    if not storage.layout.moved:
        storage["means"][:, :, : blocks_of(n)].index_copy_(0, rows, means)
        return
    block_of, means = used_blocks(new.parts["block_of"], means)
    count, last = means.shape[2], int((n - 1 + storage["state"][STATE_BLOCK]) // BLOCK)
    more = max(0, count - 1 - last)
    if more:
        storage["means"] = pad(storage["means"], (0, 0, more, 0))
        storage["block_of"] += more
        storage["state"][STATE_BLOCK] += more * BLOCK
    first = last + more + 1 - count
    storage["block_of"][:, :n].index_copy_(0, rows, block_of + first)
    storage["means"][:, :, first : first + count].index_copy_(0, rows, means)
