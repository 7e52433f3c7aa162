"""append and pack as one kernel (Triton, on a GPU CUDA C++ too): buffers equal to the bit, but for sums of symmetric
layouts; rotated tokens to a step of a code."""

import dataclasses
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from akvq_fx.kernels import cache as reference
from akvq_fx.kernels import cache_triton, rotate_triton
from akvq_fx.kernels.cache import named, read_text
from akvq_fx.kernels.layout import CODES, PADDING, STATE_TEXT, TEXT, VISION, Layout, unpack_bits
from akvq_fx.kernels.rotate import rotate_as_stored
from tests.kernel_cases import (
    FEWER,
    LAYOUTS,
    Case,
    assert_caches_alike,
    assert_close,
    assert_same,
    bf16,
    case_of,
    cases,
    f16,
    f32,
    layouts,
    poison,
    randn,
    random_affine,
    seeds,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WRITERS = ["cache_triton", "append_cuda"] if torch.cuda.is_available() else ["cache_triton"]
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
few = settings(max_examples=12 // FEWER, deadline=None)
WIDE = {
    "128": Layout(128, bf16, body_bits=2, body_clip=0.8, window=9, pivots=3),
    "128-affine": Layout(128, f16, body_bits=2, body_clip=0.8, window=9, pivots=3, rotated=True, affine=True),
    "256-two-groups": Layout(256, bf16, body_bits=2, body_clip=0.8, window=4, text_bits=4, rotated=True),
    "128-shares": Layout(128, bf16, body_bits=2, body_clip=0.8, window=9, pivots=3, shares_classes=True),
    "80": Layout(80, f16, body_bits=2, text_bits=4, text_clip=0.9, window=5, rotated=True, affine=True),
    "96": Layout(96, f32, body_bits=4, text_bits=8, window=5, rotated=True, affine=True),
    "lossless-96": Layout(96, bf16, rotated=True, affine=True),
    "64-symmetric": Layout(64, bf16, 2, window=9, pivots=3, rotated=True, symmetric=True, shares_classes=True),
    "128-symmetric": Layout(128, f16, 2, window=9, pivots=3, rotated=True, symmetric=True),
    "64-uneven": Layout(64, f16, 2, window=9, pivots=3, rotated=True, affine=True, symmetric=True, uneven=True),
    "128-uneven": Layout(128, bf16, 2, window=9, pivots=3, rotated=True, affine=True, symmetric=True, uneven=True),
    "80-uneven": Layout(80, f32, 2, window=9, rotated=True, affine=True, symmetric=True, uneven=True),
    "256-symmetric-groups": Layout(256, bf16, 4, window=4, rotated=True, symmetric=True),
}
every_wide = pytest.mark.parametrize("layout", WIDE.values(), ids=WIDE)


@pytest.fixture(autouse=True, scope="module", params=WRITERS)
def writer(request):
    """The module that writes in the tests of this file; what it refuses, cache_triton takes."""
    writer.module = importlib.import_module(f"akvq_fx.kernels.{request.param}")


def writing(x, layout):
    return cache_triton if writer.module.refusal(x, layout) else writer.module


def on(device, tensors):
    return [None if t is None else t.clone().to(device) for t in tensors]


def wrote(cache, x, at, classes, pivots, layout, rotate=False):
    """The buffers after the kernel wrote to a copy of them."""
    cache = on(DEVICE, cache)
    x, at, classes, pivots = on(DEVICE, (x, at, classes, pivots))
    writing(x, layout).append(cache, x, at, classes, pivots, layout, rotate)
    return on("cpu", cache)


def expected(cache, x, at, classes, pivots, layout):
    """The buffers after the reference, on the CPU, wrote to a copy of them."""
    cache = on("cpu", cache)
    reference.write(cache, x, at, classes, pivots, layout)
    return cache


def check_pack(case):
    at = torch.arange(case.length)
    args = on(DEVICE, (case.x, at, case.classes, case.pivots, case.affine))
    packed = on("cpu", cache_triton.pack(*args, case.capacity, case.layout))
    due = reference.create(case.x, at, case.classes, case.pivots, case.affine, case.capacity, case.layout)
    assert_caches_alike(due, packed, case.layout)


@every_layout
def test_pack_equals_the_reference(layout):
    check_pack(case_of(layout))
    check_pack(case_of(layout, T=70, capacity=80, seed=1))


@every_wide
def test_pack_equals_the_reference_at_real_head_dims(layout):
    check_pack(case_of(layout, H=3, T=67, capacity=70))


@given(cases())
@few
def test_pack_equals_the_reference_for_any_layout(case):
    check_pack(case)


@pytest.mark.parametrize("bits", (2, 4, 8))
@pytest.mark.parametrize("clip", (0.8, 1.0))
def test_codes_are_the_reference_s_for_any_numbers(bits, clip):
    """Also numbers that lie on the edge between two codes, in groups that floor, saturate or overflow."""
    sizes, offsets = torch.tensor([1e-7, 1e-3, 1.0, 300.0, 1e6, 1e30]), torch.tensor([0.0, 1.0, 1e4])
    scale, offset = torch.cartesian_prod(sizes, offsets).view(1, 18, 1, 1, 2).unbind(-1)
    edges = torch.arange(16) / 2 + randn(32, 16).round() * 1e-7
    x = torch.cat([randn(1, 18, 96, 16), edges.expand(1, 18, 32, 16)], 2) * scale + offset * scale
    layout = Layout(16, f32, body_bits=bits, body_clip=clip)
    cache, at = layout.allocate(1, 18, 128), torch.arange(128)
    args = (x, at, None, None, layout)
    assert_caches_alike(expected(cache, *args), wrote(cache, *args), layout)


def test_codes_on_the_edge_between_two_codes():
    """x = scale * k / 2 with fp16 scales, and its two neighbours: half to even, and never a neighbour's code."""
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(0)).half().clamp_min(0.01).float()
    rows = (scale * torch.arange(7) / 2).float()
    below, above = torch.nextafter(rows, rows - 1), torch.nextafter(rows, rows + 1)
    x = torch.cat([rows, below.clamp_min(0), torch.minimum(above, 3 * scale), torch.zeros(64, 3)], 1).view(1, 1, 64, 24)
    layout = Layout(24, f32, body_bits=2)
    cache, at = layout.allocate(1, 1, 64), torch.arange(64)
    due, done = (f(cache, x, at, None, None, layout) for f in (expected, wrote))
    assert_same("scales", scale[:, 0], named(due, layout)["range"][0, 0, :, 0].float())
    assert_caches_alike(due, done, layout)


@pytest.mark.parametrize("broken", (torch.nan, torch.inf, -torch.inf, 65504.0, -1e38), ids=str)
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_broken_and_huge_numbers(bits, broken):
    layout = Layout(40, f32, body_bits=bits, text_bits=2 * bits % 16, group=8, window=2)
    case = case_of(layout)
    case.x[0, 0, 3, 9], case.x[1, 1, 4, :8], case.x[0, 1, 5, [1, 2]] = broken, broken, torch.tensor([broken, -broken])
    case.x[1, 0, 10, 39] = broken
    check_pack(case)


SYMMETRIC = {
    "2": Layout(40, f32, 2, group=10, window=2, symmetric=True),
    "4": Layout(40, f32, 4, group=10, window=2, symmetric=True),
    "uneven": Layout(40, f32, 2, rotated=True, affine=True, symmetric=True, uneven=True, window=2),
}
every_symmetric = pytest.mark.parametrize("layout", SYMMETRIC.values(), ids=SYMMETRIC)


@every_symmetric
def test_symmetric_groups_that_are_silent_tiny_or_overflow(layout):
    sizes = torch.tensor([0.0, 1e-30, 1e-7, 1e-3, 1.0, 300.0, 1e6, 1e30])
    x = randn(1, 8, 40, 40) * sizes[:, None, None]
    x[:, 4, :5, :10], x[:, 4, 5, :], x[:, 4, 6, ::3] = 0.0, 3.0, 0.0
    affine = random_affine(1, 8, 40, uneven=True) if layout.uneven else None
    check_pack(Case(layout, x, torch.ones(1, 40, dtype=torch.uint8), None, affine, 40))


@pytest.mark.parametrize("broken", (torch.nan, torch.inf, -torch.inf, 65504.0, -1e38), ids=str)
@every_symmetric
def test_broken_and_huge_numbers_of_symmetric_groups(layout, broken):
    case = case_of(layout)
    case.x[0, 0, 3, 9], case.x[1, 1, 4, :8], case.x[0, 1, 5, [1, 2]] = broken, broken, torch.tensor([broken, -broken])
    case.x[1, 0, 10, 39] = broken
    check_pack(case)


@every_layout
def test_append_equals_the_reference(layout):
    """One token, a few, and a prompt; behind the end, at the end and after a crop; classes given and not."""
    case = case_of(layout, T=11, capacity=120)
    cache = case.pack()
    for seed, (start, size) in enumerate(((11, 1), (12, 3), (6, 1), (7, 70), (90, 2), (2, 5), (0, 4))):
        x = randn(2, 2, size, layout.head_dim, seed=seed, dtype=layout.dtype)
        kinds = torch.randint(0, 2, (2, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
        args = (x, torch.arange(start, start + size), kinds if seed % 2 else None, None, layout)
        due, done = expected(cache, *args), wrote(cache, *args)
        assert_caches_alike(due, done, layout)
        cache = due


@given(st.data(), cases())
@few
def test_append_writes_nothing_else(data, case):
    """Into poisoned buffers: what the new tokens do not own keeps its poison."""
    size = data.draw(st.integers(1, case.capacity), label="size")
    start = data.draw(st.integers(0, case.capacity - size), label="start")
    cache = poison(case.pack(), case.layout, case.length)
    x = randn(*case.x.shape[:2], size, case.x.shape[3], dtype=case.layout.dtype)
    args = (x, torch.arange(start, start + size), None, None, case.layout)
    assert_caches_alike(expected(cache, *args), wrote(cache, *args), case.layout)


@every_layout
def test_pivots_count_at_the_start_only(layout):
    case = case_of(layout)
    cache, pivots = case.pack(), torch.tensor([[1, 2, 0], [0, 0, -1]], dtype=torch.int32)[:, : layout.pivots + 1]
    for start in (0, 11):
        x = randn(2, 2, 2 + (start == 0), layout.head_dim, seed=start, dtype=layout.dtype)
        args = (x, torch.arange(start, start + x.shape[2]), None, pivots.clamp_max(x.shape[2] - 1), layout)
        assert_caches_alike(expected(cache, *args), wrote(cache, *args), layout)


def test_a_pivot_on_padding_is_dropped():
    layout = LAYOUTS["2bit"]
    x, at, classes = randn(1, 1, 4, 16), torch.arange(4), torch.tensor([[PADDING, VISION, TEXT, TEXT]]).to(torch.uint8)
    args = on(DEVICE, (x, at, classes, torch.tensor([[0, 2]])))
    b = named(on("cpu", cache_triton.pack(*args, None, 5, layout)), layout)
    assert b["pivot_at"].tolist() == [[-1, 2]]
    assert b["classes"].tolist() == [[PADDING, VISION, 2, TEXT, PADDING]]


def test_a_moved_text_overlay_and_its_end():
    """Slots are moved by the state; one that would lie outside the overlay is not written."""
    layout = Layout(16, f16, body_bits=2, text_bits=4)
    case = case_of(layout, T=8, capacity=12)
    cache = case.pack()
    b = named(cache, layout)
    b["state"][STATE_TEXT] = -3
    x = randn(2, 2, 2, 16, dtype=f16)
    args = (x, torch.tensor([8, 9]), None, None, layout)
    assert_caches_alike(expected(cache, *args), wrote(cache, *args), layout)
    b["state"][STATE_TEXT] = 3
    done = named(wrote(cache, *args), layout)
    assert_same("text", b["text_at"][:, :11], done["text_at"][:, :11])
    assert (done["text_at"][:, 11] == 8).all()


def check_codes(name, due, done, layout):
    """Codes and ranges of rotated tokens: a value may differ by the token's last digit, and by a step where it crosses
    an edge."""
    values, others = (reference.decode(*pair, dataclasses.replace(layout, dtype=f32)) for pair in (due, done))
    step = due[1][..., : layout.groups].float().amax(-1, keepdim=True)
    if layout.symmetric:  # the crossing moves the scale of its group, whose levels are up to 7.5 scales from zero
        step = step + 7.5 * (due[1].float() - done[1].float()).abs().amax(-1, keepdim=True)
    # a last digit of a number that was clipped and rounded twice
    digit = 4 * torch.finfo(layout.dtype).eps * values.abs().amax(-1, keepdim=True)
    difference = (values - others).abs()
    assert (difference <= 1.01 * step + digit).all(), name
    if layout.body_bits == 2:
        crossed = (unpack_bits(due[0], 2) != unpack_bits(done[0], 2)).sum().item()
        assert crossed <= 2 + 0.02 * values.numel(), name


def check_rotated(layout, cache, x, at, classes, pivots, affine):
    """Rotated in the kernel against rotated by the reference."""
    due = expected(cache, rotate_as_stored(x, affine, layout.rotated), at, classes, pivots, layout)
    done = wrote(cache, x, at, classes, pivots, layout, rotate=True)
    b, d = named(due, layout), named(done, layout)
    assert_caches_alike(due, done, layout, ("codes", "range", "ring", "pivots", "text_codes"))
    names = ("codes",) if layout.lossless else ("range", "ring", "pivots")
    for name in names:
        if name in b and not (name == "range" and layout.symmetric):
            assert_close(name, b[name], d[name], layout.dtype if b[name].dtype == f16 else None)
    if not layout.lossless:
        check_codes("codes", *((c["codes"], c["range"]) for c in (b, d)), layout)
    if layout.symmetric:  # a code that crosses an edge moves the scale
        same = (b["codes"] == d["codes"]).all(-1)
        assert same.any()
        assert_close("range", b["range"][same], d["range"][same], bf16 if layout.dtype == bf16 else f16)
    if layout.text_bits:
        due, done = (read_text(c, layout).float() for c in (b, d))
        is_text, place = b["text_at"] >= 0, b["text_at"].clamp_min(0).long()[:, None].expand(-1, due.shape[1], -1)
        step = b["range"].float().chunk(2, -1)[0].amax(-1).gather(2, place)
        digit = 4 * torch.finfo(layout.dtype).eps * due.abs().amax(-1)
        assert ((due - done).abs().amax(-1) * is_text[:, None] <= 1.01 * step + digit).all(), "text"


@every_wide
@pytest.mark.parametrize("size", (1, 3, 70))
def test_rotated_tokens(layout, size):
    case = case_of(layout, H=3, T=11, capacity=90)
    affine = case.affine if layout.affine else None
    x = randn(2, 3, size, layout.head_dim, seed=1, dtype=layout.dtype) + 2
    classes = torch.randint(0, 2, (2, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    check_rotated(layout, case.pack(), x, torch.arange(11, 11 + size), classes, None, affine)
    pivots = torch.zeros(2, max(1, layout.pivots), dtype=torch.int32)
    check_rotated(layout, case.empty(), x, torch.arange(size), classes, pivots, affine)


@every_layout
def test_rotated_prompts(layout):
    case = case_of(layout)
    args = on(DEVICE, (case.x, torch.arange(11), case.classes, case.pivots, case.affine))
    packed = on("cpu", writing(args[0], layout).pack(*args, case.capacity, layout, rotate=True))
    written = wrote(case.empty(), case.x, torch.arange(11), case.classes, case.pivots, layout, rotate=True)
    assert_caches_alike(packed, written, layout)
    check_rotated(layout, case.empty(), case.x, torch.arange(11), case.classes, case.pivots, case.affine)


@given(st.data(), layouts(head_dims=(8, 24, 40)), seeds)
@few
def test_rotated_tokens_of_any_layout(data, layout, seed):
    B, H, q = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5)), label="B, H, q")
    affine = random_affine(B, H, layout.head_dim, seed, layout.uneven) if layout.affine else None
    cache = layout.allocate(B, H, q + 3, q + 3 if layout.text_bits else 0)
    if layout.affine:
        named(cache, layout)["affine"].copy_(affine)
    x = randn(B, H, q, layout.head_dim, seed=seed, dtype=layout.dtype)
    check_rotated(layout, cache, x, torch.arange(q), None, None, affine)


def test_several_tiles_a_program(monkeypatch):
    monkeypatch.setattr(rotate_triton, "PROGRAMS", 1)
    layout = Layout(16, f32, body_bits=2, text_bits=4, window=300, rotated=True, affine=True)
    case = case_of(layout, B=1, T=700, capacity=720)
    assert rotate_triton.plan_of(2, 700, 16).steps > 1
    check_pack(case)
    check_rotated(layout, case.empty(), case.x, torch.arange(700), case.classes, None, case.affine)


STRIDED = {
    "transposed": lambda: randn(2, 5, 3, 16).to(DEVICE).transpose(1, 2),
    "every other channel": lambda: randn(2, 3, 5, 32).to(DEVICE)[..., ::2],
    "one head for all": lambda: randn(2, 1, 5, 16).to(DEVICE).expand(2, 3, 5, 16),
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("rotate", (False, True))
def test_takes_any_strides(make, rotate):
    layout = Layout(16, f32, body_bits=2, window=2, pivots=1, rotated=True)
    x, at, pivots = make(), torch.arange(5, device=DEVICE), torch.ones(2, 1, dtype=torch.int32, device=DEVICE)
    kinds = torch.tensor([[VISION, TEXT, PADDING, TEXT, TEXT]], dtype=torch.uint8, device=DEVICE)
    expanded = cache_triton.pack(x, at, kinds.expand(2, 5), pivots, None, 7, layout, rotate)
    copied = cache_triton.pack(x.contiguous(), at, kinds.repeat(2, 1), pivots, None, 7, layout, rotate)
    assert_caches_alike(copied, expanded, layout)


def test_refuses_what_it_cannot_write():
    assert cache_triton.refusal(randn(1, 1, 1, 16), LAYOUTS["2bit"]) == ""
    double, long = Layout(16, torch.float64), Layout(264, f32)
    for layout, reason in ((double, "dtype is torch.float64"), (long, "head_dim is 264")):
        x = randn(1, 1, 1, layout.head_dim)
        assert reason in cache_triton.refusal(x, layout)
        with pytest.raises(ValueError, match=f"akvq::append: {reason}"):
            cache_triton.pack(x, torch.arange(1), None, None, None, 2, layout)
    assert "x is torch.float64" in cache_triton.refusal(randn(1, 1, 1, 16).double(), LAYOUTS["2bit"])


@pytest.mark.parametrize("shape", [(2, 2, 1, 24), (1, 2, 1, 16), (2, 3, 1, 16), (2, 2, 16)], ids=str)
def test_refuses_other_shapes(shape):
    case = case_of(LAYOUTS["2bit"])
    cache = case.pack()
    with pytest.raises(ValueError, match=r"akvq::append: x is \[.*\], accepted: \[B, H, q, D\] of a cache with codes"):
        cache_triton.append(cache, torch.ones(shape), torch.tensor([11]), None, None, case.layout)
    assert_caches_alike(case.pack(), cache, case.layout)


def test_refuses_other_positions_classes_and_buffers():
    case = case_of(LAYOUTS["2bit"])
    cache, x = case.pack(), case.x[:, :, :1]
    with pytest.raises(ValueError, match=r"at is \[2\], accepted: \[1\]"):
        cache_triton.append(cache, x, torch.arange(2), None, None, case.layout)
    with pytest.raises(ValueError, match=r"classes is \[1, 1\], accepted: \[2, 1\]"):
        cache_triton.append(cache, x, torch.arange(1), case.classes[:1, :1], None, case.layout)
    cache[CODES] = cache[CODES].transpose(0, 1)
    with pytest.raises(ValueError, match="codes not contiguous"):
        cache_triton.append(cache, x, torch.arange(1), None, None, case.layout)
