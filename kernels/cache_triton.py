"""append, pack: one Triton kernel rotates, quantizes and packs new tokens and writes all that a decode step changes.

x       [B, H, q, D] float16 | bfloat16 | float32 of any strides, D a multiple of 8 up to 256
buffers those of kernels/layout.py, contiguous; the meaning is kernels/cache.py with kernels/quantizer.py

Grid and rows are those of kernels/rotate_triton.py: a row is one token of one head. Head 0 also writes its batch row's
classes, text positions and pivot positions; the first program alone moves state[END] and state[RING]. state[TEXT] is
read by all and written by none, and no program reads what another one writes. Nothing waits for the device.

Keys whose blocks have means are rotated first, and a launch of kernels/blocks_triton.py writes the means: this kernel
then quantizes differences from them. Of other layouts all is one launch.

Two bits need no division. With t = x - minimum, the code is how many of the steps 1/2, 3/2, 5/2 times the scale lie
below t, and these products are exact: an fp16 scale has 11 bits. A float32 t that is not on a step is too far from it
for t / scale to be rounded onto it, and on a step half to even goes to 0, 2 and 2. Packing is a product with powers of
two: words below 2**16 are exact in float32.

A symmetric layout's step and scale come of sums, which are taken in another order than in the reference: a scale may be
the fp16 number next to the reference's, and a number that lies on the edge between two codes may get the other one. The
edges of two bits are -step, 0 and step, which half to even puts in codes 0, 2 and 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from akvq_fx.kernels import blocks_triton, quantizer, rotate_triton
from akvq_fx.kernels.blocks_triton import BLOCK
from akvq_fx.kernels.cache import check_fits, keep_pivots, named
from akvq_fx.kernels.layout import CODE_BITS, STATE_END, STATE_RING, STATE_TEXT, TEXT, Layout
from akvq_fx.kernels.rotate import rotate_as_stored
from akvq_fx.kernels.rotate_triton import KEYS, affine_rows, head_rows, rotated
from akvq_fx.kernels.supports import ANY, NOT_SIMULATED, Supports

SUPPORTS = Supports(
    simulate=NOT_SIMULATED,
    body_bits=(*CODE_BITS, 16),
    text_bits=(0, 4, 8),
    dtype=rotate_triton.DTYPES,
    head_dim=range(8, rotate_triton.MAX_DIM + 1, 8),
    **dict.fromkeys(("group", "window", "pivots", "body_clip", "text_clip"), ANY),
    **dict.fromkeys(("rotated", "affine", "shares_classes", "symmetric", "uneven", "blocks", "moved"), ANY),
)
SCALE_FLOOR = tl.constexpr(quantizer.SCALE_FLOOR)
FP16_MAX = tl.constexpr(quantizer.FP16_MAX)
STEP_2, STEP_4 = tl.constexpr(quantizer.STEPS[2]), tl.constexpr(quantizer.STEPS[4])
ROUND = tl.constexpr(1.5 * 2**23)  # x + ROUND - ROUND rounds half to even where |x| < 2**22
TEXT_CLASS = tl.constexpr(TEXT)
END, RING, SHIFT = tl.constexpr(STATE_END), tl.constexpr(STATE_RING), tl.constexpr(STATE_TEXT)


def refusal(x: Tensor, layout: Layout) -> str:
    """Why the kernel cannot write x to a cache of this layout; "" where it can."""
    return SUPPORTS.refusal(layout) or rotate_triton.refusal(x)


@triton.jit
def as_half(x):
    """To float16; finite numbers saturate, the others stay what they are."""
    limited = tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX)
    return tl.where(tl.abs(x) < float("inf"), limited, x).to(tl.float16)


@triton.jit
def range_of(x, member, BITS: tl.constexpr, CLIP: tl.constexpr):
    """Scale and minimum, float16 [ROWS], of the channels of x [ROWS, DP] that are members [1, DP] of a group."""
    low = tl.min(tl.where(member, x, float("inf")), 1) * CLIP
    high = tl.max(tl.where(member, x, float("-inf")), 1) * CLIP
    broken = tl.max((member & (x != x)).to(tl.int32), 1) > 0  # min and max pass over NaN
    top = (1 << BITS) - 1.0
    scale = tl.div_rn(high, top) - tl.div_rn(low, top)
    scale = tl.where(scale < SCALE_FLOOR, SCALE_FLOOR, scale)
    scale, low = tl.where(broken, float("nan"), scale), tl.where(broken, float("nan"), low)
    return as_half(scale), as_half(low)


@triton.jit
def codes_of(x, scale, low, BITS: tl.constexpr):
    """Codes of x [ROWS, DP] as whole float32 numbers; scale, low float32, of x's shape or [ROWS, 1]. NaN gives 0."""
    rise = x - low
    if BITS == 2:
        scale = tl.where(scale < float("inf"), scale, float("nan"))  # with an infinite range every code is 0
        codes = tl.where(rise > 0.5 * scale, 1.0, 0.0)
        codes = tl.where(rise >= 1.5 * scale, 2.0, codes)
        codes = tl.where(rise > 2.5 * scale, 3.0, codes)
    else:
        codes = tl.div_rn(rise, scale)
        codes = tl.where(codes == codes, codes, 0.0)
        codes = tl.minimum(tl.maximum(codes, 0.0), (1 << BITS) - 1.0) + ROUND - ROUND
    return codes


@triton.jit
def store_codes(
    x, codes, ranges, slots, live, lower, texts, text, fits,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, CLIP: tl.constexpr,
    TEXT_BITS: tl.constexpr, LOW_WIDTH: tl.constexpr, TEXT_CLIP: tl.constexpr, GROUPS: tl.constexpr, TERM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Quantize x [ROWS, DP]; write codes and ranges to slots [ROWS] of [slots, D * BITS / 16], [slots, 2 * GROUPS].

    With TEXT_BITS, rows that are `text` are quantized to as many bits: the lower ones, LOW_WIDTH wide, go to slots
    `texts` of `lower` where the slot `fits`.
    """
    channel = tl.arange(0, DP)
    scales, lows = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32)
    for group in tl.static_range(GROUPS):
        member = (channel // (D // GROUPS) == group)[None, :]
        scale, low = range_of(x, member, BITS, CLIP)
        if TEXT_BITS:
            text_scale, text_low = range_of(x, member, TEXT_BITS, TEXT_CLIP)
            scale, low = tl.where(text, text_scale, scale), tl.where(text, text_low, low)
        where = ranges + (slots * (2 * GROUPS) + group)[:, None] + GROUPS * tl.arange(0, 2)[None, :]
        tl.store(where, tl.join(scale, low), mask=live[:, None])
        if GROUPS == 1:
            scales, lows = scale.to(tl.float32)[:, None], low.to(tl.float32)[:, None]
        else:
            scales = tl.where(member, scale.to(tl.float32)[:, None], scales)
            lows = tl.where(member, low.to(tl.float32)[:, None], lows)
    values = codes_of(x, scales, lows, BITS)
    if TEXT_BITS:
        LOW: tl.constexpr = TEXT_BITS - BITS
        whole = codes_of(x, scales, lows, TEXT_BITS)
        upper = tl.floor(whole / (1 << LOW))
        rest = tl.where(text[:, None], whole - upper * (1 << LOW), 0.0)
        store_words(rest, lower, texts, fits, D, DP, LOW_WIDTH, TERM)
        values = tl.where(text[:, None], upper, values)
    store_words(values, codes, slots, live, D, DP, BITS, TERM)


@triton.jit
def symmetric_of(x, member, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Codes of x [ROWS, DP] as whole float32 numbers, and scales, float16 [ROWS], that are of the SIZE channels which
    are members [1, DP] of a group."""
    MIDDLE: tl.constexpr = ((1 << BITS) - 1) / 2
    own = tl.where(member, x, 0.0)
    length = tl.sum(own * own, 1)
    step = (STEP_2 if BITS == 2 else STEP_4) * tl.sqrt_rn(tl.div_rn(length, tl.full(length.shape, SIZE, tl.float32)))
    step = tl.where(step == 0, 1.0, step)
    step = step[:, None]
    if BITS == 2:
        codes = tl.where(own > -step, 1.0, 0.0)
        codes = tl.where(own >= 0, 2.0, codes)
        codes = tl.where(own > step, 3.0, codes)
    else:
        codes = tl.div_rn(own, step + tl.zeros_like(own)) + MIDDLE
        codes = tl.where(codes == codes, codes, 0.0)
        codes = tl.minimum(tl.maximum(codes, 0.0), 2 * MIDDLE) + ROUND - ROUND
    along = tl.sum(own * (codes - MIDDLE), 1)
    return codes, as_half(tl.where(length == 0, 0.0, tl.div_rn(length, along)))


@triton.jit
def store_symmetric(
    x, codes, ranges, slots, live,
    D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, TERM: tl.constexpr,
):  # fmt: skip
    """store_codes of a symmetric layout: ranges [slots, GROUPS] are scales."""
    channel = tl.arange(0, DP)
    values = tl.zeros_like(x)
    for group in tl.static_range(GROUPS):
        member = (channel // (D // GROUPS) == group)[None, :]
        group_codes, scale = symmetric_of(x, member, D // GROUPS, BITS)
        tl.store(ranges + slots * GROUPS + group, scale, mask=live)
        values = tl.where(member, group_codes, values)
    store_words(values, codes, slots, live, D, DP, BITS, TERM)


@triton.jit
def store_uneven(x, codes, ranges, slots, live, D: tl.constexpr, DP: tl.constexpr, TERM: tl.constexpr):
    """store_codes of an uneven layout: the slots of a token are high and low codes of the first part, then the middle.

    A code of the first part, 4 * high + low, takes two slots, so words are the sum of two products.
    """
    FIRST: tl.constexpr = D // 4
    channel = tl.arange(0, DP)
    first, middle = (channel < FIRST)[None, :], ((channel >= FIRST) & (channel < 3 * FIRST))[None, :]
    fine, fine_scale = symmetric_of(x, first, FIRST, 4)
    coarse, coarse_scale = symmetric_of(x, middle, 2 * FIRST, 2)
    tl.store(ranges + slots * 2, fine_scale, mask=live)
    tl.store(ranges + slots * 2 + 1, coarse_scale, mask=live)
    high = tl.floor(fine / 4)
    low = fine - 4 * high
    weights = word_weights(0, D, DP, 2).to(tl.float32).to(TERM)
    words = tl.dot(tl.where(first, high, 0.0).to(TERM), weights, input_precision="ieee")
    weights = word_weights(FIRST, D, DP, 2).to(tl.float32).to(TERM)
    rest = tl.where(first, low, tl.where(middle, coarse, 0.0))
    words = tl.dot(rest.to(TERM), weights, words, input_precision="ieee")
    put_words(words, codes, slots, live, D, 2)


@triton.jit
def word_weights(FIRST: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """[DP, WIDTH] int32: what the code of a channel, whose slot is channel + FIRST, weighs in each word."""
    WORDS: tl.constexpr = D * BITS // 16
    # at least 32 wide, or the compiler has every warp of a decode step compute all products
    WIDTH: tl.constexpr = DP * BITS // 16 if DP * BITS > 512 else 32
    slot, word = FIRST + tl.arange(0, DP), tl.arange(0, WIDTH)
    lane = slot // WORDS
    weight = tl.where(lane < 16 // BITS, 1 << (lane % (16 // BITS) * BITS), 0)  # slot lane * WORDS + word
    return tl.where((slot % WORDS)[:, None] == word[None, :], weight[:, None], 0)


@triton.jit
def store_words(
    values, codes, slots, live, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, TERM: tl.constexpr
):  # fmt: skip
    """Pack whole float32 numbers below 2**BITS [ROWS, DP]; write words to slots [ROWS] of [slots, D * BITS / 16]."""
    weights = word_weights(0, D, DP, BITS)
    words = tl.dot(values.to(TERM), weights.to(tl.float32).to(TERM), input_precision="ieee")
    put_words(words, codes, slots, live, D, BITS)


@triton.jit
def put_words(words, codes, slots, live, D: tl.constexpr, BITS: tl.constexpr):
    """Write words [ROWS, WIDTH] to slots [ROWS] of [slots, D * BITS / 16]."""
    WORDS: tl.constexpr = D * BITS // 16
    word = tl.arange(0, words.shape[1])
    where = codes + (slots * WORDS)[:, None] + word[None, :]
    tl.store(where, words.to(tl.int32).to(tl.int16), mask=live[:, None] & (word < WORDS)[None, :])


@triton.jit
def write_state(state, at, tokens, WINDOW: tl.constexpr):
    """The end moves behind the last token. A write past the end leaves a gap that the ring never held."""
    start, end = tl.load(at).to(tl.int32), tl.load(at + tokens - 1).to(tl.int32) + 1
    held = tl.where(start > tl.load(state + END), start, tl.minimum(tl.load(state + RING), start))
    tl.store(state + RING, tl.maximum(held, end - WINDOW))
    tl.store(state + END, end)


@triton.jit
def write_kernel(
    x, at, kinds, affine, state, classes, codes, ranges, means, block_of, ring, pivot_at, text_codes, text_at,
    heads, owners, leads, tokens, steps, capacity, blocks, text_capacity,
    stride_b, stride_h, stride_t, stride_d, kinds_b, kinds_t,
    D: tl.constexpr, DP: tl.constexpr, ORDER: tl.constexpr, DEPTH: tl.constexpr, UNEVEN: tl.constexpr,
    ROTATE: tl.constexpr, MAP: tl.constexpr, TERMS: tl.constexpr, TERM: tl.constexpr, NORM: tl.constexpr,
    BITS: tl.constexpr, CLIP: tl.constexpr, TEXT_BITS: tl.constexpr, LOW_WIDTH: tl.constexpr, TEXT_CLIP: tl.constexpr,
    GROUPS: tl.constexpr, SYMMETRIC: tl.constexpr,
    WINDOW: tl.constexpr, PIVOTS: tl.constexpr, PIVOTS_P: tl.constexpr, PACK_TERM: tl.constexpr,
    SHARE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = SHARE * TILE
    channel = tl.arange(0, DP)
    real = (channel < D)[None, :]
    lead, place, exists = head_rows(leads, SHARE, TILE)
    batch, wide_lead = (lead // heads).to(tl.int64), lead.to(tl.int64)
    row = x + batch * stride_b + (lead % heads).to(tl.int64) * stride_h
    first_head = exists & (lead % heads + place * 0 == 0)  # for its batch row
    maps, has_map = row, exists
    if MAP:
        maps, has_map = affine_rows(affine, lead, heads, owners, leads, D, UNEVEN, SHARE)
    shift = tl.load(state + SHIFT)

    for step in range(steps):
        start = (tl.program_id(1) * steps + step) * TILE
        token = start + place
        live = exists & (token < tokens)
        slot = tl.load(at + token, mask=live, other=0).to(tl.int32)
        kept = live & (slot >= 0) & (slot < capacity)  # the kernel cannot raise, and must not write elsewhere
        source = row + token.to(tl.int64) * stride_t
        if ROTATE:
            tile = rotated(
                source, stride_d, live, maps, has_map, owners * D,
                D, DP, ORDER, DEPTH, UNEVEN, MAP, TERMS, TERM, NORM, ROWS,
            )  # fmt: skip
            tile = tile.to(x.dtype.element_ty).to(tl.float32)  # as the rotated keys of the reference are
        else:
            tile = tl.load(source[:, None] + channel[None, :] * stride_d, mask=live[:, None] & real, other=0)
            tile = tile.to(tl.float32)

        if WINDOW:  # noqa: SIM102  # known when compiled, the other test is not
            if start + TILE > tokens - WINDOW:
                newest = live & (token >= tokens - WINDOW)
                where = ring + ((wide_lead * WINDOW + slot % WINDOW) * D)[:, None] + channel[None, :]
                tl.store(where, tile.to(ring.dtype.element_ty), mask=newest[:, None] & real)

        if means is not None:
            block = slot // BLOCK
            if block_of is not None:
                block = tl.load(block_of + batch * capacity + slot, mask=kept, other=0)
            where = means + ((wide_lead * blocks + block) * D)[:, None] + channel[None, :]
            tile -= tl.load(where, mask=kept[:, None] & real, other=0).to(tl.float32)

        kind = tl.full([ROWS], TEXT_CLASS, tl.uint8)
        if kinds is not None:
            where = kinds + batch * kinds_b + token.to(tl.int64) * kinds_t
            kind = tl.load(where, mask=live, other=TEXT_CLASS).to(tl.uint8)
        if classes is not None:
            tl.store(classes + batch * capacity + slot, kind, mask=kept & first_head)
        text, texts, fits = live, wide_lead, live
        if TEXT_BITS:
            overlay = slot + shift
            fits = live & (overlay >= 0) & (overlay < text_capacity)
            text, texts = kind == TEXT_CLASS, wide_lead * text_capacity + overlay
            position = tl.where(text, slot, -1).to(tl.int32)
            tl.store(text_at + batch * text_capacity + overlay, position, mask=fits & first_head)
        if BITS == 16:
            where = codes + ((wide_lead * capacity + slot) * D)[:, None] + channel[None, :]
            tl.store(where, tile.to(codes.dtype.element_ty), mask=kept[:, None] & real)
        elif UNEVEN:
            store_uneven(tile, codes, ranges, wide_lead * capacity + slot, kept, D, DP, PACK_TERM)
        elif SYMMETRIC:
            body = wide_lead * capacity + slot
            store_symmetric(tile, codes, ranges, body, kept, D, DP, BITS, GROUPS, PACK_TERM)
        else:
            body = wide_lead * capacity + slot
            store_codes(
                tile, codes, ranges, body, kept, text_codes, texts, text, fits,
                D, DP, BITS, CLIP, TEXT_BITS, LOW_WIDTH, TEXT_CLIP, GROUPS, PACK_TERM, ROWS,
            )  # fmt: skip

    if tl.program_id(1) == 0:
        if PIVOTS:  # after a crop the tokens may start before the end: later pivots are gone
            pivot = tl.arange(0, PIVOTS_P)[None, :]
            where = pivot_at + (batch * PIVOTS + tl.zeros([ROWS], tl.int64))[:, None] + pivot
            mine = (first_head & (place == 0))[:, None] & (pivot < PIVOTS)
            position = tl.load(where, mask=mine, other=-1)
            tl.store(where, -1, mask=mine & (position >= tl.load(at)))
        if tl.program_id(0) == 0:
            write_state(state, at, tokens, WINDOW)


def begin_blocks(b, x: Tensor, at: Tensor, classes, affine, layout: Layout, rotate: bool) -> Tensor:
    """Write the means of blocks that begin among the tokens x; x in the stored space. rotate: x is not yet in it."""
    if rotate:
        x = rotate_as_stored(x, affine, layout.rotated)
    blocks_triton.begin_blocks(b, x, at, classes, layout)
    return x


def launch(b: dict[str, Tensor], x: Tensor, at: Tensor, classes, pivots, affine, layout: Layout, rotate: bool) -> None:
    """Write x to buffers that fit it, then its pivots."""
    reason = refusal(x, layout)
    if reason:
        raise ValueError(f"akvq::append: {reason}")
    at = at.contiguous()
    if layout.blocks:
        x, rotate = begin_blocks(b, x, at, classes, affine, layout, rotate), False
    B, H, q, D = x.shape
    kind = KEYS if rotate and affine is not None else 0
    if kind:
        rotate_triton.check_affine("append", x, affine, layout.uneven)
        affine = affine.contiguous()
    constants = rotate_triton.rotation_constants(x.dtype, D, kind, layout.uneven)
    plan = rotate_triton.plan_of(B * H, q, D)
    text_capacity = b["text_codes"].shape[2] if layout.text_bits else 0
    kinds_strides = (0, 0) if classes is None else classes.stride()
    with torch.cuda.device_of(x):
        write_kernel[plan.grid(B * H, q)](
            x, at, classes, affine if kind else None, b["state"], b.get("classes"), b["codes"],
            b.get("range"), b.get("means"), b.get("block_of"), b.get("ring"), b.get("pivot_at"), b.get("text_codes"),
            b.get("text_at"),
            H, affine.shape[2] if kind else H, B * H, q, plan.steps, b["codes"].shape[2],
            b["means"].shape[2] if layout.blocks else 0, text_capacity,
            *x.stride(), *kinds_strides,
            **constants, ROTATE=bool(kind) or (rotate and layout.rotated),
            BITS=layout.body_bits, CLIP=layout.body_clip, TEXT_BITS=layout.text_bits, LOW_WIDTH=layout.low_width,
            TEXT_CLIP=layout.text_clip,
            GROUPS=layout.groups, SYMMETRIC=layout.symmetric, WINDOW=layout.window, PIVOTS=layout.pivots,
            PIVOTS_P=triton.next_power_of_2(max(1, layout.pivots)), PACK_TERM=rotate_triton.product_type(),
            SHARE=plan.share, TILE=plan.tile, num_warps=plan.warps, num_stages=1,
        )  # fmt: skip
    if layout.pivots and pivots is not None:
        keep_pivots(b, x, at, classes, pivots, affine, layout, rotate)


def append(
    cache: list[Tensor],
    x: Tensor,
    at: Tensor,
    classes: Tensor | None,
    pivots: Tensor | None,
    layout: Layout,
    rotate: bool = False,
    run=launch,
) -> None:
    """Write q tokens in place, one launch (and a few small ones for means of blocks, and for pivots of a prompt).

    run writes tokens and pivots: this file's launch, or kernels/append_cuda.py's.
    """
    b = named(cache, layout)
    check_fits(b, x, at, classes, layout)
    run(b, x, at, classes, pivots, b.get("affine"), layout, rotate)


def pack(
    x: Tensor,
    at: Tensor,
    classes: Tensor | None,
    pivots: Tensor | None,
    affine: Tensor | None,
    capacity: int,
    layout: Layout,
    rotate: bool = False,
    run=launch,
) -> list[Tensor]:
    """pack: new buffers of `capacity` tokens that hold the prompt."""
    cache = layout.allocate(x.shape[0], x.shape[1], capacity, capacity if layout.text_bits else 0, x.device)
    b = named(cache, layout)
    if layout.affine:
        b["affine"].copy_(affine)
    check_fits(b, x, at, classes, layout)
    run(b, x, at, classes, pivots, affine, layout, rotate)
    return cache
