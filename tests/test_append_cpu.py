"""The C++ append against kernels/cache.py's reference: any layout, any numbers, and what it refuses.

It writes the same to the bit, but for what the order of a sum changes (scales of symmetric layouts, means of blocks).
"""

import dataclasses
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from akvq_fx.kernels import append_cpu, cpp
from akvq_fx.kernels import cache as reference
from akvq_fx.kernels.attend_cpu import Cache
from akvq_fx.kernels.cache import named
from akvq_fx.kernels.layout import BLOCK, PADDING, STATE_TEXT, TEXT, VISION, Layout
from akvq_fx.kernels.rotate import rotate_as_stored
from tests.kernel_cases import (
    LAYOUTS,
    Case,
    assert_caches_alike,
    assert_caches_same,
    assert_written_in_blocks,
    bf16,
    case_of,
    cases,
    drifting,
    f16,
    f32,
    layouts,
    poison,
    randn,
    random_affine,
    skip_without_a_compiler,
)

TAKEN = {name: layout for name, layout in LAYOUTS.items() if not layout.moved}
every_layout = pytest.mark.parametrize("layout", TAKEN.values(), ids=TAKEN)
UNEVEN = dict.fromkeys(("rotated", "affine", "symmetric", "uneven"), True)
SIZES = {
    "d128": Layout(128, bf16, body_bits=2, body_clip=0.8, window=9, pivots=3, shares_classes=True),
    "d128-affine-text": Layout(128, f16, body_bits=2, text_bits=4, window=4, rotated=True, affine=True),
    "d256-text8": Layout(256, f32, body_bits=2, text_bits=8, text_clip=0.9, window=5, rotated=True),
    "d96-4bit": Layout(96, f32, body_bits=4, text_bits=8, window=5, rotated=True, affine=True),
    "d128-uneven-blocks": Layout(128, bf16, body_bits=2, window=9, pivots=3, blocks=True, **UNEVEN),
    "d80-uneven": Layout(80, f16, body_bits=2, window=5, **UNEVEN),
    "d128-symmetric": Layout(128, f32, body_bits=2, group=32, window=9, symmetric=True, shares_classes=True),
    "d72-symmetric-4bit": Layout(72, bf16, body_bits=4, symmetric=True),
}
BLOCKS = {
    "2bit": Layout(64, f16, 2, body_clip=0.8, blocks=True),
    "2bit-text4": Layout(32, bf16, 2, text_bits=4, blocks=True),
    "4bit-groups": Layout(40, f32, 4, group=10, blocks=True),
    "symmetric": Layout(128, bf16, 2, symmetric=True, blocks=True),
    "uneven": Layout(80, f32, 2, blocks=True, **UNEVEN),
}


@pytest.fixture(scope="module", autouse=True)
def needs_a_compiler():
    skip_without_a_compiler()
    assert append_cpu.library()[1] == ""


def check(cache, x, at, classes, pivots, layout, rotate=False):
    """Both write to copies of a cache; returns the kernel's."""
    assert append_cpu.refusal(x, layout) == ""
    due, done = ([buffer.clone() for buffer in cache] for _ in range(2))
    stored = rotate_as_stored(x, named(due, layout).get("affine"), layout.rotated) if rotate else x
    append_cpu.append(done, x, at, classes, pivots, layout, rotate)
    if layout.blocks:
        assert_written_in_blocks(cache, done, stored, at, classes, pivots, layout)
    else:
        reference.write(due, stored, at, classes, pivots, layout)
        assert_caches_alike(due, done, layout)
    return done


@given(st.data(), layouts(blocks=(False, True)).flatmap(cases))
@settings(max_examples=60, deadline=None)
def test_equals_the_reference_for_any_layout(data, case):
    """Into poisoned buffers, behind the end, at it or after a crop: what the tokens do not own keeps its poison."""
    size = data.draw(st.integers(1, min(append_cpu.LONGEST, case.capacity)), label="size")
    start = data.draw(st.integers(0, case.capacity - size), label="start")
    x = randn(*case.x.shape[:2], size, case.x.shape[3], seed=1, dtype=case.layout.dtype)
    classes = None
    if data.draw(st.booleans(), label="classes"):
        classes = torch.randint(0, PADDING + 1, (len(x), size), generator=torch.Generator().manual_seed(start)).byte()
    pivots = None
    if case.layout.pivots and data.draw(st.booleans(), label="pivots"):
        pivots = torch.arange(case.layout.pivots).expand(len(x), -1).clamp_max(size - 1).int()
    cache = poison(case.pack(), case.layout, case.length)
    check(
        cache,
        x,
        torch.arange(start, start + size),
        classes,
        pivots,
        case.layout,
        data.draw(st.booleans(), label="rotate"),
    )


def test_crops_and_gaps():
    """A crop to a pivot and to what the ring lost, a write past the end, and the start over."""
    layout = Layout(16, f32, body_bits=2, window=6, pivots=3)
    case = case_of(layout, capacity=30)
    case.pivots = torch.tensor([[4, 7, 9], [0, 5, 7]], dtype=torch.int32)
    cache = case.pack()
    for seed, (start, size) in enumerate(((11, 1), (7, 2), (8, 3), (14, 1), (15, 2), (25, 4), (5, 1), (0, 2))):
        x = randn(2, 2, size, 16, seed=seed)
        cache = check(cache, x, torch.arange(start, start + size), None, None, layout)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("layout", SIZES.values(), ids=SIZES)
def test_real_head_dims(layout, threads):
    case = case_of(layout, B=3, H=9, T=11, capacity=40)
    cache, before = case.pack(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for seed, (start, size) in enumerate(((11, 1), (12, 16), (6, 2), (8, 1))):
            x = randn(3, 9, size, layout.head_dim, seed=seed, dtype=layout.dtype) + 2
            cache = check(cache, x, torch.arange(start, start + size), None, None, layout, rotate=True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("window", (0, 5, 40, BLOCK, 100))
@pytest.mark.parametrize("layout", BLOCKS.values(), ids=BLOCKS)
def test_blocks_are_begun_as_the_reference_begins_them(layout, window):
    """At a block's first token and before it, of padding, broken tokens and few, after a crop and past the end; into
    poisoned buffers."""
    layout = dataclasses.replace(layout, window=window)
    x = drifting(250, B=2, H=3, D=layout.head_dim).to(layout.dtype)
    x[0, 1, 120], x[1, 2, 180:190, 3] = torch.nan, torch.inf
    kinds = torch.tensor([TEXT, VISION, PADDING, TEXT], dtype=torch.uint8).repeat(2, 63)[:, :250]
    kinds[1, 50:63] = PADDING
    affine = random_affine(2, 3, layout.head_dim, uneven=layout.uneven) if layout.affine else None
    cache = poison(Case(layout, x[:, :, :60], kinds[:, :60], None, affine, 250).pack(), layout, 60)
    for start, size in ((60, 3), (63, 1), (64, 1), (65, 16), (128, 16), (120, 16), (64, 3), (191, 2), (192, 1)):
        at = torch.arange(start, start + size)
        cache = check(cache, x[:, :, at], at, kinds[:, at], None, layout)
    assert check(cache, x[:, :, 200:201], torch.tensor([200]), None, None, layout)


@pytest.mark.parametrize("bits", (2, 4, 8))
@pytest.mark.parametrize("clip", (0.8, 1.0))
def test_codes_of_any_numbers(bits, clip):
    """Also numbers that lie on the edge between two codes, in groups that floor, saturate or overflow."""
    sizes, offsets = torch.tensor([1e-7, 1e-3, 1.0, 300.0, 1e6, 1e30]), torch.tensor([0.0, 1.0, 1e4])
    scale, offset = torch.cartesian_prod(sizes, offsets).view(18, 1, 1, 1, 2).unbind(-1)
    edges = torch.arange(16) / 2 + randn(8, 16).round() * 1e-7
    x = torch.cat([randn(18, 1, 8, 16), edges.expand(18, 1, 8, 16)], 2) * scale + offset * scale
    layout = Layout(16, f32, body_bits=bits, body_clip=clip)
    check(layout.allocate(18, 1, 16), x, torch.arange(16), None, None, layout)


@pytest.mark.parametrize("dtype", (f32, f16, bf16), ids=str)
@pytest.mark.parametrize("broken", (torch.nan, torch.inf, -torch.inf, 65504.0, -1e38), ids=str)
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_broken_and_huge_numbers(bits, broken, dtype):
    layout = Layout(40, dtype, body_bits=bits, text_bits=2 * bits % 16, group=8, window=2)
    x, broken = randn(2, 2, 11, 40, dtype=dtype), torch.tensor(broken, dtype=torch.float64).to(dtype)
    x[0, 0, 3, 9], x[1, 1, 4, :8], x[0, 1, 5, [1, 2]] = broken, broken, torch.stack([broken, -broken])
    x[1, 0, 10, 39] = broken
    check(layout.allocate(2, 2, 12, 12), x, torch.arange(11), None, None, layout)
    if bits < 8:
        layout = dataclasses.replace(layout, text_bits=0, symmetric=True)
        check(layout.allocate(2, 2, 12), x, torch.arange(11), None, None, layout)
    if bits == 2:
        layout = Layout(40, dtype, body_bits=2, window=2, **UNEVEN)
        check(layout.allocate(2, 2, 12), x, torch.arange(11), None, None, layout)


def test_any_strides():
    layout = LAYOUTS["2bit"]
    case = case_of(layout, B=2, H=3)
    kinds = torch.tensor([[0, 3]], dtype=torch.uint8)
    for x in (randn(2, 2, 3, 16).transpose(1, 2), randn(2, 3, 2, 32)[..., ::2], randn(2, 1, 2, 16).expand(2, 3, 2, 16)):
        check(case.pack(), x, torch.arange(22, 26)[::2] // 2, kinds.expand(2, 2), None, layout)


@pytest.mark.parametrize("at", (-1, 13))
def test_a_position_without_a_slot_is_an_error_and_nothing_is_written(at):
    case = case_of(LAYOUTS["2bit"])
    cache, x = case.pack(), case.x[:, :, :2]
    with pytest.raises(IndexError, match=rf"at is \[3, {at}\], accepted: 0 to the capacity 13"):
        append_cpu.append(cache, x, torch.tensor([3, at]), None, None, case.layout)
    assert_caches_same(case.pack(), cache, case.layout)


def test_a_text_slot_that_is_not_there_is_an_error():
    case = case_of(Layout(16, f16, body_bits=2, text_bits=4), T=8, capacity=12)
    cache = case.pack()
    named(cache, case.layout)["state"][STATE_TEXT] = 4
    with pytest.raises(IndexError, match="accepted: 0 to the capacity"):
        append_cpu.append(cache, case.x[:, :, :1], torch.tensor([8]), None, None, case.layout)


@pytest.mark.parametrize("name", Layout(16, f16, body_bits=2, text_bits=4, window=3, pivots=2).fields)
def test_refuses_buffers_of_other_sizes(name):
    layout = Layout(16, f16, body_bits=2, text_bits=4, window=3, pivots=2)
    case = case_of(layout)
    cache = case.pack()
    place = layout.fields.index(name)
    cache[place] = cache[place][..., :-1].contiguous()
    with pytest.raises(ValueError, match=r"akvq::append: .* accepted: contiguous"):
        append_cpu.append(cache, case.x[:, :, :1], torch.tensor([11]), None, None, layout)


def test_refuses_with_a_reason():
    layout = LAYOUTS["2bit"]
    x = randn(1, 1, 1, 16)
    for token, where, reason in (
        (x.double(), layout, "x is torch.float64 and the cache torch.float32, accepted: one dtype"),
        (
            x.double(),
            Layout(16, torch.float64, body_bits=2),
            "dtype is torch.float64, accepted: torch.float32, torch.bfloat16 or torch.float16",
        ),
        (randn(1, 1, 1, 520), Layout(520, f32, body_bits=2), "head_dim is 520, accepted: 8 to 512"),
        (randn(1, 1, 17, 16), layout, r"x is [1, 1, 17, 16] on cpu, accepted: [B, H, 1..16, D] on the cpu"),
        (x, Layout(16, f32, simulate="fp8()"), "simulate is fp8(), accepted: none"),
    ):
        assert reason in append_cpu.refusal(token, where)


@every_layout
def test_the_op_takes_it(layout, monkeypatch):
    calls, append = [], append_cpu.append
    monkeypatch.setattr(append_cpu, "append", lambda *call: calls.append(call) or append(*call))
    case = case_of(layout)
    cache, x = case.pack(), randn(2, 2, 1, layout.head_dim, dtype=layout.dtype)
    torch.ops.akvq.append(cache, x, torch.tensor([11]), None, None, str(layout))
    assert len(calls) == 1


def test_without_a_compiler_the_reference_writes(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-c++")
    cpp.function.cache_clear()
    case = case_of(LAYOUTS["2bit"])
    cache, due, x = case.pack(), case.pack(), case.x[:, :, :1]
    with caplog.at_level(logging.INFO, "akvq_fx"):
        torch.ops.akvq.append(cache, x, torch.tensor([11]), None, None, str(case.layout))
    cpp.function.cache_clear()
    reference.write(due, x, torch.tensor([11]), None, None, case.layout)
    assert_caches_same(due, cache, case.layout)
    assert "no C++ compiler: looked for no-such-c++" in caplog.text


def test_structures_are_the_source_s():
    """Names of the fields stand in the same order in Python and in C++."""
    import re
    from pathlib import Path

    folder = Path(append_cpu.__file__).parent
    for structure, source in ((append_cpu.Append, "append_cpu.cpp"), (Cache, "attend_cpu.h")):
        text = (folder / source).read_text()
        body = re.search(rf"struct {structure.__name__} {{(.*?)}};", text, re.S).group(1)
        lines = [line.split("//")[0].strip().rstrip(";") for line in body.splitlines()]
        names = [re.findall(r"\w+", part)[-1] for line in lines if line for part in line.split(",")]
        assert names == [name for name, _ in structure._fields_]
