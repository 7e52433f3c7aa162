"""find_pivots and key_affine with Triton kernels that read the prompt once; the meaning is kernels/salience.py.

h       [B, T, E] float16 | bfloat16 | float32 of any strides, E up to 16384
k, q    [B, H, T, D], [B, Hq, Tq, D] of any strides, D up to 1024
valid   [B, T] bool or None

find_pivots: a program holds one token in registers. The bits of |h| order as the numbers do, with infinity and then NaN on top,
so the peak is a maximum of integers, and the lower median is the largest v with at most (E - 1) / 2 numbers below it, found
bit by bit: 15 counts for 16-bit numbers, 31 for float32. What is left, [B, T] numbers, is for the reference's own torch ops.

key_affine: a program holds CHUNK tokens of one head, a tile at a time, and adds up n, mean and M2 (the sum of squares around the
mean) of each channel over tokens that are valid and finite; parts are combined by Chan's formula, in which nothing cancels even
where the mean is far larger than the deviation. Queries need only their sum of squares. A small torch part joins the chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from akvq_fx.kernels.salience import gains, select_pivots

MAX_WIDTH = 16384  # numbers of a token that a program's registers hold
MAX_DIM = 1024  # channels of a head: tiles of 16 tokens
CHUNK = 256  # tokens a program reads of a head; its result is 3 float32 a channel, 2 % of what it read
TILE_NUMBERS = 8192  # numbers of a tile
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
INFINITY_BITS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}


def refusal(x: Tensor, q: Tensor | None = None) -> str:
    """Why find_pivots cannot take h = x, or key_affine k = x with q; "" where they can."""
    names, limit = (("h",), MAX_WIDTH) if q is None else (("k", "q"), MAX_DIM)
    for name, given in zip(names, (x, q), strict=False):
        if given.dtype not in FLOATS:
            return f"{name} is {given.dtype}, accepted: float16, bfloat16, float32"
        if not 0 < given.shape[-1] <= limit:
            return f"the last dim of {name} is {given.shape[-1]}, accepted: 1 to {limit}"
        if not given.shape[-2]:
            return f"{name} is {list(given.shape)}, accepted: one token or more"
    return ""


@triton.jit
def peak_kernel(
    h, peaks, medians, tokens, stride_b, stride_t, stride_e,
    E: tl.constexpr, WIDTH: tl.constexpr, INTEGER: tl.constexpr, BITS: tl.constexpr, INFINITY: tl.constexpr,
):  # fmt: skip
    """Bits of the peak and the lower median of |h|, [B, T]; both NaN where one number is. No medians where None is given."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    source = h + row // tokens * stride_b + row % tokens * stride_t + place.to(tl.int64) * stride_e
    bits = tl.load(source, mask=place < E, other=0).to(INTEGER, bitcast=True).to(tl.int32) & ((1 << BITS) - 1)
    peak = tl.max(bits, 0)
    tl.store(peaks + row, peak.to(INTEGER))
    if medians is not None:
        bits = tl.where(place < E, bits, (1 << BITS) - 1)  # never below anything
        median = peak * 0
        for step in range(BITS):
            larger = median | (1 << (BITS - 1 - step))
            below = tl.sum((bits < larger).to(tl.int32), 0)
            median = tl.where(below <= (E - 1) // 2, larger, median)
        tl.store(medians + row, tl.where(peak > INFINITY, peak, median).to(INTEGER))


def peaks_and_medians(h: Tensor, with_medians: bool) -> tuple[Tensor, Tensor | None]:
    """Of |h| [B, T, E] over E, each [B, T] float32: peak, 0 where a number is NaN; lower median, NaN where one is."""
    B, T, E = h.shape
    peaks = torch.empty(B, T, dtype=h.dtype, device=h.device)
    medians = torch.empty_like(peaks) if with_medians else None
    width, bits = triton.next_power_of_2(E), INTEGERS[h.dtype]
    if B * T:
        with torch.cuda.device_of(h):
            peak_kernel[(B * T,)](
                h, peaks.view(bits), medians.view(bits) if with_medians else None, T, *h.stride(),
                E=E, WIDTH=width, INTEGER=tl.int16 if bits == torch.int16 else tl.int32,
                BITS=8 * h.element_size() - 1, INFINITY=INFINITY_BITS[h.dtype],
                num_warps=max(1, min(8, width // 1024)),
            )  # fmt: skip
    peaks = peaks.float().nan_to_num(0.0, posinf=torch.finfo(torch.float32).max)
    return peaks, medians.float() if with_medians else None


def find_pivots(h: Tensor, valid: Tensor | None, count: int, mode: str, floor: float, ratio: float) -> Tensor:
    if mode not in ("topk", "massive"):
        raise ValueError(f"akvq::find_pivots: mode is {mode!r}, accepted: 'topk', 'massive'")
    reason = refusal(h)
    if reason:
        raise ValueError(f"akvq::find_pivots: {reason}")
    B, T, _ = h.shape
    peak, median = peaks_and_medians(h.detach(), mode == "massive")
    valid = torch.ones(B, T, dtype=torch.bool, device=h.device) if valid is None else valid
    return select_pivots(peak, median, valid, count, floor, ratio)


@triton.jit
def moments_kernel(
    x, valid, out, heads, tokens, chunks, stride_b, stride_h, stride_t, stride_d, valid_b, valid_t,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, CHUNK_T: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Of a chunk of a head's tokens, per channel: out [B * H, chunks, D] sum of squares, or [.., 3, D] n, mean, M2."""
    lead, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = lead // heads
    channel = tl.arange(0, DP)
    real = channel < D
    head = x + batch * stride_b + lead % heads * stride_h
    count, mean, spread = tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32)
    for start in range(0, CHUNK_T, TILE):
        token = chunk * CHUNK_T + start + tl.arange(0, TILE)
        live = token < tokens
        if valid is not None:
            seen = tl.load(valid + batch * valid_b + token.to(tl.int64) * valid_t, mask=live, other=0)
            live = live & (seen != 0)
        where = head + (token.to(tl.int64) * stride_t)[:, None] + channel[None, :] * stride_d
        tile = tl.load(where, mask=live[:, None] & real[None, :], other=0).to(tl.float32)
        counted = live[:, None] & (tl.abs(tile) < float("inf"))
        tile = tl.where(counted, tile, 0.0)
        if SQUARES:
            spread += tl.sum(tile * tile, 0)
        else:
            more = tl.sum(counted.to(tl.float32), 0)
            centre = tl.div_rn(tl.sum(tile, 0), tl.maximum(more, 1.0))  # what it misses by enters M2 squared
            apart = tl.where(counted, tile - centre[None, :], 0.0)
            total = tl.maximum(count + more, 1.0)
            step = centre - mean
            spread += tl.sum(apart * apart, 0) + step * step * (count * more / total)
            mean += step * tl.div_rn(more, total)
            count += more
    if SQUARES:
        tl.store(out + (lead * chunks + chunk) * D + channel, spread, mask=real)
    else:
        where = out + (lead * chunks + chunk) * 3 * D + channel
        tl.store(where, count, mask=real)
        tl.store(where + D, mean, mask=real)
        tl.store(where + 2 * D, spread, mask=real)


def chunk_sums(x: Tensor, valid: Tensor | None, squares: bool) -> Tensor:
    """[B, H, chunks, D] float32 sums of squares, or [B, H, chunks, 3, D] n, mean, M2, over valid and finite tokens."""
    B, H, T, D = x.shape
    chunks, wide = triton.cdiv(T, CHUNK), max(16, triton.next_power_of_2(D))
    out = torch.empty((B, H, chunks, D) if squares else (B, H, chunks, 3, D), dtype=torch.float32, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            moments_kernel[(B * H, chunks)](
                x, valid, out, H, T, chunks, *x.stride(), *((0, 0) if valid is None else valid.stride()),
                D=D, DP=wide, TILE=min(CHUNK, TILE_NUMBERS // wide), CHUNK_T=CHUNK, SQUARES=squares, num_warps=4,
            )  # fmt: skip
    return out


def join(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n, mean, M2 [..., chunks, D] of each chunk -> of all."""
    n, mean, spread = parts.unbind(-2)
    total = n.sum(-2)
    middle = (n * mean).sum(-2) / total.clamp_min(1)
    return total, middle, (spread + n * (mean - middle.unsqueeze(-2)).square()).sum(-2)


def key_affine(k: Tensor, q: Tensor, valid: Tensor | None, centre: bool, balance: bool) -> Tensor:
    reason = refusal(k, q)
    if reason:
        raise ValueError(f"akvq::key_affine: {reason}")
    B, H, T, D = k.shape
    k, q = k.detach(), q.detach()
    finite, middle, spread = join(chunk_sums(k, valid, squares=False))
    tokens = torch.full((B, 1, 1), T, device=k.device) if valid is None else valid.sum(-1).view(B, 1, 1)
    tokens = tokens.clamp_min(1).float()
    mean = middle * (finite / tokens)  # a broken number counts as a token that is 0 here, and as none in the deviation
    c = mean if centre else torch.zeros_like(mean)
    s = torch.ones_like(mean)
    if balance:
        deviation = ((spread + finite * (middle - mean).square()) / tokens).sqrt()
        same = q.shape[2] == T
        heard = chunk_sums(q, valid if same else None, squares=True).sum(2) / (tokens if same else q.shape[2])
        s = gains(deviation, heard)
    return torch.stack([c, 1 / s, s], 1)
