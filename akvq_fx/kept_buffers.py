"""Cache buffers that outlive their caches, because a CUDA graph was recorded over them: the next cache moves in.

A CUDA graph reads and writes at fixed addresses, and capturing one takes longer than many steps. So a recording
(akvq_fx/cuda_graph.py) keeps the buffers that it runs over. When their cache is gone and a later one of the same sizes
is to be continued, its contents are copied into them, and the recording serves it. Nothing that makes a cache (prompts,
beams, files, eviction) needs to know of this.

Whether a buffer is free is asked of its memory: PyTorch counts the tensors that share it, views that users hold among
them, so there are no books that could be wrong. What is kept is bounded, and is given back

- when more would be kept than a share of the device's memory (option `kept_share`): the set unused longest goes first;
- when the compiled code, the model or its weights go, or torch._dynamo.reset() is called;
- by `akvq_fx.free_kept_buffers()`;
- when an allocation of this package fails, which is then tried again.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from akvq_fx import torch_internals

T = TypeVar("T")
_clock = itertools.count()


class Kept:
    """One buffer. `tensor` shares its memory with the cache that has it, if one has.

    place   CUDA stream, as a number, on which it is used: on another one, work of a finished cache may not be done
    """

    __slots__ = ("place", "tensor", "__weakref__")

    def __init__(self, tensor: Tensor, place: int):
        self.tensor, self.place = tensor.detach(), place

    @property
    def nbytes(self) -> int:
        return self.tensor.untyped_storage().nbytes()


class KeptSet:
    """The buffers that one recording keeps, in the order of the storages that had them.

    buffers   [] once they are given back
    extra     bytes of inputs and results, which the recording holds besides
    given_back  is called when they are
    """

    def __init__(self, buffers: list[Kept], given_back: Callable[[], None]):
        self.buffers, self.given_back, self.extra, self.used = buffers, given_back, 0, next(_clock)

    @property
    def tensors(self) -> list[Tensor]:
        return [kept.tensor for kept in self.buffers]

    @property
    def device(self) -> torch.device | None:
        return self.buffers[0].tensor.device if self.buffers else None

    def is_free(self) -> bool:
        """No cache has them, and nobody holds a view of one."""
        return bool(self.buffers) and all(torch_internals.users_of_memory(kept.tensor) == 1 for kept in self.buffers)

    def fits(self, sizes: list[torch.Size]) -> bool:
        return len(sizes) == len(self.buffers) and all(
            kept.tensor.shape == size for kept, size in zip(self.buffers, sizes, strict=True)
        )


class Pool:
    """All kept buffers of this process. It owns none: recordings do, so they go with the compiled code."""

    def __init__(self):
        self.lock = threading.RLock()  # a set may be given back by garbage collection while another is looked for
        self.buffers: weakref.WeakValueDictionary[tuple, Kept] = weakref.WeakValueDictionary()  # by address
        self.sets: weakref.WeakSet[KeptSet] = weakref.WeakSet()

    def keep(self, buffers: list[Tensor], place: int, limit: float, given_back: Callable[[], None]) -> KeptSet | None:
        """Keep the buffers of caches; None where they would exceed `limit` bytes with all others that are in use, or
        where two caches share memory."""
        with self.lock:
            addresses = [x.data_ptr() for x in buffers if x.numel()]
            if len(set(addresses)) < len(addresses) or not all(map(is_whole, buffers)):
                return None
            found = [self.buffers.get((x.device, x.data_ptr())) if x.numel() else None for x in buffers]
            for x, kept in zip(buffers, found, strict=True):
                if kept is not None and (kept.place != place or kept.tensor.shape != x.shape):
                    return None
            new = sum(x.untyped_storage().nbytes() for x, kept in zip(buffers, found, strict=True) if kept is None)
            if not self.make_room(limit - new, buffers[0].device):
                return None
            made = [Kept(x, place) if kept is None else kept for x, kept in zip(buffers, found, strict=True)]
            for kept in made:
                if kept.tensor.numel():
                    self.buffers[kept.tensor.device, kept.tensor.data_ptr()] = kept
            made_set = KeptSet(made, given_back)
            self.sets.add(made_set)
            return made_set

    def take(self, kept: KeptSet) -> list[Tensor] | None:
        """The buffers for a cache to have, still filled with what the last one left; None where they are not free."""
        with self.lock:
            if not kept.is_free():
                return None
            kept.used = next(_clock)
            return [x.detach() for x in kept.tensors]

    def nbytes(self, device: torch.device | None = None) -> int:
        """Bytes that are kept, on one device or on all."""
        with self.lock:
            sets = [s for s in self.sets if s.buffers and device in (None, s.device)]
            every = {id(kept): kept.nbytes for s in sets for kept in s.buffers}  # sets may have buffers in common
            return sum(every.values()) + sum(s.extra for s in sets)

    def make_room(self, limit: float, device: torch.device | None = None) -> bool:
        """Give free sets back, the one unused longest first, until no more than `limit` bytes are kept on a device."""
        with self.lock:
            for kept in sorted((s for s in self.sets if device in (None, s.device)), key=lambda s: s.used):
                if self.nbytes(device) <= limit:
                    break
                if kept.is_free():
                    kept.given_back()  # first, so that nobody takes a new cache at the same address for this one
                    kept.buffers, kept.extra = [], 0
            return self.nbytes(device) <= limit

    def give_back(self) -> int:
        """Give every free set back; returns the bytes."""
        before = self.nbytes()
        self.make_room(-math.inf)
        return before - self.nbytes()


POOL = Pool()


def is_whole(x: Tensor) -> bool:
    """The tensor is all that lies in its memory."""
    return x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()


def with_room(call: Callable[[], T]) -> T:
    """call(), and once more where the device's memory did not suffice and kept buffers could be given back."""
    try:
        return call()
    except torch.OutOfMemoryError:
        if not POOL.give_back():
            raise
    return call()  # out here, where nothing holds the tensors of the call that failed


def free_kept_buffers() -> int:
    """Give back the cache buffers that are kept for CUDA graphs and that no cache uses, and these graphs with them.

    Returns the bytes that were kept. Later generations capture again. The memory goes to PyTorch's allocator;
    torch.cuda.empty_cache() hands it to others.
    """
    return POOL.give_back()
