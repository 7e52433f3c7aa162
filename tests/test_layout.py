"""Layout and bit packing: text and words give back what went in, and nothing else is accepted."""

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from akvq_fx.kernels.layout import DTYPES, PADDING, Layout, pack_bits, unpack_bits
from tests.kernel_cases import LAYOUTS, assert_same, few, layouts, seeds

ROOT = Path(__file__).parent.parent
clips = st.floats(0, 1, exclude_min=True, allow_subnormal=False)


@pytest.mark.parametrize("bits", (2, 4, 8))
@given(head_dim=st.integers(1, 40).map(lambda n: 8 * n), rows=st.lists(st.integers(0, 3), max_size=2), seed=seeds)
@few
def test_unpack_inverts_pack(bits, head_dim, rows, seed):
    codes = torch.randint(2**bits, (*rows, head_dim), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int16
    assert words.shape == (*rows, head_dim * bits // 16)
    assert_same("codes", codes, unpack_bits(words, bits))


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_code_j_of_word_i_is_channel_j_times_words_plus_i(bits):
    words, lanes = 3 * bits, 16 // bits
    for channel in range(words * lanes):
        codes = torch.zeros(words * lanes, dtype=torch.int32)
        codes[channel] = 2**bits - 1
        packed = pack_bits(codes, bits).to(torch.int32) & 0xFFFF
        expected = torch.zeros(words, dtype=torch.int32)
        expected[channel % words] = (2**bits - 1) << bits * (channel // words)
        assert_same(f"channel {channel}", expected, packed)


@given(layouts(head_dims=(8, 48, 128, 192, 256), dtypes=tuple(DTYPES.values())), clips, clips, st.integers(1, 300))
@few
def test_parse_inverts_str(layout, body_clip, text_clip, group):
    body_clip = 1.0 if layout.symmetric else body_clip
    layout = dataclasses.replace(layout, body_clip=body_clip, text_clip=text_clip, group=group)
    assert Layout.parse(str(layout)) == layout
    assert hash(Layout.parse(str(layout))) == hash(layout)


def test_a_layout_from_another_process_is_found_among_ours():
    """A pickle keeps the hash, so it must not be one that Python salts."""
    code = "import pickle, sys; from akvq_fx.kernels.layout import Layout; x = Layout.parse(sys.argv[1]); hash(x); "
    code += "sys.stdout.buffer.write(pickle.dumps(x))"
    layout = LAYOUTS["4bit-affine"]
    pickled = subprocess.run(
        [sys.executable, "-c", code, str(layout)], capture_output=True, check=True, cwd=ROOT
    ).stdout
    assert pickle.loads(pickled) in {layout}


def test_different_layouts_have_different_texts():
    assert len({str(layout) for layout in LAYOUTS.values()}) == len(LAYOUTS)


HOSTILE = [
    "",
    "/",
    "f32",
    "f8/d64/b2/c1/g128",
    "f32/b2/c1/g128",
    "f32/d/b2/c1/g128",
    "f32/d1e2/b2/c1/g128",
    "f32/d64/b2/c1",
    "f32/d64/b2/c1/g0",
    "f32/d64/b2/c1/g-128",
    "f32/d64/b2/cnan/g128",
    "f32/d64/b2/c1e999/g128",
    "f32/d64/b2/c0/g128",
    "f32/d64/b2/c1/g128/w-1",
    "f32/d64/b2/c1/g128/w1.5",
    "f32/d64/d128/b2/c1/g128",
    "f32/d064/b2/c1/g128",
    "f32/d64/b2/c1/g128/rotated/rotated",
    "f32/d64/b2/c1/g128/affine/rotated",
    "f32/d64/b2/c1/g128/Rotated",
    "f32/d64/b2/c1/g128/",
    "f32/d64/b2/c1/g128/t4",
    "f32/d64/b16/c1/g128/w8",
    "f32/d64/b2/c1/g128/moved",
    "f32/d64/b2/c1/g128/moved/blocks",
    "f32/d63/b2/c1/g128",
    "f32/d64/b3/c1/g128",
    "f32/d64/b2/c1/g128/tc",
    "f32/d64/b2/c1/g128/e-+.",
    "f32/d\u0666\u0664/b2/c1/g128",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="."):
        Layout.parse(text)


@given(st.text(alphabet="f32b16d48cgwpt/.-+e_ routea\u0664", max_size=24).map(lambda tail: "f32/d64/b2/c1/g128" + tail))
@example("f32/d64/b2/c1/g128/w0")
@few
def test_parse_raises_only_value_error_or_reads_its_own_text(text):
    try:
        layout = Layout.parse(text)
    except ValueError:
        return
    assert str(layout) == text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head_dim": 20}, "head_dim is 20, accepted: a positive multiple of 8"),
        ({"head_dim": 0}, "head_dim is 0, accepted: a positive multiple of 8"),
        ({"dtype": torch.int8}, "dtype is torch.int8, accepted: torch.float16, torch.bfloat16"),
        ({"body_bits": 3}, "body_bits is 3, accepted: 2, 4, 8 or 16"),
        ({"text_bits": 16}, "text_bits is 16, accepted: 0, 4 or 8"),
        ({"body_bits": 4, "text_bits": 4}, "text_bits is 4, accepted: more than body_bits, which is 4, or 0"),
        ({"window": -1}, r"window, pivots is \(-1, 0\), accepted: numbers >= 0"),
        ({"pivots": -2}, r"window, pivots is \(0, -2\), accepted: numbers >= 0"),
        ({"group": 0}, "group is 0, accepted: a positive number"),
        ({"body_clip": 0.0}, r"body_clip, text_clip is \(0.0, 1.0\), accepted: numbers in \(0, 1\]"),
        ({"text_clip": float("nan")}, r"body_clip, text_clip is \(1.0, nan\), accepted: numbers in \(0, 1\]"),
        ({"body_bits": 16, "window": 4}, "overlays is present, accepted: none when body_bits is 16"),
    ],
    ids=str,
)
def test_refuses_by_name(change, message):
    with pytest.raises(ValueError, match=f"akvq layout: {message}"):
        Layout(**{"head_dim": 64, "dtype": torch.float32, "body_bits": 2, **change})


@pytest.mark.parametrize(
    "head_dim, group, groups", [(64, 128, 1), (96, 128, 1), (256, 128, 2), (192, 64, 3), (40, 8, 5)]
)
def test_groups_divide_the_head_or_are_the_head(head_dim, group, groups):
    assert Layout(head_dim, torch.float32, body_bits=2, group=group).groups == groups


@given(layouts())
@few
def test_allocate_gives_the_declared_buffers_and_marks_overlays_free(layout):
    cache = layout.allocate(3, 2, 7, 5)
    assert len(cache) == len(layout.fields) == len(set(layout.fields))
    for name, buffer in zip(layout.fields, cache, strict=True):
        shape, dtype = layout.buffer(name, 3, 2, 7, 5)
        assert (tuple(buffer.shape), buffer.dtype) == (shape, dtype), name
        free = {"pivot_at": -1, "text_at": -1, "classes": PADDING}.get(name, 0)
        assert (buffer == free).all(), name


def test_two_bits_cost_what_the_design_says():
    layout = Layout(128, torch.float16, body_bits=2)
    sizes = dict(zip(layout.fields, layout.allocate(1, 1, 100), strict=True))
    per_element = 8 * (sizes["codes"].nbytes + sizes["range"].nbytes) / (100 * 128)
    assert per_element == 2.25
