"""attend on a GPU: Triton flash attention that unpacks the cache tile by tile, with the meaning of kernels/attend.py.

For every low-bit layout, a query token or thousands of them: no 16-bit copy of the cache is made, whatever the length.
The kernel is in attend_tiles_triton.py. Nothing here reads a number from the device, so a call may be captured in a
CUDA graph.

Besides what attend.py asks, keys and values must be written together, as pack and append do: equal overlays, classes,
pivots, text slots and state (those of the keys are read); values may lack the text overlay. With a length of None a
mask has as many columns as the cache holds tokens, or one.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from akvq_fx.kernels.attend import AttendCall
from akvq_fx.kernels.attend_tiles_triton import BOOL_MASK, FLOAT_MASK, NO_MASK, attend_tiles, combine
from akvq_fx.kernels.cache import named
from akvq_fx.kernels.layout import CODE_BITS, Layout
from akvq_fx.kernels.supports import ANY, NOT_SIMULATED, Supports

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SUPPORTS = Supports(
    simulate=NOT_SIMULATED,
    body_bits=CODE_BITS,  # a 16-bit body has nothing to unpack
    text_bits=(0, 4, 8),
    dtype=tuple(TL_DTYPES),
    head_dim=range(8, 257, 8),  # a program keeps rows of queries and of the output in registers
    **dict.fromkeys(("group", "window", "pivots"), ANY),
    **dict.fromkeys(("body_clip", "text_clip"), ANY),  # of who writes
    **dict.fromkeys(("rotated", "affine", "shares_classes"), ANY),
    **dict.fromkeys(("symmetric", "uneven", "blocks", "moved"), ANY),
)
SPLIT_TOKENS = 256  # fewer tokens than this are not worth a program of their own
MAX_SPLITS = 64  # combine holds one row of every split in registers
PROGRAMS_A_PROCESSOR = 2  # resident together, so that one unpacks while the other waits for memory
ANY_COLUMNS = 2**31 - 1


def refusal(call: AttendCall) -> str:
    """Why this kernel cannot take the call; "" where it can."""
    q, mask, key_layout, value_layout = call.q, call.mask, call.key_layout, call.value_layout
    reason = layouts_refusal(key_layout, value_layout)
    if reason:
        return reason
    if q.dtype not in TL_DTYPES:
        return f"queries are {q.dtype}, accepted: {named_dtypes()}"
    if mask is not None and mask.dtype != torch.bool and mask.dtype not in TL_DTYPES:
        return f"the mask is {mask.dtype}, accepted: torch.bool, {named_dtypes()}"
    return ""


@functools.cache
def layouts_refusal(k: Layout, v: Layout) -> str:
    reason = SUPPORTS.pair_refusal(k, v)
    if reason:
        return reason
    if (k.body_bits, k.window, k.pivots) != (v.body_bits, v.window, v.pivots):
        return f"layouts {k} and {v}, accepted: equal body bits, window and pivots"
    if v.text_bits not in (0, k.text_bits):
        return f"layouts {k} and {v}, accepted: values with the text bits of the keys, or without text overlay"
    if v.uneven:
        return "values are uneven, which only keys can be"
    if v.blocks:
        return "values have means of blocks, which only keys can have"
    return ""


def named_dtypes() -> str:
    return ", ".join(map(str, TL_DTYPES))


def count_splits(programs: int, bound: int, processors: int) -> int:
    """Splits of the tokens of one head: enough programs to fill the processors, while every split has tokens to read.

    programs   B * H * tiles of M rows, the number without splits
    bound      most tokens that there can be (the capacity where the length is on the device)
    """
    wanted = PROGRAMS_A_PROCESSOR * processors // max(programs, 1)
    return max(1, min(wanted, triton.cdiv(bound, SPLIT_TOKENS), MAX_SPLITS))


@functools.cache
def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tile_sizes(rows: int, dtype: torch.dtype, padded: int) -> tuple[int, int, int]:
    """Query rows and tokens of a tile, and warps: M, N, warps. More rows share what is unpacked, in more registers.

    Chosen by ptxas' reports for sm_86 and sm_90: almost nothing spills, and 99 KB of shared memory are enough.
    """
    wide = padded > 128
    if dtype == torch.float32:
        sizes = ((16, 16, 4),) if wide else ((16, 32, 4), (32, 32, 4))
    else:
        sizes = ((16, 32, 4), (32, 32, 4), *(((64, 16, 8),) if wide else ((64, 32, 4), (128, 32, 8))))
    return next((size for size in sizes if rows <= size[0]), sizes[-1])


def read_mask(mask: Tensor | None, sizes: tuple[int, int, int], length: int | None) -> tuple:
    """The mask as the kernel reads it, its columns, and strides for batch row, query head, token and position."""
    if mask is None:
        return None, ANY_COLUMNS, [0, 0, 0, 0]
    wide = mask[(None,) * (4 - mask.dim())]
    fits = wide.dim() == 4 and all(given in (1, size) for given, size in zip(wide.shape, sizes, strict=False))
    if not fits or wide.shape[3] != 1 and length is not None and wide.shape[3] < length:
        due = f"[{', '.join(map(str, sizes))}, {'tokens' if length is None else length}]"
        raise ValueError(f"akvq::attend: the mask is {list(mask.shape)}, accepted: broadcastable to {due}")
    strides = [0 if size == 1 else stride for size, stride in zip(wide.shape, wide.stride(), strict=True)]
    columns = ANY_COLUMNS if wide.shape[3] == 1 else wide.shape[3]
    return wide.view(torch.uint8) if wide.dtype == torch.bool else wide, columns, strides


def along_channels(x: Tensor) -> Tensor:
    """x itself, or a copy where the channels of a token do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def attend(call: AttendCall, splits: int | None = None) -> Tensor:
    """kernels/attend.py's op; splits is for tests (count_splits chooses)."""
    reason = refusal(call)
    if reason:
        raise ValueError(f"akvq::attend: {reason}")
    q, key, value, length, mask, scale, is_causal, fresh_key, fresh_value, at, key_layout, value_layout = call[:12]
    B, Hq, tokens, D = q.shape
    DV = value_layout.head_dim
    k = {name: buffer.contiguous() for name, buffer in named(key, key_layout).items()}
    v = {name: buffer.contiguous() for name, buffer in named(value, value_layout).items()}
    H, capacity = k["codes"].shape[1:3]
    length = None if length is None else min(length, capacity)
    out = q.new_empty((B, Hq, tokens, DV))
    if not out.numel():
        return out

    q, share = along_channels(q), Hq // H
    padded = [max(16, triton.next_power_of_2(size)) for size in (D, DV)]
    M, N, warps = tile_sizes(tokens * share, q.dtype, max(padded))
    tiles = triton.cdiv(tokens * share, M)
    if splits is None:
        splits = count_splits(B * H * tiles, capacity if length is None else length, processors_of(q.device))
    mask, columns, mask_steps = read_mask(mask, (B, Hq, tokens), length)
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.uint8 else FLOAT_MASK
    fresh = fresh_key is not None and fresh_key.shape[2] > 0
    fresh_key, fresh_value = (along_channels(t) if fresh else None for t in (fresh_key, fresh_value))
    fresh_steps = [*fresh_key.stride()[:3], *fresh_value.stride()[:3]] if fresh else [0] * 6

    sinks = None if call.sinks is None else call.sinks.contiguous()
    parts, maxima, sums = out, None, None
    if splits > 1:
        parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
        maxima, sums = out.new_empty((2, splits, B, Hq, tokens), dtype=torch.float32)
    # Triton's interpreter (tensors on the CPU) has no bfloat16 dot, and truncates where bfloat16 should round
    seen_as = {**TL_DTYPES, torch.bfloat16: tl.bfloat16 if q.is_cuda else tl.float32}
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        attend_tiles[(B * H * splits * tiles,)](
            q, parts, maxima, sums,
            k["state"], k["classes"], k.get("pivot_at"), k.get("text_at"), k.get("block_of"),
            *(k.get(name) for name in ("codes", "range", "ring", "pivots", "text_codes", "means")),
            *(v.get(name) for name in ("codes", "range", "ring", "pivots", "text_codes")),
            fresh_key, fresh_value, at, mask, sinks,
            1 / math.sqrt(D) if scale is None else float(scale), float(call.softcap),
            -1 if length is None else length, columns, tokens, fresh_key.shape[2] if fresh else 0, H,
            capacity, v["codes"].shape[2], k["means"].shape[2] if key_layout.blocks else 0,
            *(b["text_at"].shape[1] if "text_at" in b else 0 for b in (k, v)),
            tiles, splits,
            *q.stride()[:3], *fresh_steps, *mask_steps,
            SHARE=share, D=D, DP=padded[0], DV=DV, DVP=padded[1],
            BITS=key_layout.body_bits, LOW=key_layout.low_bits, LOW_WIDTH=key_layout.low_width,
            VALUE_TEXT=value_layout.text_bits > 0,
            WINDOW=key_layout.window, PIVOTS=key_layout.pivots,
            KEY_GROUPS=key_layout.groups, VALUE_GROUPS=value_layout.groups,
            KEY_SYMMETRIC=key_layout.symmetric, VALUE_SYMMETRIC=value_layout.symmetric, KEY_UNEVEN=key_layout.uneven,
            KEY_BLOCKS=key_layout.blocks,
            KEY_ROUND=seen_as[key_layout.dtype], VALUE_ROUND=seen_as[value_layout.dtype],
            DOT=seen_as[q.dtype], FRESH=fresh, MASK=kind, HAS_LENGTH=length is not None, IS_CAUSAL=is_causal,
            CAPPED=call.softcap > 0, SPLIT=splits > 1, M=M, N=N, num_warps=warps, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            rows = B * Hq * tokens
            split_lanes = triton.next_power_of_2(splits)
            combine[(rows,)](parts, maxima, sums, out, rows, splits, DV=DV, DVP=padded[1], SPLITS=split_lanes)
    return out


attend.fused = ()  # kernels/rotate_triton.py rotates the queries before and the output after it
