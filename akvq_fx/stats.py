"""cache_stats: what a cache holds and what it costs, in whatever object it lives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from akvq_fx.kernels.layout import PADDING, STATE_END, VISION
from akvq_fx.packed_bundle import PackedBundle
from akvq_fx.packed_kv import PackedKV, token_counts
from akvq_fx.transformers_names import CACHE_NAMES


@dataclass
class CacheStats:
    """tokens: by class, from the first packed keys of each policy; bytes: as allocated, spare capacity included.

    packed_bytes     packed tensors          plain_bytes      tensors that stayed at 16 (or 32) bits
    bytes_16bit      the same cache at 16 bits a number       bits_per_element  of the packed tensors
    simulated_tensors  packed tensors of a simulated recipe; they keep original numbers, and their bytes
    method_bits        per cached number of those: what a real cache of the method would take at these tokens
    """

    packed_tensors: int = 0
    plain_tensors: int = 0
    packed_bytes: int = 0
    plain_bytes: int = 0
    elements: int = 0
    plain_elements: int = 0
    simulated_tensors: int = 0
    method_bits: float | None = None
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def bits_per_element(self) -> float:
        return 8 * self.packed_bytes / self.elements if self.elements else 16.0

    @property
    def bytes_16bit(self) -> int:
        return 2 * (self.elements + self.plain_elements)

    @property
    def ratio(self) -> float:
        """16-bit bytes over actual bytes."""
        actual = self.packed_bytes + self.plain_bytes
        return self.bytes_16bit / actual if actual else 1.0

    def __str__(self) -> str:
        bits = f", {self.bits_per_element:.2f} bits per cached number" if self.packed_tensors else ""
        few = self.packed_tensors and not self.simulated_tensors and self.bits_per_element > 16
        lines = [
            f"packed tensors {self.packed_tensors}, {self.packed_bytes:,} bytes{bits}",
            f"plain tensors {self.plain_tensors}, {self.plain_bytes:,} bytes",
            f"the same cache at 16 bits {self.bytes_16bit:,} bytes, {self.ratio:.2f} times as much"
            + (": of so few tokens most are recent ones, and there is room for more" if few else ""),
        ]
        if self.simulated_tensors:
            lines.append(
                f"of these are simulated {self.simulated_tensors}, which save no bytes: "
                f"a real cache of the method takes {self.method_bits:.2f} bits per cached number"
            )
        lines += [
            f"{policy} tokens: " + ", ".join(f"{k} {v}" for k, v in counts.items())
            for policy, counts in self.tokens.items()
        ]
        return "\n".join(lines)


def cache_stats(cache: Any) -> CacheStats:
    """Count a cache: a transformers cache object or the output that holds it, nested containers of tensors, a module's
    buffers, or one tensor.

    Raises TypeError where no tensor is found in it.
    """
    stats, seen, method_bits = CacheStats(), set(), []
    for tensor in tensors_of(cache):
        if id(tensor) in seen or not tensor.is_floating_point():
            continue
        seen.add(id(tensor))
        if isinstance(tensor, PackedKV):
            stats.packed_tensors += 1
            stats.packed_bytes += tensor.nbytes_packed
            stats.elements += tensor.numel()
            layout = tensor.layout_of
            if layout.simulate:
                method_bits.append(method_bits_of(tensor))
            policy = layout.policy.split()[0]
            if policy not in stats.tokens and not layout.shares_classes:
                stats.tokens[policy] = token_counts(tensor)
        elif tensor.dim() >= 3 and tensor.numel():
            stats.plain_tensors += 1
            stats.plain_bytes += tensor.numel() * tensor.element_size()
            stats.plain_elements += tensor.numel()
    if not stats.packed_tensors and not stats.plain_tensors:
        raise TypeError(
            f"akvq: no cache tensors found in {type(cache).__name__}; "
            "accepted: a cache object, tensors, or containers of them"
        )
    if method_bits:
        stats.simulated_tensors, stats.method_bits = len(method_bits), sum(method_bits) / len(method_bits)
    return stats


def method_bits_of(packed: PackedKV) -> float:
    """Bits per cached number of a simulated tensor's method, for rows of the mean number of real tokens."""
    storage = packed._storage()
    end = packed.count if storage.end is not None else int(storage["state"][STATE_END])
    classes = packed.classes()[:, :end]
    real, vision = (int(mask.sum()) for mask in (classes != PADDING, classes == VISION))
    tokens = max(1, round(real / classes.shape[0]))
    return packed.layout_of.simulation.bits(packed.layout_of.head_dim, storage.rows[1], tokens, vision / max(1, real))


def tensors_of(cache: Any) -> Iterator[Tensor]:
    """Tensors of a cache, by structure: containers, `layers`, and the two caches of an encoder-decoder one.

    Of what a forward or a generate returned only the cache counts: logits and hidden states are in it too.
    """
    if isinstance(cache, PackedBundle):
        yield from cache.leaves
    elif isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, Mapping):
        named = [cache[name] for name in CACHE_NAMES if name in cache]
        is_output = bool(named) or hasattr(cache, "to_tuple")  # an output of transformers, which may hold no cache
        for part in named if is_output else cache.values():
            yield from tensors_of(part)
    elif isinstance(cache, (list, tuple)):
        for part in cache:
            yield from tensors_of(part)
    elif isinstance(cache, torch.nn.Module):
        yield from cache.buffers()
    elif hasattr(cache, "self_attention_cache"):
        yield from tensors_of([cache.self_attention_cache, cache.cross_attention_cache])
    elif hasattr(cache, "layers"):
        yield from tensors_of(list(cache.layers))
    elif hasattr(cache, "keys") and not callable(cache.keys):
        yield from tensors_of([t for t in (cache.keys, getattr(cache, "values", None)) if t is not None])
