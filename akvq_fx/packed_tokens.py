"""Tokens: packed tokens without the slots that held them, to be chosen, joined and stored again without quantizing any.

    Tokens.of(storage, length)    its first tokens
    .take(index)                  some of them
    concat_tokens, concat_rows    several Tokens as one
    .stored()                     a storage of its own

A token is its code and range, its class, and where it has them, its copies in the ring, among the pivots and in the
text overlay. Overlays get the new positions. The ring keeps what is still among the last W tokens, back to the latest
one that it did not hold. Pivots for which there is no slot are read from the body, where every token has a code.

Where blocks of keys have means, a token that moves keeps its block's, which then has a number (Layout.moved). Tokens to
come go on in the last token's block where that is the last one of the cache they came from, else they begin one.
Nothing here waits for the device, but for the number of blocks that are still referred to.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from akvq_fx.kernels import cache as ops
from akvq_fx.kernels.cache_axes import CacheAxes
from akvq_fx.kernels.layout import BLOCK, PADDING, STATE_BLOCK, STATE_END, STATE_RING, STATE_TEXT, Layout, blocks_of
from akvq_fx.storage import Storage

ROOM = 128  # a storage has room for the next token, and is a multiple of this long


@dataclass
class Tokens:
    """n tokens of B rows.

    parts     by the name of the buffer that they come from: codes, range, classes and block_of of the n tokens; ring of
              the last min(W, n); means; pivots and text_codes with positions in pivot_at and text_at, -1 for a free
              slot; affine
    held      [min(W, n)] bool: whether the ring held each of the last tokens
    left      tokens to come that belong to the last token's block, a number or a tensor [] of it
    room      capacity of the storage that they came from
    slides    it is a sliding window
    """

    layout: Layout
    parts: dict[str, Tensor]
    held: Tensor
    left: Tensor | int
    room: int
    owner: object
    axes: CacheAxes
    slides: bool = False

    @staticmethod
    def of(storage: Storage, length: int) -> Tokens:
        """The first `length` tokens of a growing cache's storage."""
        layout, parts = storage.layout, dict(zip(storage.layout.fields, storage.buffers, strict=True))
        state = parts.pop("state")
        for name in parts.keys() & {"codes", "range"}:
            parts[name] = parts[name][:, :, :length]
        if "classes" in parts:
            parts["classes"] = parts["classes"][:, :length]
        left = 0
        if layout.moved:
            parts["block_of"] = parts["block_of"][:, :length]
            left = -(length + state[STATE_BLOCK]) % BLOCK if length >= storage.prompt else 0
        elif layout.blocks:
            parts["means"] = parts["means"][:, :, : blocks_of(length)]
            left = -length % BLOCK
        at = torch.arange(max(0, length - layout.window), length, device=storage.device)
        end = state[STATE_END]
        held = (at >= state[STATE_RING]) & (at >= end - layout.window) & (at < end)
        if layout.window:
            parts["ring"] = parts["ring"].index_select(2, at % layout.window)
        if layout.pivots:
            parts["pivot_at"] = torch.where(parts["pivot_at"] < length, parts["pivot_at"], -1)
        if layout.text_bits:
            used = storage.used_text_slots(length)
            at = parts["text_at"][:, :used]
            parts["text_at"] = torch.where(at < length, at, -1)
            parts["text_codes"] = parts["text_codes"][:, :, :used]
            if used > length:
                parts["text_at"], parts["text_codes"] = first_used(parts["text_at"], parts["text_codes"], length)
        return Tokens(layout, parts, held, left, storage.capacity, storage.owner, storage.axes, storage.slides)

    @property
    def count(self) -> int:
        return self.parts["codes"].shape[2]

    def numbered(self) -> Tokens:
        """The same tokens, able to leave their positions: where blocks have means, each has the number of its block."""
        if not self.layout.blocks or self.layout.moved:
            return self
        codes = self.parts["codes"]
        block_of = torch.arange(self.count, dtype=torch.int32, device=codes.device).expand(codes.shape[0], -1) // BLOCK
        return replace(self, layout=replace(self.layout, moved=True), parts=self.parts | {"block_of": block_of})

    def take(self, index: Tensor, distinct: bool) -> Tokens:
        """Tokens at the positions `index` [m], in its order. distinct: none comes twice, which takes fewer text slots.

        Raises IndexError for a position that is not there.
        """
        given = self.numbered()
        n, m, parts = self.count, len(index), dict(given.parts)
        for name in parts.keys() & {"codes", "range"}:
            parts[name] = parts[name].index_select(2, index)
        for name in parts.keys() & {"classes", "block_of"}:
            parts[name] = parts[name].index_select(1, index)
        left = torch.where(index[-1] == n - 1, self.left, 0) if self.layout.blocks else 0
        recent = index[max(0, m - self.layout.window) :] - (n - len(self.held))  # their places among those of the ring
        held = recent >= 0
        if self.layout.window:
            held &= self.held[recent.clamp_min(0)]
            parts["ring"] = parts["ring"].index_select(2, recent.clamp_min(0))
        if self.layout.pivots:
            moved_to = torch.full((n,), -1, dtype=torch.int32, device=index.device)
            moved_to.scatter_reduce_(0, index, torch.arange(m, dtype=torch.int32, device=index.device), "amax")
            at = parts["pivot_at"]
            parts["pivot_at"] = torch.where(at >= 0, moved_to[at.clamp_min(0).long()], -1)
        if self.layout.text_bits and parts["text_at"].shape[1]:
            at, slots = parts["text_at"], parts["text_at"].shape[1]
            slot_of = torch.full((at.shape[0], n + 1), -1, device=at.device)  # the last is for free slots
            slot_of.scatter_(1, torch.where(at >= 0, at, n).long(), torch.arange(slots, device=at.device).expand_as(at))
            slot = slot_of[:, :n].index_select(1, index)
            first = torch.argsort(slot < 0, dim=1, stable=True)[:, : min(m, slots) if distinct else m]
            slot = slot.gather(1, first)
            parts["text_at"] = torch.where(slot >= 0, first, -1).to(torch.int32)
            codes = parts["text_codes"]
            chosen = slot.clamp_min(0)[:, None, :, None].expand(-1, codes.shape[1], -1, codes.shape[3])
            parts["text_codes"] = codes.gather(2, chosen)
        return replace(given, parts=parts, held=held, left=left)

    def with_whole_ring(self) -> Tokens:
        """The same tokens with a full ring: those that it did not hold are dequantized into it."""
        recent = len(self.held)
        if not recent:
            return self
        last = self.take(torch.arange(self.count - recent, self.count, device=self.held.device), distinct=True)
        ring = ops.read(last.stored().buffers, recent, last.layout)
        return replace(self, parts=self.parts | {"ring": ring}, held=torch.ones_like(self.held))

    def padding(self, count: int) -> Tokens:
        """`count` zeros of class padding. Masks hide them, so the ring may count as holding them."""
        codes = self.parts["codes"]
        B, H, device = *codes.shape[:2], codes.device
        affine = self.parts.get("affine")
        zero = torch.zeros(B, H, 1, self.layout.head_dim, dtype=self.layout.dtype, device=device)
        empty = Storage(
            self.layout, self.layout.allocate(B, H, 1, bool(self.layout.text_bits), device), 0, 0, self.owner
        )
        if affine is not None:
            empty["affine"] = affine
        classes = torch.full((B, 1), PADDING, dtype=torch.uint8, device=device)
        at = torch.zeros(1, dtype=torch.int64, device=device)
        ops.append(empty.buffers, empty.to_stored(zero), at, classes, None, str(self.layout))
        many = Tokens.of(empty, 1).take(torch.zeros(count, dtype=torch.int64, device=device), distinct=False)
        parts = many.parts
        if self.layout.text_bits:
            parts |= {"text_at": parts["text_at"][:, :0], "text_codes": parts["text_codes"][:, :, :0]}
        if self.layout.window:
            parts["ring"] = empty["ring"][:, :, :1].expand(-1, -1, min(self.layout.window, count), -1)
        held = torch.ones(min(self.layout.window, count), dtype=torch.bool, device=device)
        return replace(many, parts=parts, held=held, axes=self.axes)

    def stored(self) -> Storage:
        """New buffers of a growing cache that hold these tokens; nothing writes the affine map, so it is shared."""
        layout, parts, n = self.layout, self.parts, self.count
        capacity = max(n, min(self.room, -(-(n + 1) // ROOM) * ROOM))
        width = parts["text_at"].shape[1] if layout.text_bits else 0
        B, H, device = *parts["codes"].shape[:2], parts["codes"].device
        buffers = layout.allocate(B, H, capacity, width + capacity - n if layout.text_bits else 0, device)
        b = dict(zip(layout.fields, buffers, strict=True))
        for name in parts.keys() & {"codes", "range"}:
            b[name][:, :, :n] = parts[name]
        for name in parts.keys() & {"text_codes", "pivots", *(() if layout.moved else ("means",))}:
            b[name][:, :, : parts[name].shape[2]] = parts[name]
        for name in parts.keys() & {"classes", "text_at", "pivot_at"}:
            b[name][:, : parts[name].shape[1]] = parts[name]
        if layout.window:
            b["ring"].index_copy_(2, torch.arange(n - len(self.held), n, device=device) % layout.window, parts["ring"])
        b["state"][:STATE_TEXT] = n
        b["state"][STATE_RING] -= self.held.flip(0).int().cumprod(0).sum()
        b["state"][STATE_TEXT] = width - n if layout.text_bits else 0
        if "affine" in parts:
            b["affine"] = parts["affine"].detach()  # a tensor of its own, so that its memory's users can be counted
        storage = Storage(layout, list(b.values()), n, n, self.owner, self.axes)
        storage.slides = self.slides
        if layout.moved:
            storage.place_blocks(parts["block_of"], parts["means"], self.left)
        storage.mark_dynamic()
        return storage


def first_used(at: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` used slots, then free ones: at [B, n], -1 for a free slot, and tokens [B, H, n, .]."""
    order = torch.argsort(at < 0, dim=1, stable=True)[:, :count]
    return at.gather(1, order), tokens.gather(
        2, order[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
    )


def concat_tokens(runs: list[Tokens]) -> Tokens:
    """Concatenate along the tokens; the affine map is the first one's."""
    runs = [run.numbered() for run in runs]
    layout, parts, total = runs[0].layout, dict(runs[0].parts), sum(run.count for run in runs)
    starts = [sum(run.count for run in runs[:i]) for i in range(len(runs))]
    of_all = lambda name, dim: torch.cat([run.parts[name] for run in runs], dim)
    moved = lambda name: torch.cat(
        [torch.where(r.parts[name] >= 0, r.parts[name] + s, -1) for r, s in zip(runs, starts, strict=True)], 1
    )
    for name in parts.keys() & {"codes", "range", "text_codes"}:
        parts[name] = of_all(name, 2)
    if "classes" in parts:
        parts["classes"] = of_all("classes", 1)
    if layout.blocks:
        blocks = [sum(run.parts["means"].shape[2] for run in runs[:i]) for i in range(len(runs))]
        parts["block_of"] = torch.cat(
            [run.parts["block_of"] + first for run, first in zip(runs, blocks, strict=True)], 1
        )
        parts["means"] = of_all("means", 2)
    recent = min(layout.window, total)
    held = torch.cat([run.held for run in runs])
    held = held[len(held) - recent :]
    if layout.window:
        ring = of_all("ring", 2)
        parts["ring"] = ring[:, :, ring.shape[2] - recent :]
    if layout.text_bits:
        parts["text_at"] = moved("text_at")
    if layout.pivots:
        parts["pivot_at"], parts["pivots"] = first_used(moved("pivot_at"), of_all("pivots", 2), layout.pivots)
    room = max(*(run.room for run in runs), total)
    return replace(runs[0], parts=parts, held=held, left=runs[-1].left, room=room)


def concat_rows(rows: list[Tokens]) -> Tokens:
    """Concatenate along the batch; all have as many tokens. Rows share one ring state, so rings are filled first."""
    rows, parts, left = [row.with_whole_ring() for row in rows], {}, rows[0].left
    if any(row.layout.moved for row in rows):
        rows = [row.numbered() for row in rows]
        left = functools.reduce(torch.minimum, [torch.as_tensor(row.left, device=row.held.device) for row in rows])
    for name in rows[0].parts:
        given = [row.parts[name] for row in rows]
        if name in ("text_at", "text_codes", "means"):
            dim = 1 if name == "text_at" else 2
            width, fill = max(t.shape[dim] for t in given), -1 if name == "text_at" else 0
            given = [
                torch.nn.functional.pad(t, (*(0, 0) * (t.dim() - 1 - dim), 0, width - t.shape[dim]), value=fill)
                for t in given
            ]
        parts[name] = torch.cat(given, 0)
    return replace(rows[0], parts=parts, left=left, room=max(row.room for row in rows))
