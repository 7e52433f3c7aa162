"""Digests of weights: 128 bits that change with any bit of a tensor's contents, its shape or its dtype.

Equal contents have equal digests in every process and on every device, so a cache that was written to a file knows the
weights that made it. Not cryptographic: two sums, modulo 2**64, of differently mixed 64-bit words (the multipliers are
MurmurHash3's and SplitMix64's finalizers). A weight is read where it lies, at memory speed, and only its sums are
copied to the host.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

log = logging.getLogger(__name__)
CHUNK = {"cpu": 1 << 17}  # words mixed at a time: 1 MiB, so that a CPU's cache holds the temporaries
CHUNK_ELSEWHERE = 1 << 24
signed = lambda number: number - (1 << 64) if number >> 63 else number
STEP = signed(0x9E3779B97F4A7C15)
MIX = tuple(map(signed, (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53, 0xBF58476D1CE4E5B9)))

Mark = tuple[int, int]


def parts(weight: Tensor) -> list[Tensor]:
    """The dense tensors that a weight consists of: itself, or those inside a wrapper (quantized, sharded).

    Of a weight that several processes share (a DTensor) it is this process's part.
    """
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight.detach()]
    names, _ = weight.__tensor_flatten__()
    inside = [getattr(weight, name) for name in names]  # a DTensor's device mesh is among them
    return [part for x in inside if isinstance(x, Tensor) for part in parts(x)]


def mark(weight: Tensor) -> Mark:
    """Changes when a weight is written to in place or gets other memory; misses writes through `.data`."""
    inner = weight
    while hasattr(inner, "__tensor_flatten__"):
        inner = getattr(inner, inner.__tensor_flatten__()[0][0])
    return 0 if weight.is_inference() else weight._version, inner.data_ptr()


def words_of(x: Tensor) -> Tensor:
    """The bytes of a tensor as [n] int64, the last word filled up with zeros."""
    flat = x.contiguous().view(-1).view(torch.uint8)
    spare = -flat.numel() % 8
    if spare or flat.storage_offset() % 8 or flat.data_ptr() % 8:
        flat = torch.nn.functional.pad(flat, (0, spare)).clone()
    return flat.view(torch.int64)


def sums(words: Tensor) -> Tensor:
    """[2] int64, of words [n] int64; the same on every device, since integer sums wrap around in any order."""
    size = CHUNK.get(words.device.type, CHUNK_ELSEWHERE)
    found = torch.zeros(2, dtype=torch.int64, device=words.device)
    steps = (torch.arange(min(size, len(words)), device=words.device) + 1) * STEP
    for first in range(0, len(words), size):
        some = words[first : first + size]
        place = steps[: len(some)] + signed(first * STEP & (1 << 64) - 1)
        mixed = (some ^ place) * MIX[0]
        mixed ^= mixed >> 32
        mixed *= MIX[1]
        found[0] += (mixed ^ mixed >> 29).sum()
        mixed += place
        mixed *= MIX[2]
        found[1] += (mixed ^ mixed >> 32).sum()
    return found


class Digests:
    """Digests by weight, computed once for each change that `mark` sees, and anew where the caller asks for it."""

    def __init__(self):
        self.known, self.lock = WeakTensorKeyDictionary(), threading.Lock()

    def of(self, weights: Sequence[Tensor], anew: bool = False) -> list[str]:
        """One text of 32 hexadecimal digits for each weight; devices are asked once for all of them."""
        marks = [mark(weight) for weight in weights]
        with self.lock:
            known = [self.known.get(weight) for weight in weights]
        texts = [
            "" if anew or seen is None or seen[0] != now else seen[1] for seen, now in zip(known, marks, strict=True)
        ]
        missing = [i for i, text in enumerate(texts) if not text]
        if missing:
            with torch.no_grad():
                for i, text in zip(missing, compute([weights[i] for i in missing]), strict=True):
                    texts[i] = text
            with self.lock:
                for i in missing:
                    self.known[weights[i]] = marks[i], texts[i]
        return texts


def compute(weights: Sequence[Tensor]) -> list[str]:
    """Digests from the contents as they are now."""
    inside = [parts(weight) for weight in weights]
    by_device: dict[torch.device, list[Tensor]] = {}
    for part in (part for some in inside for part in some):
        by_device.setdefault(part.device, []).append(words_of(part))
    numbers = {device: iter(sums_of(words).tolist()) for device, words in by_device.items()}
    texts = []
    for some in inside:
        content = [(str(part.dtype), tuple(part.shape), next(numbers[part.device])) for part in some]
        texts.append(sys.intern(hashlib.sha256(repr(content).encode()).hexdigest()[:32]))
    return texts


def sums_of(words: list[Tensor]) -> Tensor:
    """[n, 2] int64: the sums of tensors of one device; on a GPU by one launch where Triton is there."""
    if words[0].device.type == "cuda":
        try:
            from akvq_fx.kernels import digest_triton
        except ImportError as error:
            log.info("weights are read by PyTorch's own ops: %s", error)
        else:
            with torch.cuda.device(words[0].device):
                return digest_triton.sums(words, STEP, MIX)
    return torch.stack([sums(some) for some in words])


DIGESTS = Digests()
