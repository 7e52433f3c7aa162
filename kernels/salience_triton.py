"""find_pivots and key_affine with Triton kernels that read the prompt once; the meaning is kernels/salience.py.

h       [B, T, E] float16 | bfloat16 | float32 of any strides, E up to 16384
k, q    [B, H, T, D], [B, Hq, Tq, D] of any strides, D up to 1024
valid   [B, T] bool or None

find_pivots: a program holds one token in registers. The bits of |h| order as the numbers do, with infinity and then NaN
on top, so the peak is a maximum of integers, and the lower median is the largest v with at most (E - 1) / 2 numbers
below it, found bit by bit: 15 counts for 16-bit numbers, 31 for float32. Mode "topk" ranks the peaks of a batch row in
one more program, as long as its registers hold them; else [B, T] numbers are left for the reference's own torch ops, a
dozen launches.

key_affine: a program takes CHUNK tokens of one head or more, a tile at a time. Each place of the tile keeps n, mean and
M2 (the sum of squares around the mean) of what passes there and is valid and finite, by Welford's update, so that no
tile waits for a reduction; places, chunks and heads are combined by Chan's formula. In both nothing cancels even where
the mean is far larger than the deviation. Queries need only their sum of squares. A program per key head then joins the
chunks and writes its part of the map: three launches, since on a short prompt the host's time for each is what counts.
With an order of channels it writes lambda, of D numbers a head, too, and PyTorch sorts these.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from akvq_fx.kernels import uneven
from akvq_fx.kernels.layout import ORDER
from akvq_fx.kernels.quantizer import FP16_MAX
from akvq_fx.kernels.salience import GAIN_RANGE, PAIR_TOKENS, STD_FLOOR, select_pivots

MAX_WIDTH = 16384  # numbers of a token that a program's registers hold
MAX_DIM = 1024  # channels of a head: tiles of 16 tokens
MAX_RANKED = 16384  # peaks of a batch row that a program's registers hold
CHUNK = 256  # tokens a program reads of a head; its result is 3 float32 a channel, 2 % of what it read
CHUNK_MOST = 1024  # the same for prompts that make PROGRAMS even so: fewer chunks to join
PROGRAMS = 1056  # 8 a multiprocessor of an H100
TILE_NUMBERS = 2048  # numbers of a tile: three in registers for each
MOMENT_WARPS = 4
JOIN_NUMBERS = 4096  # numbers of a tile of chunks: one for each of n, mean and M2 is in registers
COUNT_TILE = 4096  # bytes of `valid` that are counted at once
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
INFINITY_BITS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
FLOOR = tl.constexpr(STD_FLOOR)
LOG_RANGE = tl.constexpr(math.log(GAIN_RANGE))
PAIRED = tl.constexpr(float(PAIR_TOKENS))
MOST = tl.constexpr(FP16_MAX)
LARGEST_INT = tl.constexpr(0x7FFFFFFF)


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
    """Bits of the peak and the lower median of |h|, [B, T]; both NaN where one number is. medians may be None."""
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


def raw_peaks(h: Tensor, with_medians: bool) -> tuple[Tensor, Tensor | None]:
    """Of |h| [B, T, E] over E, each [B, T] in h's dtype: peak, lower median; NaN where a number is."""
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
    return peaks, medians


def peaks_and_medians(h: Tensor, with_medians: bool) -> tuple[Tensor, Tensor | None]:
    """Of |h| [B, T, E] over E, each [B, T] float32: peak, 0 where a number is NaN; lower median, NaN where one is."""
    peaks, medians = raw_peaks(h, with_medians)
    peaks = peaks.float().nan_to_num(0.0, posinf=torch.finfo(torch.float32).max)
    return peaks, medians.float() if with_medians else None


@triton.jit
def rank_kernel(
    peaks, valid, out, tokens, count, valid_b, valid_t, WIDTH: tl.constexpr, INFINITY: tl.constexpr
):  # fmt: skip
    """out [B, count]: a batch row's first valid token, then those of the largest peaks (bits, [B, T]), then -1."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    live = place < tokens
    bits = tl.load(peaks + row * tokens + place, mask=live, other=0).to(tl.int32)
    if valid is not None:
        seen = tl.load(valid + row * valid_b + place.to(tl.int64) * valid_t, mask=live, other=0)
        live = live & (seen != 0)
    bits = tl.where(bits > INFINITY, 0, bits)  # NaN is no size
    bits = tl.where(place == tl.min(tl.where(live, place, WIDTH), 0), LARGEST_INT, bits)
    # places below the peak's bits: keys are distinct, and of equal peaks the first token wins
    key = tl.where(live, bits.to(tl.int64) * WIDTH + (WIDTH - 1 - place), -1)
    for slot in range(count):
        best = tl.max(key, 0)
        token = WIDTH - 1 - (best & (WIDTH - 1))
        tl.store(out + row * count + slot, tl.where(best < 0, -1, token).to(tl.int32))
        key = tl.where(key == best, -1, key)


def largest_peaks(peaks: Tensor, valid: Tensor | None, count: int) -> Tensor:
    """Pivots [B, count] int32 of mode "topk", from raw_peaks' peaks [B, T]."""
    B, T = peaks.shape
    out = torch.empty(B, count, dtype=torch.int32, device=peaks.device)
    width = triton.next_power_of_2(T)
    if out.numel():
        with torch.cuda.device_of(peaks):
            rank_kernel[(B,)](
                peaks.view(INTEGERS[peaks.dtype]), valid, out, T, count, *((0, 0) if valid is None else valid.stride()),
                WIDTH=width, INFINITY=INFINITY_BITS[peaks.dtype], num_warps=max(1, min(16, width // 1024)),
            )  # fmt: skip
    return out


def find_pivots(h: Tensor, valid: Tensor | None, count: int, mode: str, floor: float, ratio: float) -> Tensor:
    if mode not in ("topk", "massive"):
        raise ValueError(f"akvq::find_pivots: mode is {mode!r}, accepted: 'topk', 'massive'")
    reason = refusal(h)
    if reason:
        raise ValueError(f"akvq::find_pivots: {reason}")
    B, T, _ = h.shape
    h = h.detach()
    if mode == "topk" and T <= MAX_RANKED:
        return largest_peaks(raw_peaks(h, False)[0], valid, count)
    peak, median = peaks_and_medians(h, mode == "massive")
    valid = torch.ones(B, T, dtype=torch.bool, device=h.device) if valid is None else valid
    return select_pivots(peak, median, valid, count, floor, ratio)


@triton.jit
def join_moments(count, mean, spread, other_count, other_mean, other_spread):
    """n, mean and M2 of two parts together, by Chan's formula."""
    total = tl.maximum(count + other_count, 1.0)
    step = other_mean - mean
    # the weight first: where one part is empty it is 0, which times a square that overflowed were NaN
    spread += other_spread + step * (step * (count * other_count / total))
    return count + other_count, mean + step * tl.div_rn(other_count, total), spread


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
    count, mean = tl.zeros([TILE, DP], tl.float32), tl.zeros([TILE, DP], tl.float32)
    spread = tl.zeros([TILE, DP], tl.float32)
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
            spread += tile * tile
        else:
            count += counted.to(tl.float32)
            step = tl.where(counted, tile - mean, 0.0)
            mean += step * (1.0 / tl.maximum(count, 1.0))
            spread += step * tl.where(counted, tile - mean, 0.0)
    if SQUARES:
        tl.store(out + (lead * chunks + chunk) * D + channel, tl.sum(spread, 0), mask=real)
    else:
        number = tl.sum(count, 0)
        centre = tl.div_rn(tl.sum(count * mean, 0), tl.maximum(number, 1.0))  # its error enters M2 squared
        away = mean - centre[None, :]
        where = out + (lead * chunks + chunk) * 3 * D + channel
        tl.store(where, number, mask=real)
        tl.store(where + D, centre, mask=real)
        tl.store(where + 2 * D, tl.sum(spread + away * (count * away), 0), mask=real)


def chunk_sums(x: Tensor, valid: Tensor | None, squares: bool) -> Tensor:
    """[B, H, chunks, D] float32 sums of squares, or [B, H, chunks, 3, D] n, mean, M2, over valid and finite tokens."""
    B, H, T, D = x.shape
    chunk = CHUNK
    while chunk < CHUNK_MOST and B * H * triton.cdiv(T, 2 * chunk) >= PROGRAMS:
        chunk *= 2
    chunks, wide = triton.cdiv(T, chunk), max(16, triton.next_power_of_2(D))
    out = torch.empty((B, H, chunks, D) if squares else (B, H, chunks, 3, D), dtype=torch.float32, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            moments_kernel[(B * H, chunks)](
                x, valid, out, H, T, chunks, *x.stride(), *((0, 0) if valid is None else valid.stride()),
                D=D, DP=wide, TILE=min(CHUNK, TILE_NUMBERS // wide), CHUNK_T=chunk, SQUARES=squares,
                num_warps=MOMENT_WARPS,
            )  # fmt: skip
    return out


@triton.jit
def joined(
    parts, squares, lead, chunks, rows, channel, real, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """(n, mean, M2 of a key head, sum of squares of its queries) of the channels, from chunk_sums of both."""
    number = tl.arange(0, PARTS)
    finite, middle, spread = tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32)
    for start in range(0, chunks, PARTS):
        live = (start + number < chunks)[:, None] & real[None, :]
        where = parts + ((lead * chunks + start + number) * (3 * D))[:, None] + channel[None, :]
        n, mean = tl.load(where, mask=live, other=0), tl.load(where + D, mask=live, other=0)
        more = tl.sum(n, 0)
        centre = tl.div_rn(tl.sum(n * mean, 0), tl.maximum(more, 1.0))
        away = mean - centre[None, :]
        further = tl.sum(tl.load(where + 2 * D, mask=live, other=0) + away * (n * away), 0)
        finite, middle, spread = join_moments(finite, middle, spread, more, centre, further)
    square = tl.zeros([DP], tl.float32)
    if squares is not None:
        for start in range(0, rows, PARTS):
            live = (start + number < rows)[:, None] & real[None, :]
            where = squares + ((lead * rows + start + number) * D)[:, None] + channel[None, :]
            square += tl.sum(tl.load(where, mask=live, other=0), 0)
    return finite, middle, spread, square


@triton.jit
def variance_of(finite, middle, spread, count):
    """(mean, variance) over `count` tokens: what is not finite counts as 0 in the mean, and not at all in the other."""
    mean = middle * tl.div_rn(finite, count)
    miss = middle - mean
    return mean, (spread + miss * (finite * miss)) / count


@triton.jit
def map_kernel(
    parts, squares, valid, out, weights, heads, tokens, chunks, rows, sharing, asked, valid_b, valid_t, rotary,
    D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, COUNTED: tl.constexpr,
    SAME: tl.constexpr, CENTRE: tl.constexpr, BALANCE: tl.constexpr, ROWS: tl.constexpr, DISTANCE: tl.constexpr,
):  # fmt: skip
    """A key head's c, s to out [B, ROWS, heads, D], from chunk_sums of its keys and of its `sharing` query heads.

    The squares are `rows` rows [D], one query head's after another's, each head's over `asked` tokens or, where SAME,
    over the keys' valid ones. Without BALANCE s = 1, without CENTRE c = 0. weights [B, heads, D], or None, take lambda
    of kernels/uneven.py; squares may be None where neither asks for them. DISTANCE, rotary: pairs of channels, or 0.
    """
    lead = tl.program_id(0).to(tl.int64)
    batch = lead // heads
    channel = tl.arange(0, DP)
    real = channel < D

    count = tokens + lead * 0
    if valid is not None:
        seen = tl.zeros([COUNTED], tl.int32)
        for start in range(0, tokens, COUNTED):
            token = start + tl.arange(0, COUNTED)
            where = valid + batch * valid_b + token.to(tl.int64) * valid_t
            seen += (tl.load(where, mask=token < tokens, other=0) != 0).to(tl.int32)
        count = tl.sum(seen, 0).to(tl.int64)
    count = tl.maximum(count, 1).to(tl.float32)

    finite, middle, spread, square = joined(parts, squares, lead, chunks, rows, channel, real, D, DP, PARTS)
    mean, variance = variance_of(finite, middle, spread, count)
    s = tl.full([DP], 1.0, tl.float32)
    if squares is not None:
        asks = (count if SAME else asked) * sharing
        square = square / asks
        if DISTANCE:
            other = tl.where(channel // DISTANCE % 2 == 0, channel + DISTANCE, channel - DISTANCE)
            other = tl.where(channel < rotary, other, channel)
            finite, middle, spread, further = joined(parts, squares, lead, chunks, rows, other, real, D, DP, PARTS)
            weight = 0.5 * (PAIRED / (count + PAIRED))
            variance += weight * (variance_of(finite, middle, spread, count)[1] - variance)
            square += weight * (further / asks - square)
        query_rms = tl.sqrt(square)
        deviation = tl.sqrt(variance)
        if weights is not None:
            tl.store(weights + lead * D + channel, deviation * query_rms, mask=real)
        if BALANCE:
            # comparisons, not tl.maximum and tl.minimum, which lose a NaN
            deviation = tl.where(deviation < FLOOR, FLOOR, deviation)
            query_rms = tl.where(query_rms < FLOOR, FLOOR, query_rms)
            log = tl.where(real, 0.5 * (tl.log(deviation) - tl.log(query_rms)), 0.0)
            log -= tl.sum(log, 0) / D
            log = tl.where(log > LOG_RANGE, LOG_RANGE, log)
            s = tl.exp(tl.where(log < -LOG_RANGE, -LOG_RANGE, log))

    c = mean if CENTRE else tl.zeros([DP], tl.float32)
    c = tl.where(c > MOST, MOST, tl.where(c < -MOST, -MOST, c))
    where = out + ((batch * ROWS) * heads + lead % heads) * D + channel
    tl.store(where, c.to(tl.float16), mask=real)
    tl.store(where + heads * D, s.to(tl.float16), mask=real)


def key_affine(
    k: Tensor,
    q: Tensor,
    valid: Tensor | None,
    centre: bool,
    balance: bool,
    order: bool = False,
    distance: int = 0,
    rotary: int = 0,
) -> Tensor:
    reason = refusal(k, q)
    if reason:
        raise ValueError(f"akvq::key_affine: {reason}")
    B, H, T, D = k.shape
    k, q = k.detach(), q.detach()
    rows, asks = 3 if order else 2, balance or order
    out = torch.empty(B, rows, H, D, dtype=torch.float16, device=k.device)
    if not out.numel():
        return out
    if asks and (q.shape[0] != B or q.shape[1] % H or q.shape[3] != D):  # the kernel would read elsewhere
        raise ValueError(
            f"akvq::key_affine: q is {list(q.shape)}, "
            f"accepted with k {list(k.shape)}: [{B}, a multiple of {H}, tokens, {D}]"
        )
    same, sharing = q.shape[2] == T, q.shape[1] // H
    parts = chunk_sums(k, valid, squares=False)
    squares = chunk_sums(q, valid if same else None, squares=True) if asks else None
    weights = torch.empty(B, H, D, dtype=torch.float32, device=k.device) if order else None
    wide = triton.next_power_of_2(D)
    with torch.cuda.device_of(k):
        map_kernel[(B * H,)](
            parts, squares, valid, out, weights,
            H, T, parts.shape[2], sharing * squares.shape[2] if asks else 0, sharing,
            q.shape[2], *((0, 0) if valid is None else valid.stride()), rotary,
            D=D, DP=wide, PARTS=JOIN_NUMBERS // wide, COUNTED=COUNT_TILE, SAME=same, CENTRE=centre,
            BALANCE=balance, ROWS=rows, DISTANCE=distance,
        )  # fmt: skip
    if order:
        out[:, ORDER] = uneven.channel_order(weights)
    return out
