"""Per-token asymmetric quantization in channel groups (AKVQ-VL equations 3-6).

Per group: lo = clip * min, hi = clip * max, scale = (hi - lo) / (2^b - 1), code = round((x - lo) / scale) in 0..2^b-1,
and x is read back as code * scale + lo. The paper's integer zero-point is unbounded, so the 16-bit minimum is kept
instead. Codes are computed against the *stored* (fp16) scale and minimum: inside the clipped range the error is at most
scale / 2. A non-finite group stays non-finite and touches no other token, as in a 16-bit cache.

A symmetric layout's levels lie evenly around zero, (code - (2^b - 1) / 2) * scale, so the scale is all that is stored.
step = STEPS[b] * rms(x) is best for numbers of a normal distribution, which a Hadamard transform comes near to; the
stored scale is then (x . x) / (x . level), which gives what is read x's own part along x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx.kernels.layout import pack_bits, unpack_bits

SCALE_FLOOR = 1e-5  # a constant group has no range; QuaRot kv_cache.py uses the same floor
# of the root mean square: uniform levels with the least mean square error for a normal (Max, 1960, table II)
STEPS = {2: 0.9957, 4: 0.3352}
FP16_MAX = 65504.0  # ranges are stored as fp16; larger finite keys saturate instead of turning into inf


def quantize(x: Tensor, bits: int, clip: float, groups: int) -> tuple[Tensor, Tensor]:
    """x [..., D] float -> codes [..., D*bits/16] int16, range [..., 2*groups] fp16 (scales, then minima)."""
    codes, range_ = encode(x, bits, clip, groups)
    return pack_bits(codes, bits), range_


def encode(x: Tensor, bits: int, clip: float, groups: int) -> tuple[Tensor, Tensor]:
    """quantize before the codes are packed: they are [..., D] int32."""
    top = 2**bits - 1
    grouped = x.float().unflatten(-1, (groups, -1))
    lo, hi = grouped.amin(-1) * clip, grouped.amax(-1) * clip
    scale, lo = saturate((hi / top - lo / top).clamp_min(SCALE_FLOOR)), saturate(lo)
    codes = ((grouped - lo.float()[..., None]) / scale.float()[..., None]).round().clamp(0, top)
    codes = codes.nan_to_num(0.0).to(torch.int32).flatten(-2)
    return codes, torch.cat([scale, lo], -1)


def saturate(x: Tensor) -> Tensor:
    """x as it is stored, in fp16."""
    return torch.where(x.isfinite(), x.clamp(-FP16_MAX, FP16_MAX), x).half()


def encode_symmetric(x: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """x [..., D] float -> codes [..., D] int32, scales [..., groups] fp16; a group of zeros has scale 0."""
    middle = (2**bits - 1) / 2
    grouped = x.float().unflatten(-1, (groups, -1))
    step = STEPS[bits] * grouped.square().mean(-1, keepdim=True).sqrt()
    codes = (grouped / torch.where(step == 0, 1.0, step) + middle).round().clamp(0, 2 * middle).nan_to_num(0.0)
    level = codes - middle
    length, along = grouped.square().sum(-1), (grouped * level).sum(-1)
    scale = saturate(torch.where(length == 0, 0.0, length / along))
    return codes.to(torch.int32).flatten(-2), scale


def decode_symmetric(codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of encode_symmetric: [..., D] in dtype, computed in fp32."""
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    level = codes.float().unflatten(-1, (scales.shape[-1], -1)) - (2**bits - 1) / 2
    return (level * scales.float()[..., None]).flatten(-2).clamp(-limit, limit).to(dtype)


def dequantize(codes: Tensor, range_: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse: codes [..., D*bits/16], range [..., 2*groups] -> [..., D] in dtype, computed in fp32."""
    return decode(unpack_bits(codes, bits), range_, dtype)


def decode(codes: Tensor, range_: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of encode: codes [..., D] int32, range [..., 2*groups] -> [..., D] in dtype."""
    # the rounded scale may lead a step past fp16; a broken group is NaN and stays so
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    scale, lo = range_.float().chunk(2, -1)
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale[..., None] + lo[..., None]).flatten(-2).clamp(-limit, limit).to(dtype)
