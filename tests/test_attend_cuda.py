"""attend_cuda: refusals and the launch's arithmetic anywhere; on a GPU, every form of call against the reference in
float64."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from akvq_fx.kernels import attend_cuda
from akvq_fx.kernels.attend import AttendCall
from akvq_fx.kernels.cache import named, read
from akvq_fx.kernels.layout import BLOCK, PIVOT, STATE_BLOCK, TEXT, Layout, blocks_of
from akvq_fx.kernels.rotate import matrix, rotate, rotate_queries
from tests.kernel_cases import case_of, few, randn, random_affine

bf16, f16 = torch.bfloat16, torch.float16
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")
# of the norm: the cache reads as 8 or 11 bits, probabilities meet the codes as bf16 (2**-9 each), averages of many
# tokens are small
RELATIVE = {f16: 8e-3, bf16: 1.2e-2}
SYMMETRIC = {"symmetric": True}
UNEVEN = dict.fromkeys(("symmetric", "uneven", "rotated", "affine"), True)
LEVELS = {  # of keys, of values
    "uneven keys": (UNEVEN, SYMMETRIC),
    "symmetric values": ({}, SYMMETRIC),
    "symmetric": (SYMMETRIC, SYMMETRIC),
    "uneven keys alone": (UNEVEN, {}),
}
BLOCKS = {
    "blocks": ({"blocks": True}, {}),
    "symmetric blocks": (SYMMETRIC | {"blocks": True}, SYMMETRIC),
    "uneven blocks": (UNEVEN | {"blocks": True}, SYMMETRIC),
}
every_level = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)


def struct_fields(name: str, source: str = "attend_cuda.cuh") -> list[str]:
    """Names of the members of a struct in a CUDA source, in order."""
    source = Path(attend_cuda.__file__).with_name(source).read_text()
    body = re.search(rf"struct {name} {{(.*?)\n}};", source, re.S).group(1)
    lines = [line.split("//")[0].strip().rstrip(";") for line in body.splitlines()]
    members = ", ".join(re.sub(r"^(const )?(long long|\w+) ", "", line) for line in lines if line)
    return [member.strip(" *") for member in members.split(",")]


def test_the_structs_here_and_there_have_the_same_members():
    assert struct_fields("Cache") == [name for name, _ in attend_cuda._Cache._fields_]
    assert struct_fields("Params") == [name for name, _ in attend_cuda._Params._fields_]


@given(st.integers(1, 5000), st.integers(1, 200_000), st.integers(1, 160))
@few
def test_splits_are_few_and_keep_warps_busy(blocks, tokens, multiprocessors):
    splits = attend_cuda.splits_for(blocks, tokens, multiprocessors)
    least = 2 * 16 * attend_cuda.DEPTH * attend_cuda.WARPS
    assert 1 <= splits <= attend_cuda.SPLITS_MAX
    assert splits == 1 or tokens // splits >= least


def test_one_long_cache_fills_the_chip():
    assert attend_cuda.splits_for(32, 32768, 132) * 32 > 0.8 * 132 * attend_cuda.BLOCKS


def refusal(q=None, layout=None, values=None, mask=None, is_causal=False, capacity=64, heads=2, **by):
    layout = layout or Layout(64, bf16, body_bits=2, window=8, pivots=2)
    key = layout.allocate(1, heads, capacity, capacity if layout.text_bits else 0)
    q = torch.zeros(1, 4, 1, layout.head_dim, dtype=layout.dtype) if q is None else q
    layouts = layout, values or layout
    return attend_cuda.refusal(AttendCall(q, key, key, 5, mask, None, is_causal, None, None, None, *layouts, **by))


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"layout": Layout(64, bf16, body_bits=4)}, "keys: body_bits is 4, accepted: 2"),
        (
            {"layout": Layout(64, bf16, body_bits=2, text_bits=8)},
            "keys: text_bits is 8, accepted: 0 or 4",
        ),
        (
            {"layout": Layout(64, bf16, body_bits=2), "values": Layout(64, bf16, body_bits=2, text_bits=4)},
            "text_bits of values is 4 and of keys 0, accepted: as the keys or 0",
        ),
        ({"layout": Layout(64, torch.float32, body_bits=2)}, "dtype is torch.float32, accepted: torch.float16 or"),
        ({"q": torch.zeros(1, 4, 1, 64, dtype=f16)}, "queries are torch.float16 and the cache torch.bfloat16"),
        ({"layout": Layout(72, bf16, body_bits=2)}, "head_dim is 72, accepted: 16 to 256 in steps of 16"),
        ({"layout": Layout(64, bf16, body_bits=2, group=8)}, "groups is 8, accepted: 1, 2 or 4"),
        ({"layout": Layout(64, bf16, body_bits=2, pivots=33)}, "pivots is 33, accepted: 0 to 32"),
        ({"values": Layout(64, bf16, body_bits=2, window=4)}, "keys and values differ in window, pivots"),
        (
            {
                "layout": Layout(64, bf16, body_bits=2, text_bits=4),
                "values": Layout(64, bf16, body_bits=2, group=32, symmetric=True),
            },
            "keys and values differ in groups, symmetric",
        ),
        (
            {"layout": Layout(64, bf16, 2), "values": Layout(64, bf16, 2, **UNEVEN)},
            "values are uneven, which only keys can be",
        ),
        (
            {"layout": Layout(64, bf16, 2), "values": Layout(64, bf16, 2, blocks=True)},
            "values have means of blocks, which only keys can have",
        ),
        ({"is_causal": True}, "is_causal"),
        ({"softcap": 30.0}, "softcap is 30.0, accepted: 0"),
        ({"sinks": torch.zeros(4)}, "there are sinks, accepted: none"),
        ({"q": torch.zeros(1, 4, 40, 64, dtype=bf16)}, "80 query rows per KV head, accepted: up to 64"),
        ({"mask": torch.zeros(1, 1, 1, 5, dtype=torch.float64)}, "the mask is torch.float64"),
        ({"q": torch.zeros(1, 4, 0, 64, dtype=bf16)}, "there are no queries"),
        ({"capacity": 16}, "a capacity of 16 tokens, accepted: from 32"),
    ],
)
def test_refuses_with_a_reason(given, reason):
    assert reason in refusal(**given)


def cache_pair(
    key_layout: Layout, B: int, H: int, T: int, capacity: int, value_layout: Layout | None = None, text: float = 0.5
) -> tuple[list, list]:
    """Key and value buffers of T tokens with the same token classes; what was never written is NaN or garbage.

    text: how many of the tokens are text, where layouts tell it apart.
    """
    pair = []
    for seed, layout in enumerate((key_layout, value_layout or key_layout)):
        case = case_of(layout, B, H, T, capacity, seed)
        generator = torch.Generator().manual_seed(B * T)
        case.classes[:] = TEXT
        if key_layout.text_bits:
            case.classes[:] = torch.rand(B, T, generator=generator) < text
        if layout.blocks:  # a mean that turns once in 500 tokens
            angle = torch.arange(T) * 2 * torch.pi / 500
            case.x[..., :2] += 4 * torch.stack([angle.cos(), angle.sin()], -1).to(layout.dtype)
        if case.pivots is not None:
            case.pivots = torch.stack([torch.randperm(T, generator=generator)[: layout.pivots] for _ in range(B)]).int()
        cache = case.pack()
        b = named(cache, layout)
        for name, junk in (("codes", 0x5A5A), ("range", math.nan), ("classes", PIVOT)):
            if name in b:
                b[name].narrow(1 if name == "classes" else 2, T, capacity - T).fill_(junk)
        if layout.text_bits:
            b["text_codes"][:, :, T:] = 0x5A5A
        if layout.window > T:
            b["ring"][:, :, T:] = math.nan
        if layout.blocks:
            b["means"][:, :, blocks_of(T) :] = math.nan
        pair.append([buffer.cuda() for buffer in cache])
    return tuple(pair)


def expected(q, key, value, layout, length, mask, fresh, value_layout=None):
    """SDPA in float64 over the dequantized cache."""
    k, v = read(key, length, layout).double(), read(value, length, value_layout or layout).double()
    if fresh is not None:
        k, v = k.index_copy(2, fresh[2], fresh[0].double()), v.index_copy(2, fresh[2], fresh[1].double())
    if mask is not None:
        mask = mask[..., :length] if mask.dtype == torch.bool else mask[..., :length].double()
    return F.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


SHAPES = {  # batch, KV heads, queries a KV head, query tokens, tokens, capacity, window, pivots
    "one head each": (1, 2, 1, 1, 700, 768, 128, 15),
    "grouped": (2, 2, 4, 1, 300, 384, 128, 15),
    "two tokens": (2, 1, 8, 2, 1000, 1024, 64, 4),
    "sixteen tokens": (1, 2, 1, 16, 130, 256, 16, 0),
    "seven a group, no overlay": (1, 2, 7, 1, 2500, 2560, 0, 0),
    "all in the ring": (2, 3, 1, 1, 70, 128, 128, 15),
    "odd sizes": (2, 1, 1, 3, 65, 65, 5, 2),
    "less than a tile": (1, 2, 1, 1, 20, 64, 128, 15),
    "chunk": (1, 1, 4, 8, 400, 401, 128, 15),
}
KINDS = ("plain", "padded", "float mask", "mask a query", "fresh", "cropped", "chunk", "chunk after a crop")


@gpu
@pytest.mark.parametrize("dtype", (f16, bf16), ids=str)
@pytest.mark.parametrize(
    "head_dim, group", [(16, 128), (64, 32), (80, 128), (96, 128), (128, 128), (256, 128)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(dtype, head_dim, group, shape):
    check_equals_the_reference(dtype, head_dim, group, shape)


@gpu
@pytest.mark.parametrize(
    "dtype, head_dim, group", [(f16, 64, 32), (bf16, 64, 128), (f16, 80, 128), (bf16, 128, 128)], ids=str
)
@pytest.mark.parametrize("value_text", (0, 4), ids=("keys", "keys and values"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reads_the_text_overlay(dtype, head_dim, group, shape, value_text):
    check_equals_the_reference(dtype, head_dim, group, shape, 4, value_text)


@gpu
@every_level
@pytest.mark.parametrize(
    "dtype, head_dim, group",
    [(f16, 16, 128), (f16, 64, 32), (bf16, 64, 128), (bf16, 80, 128), (f16, 128, 128), (bf16, 256, 128)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reads_other_levels(dtype, head_dim, group, shape, levels):
    check_equals_the_reference(dtype, head_dim, group, shape, levels=levels)


LONG = (1, 1, 2, 1, 4500, 4600, 64, 4)  # more than 16 blocks a warp


@gpu
@pytest.mark.parametrize("levels", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize(
    "dtype, head_dim, group", [(f16, 16, 128), (f16, 64, 32), (bf16, 80, 128), (bf16, 128, 128)], ids=str
)
@pytest.mark.parametrize("shape", [*SHAPES.values(), LONG], ids=[*SHAPES, "long"])
def test_adds_what_means_of_blocks_score(dtype, head_dim, group, shape, levels):
    check_equals_the_reference(dtype, head_dim, group, shape, levels=levels)


@gpu
@pytest.mark.parametrize("value_text", (0, 4), ids=("keys", "keys and values"))
@pytest.mark.parametrize("dtype, head_dim, group", [(f16, 64, 32), (bf16, 80, 128), (bf16, 128, 128)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), LONG], ids=[*SHAPES, "long"])
def test_text_of_any_blocks_gains_what_their_means_score(dtype, head_dim, group, shape, value_text):
    check_equals_the_reference(dtype, head_dim, group, shape, 4, value_text, BLOCKS["blocks"])


@gpu
@pytest.mark.parametrize("text", (0.0, 0.02, 1.0))  # 0.02: a tile of text is of more than 16 blocks
def test_little_text_and_nothing_but_text_of_blocks(text):
    check_equals_the_reference(bf16, 64, 128, LONG, 4, 0, BLOCKS["blocks"], text)


@gpu
@pytest.mark.parametrize("levels", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("text_bits", (0, 4), ids=("all alike", "text overlay"))
@pytest.mark.parametrize("shape", [*SHAPES.values(), LONG], ids=[*SHAPES, "long"])
def test_a_token_that_moved_gains_what_the_mean_of_its_block_scores(shape, text_bits, levels):
    if text_bits and "symmetric" in levels[0]:
        pytest.skip("levels of text have minima")
    check_equals_the_reference(bf16, 64, 128, shape, text_bits, 0, levels, move=True)


@gpu
@pytest.mark.parametrize("levels", (BLOCKS["blocks"], BLOCKS["uneven blocks"]), ids=("even", "uneven"))
def test_a_mean_is_read_by_the_tokens_of_its_block(levels):
    """Broken means, behind the tokens or of blocks whose tokens are hidden, do not matter; another one does."""
    layout, value_layout = layouts_of(levels, 64, bf16, window=16)
    key, value = cache_pair(layout, 2, 2, 300, 400, value_layout)
    q, means = randn(2, 2, 1, 64).to(bf16).cuda(), named(key, layout)["means"]
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[:, :, :, 128:192] = False
    mask, rest = mask.cuda(), (None, False, None, None, None, layout, value_layout)
    due = expected(q, key, value, layout, 300, mask, None, value_layout)
    means[:, :, 2] = math.nan
    for splits in (1, 3):
        out = attend_cuda.attend(AttendCall(q, key, value, 300, mask, *rest), splits)
        assert ((out.double() - due).norm() / due.norm()).item() <= RELATIVE[bf16]
        spoilt = attend_cuda.attend(AttendCall(q, key, value, 300, None, *rest), splits)
        assert spoilt.isnan().all()


def layouts_of(levels, head_dim, dtype, body_clip=0.8, **rest) -> tuple[Layout, Layout]:
    """Keys and values; levels: as in LEVELS."""
    clip = lambda given: 1.0 if "symmetric" in given else body_clip
    key, value = (Layout(head_dim, dtype, body_bits=2, body_clip=clip(given), **rest, **given) for given in levels)
    return key, value


def moved(cache, layout):
    """The buffers and the layout with every row's blocks in an order of its own: every token reads as it did."""
    b, block_of, means = named(cache, layout), [], []
    for row in b["means"].cpu():
        place = torch.randperm(row.shape[1])
        block_of.append(place[torch.arange(b["codes"].shape[2]) // BLOCK].int())
        means.append(row[:, place.argsort()])
    b["means"], b["block_of"] = torch.stack(means).cuda(), torch.stack(block_of).cuda()
    b["state"] = torch.cat([b["state"][:STATE_BLOCK], b["state"].new_zeros(1 + bool(layout.text_bits))])
    layout = dataclasses.replace(layout, moved=True)
    return [b[name] for name in layout.fields], layout


def check_equals_the_reference(
    dtype, head_dim, group, shape, text_bits=0, value_text=0, levels=({}, {}), text=0.5, move=False
):
    B, H, share, queries, T, capacity, window, pivots = shape
    overlays = {"window": window, "pivots": pivots, "text_bits": text_bits}
    layout, value_layout = layouts_of(levels, head_dim, dtype, group=group, **overlays)
    value_layout = dataclasses.replace(value_layout, text_bits=value_text, shares_classes=True)
    key, value = cache_pair(layout, B, H, T, capacity, value_layout, text)
    if move:
        key, layout = moved(key, layout)
    if layout.affine:  # as read() takes them
        plain, key_layout = key, layout
    else:  # a field more, which attention does not read
        plain, key_layout = key, dataclasses.replace(layout, rotated=True, affine=True)
        key = [*key, torch.full((B, 3, H, head_dim), math.nan, device="cuda")]
    generator = torch.Generator("cuda").manual_seed(head_dim)
    normal = lambda *size: torch.randn(size, device="cuda", generator=generator).to(dtype)
    uniform = lambda *size: torch.rand(size, device="cuda", generator=generator)
    q = normal(B, H * share, queries, head_dim) * 3
    for kind in KINDS:
        mask, fresh, length = None, None, T
        if kind == "padded":
            mask = uniform(B, 1, 1, T) > 0.3
        elif kind == "float mask":
            mask = torch.where(uniform(B, 1, queries, T) > 0.3, uniform(B, 1, queries, T), -math.inf).to(dtype)
        elif kind == "mask a query":
            mask, length = uniform(B, H * share, queries, capacity) > 0.5, None
        elif kind == "fresh":
            fresh = (
                normal(B, H, queries, head_dim),
                normal(B, H, queries, head_dim),
                torch.arange(T - queries, T).cuda(),
            )
        elif kind == "cropped":
            length = max(1, T - 37)
        elif kind.startswith("chunk"):  # attended before they are appended
            start = min(T if kind == "chunk" else max(0, T - 37), capacity - queries)
            at = torch.arange(start, start + queries).cuda()
            fresh = normal(B, H, queries, head_dim), normal(B, H, queries, head_dim), at
            mask, length = uniform(B, 1, queries, capacity) > 0.5, None
            mask[..., start] = True
        if mask is not None:
            mask[..., T - 1] = True if mask.dtype == torch.bool else 0.5
        tokens = length or (T if fresh is None else int(fresh[2][-1]) + 1)
        due = expected(q, plain, value, layout, tokens, mask, fresh, value_layout)
        for splits in (None, 1, 3):
            args = AttendCall(
                q, key, value, length, mask, None, False, *(fresh or (None,) * 3), key_layout, value_layout
            )
            assert attend_cuda.refusal(args) == ""
            out = attend_cuda.attend(args, splits)
            error = ((out.double() - due).norm() / due.norm()).item()
            assert error <= RELATIVE[dtype], f"{kind}, {splits} splits: {error:.2g}"


@gpu
@pytest.mark.parametrize("head_dim", (16, 48, 64, 80, 96, 128, 192, 256))
@pytest.mark.parametrize("dtype", (f16, bf16), ids=str)
def test_rotates_queries_of_uneven_keys_in_its_own_launch(head_dim, dtype):
    layout, value_layout = layouts_of((UNEVEN, SYMMETRIC), head_dim, dtype, window=16, pivots=3)
    key, value = cache_pair(layout, 2, 2, 301, 321, value_layout)
    affine = named(key, layout)["affine"]
    for heads, tokens in ((2, 1), (6, 3), (10, 2)):
        q = torch.randn(2, heads, tokens, head_dim, device="cuda").to(dtype)
        args = (key, value, 301, None, None, False, None, None, None, layout, value_layout)
        due = expected(rotate_queries(q, affine), key, value, layout, 301, None, None, value_layout)
        for splits in (None, 1, 3):
            call = AttendCall(q, *args, rotate=True)
            assert attend_cuda.refusal(call) == ""
            error = ((attend_cuda.attend(call, splits).double() - due).norm() / due.norm()).item()
            assert error <= RELATIVE[dtype], f"{heads} heads, {splits} splits: {error:.2g}"
        unrotated = attend_cuda.attend(AttendCall(q, *args))
        assert (unrotated.double() - due).norm() / due.norm() > 0.1


@gpu
@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
@pytest.mark.parametrize("affine", (False, True), ids=("rotated", "affine"))
def test_rotates_queries_in_its_own_launch(head_dim, affine):
    layout = Layout(head_dim, bf16, body_bits=2, window=16, pivots=3)
    key, value = cache_pair(layout, 2, 2, 300, 320)
    key_layout = dataclasses.replace(layout, rotated=True, affine=affine)
    maps = [random_affine(2, 2, head_dim).cuda()] if affine else []
    q = torch.randn(2, 6, 3, head_dim, device="cuda", dtype=bf16)
    args = ([*key, *maps], value, 300, None, None, False, None, None, None)
    rotated = rotate_queries(q, maps[0]) if affine else rotate(q)
    due = torch.ops.akvq.attend(rotated, *args, str(key_layout), str(layout))
    out = torch.ops.akvq.attend(q, *args, str(key_layout), str(layout), True)
    error = ((out.double() - due.double()).norm() / due.double().norm()).item()
    assert error <= RELATIVE[bf16]
    other = dataclasses.replace(key_layout, rotated=False, affine=False)
    assert ((torch.ops.akvq.attend(q, key, value, *args[2:], str(other), str(layout)) - out).norm() / out.norm()) > 0.1


@gpu
@pytest.mark.parametrize("head_dim", (48, 64, 80, 96, 128, 256))
@pytest.mark.parametrize("form", ({}, {"text_bits": 4}, {"symmetric": True}), ids=("two bits", "text", "symmetric"))
@pytest.mark.parametrize("dtype", (f16, bf16), ids=str)
def test_restores_the_output_in_its_own_launch(dtype, form, head_dim):
    layout = Layout(head_dim, dtype, body_bits=2, window=16, pivots=3, rotated=True, **form)
    key, value = cache_pair(layout, 2, 2, 300, 320)
    back, at = matrix(head_dim).cuda(), torch.arange(297, 300).cuda()
    fresh = (*torch.randn(2, 2, 2, 3, head_dim, device="cuda").to(dtype), at)
    mask = torch.rand(2, 1, 3, 300, device="cuda") > 0.3
    mask[..., 0] = True
    cases = ((2, None, None), (6, mask, None), (14, None, fresh), (2, mask, fresh))  # 3 to 21 rows a KV head
    for heads, seen, new in cases:
        q = torch.randn(2, heads, 3, head_dim, device="cuda").to(dtype)
        due = expected(q, key, value, layout, 300, seen, new) @ back
        for splits in (None, 1, 3):
            args = AttendCall(
                q, key, value, 300, seen, None, False, *(new or (None,) * 3), layout, layout, restore=True
            )
            assert attend_cuda.refusal(args) == ""
            out = attend_cuda.attend(args, splits)
            error = ((out.double() - due).norm() / due.norm()).item()
            assert error <= RELATIVE[dtype], f"{heads} heads, {splits} splits: {error:.2g}"


@gpu
@pytest.mark.parametrize("bits", (2, 4, 16))
def test_the_op_restores_whichever_kernel_answers(bits):
    overlays = dict(window=16, pivots=3) if bits < 16 else {}
    layout = Layout(128, bf16, body_bits=bits, rotated=True, **overlays)
    key, value = cache_pair(layout, 2, 2, 300, 320)
    q = torch.randn(2, 6, 1, 128, device="cuda", dtype=bf16)
    args = (q, key, value, 300, None, None, False, None, None, None, str(layout), str(layout), True)
    due = torch.ops.akvq.attend(*args).double() @ matrix(128).cuda()
    error = ((torch.ops.akvq.attend(*args, True).double() - due).norm() / due.norm()).item()
    assert error <= RELATIVE[bf16]


@gpu
@pytest.mark.parametrize("levels", (({}, {}), *LEVELS.values()), ids=("even", *LEVELS))
@pytest.mark.parametrize("half", ("keys", "values"))
def test_a_broken_token_spoils_only_rows_that_see_it(levels, half):
    layout, value_layout = layouts_of(levels, 128, bf16, window=16)
    key, value = cache_pair(layout, 2, 2, 300, 321, value_layout)
    cache, broken = (key, layout) if half == "keys" else (value, value_layout)
    named(cache, broken)["range"][1, :, 40] = math.nan
    q = torch.randn(2, 2, 1, 128, device="cuda", dtype=bf16)
    args = (None, False, None, None, None, layout, value_layout)
    seen = attend_cuda.attend(AttendCall(q, key, value, 300, None, *args))
    assert seen[0].isfinite().all() and seen[1].isnan().all()
    hidden = torch.ones(2, 1, 1, 300, dtype=torch.bool, device="cuda")
    hidden[1, :, :, 40] = False
    assert attend_cuda.attend(AttendCall(q, key, value, 300, hidden, *args)).isfinite().all()


@gpu
def test_a_row_that_sees_nothing_is_zero():
    layout = Layout(64, f16, body_bits=2, window=16, pivots=3)
    key, value = cache_pair(layout, 2, 2, 100, 128)
    q = torch.randn(2, 2, 1, 64, device="cuda", dtype=f16)
    mask = torch.ones(2, 1, 1, 100, dtype=torch.bool, device="cuda")
    mask[0] = False
    for splits in (1, 2):
        asked = AttendCall(q, key, value, 100, mask, None, False, None, None, None, layout, layout)
        out = attend_cuda.attend(asked, splits)
        assert (out[0] == 0).all() and (out[1] != 0).any()


@gpu
@pytest.mark.parametrize("size", (1e-6, 1e4), ids=str)
@pytest.mark.parametrize("levels", (({}, {}), LEVELS["uneven keys"]), ids=("even", "uneven"))
def test_queries_of_any_size(size, levels):
    layout, value_layout = layouts_of(levels, 128, bf16, body_clip=1.0, window=16)
    key, value = cache_pair(layout, 1, 2, 300, 320, value_layout)
    # of other numbers one query in a hundred has two keys so close that rounding decides between them
    q = randn(1, 4, 1, 128, seed=1).cuda().to(bf16) * size
    asked = AttendCall(q, key, value, 300, None, None, False, None, None, None, layout, value_layout)
    out = attend_cuda.attend(asked)
    due = expected(q, key, value, layout, 300, None, None, value_layout)
    assert ((out.double() - due).norm() / due.norm()).item() <= RELATIVE[bf16]
