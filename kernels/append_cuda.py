"""append and pack on NVIDIA GPUs: compiles and launches kernels/append_cuda.cu; the meaning is kernels/cache.py's.

One launch rotates, clips, quantizes, packs and writes all that a decode step changes. Where means of blocks may begin
among more than one token, other launches rotate these and write the means before. `refusal` says why a call is left to
kernels/cache_triton.py, whose checks of a call and order of steps serve this kernel too.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from akvq_fx.kernels import cache_triton, nvrtc, uneven
from akvq_fx.kernels.blocks import ENOUGH
from akvq_fx.kernels.cache import check_fits, keep_pivots, named
from akvq_fx.kernels.layout import BLOCK, CODE_BITS, Layout
from akvq_fx.kernels.rotate import order_of
from akvq_fx.kernels.supports import ANY, NOT_SIMULATED, Supports

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SUPPORTS = Supports(
    simulate=NOT_SIMULATED,
    body_bits=(*CODE_BITS, 16),
    text_bits=(0, 4, 8),
    dtype=tuple(DTYPES),
    head_dim=range(8, 513, 8),  # 16 channels a lane
    groups=range(1, 5),  # each costs a reduction over the warp
    **dict.fromkeys(("group", "window", "pivots", "body_clip", "text_clip"), ANY),
    **dict.fromkeys(("rotated", "affine", "shares_classes", "symmetric", "uneven", "blocks", "moved"), ANY),
)
WARPS = 4
SHARE = 8  # tokens a warp (in pack: four lanes) takes where there are many, to read the affine map once
PACKED_DIMS = (64, 128)  # of pack: four lanes hold a token, and its centre and gains, in registers
PACKED_TOKENS = 64  # fewer are appended a warp each
PACK_ROWS = 8  # tokens that a warp packs at a time
MANY = 1 << 16  # rows: enough warps to fill a GPU even with SHARE tokens each
POINTERS = ("x", "at", "kinds", "affine", "state", "classes", "codes", "range", "ring", "pivot_at")
POINTERS += ("text_codes", "text_at", "pivots", "chosen")
SIZES = ("batch", "heads", "tokens", "share", "capacity", "text_capacity", "window", "pivot_count")
SIZES += ("chosen_count", "fresh")


class Params(ctypes.Structure):
    """struct Params of append_cuda.cu."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS]
    _fields_ += [(name, ctypes.c_longlong) for name in ("x_b", "x_h", "x_t", "kinds_b", "kinds_t")]
    _fields_ += [(name, ctypes.c_int) for name in SIZES]
    _fields_ += [("means", ctypes.c_void_p), ("block_of", ctypes.c_void_p), ("blocks", ctypes.c_int)]


def refusal(x: Tensor, layout: Layout) -> str:
    """Why this kernel cannot write x to a cache of this layout; "" where it can."""
    reason = SUPPORTS.refusal(layout)
    if reason:
        return reason
    if x.dtype != layout.dtype:
        return f"x is {x.dtype} and the cache {layout.dtype}, accepted: one dtype"
    if x.stride(-1) != 1:
        return f"the channels of x are {x.stride(-1)} numbers apart, accepted: side by side"
    return nvrtc.refusal(x.device.index, "append_cuda")


def append(cache, x, at, classes, pivots, layout: Layout, rotate: bool = False) -> None:
    """Write q tokens in place, as kernels.cache.append."""
    cache_triton.append(cache, x, at, classes, pivots, layout, rotate, launch)


def pack(x, at, classes, pivots, affine, capacity: int, layout: Layout, rotate: bool = False) -> list[Tensor]:
    """New buffers that hold the prompt, as kernels.cache.pack. Where `packs`, all but text overlays is written once."""
    if not packs(x, layout) or x.shape[2] < layout.window or (layout.pivots and pivots is None):
        return cache_triton.pack(x, at, classes, pivots, affine, capacity, layout, rotate, launch)
    B, H, *_ = x.shape
    cache = []
    for name, shape, dtype in layout.sizes(B, H, capacity, capacity):
        cache.append(torch.empty(shape, dtype=dtype, device=x.device))
        if name.startswith("text_"):
            cache[-1].fill_(-1 if name == "text_at" else 0)
    b = named(cache, layout)
    if layout.affine:
        b["affine"].copy_(affine)
    check_fits(b, x, at, classes, layout)
    launch(b, x, at, classes, pivots, affine, layout, rotate, fresh=True)
    return cache


def launch(
    b: dict[str, Tensor],
    x: Tensor,
    at: Tensor,
    classes: Tensor | None,
    pivots: Tensor | None,
    affine: Tensor | None,
    layout: Layout,
    rotate: bool,
    fresh: bool = False,
) -> None:
    """Write x and, where the kernel does not, keep its pivots; fresh: buffers are unwritten, and `packs(x, layout)`."""
    B, H, q, _ = x.shape
    # One token's block is begun by the kernel. Where that turns out not to run, the next one writes the same means.
    if layout.blocks and q > 1:
        x, rotate = cache_triton.begin_blocks(b, x, at, classes, affine, layout, rotate), False
    at, form = at.contiguous(), 0
    if rotate:
        form = 2 if affine is not None else int(layout.rotated)
    params = Params(x.data_ptr(), at.data_ptr(), fresh=fresh)
    for name in POINTERS[4:-1]:
        if name in b:
            setattr(params, name, b[name].data_ptr())
    if classes is not None:
        params.kinds, (params.kinds_b, params.kinds_t) = classes.data_ptr(), classes.stride()
    if form == 2:
        affine = affine.contiguous()
        affine = affine.clone() if affine.data_ptr() % 16 else affine  # `pack` reads eight numbers at once
        params.affine = affine.data_ptr()
    params.x_b, params.x_h, params.x_t = x.stride()[:3]
    params.batch, params.heads, params.tokens, params.capacity = B, H, q, b["codes"].shape[2]
    params.share = SHARE if B * H * q >= MANY else 1
    params.text_capacity = b["text_codes"].shape[2] if layout.text_bits else 0
    params.window, params.pivot_count = layout.window, layout.pivots
    if layout.blocks:
        params.means, params.blocks = b["means"].data_ptr(), b["means"].shape[2]
    if layout.moved:
        params.block_of = b["block_of"].data_ptr()
    fast, keep = packs(x, layout), layout.pivots and pivots is not None
    parts = -(-q // (params.share * (PACK_ROWS if fast else 1)))
    if fast and keep:
        pivots = pivots.to(torch.int32).contiguous()
        params.chosen, params.chosen_count = pivots.data_ptr(), pivots.shape[1]
        parts += -(-layout.pivots // PACK_ROWS)
    workers = (B * H * parts, B * H * -(-q // params.share))  # the second's are of the text tokens' launch
    launches = [
        (name, count, given) for count, (name, given) in zip(workers, kernels_of(layout, form, fast), strict=False)
    ]
    run(launches, params, x.device)
    if keep and not fast:
        keep_pivots(b, x, at, classes, pivots, affine, layout, rotate)


@functools.cache
def kernels_of(layout: Layout, form: int, fast: bool) -> list[tuple[str, tuple]]:
    """(kernel, macros) of each launch; where `packs`, the codes of text tokens are left to a launch of their own."""
    apart = fast and layout.text_bits > 0
    launches = [("pack" if fast else "append", macros(layout, form, fast, text_only=apart))]
    return launches + [("append", macros(layout, form, False, text_only=True))] * apart


def compile_ahead(x: Tensor, layout: Layout) -> None:
    """Compile what writes x, which may be fake, to a cache of this layout, and rotates it if the layout is rotated.

    Another kernel serves a prompt whose rows do not begin at whole 16 bytes.
    """
    apart = layout.blocks and x.shape[2] > 1  # rotated by launches of their own
    form = 0 if apart else 2 if layout.affine else int(layout.rotated)
    for name, given in kernels_of(layout, form, may_pack(layout, x.shape[2]) and x.itemsize == 2):
        nvrtc.binary(x.device.index or 0, "append_cuda", (name,), given)


def run(launches: list[tuple[str, int, tuple]], params: Params, device: torch.device) -> None:
    """Launch kernels, each with a warp for every worker; all are compiled before the first writes anything."""
    kernels = [nvrtc.compiled(device.index, "append_cuda", (name,), macros)[name] for name, _, macros in launches]
    with torch.cuda.device(device):
        for kernel, (_, workers, _) in zip(kernels, launches, strict=True):
            nvrtc.launch(kernel, (-(-workers // WARPS), 1, 1), 32 * WARPS, params)


def packs(x: Tensor, layout: Layout) -> bool:
    """The tokens are a prompt that the kernel `pack` takes: 2 bits, one range a token, rows of whole 16 bytes."""
    if not may_pack(layout, x.shape[2]):
        return False
    return x.itemsize == 2 and x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in x.stride()[:3])


def may_pack(layout: Layout, tokens: int) -> bool:
    """So far as it goes by the layout and the number of tokens."""
    simple = layout.body_bits == 2 and layout.groups == 1 and layout.head_dim in PACKED_DIMS
    simple = simple and not (layout.uneven or layout.blocks)  # differences from means are no 16-bit numbers
    return simple and tokens >= PACKED_TOKENS


def macros(layout: Layout, form: int, fast: bool, text_only: bool = False) -> tuple:
    exact = lambda number: f"{float(number)!r}f"
    orders = [order_of(layout.head_dim)] * 2
    if layout.uneven:
        orders = [uneven.blocks(size)[0] for size in uneven.parts(layout.head_dim)[:2]]
    return (
        ("HEAD_DIM", layout.head_dim),
        ("DTYPE", DTYPES[layout.dtype]),
        ("ROTATE", form),
        ("GROUPS", layout.groups),
        ("BITS", layout.body_bits),
        ("CLIP", exact(layout.body_clip)),
        ("NORM", exact(orders[0] ** -0.5)),
        ("MIDDLE_NORM", exact(orders[1] ** -0.5)),
        ("SYMMETRIC", int(layout.symmetric)),
        ("UNEVEN", int(layout.uneven)),
        ("MEANS", int(layout.blocks)),
        ("MOVED", int(layout.moved)),
        ("BLOCK", BLOCK),
        ("ENOUGH", ENOUGH),
        ("TEXT_BITS", 0 if fast else layout.text_bits),
        ("LOW_WIDTH", 0 if fast else layout.low_width),
        ("TEXT_CLIP", exact(layout.text_clip)),
        ("TEXT_ONLY", int(text_only)),
        ("WARPS", WARPS),
        ("PACKS", int(fast)),
    )
