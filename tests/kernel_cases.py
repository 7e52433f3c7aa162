"""Shared by the kernel tests: tolerances, named layouts, random caches, and what reading a cache must give."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from akvq_fx.kernels import blocks, cpp
from akvq_fx.kernels import cache as ops
from akvq_fx.kernels.blocks import ENOUGH
from akvq_fx.kernels.layout import BLOCK, PADDING, TEXT, VISION, Layout, blocks_of, pack_bits, unpack_bits
from akvq_fx.kernels.quantizer import dequantize, quantize
from akvq_fx.packed_kv import PackedKV
from akvq_fx.storage import Storage

# Largest error allowed, as a share of the largest expected number (or of 1 where all are smaller).
TOLERANCE = {
    torch.float64: 1e-12,  # 53 bits: 256-term sums at 2**-53 each, 40 times over
    torch.float32: 5e-5,  # 24 bits: 256-term sums at 2**-24 each, 3 times over
    torch.float16: 4e-3,  # 11 bits: probabilities, products and the result each rounded at 2**-11, twice over
    torch.bfloat16: 3e-2,  # 8 bits: the same at 2**-8
}

# Hypothesis runs 1 / FEWER of a test's examples in Triton's interpreter, where one takes up to seconds
FEWER = 1 if torch.cuda.is_available() else 3

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32 - 1)

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
LAYOUTS = {
    "2bit": Layout(16, f32, body_bits=2, body_clip=0.8, window=5, pivots=2),
    "2bit-f16-rotated": Layout(24, f16, body_bits=2, window=3, pivots=1, rotated=True),
    "2bit-groups": Layout(40, f32, body_bits=2, window=3, pivots=1, group=8),
    "2bit-no-overlay": Layout(16, f32, body_bits=2),
    "2bit-symmetric": Layout(16, f32, body_bits=2, window=5, pivots=2, rotated=True, symmetric=True),
    "2bit-uneven": Layout(24, f32, 2, window=5, pivots=2, rotated=True, affine=True, symmetric=True, uneven=True),
    "2bit-blocks": Layout(16, f32, body_bits=2, window=5, pivots=2, blocks=True),
    "2bit-moved": Layout(16, f32, body_bits=2, window=5, pivots=2, blocks=True, moved=True),
    "2bit-text4-blocks": Layout(16, f32, body_bits=2, text_bits=4, window=5, pivots=2, body_clip=0.8, blocks=True),
    "2bit-text4-bf16": Layout(16, bf16, body_bits=2, text_bits=4, window=3, body_clip=0.8),
    "4bit-text8-pivots": Layout(8, f32, body_bits=4, text_bits=8, pivots=2),
    "4bit-affine": Layout(24, f32, body_bits=4, window=3, rotated=True, affine=True),
    "8bit-bf16": Layout(40, bf16, body_bits=8, window=3, pivots=1),
    "lossless-f16": Layout(16, f16),
    "lossless-rotated-affine": Layout(16, f32, rotated=True, affine=True),
}


def randn(*shape, seed: int = 0, dtype: torch.dtype = f32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(name: str, expected: Tensor, actual: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal within TOLERANCE of dtype (actual's where omitted)."""
    assert expected.shape == actual.shape, f"{name}: expected {list(expected.shape)}, got {list(actual.shape)}"
    error = (expected.double() - actual.double()).abs()
    size = expected.double().abs()
    limit = TOLERANCE[dtype or actual.dtype] * max(1.0, size.max().item())
    rms = (error.square().mean().sqrt() / size.square().mean().sqrt().clamp_min(1e-30)).item()
    assert error.max() <= limit, f"{name}: max error {error.max().item():.3g} > {limit:.3g}, RMS ratio {rms:.3g}"


def assert_same(name: str, expected: Tensor, actual: Tensor) -> None:
    """Equal to the bit, NaN equal to NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")


@dataclasses.dataclass
class Case:
    """A prompt and what is known about its tokens."""

    layout: Layout
    x: Tensor  # [B, H, T, D]
    classes: Tensor  # [B, T] uint8
    pivots: Tensor | None  # [B, P] int32
    affine: Tensor | None  # [B, 2, H, D]
    capacity: int

    @property
    def length(self) -> int:
        return self.x.shape[2]

    def pack(self) -> list[Tensor]:
        at = torch.arange(self.length)
        args = (self.x, at, self.classes, self.pivots, self.affine, self.capacity, str(self.layout))
        return torch.ops.akvq.pack(*args)

    def empty(self) -> list[Tensor]:
        """Buffers of the case with nothing written but the affine map."""
        B, H = self.x.shape[:2]
        cache = self.layout.allocate(B, H, self.capacity, self.capacity if self.layout.text_bits else 0)
        if self.layout.affine:
            ops.named(cache, self.layout)["affine"].copy_(self.affine)
        return cache

    def expected(self, means: Tensor | None = None) -> Tensor:
        """What the packed prompt reads as in the stored space, token by token; means: as its cache has them."""
        ring = range(max(0, self.length - self.layout.window), self.length)
        return expected_tokens(self.layout, self.x, self.classes, self.pivots, ring, means)


def expected_tokens(
    layout: Layout, x: Tensor, classes: Tensor, pivots: Tensor | None, ring, means: Tensor | None = None
) -> Tensor:
    """x [B, H, T, D] with every token at its due bits: ring and pivots exact, text at text bits, else body bits.

    means  of its blocks where they are not a prompt's to the last bit, [B, H, n, D]
    """
    if layout.lossless:
        return x.to(layout.dtype)
    body, means_of_tokens = x, torch.zeros_like(x)
    if layout.blocks:
        means = block_means(x, classes, layout) if means is None else means
        means_of_tokens = means.repeat_interleave(BLOCK, 2)[:, :, : x.shape[2]]
        body = x.float() - means_of_tokens.float()
    codes, range_ = ops.encode(body, layout)
    out = ops.decode(pack_bits(codes, layout.body_bits), range_, layout)
    out = (out + means_of_tokens).to(layout.dtype)
    text = None
    if layout.text_bits:
        bits = layout.text_bits
        text = dequantize(*quantize(body, bits, layout.text_clip, layout.groups), bits, layout.code_dtype)
        text = (text + means_of_tokens).to(layout.dtype)
    for row in range(x.shape[0]):
        for t in range(x.shape[2]):
            exact = (layout.window and t in ring) or (
                layout.pivots
                and pivots is not None
                and t in pivots[row].tolist()
                and (classes is None or classes[row, t] != PADDING)
            )
            if exact:
                out[row, :, t] = x[row, :, t]
            elif text is not None and classes[row, t] == TEXT:
                out[row, :, t] = text[row, :, t]
    return out


def block_means(x: Tensor, classes: Tensor | None, layout: Layout, writes: list[int] | None = None) -> Tensor:
    """The mean of each block [B, H, n, D] that x [B, H, T, D] leaves, token by token (kernels/blocks.py); writes: the
    tokens of each write, None for one prompt."""
    B, H, T, D = x.shape
    out, begin = torch.zeros(B, H, blocks_of(T), D, dtype=layout.dtype), 0
    for size in [T] if writes is None else writes:
        end, first = begin + size, blocks_of(begin)
        for block in range(first, blocks_of(end)):
            last = min((block + 1) * BLOCK, end)
            newest = range(max(0, last - BLOCK, begin - layout.window), last)
            for row in range(B):
                known = [t for t in newest if classes is None or classes[row, t] != PADDING]
                if len(known) >= ENOUGH:
                    mean = x[row, :, known].float().nan_to_num(0.0, 0.0, 0.0).mean(1)
                    out[row, :, block] = mean.to(layout.dtype)
                elif first:
                    out[row, :, block] = out[row, :, first - 1]
        begin = end
    return out


def drifting(T: int, B: int = 1, H: int = 2, D: int = 16, seed: int = 0, turn: int = 6000) -> Tensor:
    """Tokens [B, H, T, D] of unit variance around a mean of length 8 that turns once in `turn` tokens."""
    x, angle = randn(B, H, T, D, seed=seed), torch.arange(T) * 2 * torch.pi / turn
    x[..., 0] += 8 * angle.cos()
    x[..., 1] += 8 * angle.sin()
    return x


def assert_written_in_blocks(
    cache: list[Tensor], done: list[Tensor], x: Tensor, at: Tensor, classes: Tensor | None, pivots: Tensor | None,
    layout: Layout,
) -> None:  # fmt: skip
    """`done`, what a kernel made of `cache` by writing x, has the reference's means, which are sums in another order,
    and with its own means all else as the reference writes it."""
    due, means = [buffer.clone() for buffer in cache], ops.named(done, layout)["means"]
    begun = [buffer.clone() for buffer in cache]
    blocks.begin_blocks(ops.named(begun, layout), x, at, ops.kinds_of(x, classes), layout)
    expected = ops.named(begun, layout)["means"]
    assert_same("unwritten means", expected.isnan(), means.isnan())
    assert_close("means", expected.nan_to_num(), means.nan_to_num())
    with mock.patch.object(blocks, "begin_blocks", lambda b, *_: b["means"].copy_(means)):
        ops.write(due, x, at, classes, pivots, layout)
    assert_caches_alike(due, done, layout)


def moved(cache, layout, T):
    """The buffers after tokens moved: rows without some of their first tokens, each row without others."""
    view = PackedKV.view_of(Storage(layout, [buffer.clone() for buffer in cache], T, T, None), T)
    if layout.text_bits:
        view.storage.compact_text(T)
    rows = [torch.cat([view[row : row + 1, :, :4], view[row : row + 1, :, 4 + 9 * row : T - 5]], 2) for row in (0, 1)]
    short = rows[0].shape[2] - rows[1].shape[2]
    joined = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (0, 0, short, 0))])
    return joined.storage.buffers, joined.layout_of, joined.shape[2]


def skip_without_a_compiler() -> None:
    """Of C++, for the kernels of the CPU."""
    try:
        cpp.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))


def random_affine(B: int, H: int, D: int, seed: int = 0, uneven: bool = False) -> Tensor:
    """Centres of order 1 and gains that are powers of two, so that s * (1/s) is exactly 1; for uneven layouts an order
    of channels."""
    gain = 2.0 ** randn(B, H, D, seed=seed + 1).mul(2).round().clamp(-4, 4)
    order = [randn(B, H, D, seed=seed + 2).argsort(-1)] if uneven else []
    return torch.stack([randn(B, H, D, seed=seed), gain, *order], 1).half()


@st.composite
def layouts(
    draw,
    head_dims=(8, 16, 24, 40),
    dtypes=(f32, f16, bf16),
    shares=(False, True),
    symmetric=(False, True),
    blocks=(False,),
) -> Layout:
    bits = draw(st.sampled_from((2, 4, 8, 16)))
    overlays = {}
    if bits != 16:
        overlays = {
            "text_bits": draw(st.sampled_from((0, 0, *(more for more in (4, 8) if more > bits)))),
            "window": draw(st.sampled_from((0, 1, 5, 40))),
            "pivots": draw(st.sampled_from((0, 1, 3))),
        }
    symmetric = bits in (2, 4) and not overlays["text_bits"] and draw(st.sampled_from(symmetric))
    uneven = symmetric and bits == 2 and draw(st.booleans())
    shares_classes = draw(st.sampled_from(shares))
    return Layout(
        draw(st.sampled_from(head_dims)),
        draw(st.sampled_from(dtypes)),
        body_bits=bits,
        body_clip=1.0 if symmetric else draw(st.sampled_from((0.8, 1.0))),
        symmetric=symmetric,
        uneven=uneven,
        text_clip=draw(st.sampled_from((0.9, 1.0))) if overlays.get("text_bits") else 1.0,
        group=draw(st.sampled_from((8, 128))),
        rotated=uneven or draw(st.booleans()),
        affine=uneven or draw(st.booleans()),
        shares_classes=shares_classes,
        blocks=bits != 16 and not shares_classes and draw(st.sampled_from(blocks)),
        **overlays,
    )


@st.composite
def cases(draw, layout=None, batch=None, heads=None, length=None, blocks=(False,), longest=23) -> Case:
    """A random prompt; batch, heads and length may be given to match another case."""
    layout = (
        draw(layouts(shares=(False,) if any(blocks) else (False, True), blocks=blocks)) if layout is None else layout
    )
    B = draw(st.integers(1, 3)) if batch is None else batch
    H = draw(st.integers(1, 3)) if heads is None else heads
    T = draw(st.integers(1, longest)) if length is None else length
    classes = draw(st.lists(st.sampled_from((VISION, TEXT, PADDING)), min_size=B * T, max_size=B * T))
    pivots = None
    if layout.pivots:
        some = st.lists(st.integers(0, T - 1), max_size=layout.pivots, unique=True)
        rows = [draw(some) for _ in range(B)]
        pivots = torch.tensor([row + [-1] * (layout.pivots - len(row)) for row in rows], dtype=torch.int32)
    seed = draw(seeds)
    return Case(
        layout,
        randn(B, H, T, layout.head_dim, seed=seed, dtype=layout.dtype),
        torch.tensor(classes, dtype=torch.uint8).view(B, T),
        pivots,
        random_affine(B, H, layout.head_dim, seed, layout.uneven) if layout.affine else None,
        T + draw(st.integers(0, 7)),
    )


def case_of(layout: Layout, B: int = 2, H: int = 2, T: int = 11, capacity: int = 13, seed: int = 0) -> Case:
    """A fixed prompt for one layout, with every token class in it."""
    classes = torch.tensor([VISION, TEXT, TEXT, VISION, PADDING], dtype=torch.uint8).repeat(B, T)[:, :T]
    pivots = torch.arange(B)[:, None] + torch.arange(layout.pivots) * 3
    pivots[0, -1:] = -1
    pivots[pivots >= T] = -1
    x = randn(B, H, T, layout.head_dim, seed=seed, dtype=layout.dtype)
    affine = random_affine(B, H, layout.head_dim, seed, layout.uneven) if layout.affine else None
    return Case(layout, x, classes, pivots.to(torch.int32) if layout.pivots else None, affine, capacity)


@dataclasses.dataclass
class Chunk:
    """Tokens x [B, H, q, D] that follow the first `start` of a packed prompt, the rest of which was cropped."""

    case: Case
    start: int
    x: Tensor

    @property
    def end(self) -> int:
        return self.start + self.x.shape[2]

    @property
    def at(self) -> Tensor:
        return torch.arange(self.start, self.end)

    def cache(self, appended: bool) -> list[Tensor]:
        """The prompt, with the chunk written to it or not."""
        cache = self.case.pack()
        if appended:
            ops.append(cache, self.x, self.at, None, None, str(self.case.layout))
        return cache

    def expected(self, appended: bool) -> Tensor:
        """What the chunk's queries read, [B, H, end, D]: the chunk exactly, and of the prompt's ring what the chunk
        left of it."""
        case, layout = self.case, self.case.layout
        ends = (case.length, self.end) if appended else (case.length,)
        ring = range(max(0, *(end - layout.window for end in ends)), case.length)
        stored = expected_tokens(layout, case.x, case.classes, case.pivots, ring)
        return torch.cat([stored[:, :, : self.start], self.x.to(layout.dtype)], 2)


def chunk_of(case: Case, start: int, tokens: int, seed: int = 0, spare: int = 2) -> Chunk:
    """A random chunk, with `spare` slots of capacity behind it."""
    B, H, T, D = case.x.shape
    x = randn(B, H, tokens, D, seed=seed, dtype=case.layout.dtype) * 2
    return Chunk(dataclasses.replace(case, capacity=max(T, start + tokens) + spare), start, x)


@st.composite
def splits(draw, total: int) -> list[int]:
    """Sizes of consecutive chunks that add up to total."""
    cuts = sorted({0, total, *draw(st.lists(st.integers(0, total), max_size=4))})
    return [after - before for before, after in zip(cuts, cuts[1:], strict=False)]


def poison(cache: list[Tensor], layout: Layout, length: int) -> list[Tensor]:
    """A copy with NaN or garbage in every slot that the first `length` tokens did not write."""
    cache = [buffer.clone() for buffer in cache]
    b = ops.named(cache, layout)
    junk = lambda t: torch.full_like(t, torch.nan if t.is_floating_point() else 0x5A)
    if "classes" in b:
        b["classes"][:, length:] = junk(b["classes"])[:, length:]
    b["codes"][:, :, length:] = junk(b["codes"])[:, :, length:]
    if "range" in b:
        b["range"][:, :, length:] = junk(b["range"])[:, :, length:]
    if "means" in b:
        b["means"][:, :, blocks_of(length) :] = torch.nan
    if "ring" in b:
        b["ring"][:, :, length:] = junk(b["ring"])[:, :, length:]
    for positions, values in (("pivot_at", ("pivots",)), ("text_at", ("text_codes",))):
        for name in values if positions in b else ():
            free = (b[positions] < 0)[:, None, :, None]
            b[name].copy_(torch.where(free, junk(b[name]), b[name]))
    return cache


def assert_caches_same(
    expected: list[Tensor], actual: list[Tensor], layout: Layout, skip: tuple[str, ...] = ()
) -> None:
    for name, e, a in zip(layout.fields, expected, actual, strict=True):
        if name not in skip:
            assert_same(name, e, a)


def assert_caches_alike(
    expected: list[Tensor], actual: list[Tensor], layout: Layout, skip: tuple[str, ...] = ()
) -> None:
    """Same buffers; of a symmetric layout but for what the order of a sum changes: the last bit of a scale, whether one
    that is not finite is infinite or NaN, and in few tokens a code at the edge between two, with which the scale moves.
    Codes are open where the scale is 0, or not finite: then no level reads finite, since none is 0. Means of blocks are
    sums too.
    """
    if layout.blocks and "means" not in skip:
        means, others = (ops.named(cache, layout)["means"] for cache in (expected, actual))
        assert_same("unwritten means", means.isnan(), others.isnan())
        assert_close("means", means.nan_to_num(0.0), others.nan_to_num(0.0))
        skip = (*skip, "means")
    assert_caches_same(expected, actual, layout, (*skip, "codes", "range") if layout.symmetric else skip)
    if layout.symmetric and "codes" not in skip:
        (codes, scales), (others, other_scales) = (coded(cache, layout) for cache in (expected, actual))
        D, G = layout.head_dim, layout.groups
        sizes = torch.tensor([D // 4, D // 2] if layout.uneven else [D // G] * G)
        told = scales.isfinite() & other_scales.isfinite() & ((scales != 0) | (other_scales != 0))
        moved = ((codes - others).abs() * told.repeat_interleave(sizes, -1)).amax(-1)
        assert moved.max() <= 1 and moved.sum() <= 1 + 1e-3 * moved.numel(), f"codes: {int(moved.sum())} tokens differ"
        moved = moved[..., None].expand(scales.shape) > 0
        scales, other_scales = (t.masked_fill(~t.isfinite(), torch.nan) for t in (scales, other_scales))
        torch.testing.assert_close(other_scales[~moved], scales[~moved], rtol=2**-10, atol=2**-24, equal_nan=True)
        torch.testing.assert_close(other_scales[moved], scales[moved], rtol=0.5, atol=2**-24, equal_nan=True)


def coded(cache: list[Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """Codes of the channels that have any, [B, H, C, 3/4 D or D] int32, and scales, of a symmetric layout's buffers."""
    b = ops.named(cache, layout)
    codes = unpack_bits(b["codes"], layout.body_bits)
    if layout.uneven:
        high, low, coarse = codes.split((layout.head_dim // 4, layout.head_dim // 4, layout.head_dim // 2), -1)
        codes = torch.cat([high << 2 | low, coarse], -1)
    return codes, b["range"]
