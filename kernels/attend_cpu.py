"""attend on the CPU for decode steps: a C++ kernel (attend_cpu.cpp) that reads the codes where they lie.

Arguments and meaning are those of kernels/attend.py; layouts are `Layout`s. Codes are never written out as keys and
values: each 2-bit code costs a mask, a conversion and a multiply-add, so a long cache is attended several times as fast
as torch's attention reads 16- or 32-bit tokens. Scores, softmax and sums are fp32; tokens are not rounded to the
cache's dtype on the way.

kernels/cpp.py compiles it at first use. `refusal` says why a call cannot be taken, "" where it can: the reference
answers the others, and all of them where there is no compiler.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from akvq_fx.kernels import cpp
from akvq_fx.kernels.attend import AttendCall
from akvq_fx.kernels.layout import BLOCK, CODE_BITS, CODES, STATE_END, Layout
from akvq_fx.kernels.supports import ANY, NOT_SIMULATED, Supports

LONGEST_QUERY = 16  # tokens; for more the reference is right: it reads the cache once for all of them
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASK_DTYPES = DTYPES | {torch.bool: 3}
SUPPORTS = Supports(
    simulate=NOT_SIMULATED,
    body_bits=CODE_BITS,
    text_bits=(0, 4, 8),
    dtype=tuple(DTYPES),
    head_dim=range(8, 257, 8),
    **dict.fromkeys(("group", "window", "pivots"), ANY),
    **dict.fromkeys(("body_clip", "text_clip"), ANY),  # of who writes
    **dict.fromkeys(("rotated", "affine", "shares_classes"), ANY),
    **dict.fromkeys(("symmetric", "uneven", "blocks"), ANY),
    moved=(False,),
)
OF_VALUES = Supports(**SUPPORTS.accepted | dict.fromkeys(("uneven", "blocks"), (False,)))  # which only keys can be
OUT_OF_MEMORY, BAD_POSITION = 1, 2  # what the kernel answers, 0 for done
SOURCES = ("attend_cpu.cpp", "attend_cpu.h", "numbers_cpu.h")


class Cache(ctypes.Structure):
    """Buffers of one packed tensor, as struct Cache of attend_cpu.h."""

    POINTERS = ("state", "codes", "range", "ring", "pivots", "pivot_at", "text_codes", "text_at")
    POINTERS += ("means", "affine", "fresh")
    SIZES = ("dtype", "head_dim", "groups", "capacity", "bits", "window", "pivot_count", "text_bits")
    SIZES += ("low_width", "text_capacity", "symmetric", "uneven", "block")
    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in SIZES]


class Params(ctypes.Structure):
    """The other arguments, as struct Call of attend_cpu.h."""

    POINTERS = ("q", "out", "mask", "at", "sinks")
    DTYPES_AND_STRIDES = ("q_dtype", "mask_dtype", "mask_batch", "mask_head", "mask_query", "mask_token")
    SIZES = ("batch", "heads", "query_heads", "tokens", "length", "fresh_count", "is_causal")
    SIZES += ("rotate", "restore", "threads")
    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS]
    _fields_ += [(name, ctypes.c_int64) for name in DTYPES_AND_STRIDES + SIZES]
    _fields_ += [(name, ctypes.c_double) for name in ("scale", "softcap")]


def attend(call: AttendCall) -> Tensor:
    """[B, Hq, q, Dv] contiguous, for a call that is not refused; queries and output are rotated in float32."""
    q, key, value, length, mask, scale, is_causal, fresh_key, fresh_value, at, key_layout, value_layout = call[:12]
    B, query_heads, tokens, D = q.shape
    heads = key[CODES].shape[1]
    q = q.contiguous()
    out = q.new_empty((B, query_heads, tokens, value_layout.head_dim))
    fresh_count = 0
    if at is not None:
        fresh_count, at = at.shape[0], at.contiguous()
        fresh_key = fresh_key.to(key_layout.dtype).contiguous()
        fresh_value = fresh_value.to(value_layout.dtype).contiguous()
    sinks = None if call.sinks is None else call.sinks.float().contiguous()
    strides, mask_dtype = (0, 0, 0, 0), 0
    if mask is not None:
        mask_dtype = MASK_DTYPES[mask.dtype]
        steps = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
        strides = [0] * (4 - len(steps)) + steps
    params = Params(
        *(q.data_ptr(), out.data_ptr(), address(mask), address(at), address(sinks)),
        *(DTYPES[q.dtype], mask_dtype, *strides),
        *(B, heads, query_heads, tokens, -1 if length is None else length, fresh_count, is_causal),
        *(call.rotate and (key_layout.rotated or key_layout.affine), call.restore),
        *(torch.get_num_threads(), D**-0.5 if scale is None else scale, call.softcap),
    )
    caches = pointers(key, key_layout, fresh_key), pointers(value, value_layout, fresh_value)
    status = library()[0](ctypes.byref(params), *map(ctypes.byref, caches))
    if status == OUT_OF_MEMORY:
        raise MemoryError("akvq::attend: no memory for the kernel's scratch")
    if status == BAD_POSITION:
        raise IndexError(f"akvq::attend: a fresh token's position is out of range, accepted: 0 to {length} (excluded)")
    return out


attend.fused = ("rotate", "restore")


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pointers(cache: list[Tensor], layout: Layout, fresh: Tensor | None) -> Cache:
    at = field_places(layout)
    text_capacity = cache[at["text_at"]].shape[1] if layout.text_bits else 0
    return Cache(
        *(cache[at[name]].data_ptr() if name in at else 0 for name in Cache.POINTERS[:-1]),
        *(address(fresh), DTYPES[layout.dtype], layout.head_dim, layout.groups, cache[at["codes"]].shape[2]),
        *(layout.body_bits, layout.window, layout.pivots, layout.text_bits, layout.low_width, text_capacity),
        *(layout.symmetric, layout.uneven, BLOCK),
    )


@functools.cache
def field_places(layout: Layout) -> dict[str, int]:
    return {name: i for i, name in enumerate(layout.fields)}


def refusal(call: AttendCall) -> str:
    """Why the kernel cannot take this call, "" where it can."""
    q, key, value, length, mask, _, is_causal, fresh_key, fresh_value, at, key_layout, value_layout = call[:12]
    if q.device.type != "cpu":
        return f"q is on {q.device}, accepted: cpu"
    if q.dtype not in DTYPES or q.dim() != 4 or q.shape[2] > LONGEST_QUERY or q.numel() == 0:
        return f"q is {list(q.shape)} {q.dtype}, accepted: [B, Hq, 1..{LONGEST_QUERY}, D] in {list(DTYPES)}"
    B, heads = q.shape[0], key[CODES].shape[1]
    if heads == 0 or q.shape[1] % heads or q.shape[3] != key_layout.head_dim:
        return f"q is {list(q.shape)}, accepted: head dim {key_layout.head_dim} and a multiple of {heads} heads"
    # else tokens would have to be rounded to the cache's dtype first
    if not q.dtype == key_layout.dtype == value_layout.dtype:
        return f"q is {q.dtype} over {key_layout.dtype} keys and {value_layout.dtype} values, accepted: one dtype"
    for name, cache, layout, supports in (
        ("key", key, key_layout, SUPPORTS),
        ("value", value, value_layout, OF_VALUES),
    ):
        reason = supports.refusal(layout) or buffers_refusal(cache, layout, B, heads)
        if reason:
            return f"{name} cache: {reason}"
    reason = fresh_refusal(q, fresh_key, fresh_value, at, heads, value_layout.head_dim)
    if reason:
        return reason
    end = key[0][STATE_END] if at is None or not at.shape[0] else at[-1] + 1
    tokens = int(end) if length is None else length
    if tokens > min(key[CODES].shape[2], value[CODES].shape[2]) or tokens < 0:
        return f"length is {tokens}, accepted: 0 to the capacity {min(key[CODES].shape[2], value[CODES].shape[2])}"
    return ("" if mask is None else mask_refusal(q, mask, tokens, is_causal)) or library()[1]


def buffers_refusal(cache: list[Tensor], layout: Layout, batch: int, heads: int) -> str:
    """The kernel checks nothing but sizes, so every buffer must be just what the layout says."""
    fields = layout.fields
    if len(cache) != len(fields):
        return f"{len(cache)} buffers, accepted: {fields}"
    at = field_places(layout)
    text_capacity = cache[at["text_at"]].shape[-1] if layout.text_bits else 0
    expected = buffer_specs(layout, batch, heads, cache[at["codes"]].shape[-2], text_capacity)
    for name, buffer, (shape, dtype) in zip(fields, cache, expected, strict=True):
        if buffer.shape != shape or buffer.dtype != dtype or not buffer.is_contiguous() or not buffer.is_cpu:
            come = f"{list(buffer.shape)} {buffer.dtype}, strides {buffer.stride()}, on {buffer.device}"
            return f"{name} is {come}, accepted: contiguous {list(shape)} {dtype} on the cpu"
    return ""


@functools.lru_cache(maxsize=256)
def buffer_specs(layout: Layout, *sizes: int) -> tuple:
    specs = [layout.buffer(name, *sizes) for name in layout.fields]
    return tuple((torch.Size(shape), dtype) for shape, dtype in specs)


def mask_refusal(q: Tensor, mask: Tensor, tokens: int, is_causal: bool) -> str:
    if is_causal:
        return "both a mask and is_causal, accepted: one of them"
    sizes = (1, 1, 1, 1, *mask.shape)[-4:]
    fits = mask.dim() in (2, 3, 4) and all(size in (1, full) for size, full in zip(sizes[:3], q.shape[:3], strict=True))
    if not fits or (sizes[3] != 1 and sizes[3] < tokens) or mask.dtype not in MASK_DTYPES or not mask.is_cpu:
        wanted = f"[{', '.join(map(str, q.shape[:3]))}, {tokens} or more]"
        return f"mask is {list(mask.shape)} {mask.dtype}, accepted: broadcastable to {wanted} in {list(MASK_DTYPES)}"
    return ""


def fresh_refusal(q: Tensor, key: Tensor | None, value: Tensor | None, at: Tensor | None, heads: int, value_dim) -> str:
    if key is None and value is None and at is None:
        return ""
    if key is None or value is None or at is None or at.dim() != 1 or at.dtype != torch.int64:
        return "fresh tokens are not complete, accepted: fresh_key, fresh_value and at [q] int64, or none of them"
    shape = (q.shape[0], heads, at.shape[0])
    if key.shape != (*shape, q.shape[3]) or value.shape != (*shape, value_dim):
        return f"fresh tokens are {list(key.shape)} and {list(value.shape)}, accepted: {list(shape)} and the head dim"
    return ""


def library() -> tuple:
    """The compiled function and "", or nothing callable and why."""
    return cpp.function(SOURCES, "akvq_attend", 3)
