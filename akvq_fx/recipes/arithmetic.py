"""Arithmetic that several methods share: rounding to nearest, numbers as they are stored, the Walsh-Hadamard rotation.

Everything is computed in float32 (float64 stays). Scales and minima are used as they would be stored, so that what is
read is what a packed cache of the counted bits could hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SCALE_FLOOR = 1e-5  # a constant group has no range


def saturated(x: Tensor, kind: torch.dtype) -> Tensor:
    """x as it comes back from storage in a narrow float; what is too large becomes the largest number, NaN stays."""
    limit = torch.finfo(kind).max
    return x.clamp(-limit, limit).to(kind).to(x.dtype)


def half(x: Tensor) -> Tensor:
    return saturated(x, torch.float16)


def e4m3(x: Tensor) -> Tensor:
    return saturated(x, torch.float8_e4m3fn)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def width(size: int, group: int) -> int:
    """Members of a group along an axis of this size: the group where it divides the axis, else all of it."""
    return group if size % group == 0 else size


def round_trip(
    x: Tensor,
    bits: int,
    dim: int,
    clip: float = 1.0,
    stored: Callable[[Tensor], Tensor] = half,
    among: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize x, one range along `dim`.

    lo = clip * min, hi = clip * max, scale = (hi - lo) / (2^b - 1), code = round((x - lo) / scale), read as code *
    scale + lo.
    stored  what storage makes of scale and minimum;  among  bool, broadcastable to x: members that make the range
    """
    x, top = wide(x), 2**bits - 1
    least, most = (x, x) if among is None else (x.where(among, torch.inf), x.where(among, -torch.inf))
    lo, hi = least.amin(dim, keepdim=True) * clip, most.amax(dim, keepdim=True) * clip
    scale, lo = stored(((hi - lo) / top).clamp_min(SCALE_FLOOR)), stored(lo)
    divisor = scale.where(scale != 0, 1.0)  # a scale below the smallest number that storage has reads as the minimum
    return ((x - lo) / divisor).clamp(0, top).round() * scale + lo


def round_trip_channels(x: Tensor, bits: int, group: int, clip: float = 1.0, stored=half) -> Tensor:
    """round_trip of x [..., D] in groups of neighbouring channels, per token."""
    grouped = x.unflatten(-1, (-1, width(x.shape[-1], group)))
    return round_trip(grouped, bits, -1, clip, stored).flatten(-2)


def rotate(x: Tensor) -> Tensor:
    """kernels/rotate.py's rotation of the last axis: Walsh-Hadamard in blocks of its largest power of two."""
    x = wide(x)
    order = x.shape[-1] & -x.shape[-1]
    out, size = x.unflatten(-1, (-1, order)), 1
    while size < order:
        pairs = out.unflatten(-1, (-1, 2, size))
        one, other = pairs[..., 0, :], pairs[..., 1, :]
        out, size = torch.stack([one + other, one - other], -2).flatten(-3), 2 * size
    return (out * order**-0.5).flatten(-2)
