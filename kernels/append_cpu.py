"""append on the CPU for decode steps: a C++ kernel (append_cpu.cpp) that quantizes, packs and writes a few tokens.

The meaning is kernels/cache.py's, to the bit: the same float32 operations in the same order, but for sums over channels
(scales of symmetric layouts) and over tokens (means of blocks). The reference rotates the keys before. kernels/cpp.py
compiles the kernel at first use. `refusal` says why tokens cannot be written by it, "" where they can: the reference
writes the others, prompts among them, and all of them where there is no compiler.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from akvq_fx.kernels import cpp
from akvq_fx.kernels.attend_cpu import buffers_refusal
from akvq_fx.kernels.blocks import ENOUGH
from akvq_fx.kernels.cache import check_call, keep_pivots, named
from akvq_fx.kernels.layout import BLOCK, CODE_BITS, Layout
from akvq_fx.kernels.quantizer import STEPS
from akvq_fx.kernels.rotate import rotate_as_stored
from akvq_fx.kernels.supports import ANY, NOT_SIMULATED, Supports

LONGEST = 16  # tokens, fewer than a block; more are a prompt, for which the reference's few large operations are right
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SUPPORTS = Supports(
    simulate=NOT_SIMULATED,
    body_bits=(*CODE_BITS, 16),
    text_bits=(0, 4, 8),
    dtype=tuple(DTYPES),
    head_dim=range(8, 513, 8),
    **dict.fromkeys(("group", "window", "pivots", "body_clip", "text_clip"), ANY),
    **dict.fromkeys(("rotated", "affine", "shares_classes"), ANY),
    **dict.fromkeys(("symmetric", "uneven", "blocks"), ANY),
    moved=(False,),
)
BAD_POSITION = 1  # what the kernel answers, 0 for done
SOURCES = ("append_cpu.cpp", "numbers_cpu.h")


class Append(ctypes.Structure):
    """struct Append of append_cpu.cpp."""

    BUFFERS = ("state", "codes", "classes", "range", "means", "ring", "pivot_at", "text_codes", "text_at")
    POINTERS = ("x", "at", "kinds", *BUFFERS)
    SIZES = ("dtype", "batch", "heads", "tokens", "head_dim", "groups", "capacity", "bits", "text_bits", "low_width")
    SIZES += ("window", "pivot_count", "text_capacity", "symmetric", "uneven", "block", "enough")
    SIZES += ("kinds_batch", "kinds_token", "threads")
    FACTORS = ("clip", "text_clip", "step_2", "step_4")
    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in SIZES]
    _fields_ += [(name, ctypes.c_double) for name in FACTORS]


def refusal(x: Tensor, layout: Layout) -> str:
    """Why this kernel cannot write x to a cache of this layout; "" where it can."""
    reason = SUPPORTS.refusal(layout)
    if reason:
        return reason
    if x.dtype != layout.dtype:
        return f"x is {x.dtype} and the cache {layout.dtype}, accepted: one dtype"
    if x.dim() != 4 or not 0 < x.shape[2] <= LONGEST or not x.is_cpu:
        return f"x is {list(x.shape)} on {x.device}, accepted: [B, H, 1..{LONGEST}, D] on the cpu"
    return library()[1]


def append(
    cache: list[Tensor],
    x: Tensor,
    at: Tensor,
    classes: Tensor | None,
    pivots: Tensor | None,
    layout: Layout,
    rotate: bool = False,
) -> None:
    """kernels.cache.append for q tokens. Raises IndexError for a position without a slot, before writing."""
    b = named(cache, layout)
    check_call(b, x, at, classes, layout)
    reason = buffers_refusal(cache, layout, *x.shape[:2])
    if reason:
        raise ValueError(f"akvq::append: {reason}")
    x = rotate_as_stored(x, b.get("affine"), layout.rotated) if rotate else x
    B, H, q, D = x.shape
    x, at = x.contiguous(), at.to(torch.int64).contiguous()
    kinds = None if classes is None else classes.to(torch.uint8)
    call = Append(
        *(t.data_ptr() if t is not None else 0 for t in (x, at, kinds, *map(b.get, Append.BUFFERS))),
        *(DTYPES[layout.dtype], B, H, q, D, layout.groups, b["codes"].shape[2]),
        *(layout.body_bits, layout.text_bits, layout.low_width, layout.window, layout.pivots),
        b["text_at"].shape[1] if layout.text_bits else 0,
        *(layout.symmetric, layout.uneven, BLOCK, ENOUGH),
        *((0, 0) if kinds is None else kinds.stride()),
        *(torch.get_num_threads(), layout.body_clip, layout.text_clip, STEPS[2], STEPS[4]),
    )
    if library()[0](ctypes.byref(call)) == BAD_POSITION:
        raise IndexError(f"akvq::append: at is {at.tolist()}, accepted: 0 to the capacity {call.capacity} (excluded)")
    if layout.pivots and pivots is not None:
        keep_pivots(b, x, at, classes, pivots, None, layout, rotate=False)


def library() -> tuple:
    """The compiled function and "", or nothing callable and why."""
    return cpp.function(SOURCES, "akvq_append", 1)
