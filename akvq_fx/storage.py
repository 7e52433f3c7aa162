"""Storage: the buffers behind packed cache tensors, and what the host does to them between steps."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from akvq_fx import torch_internals
from akvq_fx.kernels.cache_axes import STANDARD, CacheAxes, moved
from akvq_fx.kernels.layout import (
    BLOCK,
    CODES,
    GAIN,
    ORDER,
    STATE_BLOCK,
    STATE_END,
    STATE_TEXT,
    Layout,
    blocks_of,
    unwritten,
)
from akvq_fx.kernels.rotate import rotate_as_stored

ROWS, TOKENS = 0, 2  # axes of [B, H, T, D]
_stamps = itertools.count()


@functools.cache
def marks_of(axes: CacheAxes, static: bool) -> dict:
    """Marks of a view: its sizes that are symbols from the first decode step on. A static cache has as many tokens as
    it was made for."""
    return torch_internals.dynamic_marks([axes.rows] if static else sorted([axes.rows, axes.tokens]))


FIRST = torch_internals.dynamic_marks([0])  # of a sliding window's first slot


def text_slots(at: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(slots, positions) of the text tokens before position `length`, both [B, n], position -1 where a row has fewer.

    at: the text_at buffer [B, Ct]. n is the most that any row uses; to find it waits for the device.
    """
    used = (at >= 0) & (at < length)
    width = int(used.sum(1).max()) if at.numel() else 0
    order = torch.argsort(~used, dim=1, stable=True)[:, :width]
    return order, torch.where(used.gather(1, order), at.gather(1, order), -1)


def used_blocks(block_of: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks that tokens are in, and no others, the last token's at the end in every row: new numbers [B, n] int32
    of the blocks of n tokens, and means [B, H, N, D].

    N is the most that any row uses; to find it waits for the device.
    """
    if not block_of.shape[1]:
        return block_of, means[:, :, :0]
    number = block_of.long()
    last = number[:, -1:]
    used = torch.zeros(len(number), means.shape[2], dtype=torch.bool, device=means.device)
    used = used.scatter(1, number, True).scatter(1, last, False)
    count = int(used.sum(1).max())
    order = torch.cat([torch.argsort(~used, dim=1, stable=True)[:, :count], last], 1)
    renumbered = (used.cumsum(1) - 1).scatter(1, last, count)
    means = means.gather(2, order[:, None, :, None].expand(-1, means.shape[1], -1, means.shape[3]))
    return renumbered.gather(1, number).to(torch.int32), means


def axis_of(name: str) -> int | None:
    """The axis along which a buffer grows with the capacity, None for one that does not."""
    if name in ("classes", "block_of", "text_at"):
        return 1
    return 2 if name in ("codes", "range", "means", "text_codes") else None


class Storage:
    """The buffers behind one or more PackedKV views of the same tokens.

    end     tokens written, where the host knows it (a growing cache); None for a static one, whose end is on the device
    prompt  tokens of the prompt, or that were moved: text overlay slots before it are compacted, later ones follow the
            position, as the blocks of later tokens do where tokens moved
    owner   digests of the weights that made the tokens, None if unknown
    loaded  it comes from a file or a pickle: the weights that continue it are checked by their contents
    slides  it is a sliding window: views may begin behind the first slot (akvq_fx/sliding.py)
    borrowers  storages that read this one's memory until one of the two is written (`expanded`)
    axes    how the model orders the axes of its cache tensors; buffers are [B, H, ...] whatever it is
    held    its buffers as they are, in the layout's order
    stamp   a number that no other set of buffers has: it is the same as long as they are
    attributes  of views, as long as they are: made for the first one (packed_kv.py)
    parts   rows -> (buffers, the same of so many rows), the last that `first_rows` was asked for
    """

    __slots__ = ("layout", "text", "borrowed", "borrowers", "rows", "device", "end", "prompt", "owner", "views")
    __slots__ += ("loaded", "axes", "slides", "parts", "_held", "stamp", "attributes", "__weakref__")

    def __init__(
        self,
        layout: Layout,
        buffers: Sequence[Tensor],
        end: int | None,
        prompt: int,
        owner: str | None,
        axes: CacheAxes = STANDARD,
    ):
        self.layout, self.end, self.prompt, self.owner, self.axes = layout, end, prompt, owner, axes
        self.parts = {}
        self.borrowed, self.borrowers, self.loaded, self.slides = False, [], False, False
        self.held = buffers
        self.text, self.rows, self.device = str(layout), tuple(buffers[CODES].shape[:2]), buffers[CODES].device
        self.views: list[weakref.ref] = []

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self._held

    @held.setter
    def held(self, buffers: Sequence[Tensor]) -> None:
        self._held, self.stamp, self.attributes = tuple(buffers), next(_stamps), None

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Contiguous buffers of its own, in the layout's order. `held` may still be memory of another storage."""
        if self.borrowed:
            self.held, self.borrowed = [buffer.contiguous() for buffer in self.held], False
            self.mark_dynamic()
        return self.held

    def expanded(self, rows: int) -> Storage:
        """`rows` times the one row of a growing cache, without a copy until either is written or a graph takes it."""
        held = [b.clone() if name == "state" else b.expand(rows, *b.shape[1:]) for name, b in self.named()]
        made = Storage(self.layout, held, self.end, self.prompt, self.owner, self.axes)
        made.borrowed, made.loaded, made.slides = True, self.loaded, self.slides
        self.borrowers.append(weakref.ref(made))
        return made

    def named(self) -> list[tuple[str, Tensor]]:
        return list(zip(self.layout.fields, self.buffers, strict=True))

    def release_borrowers(self) -> None:
        """To be called before a write: storages that borrow this memory copy it."""
        for ref in self.borrowers:
            other = ref()
            if other is not None:
                other.buffers  # noqa: B018 - the copy is made
        self.borrowers = []

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[self.layout.fields.index(name)]

    def __setitem__(self, name: str, buffer: Tensor):
        at = self.layout.fields.index(name)
        self.held = (*self.buffers[:at], buffer, *self.buffers[at + 1 :])

    @property
    def capacity(self) -> int:
        return self.held[CODES].shape[2]  # as large where it is borrowed

    @property
    def codes(self) -> Tensor:
        return self.buffers[CODES]

    def map(self, fn, end: int | None = -1) -> Storage:
        """A new storage with fn(name, buffer) in place of every buffer."""
        buffers = [fn(name, buffer) for name, buffer in self.named()]
        made = Storage(self.layout, buffers, self.end if end == -1 else end, self.prompt, self.owner, self.axes)
        made.loaded, made.slides = self.loaded, self.slides
        made.mark_dynamic()
        return made

    def clone(self) -> Storage:
        return self.map(lambda name, buffer: buffer.clone())

    def gather(self, index: Tensor) -> Storage:
        """Storage of the batch rows `index` [B'], gathered."""
        return self.map(lambda name, b: b.clone() if name == "state" else b.index_select(0, index.to(b.device)))

    def compact_text(self, length: int, slots: tuple[Tensor, Tensor] | None = None) -> None:
        """Keep only the text slots of positions below `length`; later tokens then take slot position + state[2].

        Codes are moved, none is computed. slots: text_slots(text_at, length) of another layer that holds the same
        tokens as text. Called after a prompt or a crop, never in a decode step.
        """
        order, kept_at = text_slots(self["text_at"], length) if slots is None else slots
        tail = self.capacity - length
        b = self["text_codes"]
        kept = b.gather(2, order[:, None, :, None].expand(-1, b.shape[1], -1, b.shape[3]))
        self["text_codes"] = torch.nn.functional.pad(kept, (0, 0, 0, tail))
        self["text_at"] = torch.nn.functional.pad(kept_at, (0, tail), value=-1)
        self["state"][STATE_TEXT] = order.shape[1] - length
        self.prompt = length
        self.mark_dynamic()

    def first_rows(self, rows: int) -> Storage:
        """The same memory of its first rows, made once for a size; all rows share one state."""
        whole, part = self.parts.get(rows, ((), None))
        if part is None or any(one is not other for one, other in zip(whole, self.buffers, strict=True)):
            held = [b if name == "state" else b[:rows] for name, b in self.named()]
            part = Storage(self.layout, held, self.end, self.prompt, self.owner, self.axes)
            self.parts = {rows: (list(self.held), part)}
        return part

    def written(self) -> int:
        """Slots up to the last token that was written, of a static cache too; waits for the device."""
        return int(self["state"][STATE_END])

    def used_text_slots(self, length: int) -> int:
        """Text slots of the first `length` tokens: those of the prompt, then one for each position."""
        return max(length, self.prompt) + self["text_at"].shape[1] - self.capacity

    def begin_anew(self, length: int) -> None:
        """Have tokens to come follow on position `length`, below `prompt`: after a crop among the prompt's tokens."""
        if self.layout.moved:
            self.place_blocks(self["block_of"][:, :length], self["means"], 0)
        if self.layout.text_bits:
            self.compact_text(length)

    def place_blocks(self, block_of: Tensor, means: Tensor, left: Tensor | int) -> None:
        """Where tokens moved: the first n are in blocks block_of [B, n], whose means are [B, H, N, D]; the `left` next
        ones will be in the last token's block, and those after them in blocks of their own.

        Called after a move or a crop, never in a decode step.
        """
        block_of, means = used_blocks(block_of, means)
        (rows, length), count = block_of.shape, means.shape[2]
        shift = torch.full((1,), count * BLOCK - length, dtype=torch.int32, device=self.device) - left
        counter = shift.new_zeros(int(self.layout.text_bits > 0))
        self["state"] = torch.cat([self["state"][:STATE_BLOCK], shift.to(torch.int32), counter])
        to_come = self.blocks_at(length, self.capacity)
        self["block_of"] = torch.cat([block_of, to_come.expand(rows, -1)], 1)
        size = max(2, count + blocks_of(self.capacity - length))  # dynamo would take a size of 1 for a constant
        self["means"] = torch.nn.functional.pad(means, (0, 0, 0, size - count))
        self.prompt = length
        self.mark_dynamic()

    def blocks_at(self, start: int, end: int) -> Tensor:
        """The blocks of tokens appended at positions from start to end, where others moved: [end - start] int32."""
        at = torch.arange(start, end, dtype=torch.int32, device=self.device)
        return (at + self["state"][STATE_BLOCK]) // BLOCK

    def grow(self, capacity: int, apart: bool = False) -> None:
        """Make room for `capacity` tokens; new slots are empty.

        apart: the buffers that do not grow are copied too. A CUDA graph may have kept them for caches of this size.
        """
        sizes = self.grown(capacity)
        stays = lambda name, b: b.shape == sizes[name] and not apart
        buffers = [b if stays(name, b) else b.new_empty(sizes[name]) for name, b in self.named()]
        torch_internals.copy_all(*self.copies_to(buffers))
        self.held = buffers  # at once: an allocation that fails leaves the storage as it was
        self.mark_dynamic()

    def grown(self, capacity: int) -> dict[str, torch.Size]:
        """Sizes of the buffers with room for `capacity` tokens, by name."""
        sizes = {name: list(b.shape) for name, b in self.named()}
        extra, blocks = capacity - self.capacity, blocks_of(capacity)
        if self.layout.moved:  # as many means more as blocks may begin there
            own = blocks_of(capacity - self.prompt) - blocks_of(self.capacity - self.prompt)
            blocks = max(blocks, self["means"].shape[2] + own)
        for name, size in sizes.items():
            if name == "means":
                size[2] = blocks
            elif axis_of(name) is not None:
                size[axis_of(name)] += extra
        return {name: torch.Size(size) for name, size in sizes.items()}

    def copies_to(self, buffers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Targets and sources of copies that bring its contents into other buffers, which are as large or grown. What
        they have more is filled at once."""
        targets, sources = [], []
        for (name, b), into in zip(self.named(), buffers, strict=True):
            if into is b:
                continue
            if into.shape != b.shape:
                axis = axis_of(name)
                have, size = b.shape[axis], into.shape[axis]
                rest, into = into.narrow(axis, have, size - have), into.narrow(axis, 0, have)
                rest.copy_(self.blocks_at(have, size)) if name == "block_of" else rest.fill_(unwritten(name))
            targets.append(into)
            sources.append(b)
        return targets, sources

    def move_to(self, buffers: list[Tensor]) -> None:
        """Have other buffers, which hold the same, in place of its own."""
        self.held, self.borrowed = buffers, False
        self.mark_dynamic()
        for view in (ref() for ref in self.views):
            for name in () if view is None else self.layout.traced:
                setattr(view, name, self[name])

    def mark_dynamic(self) -> None:
        """Let dynamo treat rows and capacities that change as symbols: neither may recompile."""
        torch._dynamo.maybe_mark_dynamic(self["codes"], [ROWS] if self.end is None else [ROWS, TOKENS])
        for name in ("text_codes", "means"):
            if name in self.layout.traced:
                torch._dynamo.maybe_mark_dynamic(self[name], [ROWS, TOKENS])

    def clear(self) -> None:
        """Forget every token, in place."""
        self.release_borrowers()
        B, H, C = self["codes"].shape[:3]
        empty = self.layout.allocate(B, H, C, C if self.layout.text_bits else 0, self["codes"].device)
        for name, fresh in zip(self.layout.fields, empty, strict=True):
            compacted = self[name].shape != fresh.shape  # for a prompt that is gone
            # caches that were selected from a growing one share its affine map
            if compacted or name == "affine" and self.end is not None:
                self[name] = fresh
            else:
                self[name].copy_(fresh)
        if self.layout.affine:
            self["affine"][:, GAIN] = 1.0  # the identity: tokens written outside a graph must not be multiplied by 0
        if self.layout.uneven:
            self["affine"][:, ORDER] = torch.arange(self.layout.head_dim, device=self["affine"].device).half()
        self.prompt, self.end = 0, None if self.end is None else 0

    def shape(self, length: int) -> tuple[int, ...]:
        """Of a view of `length` tokens, in the model's axes."""
        if self.axes is STANDARD:  # on the path of every decode step
            return *self.rows, length, self.layout.head_dim
        return self.axes.shape(*self.rows, length, self.layout.head_dim)

    def as_model(self, x: Tensor) -> Tensor:
        """[B, H, T, D] -> the model's axes."""
        return moved(x, self.axes.from_standard())

    def to_stored(self, x: Tensor) -> Tensor:
        """x as the model made it, in the model's axes -> [B, H, T, D] in the space of the buffers."""
        x = moved(x, self.axes.to_standard(self.rows[1], self.layout.head_dim))
        return rotate_as_stored(x, self["affine"] if self.layout.affine else None, self.layout.rotated)

    @property
    def nbytes(self) -> int:
        """Bytes of its own memory."""
        return sum(b.numel() * b.element_size() for b in (self.held[:1] if self.borrowed else self.held))
