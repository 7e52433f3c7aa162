"""rotate, rotate_keys, rotate_queries as Triton kernels; `rotated`, the device function that the append kernel shares.

x       [..., D] float16 | bfloat16 | float32 of any strides, D a multiple of 8 up to 256
affine  [B, 2, Ha, D] float16: c, s; heads of x may be a multiple of Ha (GQA queries); a third row is an order of
        channels, and the transform is that of the parts of kernels/uneven.py
->      [..., D] in x's dtype, contiguous; the meaning is kernels/rotate.py

The rotation is a product with H's signs on tensor cores. Signs are exact in 16 bits, so x is what must not lose digits:
16-bit x goes in as it is; a float32 tile t is cut into bfloat16 terms, t = t0 + t1 (16 digits: t came of 16-bit x) or
t0 + t1 + t2 (24 digits: float32 x). Sums are float32, scaled by order**-0.5 at the end (so |x| must stay below 1e36).
Where the map has an order of channels, rows are read in it.

Grid (heads / share, token tiles / steps). A program's rows are `share` heads times `tile` tokens: a decode step has one
token, and many heads fill the 16 rows that a product needs at least.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from akvq_fx.kernels import uneven
from akvq_fx.kernels.layout import ORDER as ROW_OF_ORDER
from akvq_fx.kernels.rotate import order_of

MAX_DIM = 256  # a program holds whole rows
MIN_DOT = 16  # tl.dot takes no side below it
MAX_TILE = 32  # tokens; with 64 rows Triton 3.6 takes wgmma on an H100, and the append kernel's codes came out wrong
MAX_DEPTH = 64  # channels of a product: more of them do not fit the registers next to the sums
PROGRAMS = 2048  # with more programs than these, each loops over several tiles and makes the signs once
MAX_STEPS = 8
KEYS, QUERIES = 1, 2  # which affine map
ORDER_ROW = tl.constexpr(ROW_OF_ORDER)
HALF_ROOT = tl.constexpr(0.5**0.5)  # blocks of the middle part are twice as long as those of the first
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Plan(NamedTuple):
    """How rows are cut into programs: heads a tile, tokens a tile, tiles a program."""

    share: int
    tile: int
    steps: int
    warps: int

    def grid(self, leads: int, tokens: int) -> tuple[int, int]:
        return triton.cdiv(leads, self.share), triton.cdiv(tokens, self.tile * self.steps)


def plan_of(leads: int, tokens: int, head_dim: int) -> Plan:
    """leads = batch * heads."""
    wide = triton.next_power_of_2(head_dim)
    tile = min(triton.next_power_of_2(tokens), MAX_TILE)
    share = max(1, MIN_DOT // tile)
    programs = triton.cdiv(leads, share) * triton.cdiv(tokens, tile)
    warps = (4 if wide <= 128 else 8) if tile == MAX_TILE else max(1, min(8, wide // 16))
    return Plan(share, tile, max(1, min(MAX_STEPS, programs // PROGRAMS)), warps)


def padded(head_dim: int) -> int:
    return max(MIN_DOT, triton.next_power_of_2(head_dim))


def refusal(x: Tensor) -> str:
    """Why these kernels cannot take x; "" where they can."""
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, accepted: float16, bfloat16, float32"
    if x.shape[-1] > MAX_DIM:
        return f"the head dim is {x.shape[-1]}, accepted: up to {MAX_DIM}"
    return ""


@triton.jit
def block_of(channel, D: tl.constexpr, ORDER: tl.constexpr):
    """Of channels of an uneven layout, whose first part has blocks of ORDER: number of the block, place in it."""
    FIRST: tl.constexpr = D // 4
    within = tl.where(channel < FIRST, channel, channel - FIRST)
    size = tl.where(channel < FIRST, ORDER, 2 * ORDER)
    block = tl.where(channel < FIRST, within // size, D + within // size)
    last = channel >= 3 * FIRST
    return tl.where(last, 2 * D + channel, block), tl.where(last, 0, within % size)


@triton.jit
def signs(rows, columns, D: tl.constexpr, ORDER: tl.constexpr, UNEVEN: tl.constexpr, TERM: tl.constexpr):
    """H's entries times sqrt(order): +-1 by the parity of i & j within a block, 0 between blocks."""
    if UNEVEN:
        row_block, i = block_of(rows, D, ORDER)
        column_block, j = block_of(columns, D, ORDER)
        parity = i[:, None] & j[None, :]
    else:
        parity = rows[:, None] & columns[None, :] & (ORDER - 1)
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    sign = 1 - 2 * (parity & 1)
    if UNEVEN:
        sign = tl.where(row_block[:, None] == column_block[None, :], sign, 0)
    elif ORDER < D:
        sign = tl.where(rows[:, None] // ORDER == columns[None, :] // ORDER, sign, 0)
    return sign.to(tl.float32).to(TERM)


@triton.jit
def head_rows(leads, SHARE: tl.constexpr, TILE: tl.constexpr):
    """Of each row of a tile: batch * heads + head, its place among the tile's tokens, whether the head exists.

    The first is a scalar where the tile is of one head.
    """
    row = tl.arange(0, SHARE * TILE)
    if SHARE == 1:
        lead = tl.program_id(0)
    else:
        lead = tl.program_id(0) * SHARE + row // TILE
    return lead, row % TILE, lead + row * 0 < leads


@triton.jit
def affine_rows(affine, lead, heads, owners, leads, D: tl.constexpr, UNEVEN: tl.constexpr, SHARE: tl.constexpr):
    """Pointers to c of each row's head, [rows], or [1] where the tile is of one head; and which of them exist."""
    if SHARE == 1:
        lead += tl.zeros([1], tl.int32)
    owner = lead % heads // (heads // owners)
    ROWS: tl.constexpr = 3 if UNEVEN else 2
    return affine + (lead // heads * ROWS * owners + owner).to(tl.int64) * D, lead < leads


@triton.jit
def add_product(
    total, first, x, step, live, affine, has_affine, plane,
    D: tl.constexpr, DP: tl.constexpr, ORDER: tl.constexpr, DEPTH: tl.constexpr, UNEVEN: tl.constexpr,
    MAP: tl.constexpr, TERMS: tl.constexpr, TERM: tl.constexpr,
):  # fmt: skip
    """total + what channels first .. first + DEPTH of the mapped rows add to the signed sums."""
    k = first + tl.arange(0, DEPTH)
    channel = k[None, :]
    if UNEVEN:
        real = has_affine[:, None] & (k < D)[None, :]
        where = affine[:, None] + ORDER_ROW * plane + k[None, :]
        channel = tl.load(where, mask=real, other=0).to(tl.int32)
    rest = tl.load(x[:, None] + channel * step, mask=live[:, None] & (k < D)[None, :], other=0)
    matrix = signs(k, tl.arange(0, DP), D, ORDER, UNEVEN, TERM)
    if MAP:
        real = has_affine[:, None] & (k < D)[None, :]
        rest = rest.to(tl.float32)
        gain = tl.load(affine[:, None] + plane + channel, mask=real, other=1).to(tl.float32)
        if MAP == 1:
            rest -= tl.load(affine[:, None] + channel, mask=real, other=0).to(tl.float32)
            gain = tl.div_rn(tl.full(gain.shape, 1.0, tl.float32), gain)
        rest *= gain
    if TERMS == 1:
        total = tl.dot(rest.to(TERM), matrix, total, input_precision="ieee")
    else:
        term = rest.to(tl.bfloat16)
        total = tl.dot(term.to(TERM), matrix, total, input_precision="ieee")
        for _ in tl.static_range(TERMS - 1):
            rest -= term.to(tl.float32)
            term = rest.to(tl.bfloat16)
            total = tl.dot(term.to(TERM), matrix, total, input_precision="ieee")
    return total


@triton.jit
def rotated(
    x, step, live, affine, has_affine, plane,
    D: tl.constexpr, DP: tl.constexpr, ORDER: tl.constexpr, DEPTH: tl.constexpr, UNEVEN: tl.constexpr,
    MAP: tl.constexpr, TERMS: tl.constexpr, TERM: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """H((x - c) * gain) of rows at pointers x [ROWS], -> [ROWS, DP] float32; plane = numbers from c to s."""
    total = tl.zeros([ROWS, DP], tl.float32)
    if DP <= 128:  # unrolled, so that the compiler makes the signs before the loop over tiles
        for first in tl.static_range(0, DP, DEPTH):
            total = add_product(
                total, first, x, step, live, affine, has_affine, plane, D, DP, ORDER, DEPTH, UNEVEN, MAP, TERMS, TERM
            )
    else:  # signs of all channels would take 128 KiB of shared memory: more than most GPUs have
        for first in range(0, DP, DEPTH):
            total = add_product(
                total, first, x, step, live, affine, has_affine, plane, D, DP, ORDER, DEPTH, UNEVEN, MAP, TERMS, TERM
            )
    if UNEVEN:
        FIRST: tl.constexpr = D // 4
        channel = tl.arange(0, DP)
        norm = tl.where(channel < FIRST, NORM, tl.where(channel < 3 * FIRST, NORM * HALF_ROOT, 1.0))
        total *= norm[None, :]
    else:
        total *= NORM
    return total


@triton.jit
def rotate_kernel(
    x, affine, out, heads, owners, leads, tokens, steps, stride_b, stride_h, stride_t, stride_d,
    D: tl.constexpr, DP: tl.constexpr, ORDER: tl.constexpr, DEPTH: tl.constexpr, UNEVEN: tl.constexpr,
    MAP: tl.constexpr, TERMS: tl.constexpr, TERM: tl.constexpr, NORM: tl.constexpr,
    SHARE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, DP)
    lead, place, exists = head_rows(leads, SHARE, TILE)
    rows = x + (lead // heads).to(tl.int64) * stride_b + (lead % heads).to(tl.int64) * stride_h
    maps, has_map = rows, exists
    if MAP:
        maps, has_map = affine_rows(affine, lead, heads, owners, leads, D, UNEVEN, SHARE)
    for step in range(steps):
        token = (tl.program_id(1) * steps + step) * TILE + place
        live = exists & (token < tokens)
        y = rotated(
            rows + token.to(tl.int64) * stride_t, stride_d, live, maps, has_map, owners * D,
            D, DP, ORDER, DEPTH, UNEVEN, MAP, TERMS, TERM, NORM, SHARE * TILE,
        )  # fmt: skip
        slots = (lead.to(tl.int64) * tokens + token) * D
        where = out + slots[:, None] + columns[None, :]
        tl.store(where, y.to(out.dtype.element_ty), mask=live[:, None] & (columns < D)[None, :])


COMPILED = isinstance(rotate_kernel, triton.JITFunction)  # else Triton's interpreter, whose products know no bfloat16
TERM_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.bfloat16}


def product_type(dtype: torch.dtype = torch.bfloat16) -> tl.dtype:
    """What tl.dot multiplies where numbers of dtype go in as 16 bits."""
    return TERM_TYPES[dtype] if COMPILED else tl.float32


def rotation_constants(dtype: torch.dtype, head_dim: int, kind: int, ordered: bool = False) -> dict:
    """The compile-time arguments of `rotated`. kind: 0, KEYS or QUERIES; ordered: the map has an order of channels."""
    order, wide = order_of(head_dim), padded(head_dim)
    if ordered:
        order = uneven.blocks(uneven.parts(head_dim)[0])[0]
    terms = 3 if dtype == torch.float32 else 2 if kind else 1
    return dict(
        D=head_dim,
        DP=wide,
        ORDER=order,
        DEPTH=min(wide, MAX_DEPTH),
        UNEVEN=ordered,
        MAP=kind,
        TERMS=terms,
        TERM=product_type(dtype if terms == 1 else torch.bfloat16),
        NORM=order**-0.5,
    )


def check_affine(op: str, x: Tensor, affine: Tensor, ordered: bool) -> None:
    """Raises ValueError where affine is no map of x, with an order of channels where it is `ordered`."""
    (B, H, _, D), rows = x.shape, 3 if ordered else 2
    fits = affine.dim() == 4 and (affine.shape[0], affine.shape[1], affine.shape[3]) == (B, rows, D)
    if not fits or affine.dtype != torch.float16 or H % affine.shape[2]:
        raise ValueError(
            f"akvq::{op}: affine is {affine.dtype} {list(affine.shape)}, accepted: float16 [{B}, {rows}, heads, {D}] "
            f"with heads that divide {H}"
        )


def launch(op: str, x: Tensor, affine: Tensor | None, kind: int) -> Tensor:
    reason = refusal(x)
    if reason:
        raise ValueError(f"akvq::{op}: {reason}")
    ordered = affine is not None and affine.dim() > 1 and affine.shape[1] > ROW_OF_ORDER
    constants, out = rotation_constants(x.dtype, x.shape[-1], kind, ordered), x.new_empty(x.shape)
    x = x[(None,) * (4 - x.dim())] if x.dim() <= 4 else x.flatten(0, x.dim() - 4)
    if affine is not None:
        check_affine(op, x, affine, ordered)
        affine = affine.contiguous()
    B, H, T, D = x.shape
    if not x.numel():
        return out
    plan, owners = plan_of(B * H, T, D), H if affine is None else affine.shape[2]
    with torch.cuda.device_of(x):
        rotate_kernel[plan.grid(B * H, T)](
            x, affine, out, H, owners, B * H, T, plan.steps, *x.stride(),
            **constants, SHARE=plan.share, TILE=plan.tile, num_warps=plan.warps, num_stages=1,
        )  # fmt: skip
    return out


def rotate(x: Tensor) -> Tensor:
    return launch("rotate", x, None, 0)


def rotate_keys(k: Tensor, affine: Tensor) -> Tensor:
    return launch("rotate_keys", k, affine, KEYS)


def rotate_queries(q: Tensor, affine: Tensor) -> Tensor:
    return launch("rotate_queries", q, affine, QUERIES)
