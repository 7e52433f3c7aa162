"""Device side of attend_triton: flash attention over the tiles of a packed cache (kernels/layout.py gives the buffers).

Grid         (B * H * splits * M tiles,). A program owns M rows of one KV head and one share of that head's token tiles.
rows         query tokens x SHARE query heads of the KV head, the token running slower, so that codes are unpacked once
             for all of them and the rows of a tile are neighbours under a causal mask
token tiles  N tokens each, of five segments: body, text overlay, pivots, ring, fresh tokens. Their tiles are numbered
             in this order and a split takes a consecutive run of the numbers, found on the device from what the cache
             holds
-> out       [B, Hq, q, Dv] q's dtype when there is one split; else fp32 [splits, B, Hq, q, Dv] with maxima and sums
             [splits, B, Hq, q] fp32 for `combine`

Every position is read from one segment: fresh tokens by their range, the ring by its range, the others by their class,
which names the one overlay that holds them (PIVOT, TEXT) or none. Where there are fresh tokens, the other segments end
before them. Text tokens have the upper bits of their codes, and their ranges, in the body and LOW bits more in the
overlay; values may lack the overlay (VALUE_TEXT 0) and are then read from the body alone.
Keys that are uneven (kernels/uneven.py) are put together from their slots' codes: their channels are what queries ask.
To keys whose blocks have means (kernels/blocks.py) these are added: a body tile is of one block, a text tile of many,
as any is where tokens moved (block_of is not None).
A slot that nothing was written to may hold NaN: its load is masked for keys and values alike, because 0 * NaN is NaN.
DP is a head dim padded to a power of two of 16 or more, as tl.dot asks.
Source: FlashAttention-2, arXiv 2307.08691 (online softmax); Flash-Decoding (splits over tokens).
"""

from __future__ import annotations

import triton
import triton.language as tl

from akvq_fx.kernels import layout
from akvq_fx.kernels.quantizer import FP16_MAX

LOG2E = tl.constexpr(1.4426950408889634)
LIMIT = tl.constexpr(FP16_MAX)
WORD_BITS, BLOCK = tl.constexpr(layout.WORD_BITS), tl.constexpr(layout.BLOCK)
TEXT, PIVOT = tl.constexpr(layout.TEXT), tl.constexpr(layout.PIVOT)
STATE_END, STATE_RING, STATE_TEXT = (
    tl.constexpr(layout.STATE_END),
    tl.constexpr(layout.STATE_RING),
    tl.constexpr(layout.STATE_TEXT),
)
# of float32 products: 22 bits from three tensor core products; the scalar products of "ieee" spill kilobytes
PRECISION = tl.constexpr("tf32x3")
NO_MASK, BOOL_MASK, FLOAT_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def code_in(words, block, BITS: tl.constexpr, UNEVEN: tl.constexpr):
    """Code number `block` of words; of uneven keys that of the channel in its place, 4 or 2 bits."""
    TOP: tl.constexpr = 2**BITS - 1
    if UNEVEN:  # a word has two high codes, two low ones and four of the middle, and nothing of the last two channels
        low = (words >> (tl.minimum(block + 2, 7) * BITS)) & TOP
        high = (words >> (block * BITS)) & TOP
        code = tl.where(block < 2, high << BITS | low, low)
    else:
        code = (words >> (block * BITS)) & TOP
    return code


@triton.jit
def codes_at(codes, slot, valid, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, UNEVEN: tl.constexpr):
    """Codes of the tokens in slots [N] of a low-bit buffer, int32 [N, DP]."""
    WORDS: tl.constexpr = D * BITS // WORD_BITS
    LANES: tl.constexpr = WORD_BITS // BITS
    channel = tl.arange(0, DP)
    if D == DP:  # code j of word i is channel j * WORDS + i: every word is loaded once and all its codes taken
        words = tl.load(codes + slot[:, None] * WORDS + tl.arange(0, WORDS)[None, :], mask=valid[:, None], other=0)
        code = code_in(words.to(tl.int32)[:, None, :], tl.arange(0, LANES)[None, :, None], BITS, UNEVEN)
        code = tl.reshape(code, (slot.shape[0], DP))
    else:  # channels without a code read 0; queries are 0 there and outputs are not stored
        inside = valid[:, None] & (channel < D)[None, :]
        words = tl.load(codes + slot[:, None] * WORDS + (channel % WORDS)[None, :], mask=inside, other=0)
        code = code_in(words.to(tl.int32), (channel // WORDS)[None, :], BITS, UNEVEN)
    return code


@triton.jit
def levels_of(code, range_, slot, valid, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
              SYMMETRIC: tl.constexpr, UNEVEN: tl.constexpr):  # fmt: skip
    """Codes [N, DP] with ranges in slots [N] -> fp32 [N, DP]."""
    channel = tl.arange(0, DP)
    if UNEVEN:
        first = (channel < D // 4)[None, :]
        scale = tl.load(range_ + slot * 2, mask=valid, other=0.0).to(tl.float32)[:, None]
        middle_scale = tl.load(range_ + slot * 2 + 1, mask=valid, other=0.0).to(tl.float32)[:, None]
        level = code.to(tl.float32) - tl.where(first, (4**BITS - 1) / 2, (2**BITS - 1) / 2)
        x = level * tl.where(first, scale, middle_scale)
        x = tl.where((channel < D // 4 * 3)[None, :], x, 0.0)  # even where a scale is NaN
    elif GROUPS == 1 and SYMMETRIC:
        scale = tl.load(range_ + slot, mask=valid, other=0.0).to(tl.float32)[:, None]
        x = (code.to(tl.float32) - (2**BITS - 1) / 2) * scale
    elif GROUPS == 1:
        scale = tl.load(range_ + slot * 2, mask=valid, other=0.0).to(tl.float32)[:, None]
        lo = tl.load(range_ + slot * 2 + 1, mask=valid, other=0.0).to(tl.float32)[:, None]
        x = code.to(tl.float32) * scale + lo
    elif SYMMETRIC:
        group = range_ + slot[:, None] * GROUPS + (tl.minimum(channel, D - 1) // (D // GROUPS))[None, :]
        scale = tl.load(group, mask=valid[:, None], other=0.0).to(tl.float32)
        x = (code.to(tl.float32) - (2**BITS - 1) / 2) * scale
    else:
        group = range_ + slot[:, None] * (2 * GROUPS) + (tl.minimum(channel, D - 1) // (D // GROUPS))[None, :]
        scale = tl.load(group, mask=valid[:, None], other=0.0).to(tl.float32)
        lo = tl.load(group + GROUPS, mask=valid[:, None], other=0.0).to(tl.float32)
        x = code.to(tl.float32) * scale + lo
    return x


@triton.jit
def code_tile(codes, range_, slot, valid, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
              SYMMETRIC: tl.constexpr, UNEVEN: tl.constexpr):  # fmt: skip
    """What codes of the body hold: slot, valid [N] -> fp32 [N, DP]."""
    code = codes_at(codes, slot, valid, D, DP, BITS, UNEVEN)
    return levels_of(code, range_, slot, valid, D, DP, BITS, GROUPS, SYMMETRIC, UNEVEN)


@triton.jit
def text_tile(codes, range_, lower, position, slot, valid, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr,
              LOW: tl.constexpr, LOW_WIDTH: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """The same of text tokens at `position` [N] of the body; LOW bits more, LOW_WIDTH wide, are in `slot` [N] of the
    overlay."""
    code = codes_at(codes, position, valid, D, DP, BITS, False) << LOW
    code += codes_at(lower, slot, valid, D, DP, LOW_WIDTH, False)
    return levels_of(code, range_, position, valid, D, DP, BITS, GROUPS, False, False)


@triton.jit
def means_at(means, block_of, position, valid, D: tl.constexpr, DP: tl.constexpr):
    """Means of the blocks of positions [N], or [1] for tokens of one block, -> fp32 [N, DP] or [1, DP]."""
    channel = tl.arange(0, DP)
    inside = valid[:, None] & (channel < D)[None, :]
    block = position // BLOCK
    if block_of is not None:
        block = tl.load(block_of + position, mask=valid, other=0)
    return tl.load(means + (block * D)[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rounded(x, ROUND: tl.constexpr, DOT: tl.constexpr):
    """fp32 numbers as a cache of dtype ROUND reads, in dtype DOT."""
    if tl.float16 == ROUND:  # 255 fp16 steps past an fp16 minimum stay far inside the other dtypes; a NaN stays
        x = tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))
    return x.to(ROUND).to(DOT)


@triton.jit
def exact_tile(tokens, slot, valid, stride, D: tl.constexpr, DP: tl.constexpr, ROUND: tl.constexpr, DOT: tl.constexpr):
    """Tokens kept whole: slot, valid [N] -> [N, DP] in dtype DOT, through the cache's dtype ROUND."""
    channel = tl.arange(0, DP)
    inside = valid[:, None] & (channel < D)[None, :]
    x = tl.load(tokens + slot.to(tl.int64)[:, None] * stride + channel[None, :], mask=inside, other=0.0)
    return x.to(ROUND).to(DOT)


@triton.jit
def capped(scores, softcap):
    """softcap * tanh(scores / softcap), by exp(-2 |x|)."""
    x = scores / softcap
    shrunk = tl.exp2(tl.where(x < 0, x, -x) * 2 * LOG2E)
    y = (1 - shrunk) / (1 + shrunk) * softcap
    return tl.where(x < 0, -y, y)


@triton.jit
def step(q, k, v, position, valid, token, mask_row, row_valid, mask_stride, scale, softcap, top, total, acc,
         MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, CAPPED: tl.constexpr):  # fmt: skip
    """One tile of the online softmax: q [M, DP], k [N, DP], v [N, DVP]; top (maximum), total [M], acc [M, DVP] move.

    Scores meet log2(e) only in the exponent: times a mask of finfo.min it is -inf, but such rows must be averages.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if CAPPED:
        scores = capped(scores, softcap)
    seen = row_valid[:, None] & valid[None, :]
    if IS_CAUSAL:
        seen = seen & (position[None, :] <= token[:, None])
    if MASK == BOOL_MASK:
        seen = seen & (tl.load(mask_row[:, None] + position[None, :] * mask_stride, mask=seen, other=0) != 0)
    elif MASK == FLOAT_MASK:
        scores += tl.load(mask_row[:, None] + position[None, :] * mask_stride, mask=seen, other=0.0).to(tl.float32)
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - -inf would be NaN
    weight = tl.exp2((scores - base[:, None]) * LOG2E)
    decay = tl.exp2((top - base) * LOG2E)
    total = total * decay + tl.sum(weight, 1)
    acc = acc * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
    return higher, total, acc


@triton.jit(do_not_specialize=["length", "columns", "tokens", "fresh_tokens", "capacity", "value_capacity", "blocks",
                               "text_capacity", "value_text_capacity", "tiles", "splits",
                               "mask_b", "mask_h", "mask_q"])  # fmt: skip
def attend_tiles(
    q, out, maxima, sums,
    state, classes, pivot_at, text_at, block_of,
    key_codes, key_range, key_ring, key_pivots, key_text, key_means,
    value_codes, value_range, value_ring, value_pivots, value_text,
    fresh_key, fresh_value, at, mask, sinks,
    scale, softcap, length, columns, tokens, fresh_tokens, heads,
    capacity, value_capacity, blocks, text_capacity, value_text_capacity, tiles, splits,
    q_b, q_h, q_t, fk_b, fk_h, fk_t, fv_b, fv_h, fv_t, mask_b, mask_h, mask_q, mask_t,
    SHARE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BITS: tl.constexpr, LOW: tl.constexpr, LOW_WIDTH: tl.constexpr, VALUE_TEXT: tl.constexpr,
    WINDOW: tl.constexpr, PIVOTS: tl.constexpr,
    KEY_GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    KEY_SYMMETRIC: tl.constexpr, VALUE_SYMMETRIC: tl.constexpr, KEY_UNEVEN: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    KEY_ROUND: tl.constexpr, VALUE_ROUND: tl.constexpr,
    DOT: tl.constexpr, FRESH: tl.constexpr, MASK: tl.constexpr, HAS_LENGTH: tl.constexpr, IS_CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr, SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles  # quickest: programs that read the same tokens run side by side
    split = tl.program_id(0) // tiles % splits
    pair = (tl.program_id(0) // tiles // splits).to(tl.int64)  # batch row and KV head; buffers may pass 2**31 elements
    b, h = pair // heads, pair % heads

    row = tile * M + tl.arange(0, M)
    row_valid = row < tokens * SHARE
    token, head = row // SHARE, h * SHARE + row % SHARE  # [M]
    channel = tl.arange(0, DP)
    queries = q + b * q_b + head * q_h + token.to(tl.int64) * q_t
    inside = row_valid[:, None] & (channel < D)[None, :]
    queries = tl.load(queries[:, None] + channel[None, :], mask=inside, other=0.0).to(DOT)
    mask_row = mask
    if MASK != NO_MASK:
        mask_row = mask + b * mask_b + head * mask_h + token.to(tl.int64) * mask_q

    end = tl.load(state + STATE_END)  # of what was appended: the fresh tokens may be there already or not
    first, last = end, end
    if FRESH:
        first = tl.load(at).to(tl.int32)
        last = first + fresh_tokens
    seen = last
    if HAS_LENGTH:
        seen = length
        if FRESH or MASK != NO_MASK:
            seen = tl.minimum(seen, last)
    if MASK != NO_MASK:
        seen = tl.minimum(seen, columns)
    if IS_CAUSAL:
        seen = tl.minimum(seen, (tl.minimum(tile * M + M, tokens * SHARE) - 1) // SHARE + 1)

    # stored: how much of it the cache holds; held: the ring's first position; body: its end, less what the ring holds
    stored, held = seen, end
    if FRESH:
        stored = tl.minimum(seen, first)
    if WINDOW > 0:
        held = tl.maximum(tl.load(state + STATE_RING), tl.maximum(end - WINDOW, 0))
    body = tl.where((stored > held) & (stored <= end), held, stored)

    tile_n = tl.arange(0, N)
    body_tiles = tl.cdiv(body, N)
    text_tiles = 0
    if LOW > 0:
        text_end = tl.minimum(tl.maximum(end + tl.load(state + STATE_TEXT), 0), text_capacity)
        text_tiles = tl.cdiv(text_end, N)
    pivot_tiles: tl.constexpr = (PIVOTS + N - 1) // N
    ring_tiles = 0
    if WINDOW > 0:
        ring_tiles = tl.where(stored <= held, 0, (WINDOW + N - 1) // N)
    fresh_tiles = 0
    if FRESH:
        fresh_tiles = tl.cdiv(tl.maximum(seen - first, 0), N)
    share = tl.cdiv(body_tiles + text_tiles + pivot_tiles + ring_tiles + fresh_tiles, splits)
    start = split * share
    stop = start + share

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if sinks is not None:  # a token of weight 1 and no value, in the first split
        sink = tl.load(sinks + head, mask=row_valid, other=0.0).to(tl.float32)
        top = tl.where(split == 0, sink, top)
        total = tl.where(split == 0, total + 1.0, total)
    acc = tl.zeros([M, DVP], tl.float32)

    key_codes += pair * capacity * (D * BITS // WORD_BITS)
    key_range += pair * capacity * (KEY_GROUPS if KEY_SYMMETRIC else 2 * KEY_GROUPS)
    value_codes += pair * value_capacity * (DV * BITS // WORD_BITS)
    value_range += pair * value_capacity * (VALUE_GROUPS if VALUE_SYMMETRIC else 2 * VALUE_GROUPS)
    if KEY_BLOCKS:
        tl.static_assert(BLOCK % N == 0, "a body tile must be of one block")
        key_means += pair * blocks * D
        if block_of is not None:
            block_of += b * capacity
    classes += b * capacity
    for i in range(start, tl.minimum(stop, body_tiles)):
        position = i * N + tile_n
        valid = (position < body) & ((position < held) | (position >= end))
        if PIVOTS > 0 or LOW > 0:
            kind = tl.load(classes + position, mask=valid, other=0)
            if PIVOTS > 0:
                valid = valid & (kind != PIVOT)
            if LOW > 0:
                valid = valid & (kind != TEXT)
        k = code_tile(key_codes, key_range, position, valid,
                      D, DP, BITS, KEY_GROUPS, KEY_SYMMETRIC, KEY_UNEVEN)  # fmt: skip
        if KEY_BLOCKS:
            if block_of is not None:
                k += means_at(key_means, block_of, position, valid, D, DP)
            else:
                one = tl.zeros([1], tl.int32) + i * N
                k += means_at(key_means, block_of, one, one < body, D, DP)
        k = rounded(k, KEY_ROUND, DOT)
        v = code_tile(value_codes, value_range, position, valid,
                      DV, DVP, BITS, VALUE_GROUPS, VALUE_SYMMETRIC, False)  # fmt: skip
        v = rounded(v, VALUE_ROUND, DOT)
        top, total, acc = step(queries, k, v, position, valid, token, mask_row, row_valid, mask_t, scale, softcap,
                               top, total, acc, MASK, IS_CAUSAL, CAPPED)  # fmt: skip

    if LOW > 0:
        start, stop = start - body_tiles, stop - body_tiles
        key_text += pair * text_capacity * (D * LOW_WIDTH // WORD_BITS)
        if VALUE_TEXT:
            value_text += pair * value_text_capacity * (DV * LOW_WIDTH // WORD_BITS)
        text_at += b * text_capacity
        for i in range(tl.maximum(start, 0), tl.minimum(stop, text_tiles)):
            slot = i * N + tile_n
            position = tl.load(text_at + slot, mask=slot < text_end, other=-1)
            valid = (position >= 0) & (position < stored) & ((position < held) | (position >= end))
            valid = valid & (tl.load(classes + position, mask=valid, other=0) == TEXT)
            k = text_tile(key_codes, key_range, key_text, position, slot, valid,
                          D, DP, BITS, LOW, LOW_WIDTH, KEY_GROUPS)  # fmt: skip
            if KEY_BLOCKS:
                k += means_at(key_means, block_of, position, valid, D, DP)
            k = rounded(k, KEY_ROUND, DOT)
            if VALUE_TEXT:
                v = text_tile(value_codes, value_range, value_text, position, slot, valid,
                              DV, DVP, BITS, LOW, LOW_WIDTH, VALUE_GROUPS)  # fmt: skip
            else:
                v = code_tile(value_codes, value_range, position, valid,
                              DV, DVP, BITS, VALUE_GROUPS, VALUE_SYMMETRIC, False)  # fmt: skip
            v = rounded(v, VALUE_ROUND, DOT)
            top, total, acc = step(queries, k, v, position, valid, token, mask_row, row_valid, mask_t, scale, softcap,
                                   top, total, acc, MASK, IS_CAUSAL, CAPPED)  # fmt: skip
        start, stop = start - text_tiles, stop - text_tiles
    else:
        start, stop = start - body_tiles, stop - body_tiles

    if PIVOTS > 0:
        for i in range(tl.maximum(start, 0), tl.minimum(stop, pivot_tiles)):
            slot = i * N + tile_n
            position = tl.load(pivot_at + b * PIVOTS + slot, mask=slot < PIVOTS, other=-1)
            valid = (position >= 0) & (position < stored) & ((position < held) | (position >= end))
            valid = valid & (tl.load(classes + position, mask=valid, other=0) == PIVOT)
            k = exact_tile(key_pivots + pair * PIVOTS * D, slot, valid, D, D, DP, KEY_ROUND, DOT)
            v = exact_tile(value_pivots + pair * PIVOTS * DV, slot, valid, DV, DV, DVP, VALUE_ROUND, DOT)
            top, total, acc = step(queries, k, v, position, valid, token, mask_row, row_valid, mask_t, scale, softcap,
                                   top, total, acc, MASK, IS_CAUSAL, CAPPED)  # fmt: skip
        start, stop = start - pivot_tiles, stop - pivot_tiles

    if WINDOW > 0:
        for i in range(tl.maximum(start, 0), tl.minimum(stop, ring_tiles)):
            slot = i * N + tile_n
            valid = (slot < WINDOW) & (slot < end)
            position = slot + tl.maximum(end - 1 - slot, 0) // WINDOW * WINDOW  # the newest that the slot may hold
            valid = valid & (position >= held) & (position < stored)
            k = exact_tile(key_ring + pair * WINDOW * D, slot, valid, D, D, DP, KEY_ROUND, DOT)
            v = exact_tile(value_ring + pair * WINDOW * DV, slot, valid, DV, DV, DVP, VALUE_ROUND, DOT)
            top, total, acc = step(queries, k, v, position, valid, token, mask_row, row_valid, mask_t, scale, softcap,
                                   top, total, acc, MASK, IS_CAUSAL, CAPPED)  # fmt: skip
        start, stop = start - ring_tiles, stop - ring_tiles

    if FRESH:
        fresh_key += b * fk_b + h * fk_h
        fresh_value += b * fv_b + h * fv_h
        for i in range(tl.maximum(start, 0), tl.minimum(stop, fresh_tiles)):
            slot = i * N + tile_n
            position = first + slot
            valid = (slot < fresh_tokens) & (position < seen)
            k = exact_tile(fresh_key, slot, valid, fk_t, D, DP, KEY_ROUND, DOT)
            v = exact_tile(fresh_value, slot, valid, fv_t, DV, DVP, VALUE_ROUND, DOT)
            top, total, acc = step(queries, k, v, position, valid, token, mask_row, row_valid, mask_t, scale, softcap,
                                   top, total, acc, MASK, IS_CAUSAL, CAPPED)  # fmt: skip

    # row of [B * Hq * q]; a row that saw nothing is 0, as torch's
    place = (b * heads * SHARE + head) * tokens + token
    if SPLIT:
        place += split.to(tl.int64) * (tl.num_programs(0) // tiles // splits) * SHARE * tokens
        tl.store(maxima + place, top, mask=row_valid)
        tl.store(sums + place, total, mask=row_valid)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    channel = tl.arange(0, DVP)
    stored = out + place[:, None] * DV + channel[None, :]
    tl.store(stored, acc.to(out.dtype.element_ty), mask=row_valid[:, None] & (channel < DV)[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def combine(parts, maxima, sums, out, rows, splits, DV: tl.constexpr, DVP: tl.constexpr, SPLITS: tl.constexpr):
    """Grid (rows,): one row of B * Hq * q. parts [splits, rows, DV], maxima, sums [splits, rows] -> out [rows, DV]."""
    row = tl.program_id(0).to(tl.int64)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, DVP)
    made = split < splits
    place = split.to(tl.int64) * rows + row
    top = tl.load(maxima + place, mask=made, other=float("-inf"))
    highest = tl.max(top, 0)
    weight = tl.exp2((top - tl.where(highest == float("-inf"), 0.0, highest)) * LOG2E)
    total = tl.sum(weight * tl.load(sums + place, mask=made, other=0.0), 0)
    inside = made[:, None] & (channel < DV)[None, :]
    part = tl.load(parts + place[:, None] * DV + channel[None, :], mask=inside, other=0.0)
    result = tl.sum(weight[:, None] * part, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * DV + channel, result.to(out.dtype.element_ty), mask=channel < DV)
