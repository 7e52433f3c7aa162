"""attend for decode steps over a 2-bit cache on NVIDIA tensor cores: compiles and launches kernels/attend_cuda.cu.

The meaning is kernels/attend.py's. This path takes few query tokens over bodies of 2 bits, symmetric, uneven or
neither, with means of blocks of keys or without, with a text overlay of 4 or none (values may lack the one that keys
have), which is nearly every decode step; `refusal` says why it does not take a call, and kernels/attend_triton.py takes
those.
Compiled at first use by NVRTC, which comes with PyTorch's CUDA builds (about a second per head dim and dtype, kept for
the process).
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from akvq_fx.kernels import nvrtc, uneven
from akvq_fx.kernels.attend import AttendCall
from akvq_fx.kernels.cache import named
from akvq_fx.kernels.layout import BLOCK, CODES, Layout
from akvq_fx.kernels.rotate import order_of
from akvq_fx.kernels.supports import ANY, NOT_SIMULATED, Supports

SUPPORTS = Supports(
    simulate=NOT_SIMULATED,
    body_bits=(2,),
    text_bits=(0, 4),
    dtype=(torch.float16, torch.bfloat16),
    head_dim=range(16, 257, 16),
    groups=(1, 2, 4),  # a pair of codes of one word must share a group
    group=ANY,
    window=ANY,
    pivots=range(33),  # one lane holds one position
    **dict.fromkeys(("body_clip", "text_clip"), ANY),  # of who writes
    **dict.fromkeys(("rotated", "affine", "shares_classes"), ANY),
    **dict.fromkeys(("symmetric", "uneven", "blocks", "moved"), ANY),
)
ALIKE = ("head_dim", "dtype", "window", "pivots")  # of keys and values
ALIKE_WITH_TEXT = ("groups", "symmetric")  # where keys have a text overlay: a lane gathers both ranges at once
LOG2_E = math.log2(math.e)
ROWS_MAX = 64  # query rows per KV head; with more, re-reading the codes per 16 rows costs more than it saves
WARPS = 4
DEPTH = 2  # 16-token tiles a warp takes at a time
STAGES = 4  # tiles in shared memory, all but one of them on their way
BLOCKS = 3  # on one multiprocessor: bounds the registers
WORTH = 0.82  # share of the best utilization that is enough, as more parts cost more sums; measured on an H100
SPLITS_MAX = 96  # a multiple of 32: a lane of the last step takes every 32nd
KERNELS = ("attend", "combine")
MASKS = {torch.bool: 1, torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}


class _Cache(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "range", "ring", "pivots", "fresh", "text")]


class _Params(ctypes.Structure):
    """struct Params of attend_cuda.cuh."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("key", _Cache),
        ("value", _Cache),
        *(
            (name, ctypes.c_void_p)
            for name in ("state", "pivot_at", "fresh_at", "mask", "affine", "classes", "text_at")
        ),
        *((name, ctypes.c_void_p) for name in ("part_o", "part_ml")),
        *((name, ctypes.c_longlong) for name in ("mask_b", "mask_h", "mask_q", "mask_t")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "capacity", "window", "pivots", "fresh_count", "text_capacity")),
        *((name, ctypes.c_int) for name in ("rows", "queries")),
        *((name, ctypes.c_int) for name in ("length", "mask_kind", "splits", "rotate", "restore")),
        *((name, ctypes.c_void_p) for name in ("means", "block_of")),
        ("blocks", ctypes.c_int),
    ]


def refusal(call: AttendCall) -> str:
    """Why this path does not take the call; "" where it does."""
    q, key, value, _, mask, _, is_causal, *_, key_layout, value_layout = call[:12]
    reason = layouts_refusal(key_layout, value_layout)
    if reason:
        return reason
    if key_layout.dtype != q.dtype:
        return f"queries are {q.dtype} and the cache {key_layout.dtype}, accepted: both float16 or both bfloat16"
    if call.softcap:
        return f"softcap is {call.softcap}, accepted: 0"
    if call.sinks is not None:
        return "there are sinks, accepted: none"
    if is_causal:
        return "is_causal: a decode step's queries see the whole cache"
    rows = q.shape[1] // key[CODES].shape[1] * q.shape[2]
    if rows > ROWS_MAX:
        return f"{rows} query rows per KV head, accepted: up to {ROWS_MAX}"
    if mask is not None and mask.dtype not in MASKS:
        return f"the mask is {mask.dtype}, accepted: {', '.join(map(str, MASKS))}"
    if not q.numel():
        return "there are no queries"
    if key[CODES].shape[2] < 16 * DEPTH:
        return f"a capacity of {key[CODES].shape[2]} tokens, accepted: from {16 * DEPTH}"
    if not all(b.is_contiguous() for b in (*key, *value)):
        return "a buffer is not contiguous"
    return nvrtc.refusal(q.device.index, "attend_cuda")


@functools.cache
def layouts_refusal(k: Layout, v: Layout) -> str:
    reason = SUPPORTS.pair_refusal(k, v)
    if reason:
        return reason
    alike = ALIKE + ALIKE_WITH_TEXT if k.text_bits else ALIKE
    different = [name for name in alike if getattr(k, name) != getattr(v, name)]
    if different:
        return f"keys and values differ in {', '.join(different)}"
    if v.text_bits not in (0, k.text_bits):
        return f"text_bits of values is {v.text_bits} and of keys {k.text_bits}, accepted: as the keys or 0"
    if v.uneven:
        return "values are uneven, which only keys can be"
    if v.blocks:
        return "values have means of blocks, which only keys can have"
    return ""


def attend(call: AttendCall, splits: int | None = None) -> Tensor:
    """As kernels.attend.attend, for calls that `refusal` has nothing against; splits: as splits_for where omitted."""
    q, key, value, length, mask, scale, _, fresh_key, fresh_value, at, key_layout, value_layout = call[:12]
    rotate, restore = call.rotate, call.restore
    layout = key_layout
    k, v = named(key, key_layout), named(value, value_layout)
    fresh = None
    if at is not None:
        fresh = fresh_key.to(layout.dtype).contiguous(), fresh_value.to(layout.dtype).contiguous(), at.contiguous()
    (B, heads, capacity), (Hq, queries) = k["codes"].shape[:3], q.shape[1:3]
    q = q.contiguous()
    out = torch.empty_like(q)
    rows = Hq // heads * queries
    columns, tiles = _columns_and_tiles(rows, layout.head_dim)
    blocks = (B * heads, -(-rows // (4 * columns * tiles)))
    multiprocessors = _multiprocessors(q.device.index)
    if splits is None:
        splits = splits_for(blocks[0] * blocks[1], capacity if length is None else length, multiprocessors)
    params = _Params(q.data_ptr(), out.data_ptr(), _cache(k, key_layout, fresh, 0), _cache(v, value_layout, fresh, 1))
    params.state, params.scale = k["state"].data_ptr(), (layout.head_dim**-0.5 if scale is None else scale) * LOG2_E
    params.heads, params.capacity, params.rows, params.queries = heads, capacity, rows, queries
    params.window, params.pivots, params.length = layout.window, layout.pivots, -1 if length is None else length
    params.splits, params.rotate, params.restore = splits, rotate and layout.rotated, restore
    if rotate and layout.affine:
        params.affine = k["affine"].data_ptr()
    if layout.pivots:
        params.pivot_at = k["pivot_at"].data_ptr()
    if layout.text_bits:
        params.classes, params.text_at = k["classes"].data_ptr(), k["text_at"].data_ptr()
        params.text_capacity = k["text_codes"].shape[2]
    if layout.blocks:
        params.means, params.blocks = k["means"].data_ptr(), k["means"].shape[2]
    if layout.moved:
        params.block_of = k["block_of"].data_ptr()
    if fresh is not None:
        params.fresh_at, params.fresh_count = fresh[2].data_ptr(), fresh[2].shape[0]
    steps = None if mask is None else _steps(mask)
    if mask is not None:
        params.mask, params.mask_kind = mask.data_ptr(), MASKS[mask.dtype]
        params.mask_b, params.mask_h, params.mask_q, params.mask_t = steps
    form = _form_of(mask, steps, rows, queries)
    if splits > 1:
        parts = torch.empty(B * heads * rows * splits, layout.head_dim + 2, dtype=torch.float32, device=q.device)
        params.part_o = parts.data_ptr()
        params.part_ml = params.part_o + 4 * layout.head_dim * parts.shape[0]
    kernels = _compiled(q.device.index, _shape_of(layout), _shape_of(value_layout), tiles, columns, form)
    with torch.cuda.device(q.device):
        nvrtc.launch(kernels["attend"], (blocks[0], splits, blocks[1]), 32 * WARPS, params, kernels["shared"])
        if splits > 1:
            nvrtc.launch(kernels["combine"], (blocks[0] * rows, 1, 1), 256, params)
    return out


attend.fused = ("rotate", "restore")


@functools.lru_cache(4096)
def splits_for(blocks: int, tokens: int, multiprocessors: int) -> int:
    """Parts to divide each cache into: the fewest that leave hardly any multiprocessor idle in the last wave of blocks.

    Every warp has two tiles or more, since each part costs a trip of its sums through memory.
    """
    slots = BLOCKS * multiprocessors
    most = max(1, min(SPLITS_MAX, tokens // (2 * 16 * DEPTH * WARPS)))

    def busy(splits: int) -> float:
        return blocks * splits / slots / math.ceil(blocks * splits / slots)

    best = max(map(busy, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if busy(splits) >= WORTH * best)


@functools.cache
def _shape_of(layout: Layout) -> Layout:
    """The parts of a layout that a kernel is compiled for."""
    form = {"symmetric": layout.symmetric, "blocks": layout.blocks, "moved": layout.moved}
    form |= dict.fromkeys(("uneven", "rotated", "affine"), layout.uneven)
    return Layout(layout.head_dim, layout.dtype, body_bits=2, text_bits=layout.text_bits, group=layout.group, **form)


def _cache(buffers: dict[str, Tensor], layout: Layout, fresh, which: int) -> _Cache:
    c = _Cache(buffers["codes"].data_ptr(), buffers["range"].data_ptr())
    if layout.window:
        c.ring = buffers["ring"].data_ptr()
    if layout.pivots:
        c.pivots = buffers["pivots"].data_ptr()
    if layout.text_bits:
        c.text = buffers["text_codes"].data_ptr()
    if fresh is not None:
        c.fresh = fresh[which].data_ptr()
    return c


def _steps(mask: Tensor) -> list[int]:
    """Strides of a mask that broadcasts to [B, Hq, q, T], 0 where it is the same for all."""
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    strides = (0,) * (4 - mask.dim()) + mask.stride()
    return [0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)]


def _form_of(mask: Tensor | None, steps: list[int] | None, rows: int, queries: int) -> int:
    """MASK of the kernel that reads a mask of these _steps, for `rows` of queries to a KV head."""
    if mask is None:
        return 0
    _, heads, asked, _ = steps
    same = (heads == 0 or rows == queries) and (asked == 0 or queries == 1)
    return 1 if mask.dtype == torch.bool and same else 2


def _columns_and_tiles(rows: int, head_dim: int) -> tuple[int, int]:
    """CC and NT of the kernel for so many rows of queries to a KV head."""
    return 1 if rows <= 4 else 2, 2 if rows > 8 and head_dim <= 128 else 1


def compile_ahead(call: AttendCall) -> None:
    """Compile what `attend` will launch; the call's tensors may be fake."""
    keys, values = _shape_of(call.key_layout), _shape_of(call.value_layout)
    queries = call.q.shape[2]
    rows = call.q.shape[1] // call.key[CODES].shape[1] * queries
    columns, tiles = _columns_and_tiles(rows, keys.head_dim)
    steps = None if call.mask is None else _steps(call.mask)
    given = macros(keys, values, tiles, columns, _form_of(call.mask, steps, rows, queries))
    nvrtc.binary(call.q.device.index or 0, "attend_cuda", KERNELS, tuple(given.items()))


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _compiled(index: int, keys: Layout, values: Layout, tiles: int, columns: int, form: int) -> dict:
    """The kernels and the shared memory of the first; form is the kernel's MASK."""
    stage, outputs = STAGES * stage_bytes(keys, values), 4 * columns * tiles * keys.head_dim * 4
    shared = WARPS * max(stage, outputs)  # rings of tiles, then outputs
    given = tuple(macros(keys, values, tiles, columns, form).items())
    return {**nvrtc.compiled(index, "attend_cuda", KERNELS, given, shared), "shared": shared}


def stage_bytes(keys: Layout, values: Layout) -> int:
    """What a tile of tokens takes in shared memory; attend_tiles_cuda.cuh says what stands where."""
    tokens = 16 * DEPTH
    codes, padded = tokens * keys.head_dim // 4, lambda size: -(-size // 16) * 16
    ranges = [2 * layout.range_size for layout in (keys, values)]  # bytes of a token
    lower = codes * (bool(keys.text_bits) + bool(values.text_bits)) + (tokens * 4 if keys.text_bits else 0)
    return padded(2 * codes + sum(padded(tokens * size + size % 4) for size in ranges) + lower)


def macros(keys: Layout, values: Layout, tiles: int, columns: int, form: int) -> dict[str, object]:
    """What attend_cuda.cu calls compile-time."""
    head_dim = keys.head_dim
    many = tiles > 1 or head_dim > 128  # accumulators a lane: fewer blocks
    given = {"HEAD_DIM": head_dim, "BF16": int(keys.dtype == torch.bfloat16), "NT": tiles}
    given |= {"MT": DEPTH, "CC": columns, "SPLITS_MAX": SPLITS_MAX, "STAGES": STAGES, "WARPS": WARPS, "MASK": form}
    for name, layout in (("KEY", keys), ("VALUE", values)):
        given |= {f"{name}_GROUPS": layout.groups, f"{name}_SYMMETRIC": int(layout.symmetric)}
    given |= {
        "KEY_UNEVEN": int(keys.uneven),
        "KEY_BLOCKS": int(keys.blocks),
        "KEY_MOVED": int(keys.moved),
        "BLOCK": BLOCK,
    }
    given |= {"TEXT_BITS": keys.text_bits, "VALUE_TEXT_BITS": values.text_bits}
    orders = {"NORM": order_of(head_dim)}
    first, middle, _ = uneven.parts(head_dim)
    orders |= {"FIRST_NORM": uneven.blocks(first)[0], "MIDDLE_NORM": uneven.blocks(middle)[0]}
    given |= {name: f"{order**-0.5!r}f" for name, order in orders.items()}
    return given | {"STAGE_BYTES": stage_bytes(keys, values), "BLOCKS": 2 if many else BLOCKS}
