"""attend_cpu: the C++ kernel against torch's attention in float64, what it refuses, and how it is built."""

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from akvq_fx.kernels import attend_cpu, cpp
from akvq_fx.kernels.attend import AttendCall, reference, rotate_query
from akvq_fx.kernels.cache import append, read
from akvq_fx.kernels.layout import Layout
from akvq_fx.kernels.rotate import matrix
from tests.kernel_cases import (
    LAYOUTS,
    Case,
    assert_close,
    assert_same,
    bf16,
    case_of,
    drifting,
    f16,
    f32,
    few,
    poison,
    randn,
    random_affine,
    seeds,
    skip_without_a_compiler,
)
from tests.test_attend import (
    assert_capped,
    assert_chunk,
    assert_sunk,
    calls,
    chunk_calls,
    oracle,
    restored_calls,
    softcaps,
    sunk_oracle,
)

ROOT = Path(__file__).parent.parent
PACKED = {name: layout for name, layout in LAYOUTS.items() if not (layout.lossless or layout.moved)}
every_layout = pytest.mark.parametrize("layout", PACKED.values(), ids=PACKED)
UNEVEN = dict.fromkeys(("rotated", "affine", "symmetric", "uneven"), True)
ROTATED = {"as it is": {}, "rotated": {"rotated": True}, "affine": {"rotated": True, "affine": True}, "uneven": UNEVEN}
WIDE = {
    "d256-two-groups": Layout(256, f32, body_bits=2, window=7, pivots=3),
    "d256-groups-in-words": Layout(256, f32, body_bits=4, text_bits=8, group=16),
    "d128": Layout(128, f32, body_bits=2, body_clip=0.8, window=128, pivots=15, rotated=True),
    "d128-text": Layout(128, f32, body_bits=2, text_bits=4, window=128, rotated=True),
    "d96-text8": Layout(96, f32, body_bits=2, text_bits=8, window=20),
    "d40-8bit": Layout(40, f32, body_bits=8, window=20),
    "d80": Layout(80, f32, body_bits=2, text_bits=4, window=20),
    "d72-odd-words": Layout(72, f32, body_bits=2, window=9),
    "d128-uneven-blocks": Layout(128, f32, body_bits=2, window=64, pivots=15, blocks=True, **UNEVEN),
    "d72-uneven": Layout(72, f32, body_bits=2, window=9, **UNEVEN),
    "d128-symmetric-groups": Layout(128, f32, body_bits=4, window=20, group=32, symmetric=True),
    "d64-blocks-text": Layout(64, f32, body_bits=2, text_bits=4, window=20, blocks=True),
}
QUICK_FLAGS = (*cpp.FLAGS, "-O0")  # a quicker compilation


@pytest.fixture(scope="module", autouse=True)
def needs_a_compiler():
    skip_without_a_compiler()
    assert attend_cpu.library()[1] == ""


def of_values(layout: Layout) -> Layout:
    """The layout of values beside such keys: only keys can be uneven, or in blocks."""
    return dataclasses.replace(layout, uneven=False, blocks=False)


def taken(key: Layout, value: Layout) -> bool:
    return not (key.lossless or value.lossless or value.uneven)


packed_calls = calls().filter(lambda drawn: taken(drawn[1].layout, drawn[2].layout))


@contextlib.contextmanager
def poisoned_outputs():
    """New memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(q, key, value, length, layouts, mask=None, scale=None, is_causal=False, fresh=(None, None, None), **by):
    """The kernel on buffers of two caches; it must not refuse."""
    args = AttendCall(q, key, value, length, mask, scale, is_causal, *fresh, *layouts, **by)
    assert attend_cpu.refusal(args) == ""
    with poisoned_outputs():
        return attend_cpu.attend(args)


def call(q, key, value, length=None, **options):
    length = key.length if length is None else length
    return run(q, key.pack(), value.pack(), length, (key.layout, value.layout), **options)


def test_new_memory_is_poisoned():
    with poisoned_outputs():
        assert torch.ones(1).new_empty(4).isnan().all()


@given(packed_calls)
@few
def test_equals_torch_on_the_dequantized_cache(drawn):
    q, key, value, mask, scale, is_causal = drawn
    out = call(q, key, value, mask=mask, scale=scale, is_causal=is_causal)
    assert (out.dtype, out.is_contiguous()) == (q.dtype, True)
    assert_close("out", oracle(q, key.expected(), value.expected(), mask, scale, is_causal), out)


@given(packed_calls, softcaps)
@few
def test_caps_scores(drawn, softcap):
    assert_capped(call, drawn, softcap)


@given(packed_calls, seeds)
@few
def test_sinks_take_their_share(drawn, seed):
    assert_sunk(call, drawn, seed)


def test_sinks_count_once_where_threads_share_a_head():
    layout = Layout(64, f32, body_bits=2, window=7)
    key, value = case_of(layout, 1, 1, 3000, capacity=3000), case_of(layout, 1, 1, 3000, capacity=3000, seed=1)
    q, sinks = randn(1, 16, 1, 64, seed=2), torch.full((16,), 5.0)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        out = call(q, key, value, sinks=sinks)
    finally:
        torch.set_num_threads(before)
    assert_close("out", sunk_oracle(q, key.expected(), value.expected(), None, None, False, sinks), out)


@given(packed_calls, st.data())
@few
def test_fresh_tokens_are_read_at_full_precision(drawn, data):
    q, key, value, mask, scale, is_causal = drawn
    count = data.draw(st.integers(1, key.length), label="fresh")
    at = torch.arange(key.length - count, key.length)
    fresh = (key.x[:, :, at], value.x[:, :, at], at)
    k, v = key.expected().clone(), value.expected().clone()
    k[:, :, at], v[:, :, at] = fresh[0], fresh[1]
    out = call(q, key, value, mask=mask, scale=scale, is_causal=is_causal, fresh=fresh)
    assert_close("out", oracle(q, k, v, mask, scale, is_causal), out)


@given(chunk_calls().filter(lambda drawn: taken(*(chunk.case.layout for chunk in drawn[1:3]))))
@few
def test_a_chunk_sees_the_cache_before_it_and_itself(drawn):
    assert_chunk(lambda q, key, value, layouts, length, **rest: run(q, key, value, length, layouts, **rest), drawn)


@given(restored_calls().filter(lambda args: taken(*args[-2:])))
@few
def test_restores_the_output_in_the_same_call(drawn):
    args = AttendCall(*drawn)
    assert attend_cpu.refusal(args) == ""
    with poisoned_outputs():
        stored, out = (attend_cpu.attend(args._replace(restore=restore)) for restore in (False, True))
    assert_close("out", stored.double() @ matrix(stored.shape[-1]), out)


@pytest.mark.parametrize("dtype", (f32, f16, bf16), ids=str)
@pytest.mark.parametrize("head_dim", (8, 40, 64, 72, 128, 256))
@pytest.mark.parametrize("form", ROTATED.values(), ids=ROTATED)
def test_rotates_the_queries_in_the_same_call(form, head_dim, dtype):
    layout = Layout(head_dim, dtype, body_bits=2, window=3, **form)
    key, value = case_of(layout), case_of(of_values(layout), seed=1)
    cache, values = key.pack(), value.pack()
    q, layouts = randn(2, 6, 3, head_dim, seed=2, dtype=dtype), (layout, value.layout)
    asked = AttendCall(q, cache, values, 11, None, None, False, None, None, None, *layouts, rotate=True)
    k, v = (read(buffers, 11, each) for buffers, each in zip((cache, values), layouts, strict=True))
    assert_close("out", oracle(rotate_query(q.double(), cache, layout), k, v), attend_cpu.attend(asked))


@given(packed_calls, st.data())
@few
def test_sees_the_first_length_tokens_only(drawn, data):
    q, key, value, _, scale, _ = drawn
    length = data.draw(st.integers(1, key.length), label="length")
    out = call(q, key, value, length=length, scale=scale)
    k, v = key.expected()[:, :, :length], value.expected()[:, :, :length]
    assert_close("out", oracle(q, k, v, scale=scale), out)


@given(packed_calls)
@few
def test_what_was_never_written_does_not_matter(drawn):
    q, key, value, mask, scale, is_causal = drawn
    dirty = [poison(case.pack(), case.layout, case.length) for case in (key, value)]
    options = dict(mask=mask, scale=scale, is_causal=is_causal)
    out = run(q, *dirty, key.length, (key.layout, value.layout), **options)
    assert out.isfinite().all()
    assert_same("out", call(q, key, value, **options), out)


@every_layout
def test_length_may_be_as_many_as_the_cache_holds(layout):
    key, value = case_of(layout), case_of(of_values(layout), seed=1)
    q, layouts = randn(2, 4, 2, layout.head_dim, dtype=layout.dtype), (layout, value.layout)
    caches = [poison(case.pack(), case.layout, case.length) for case in (key, value)]
    expected = call(q, key, value)
    assert_same("no mask", expected, run(q, *caches, None, layouts))
    seen = torch.ones(2, 1, 1, key.capacity, dtype=torch.bool)
    assert_same("more columns than tokens", expected, run(q, *caches, None, layouts, mask=seen))
    assert_same("one column", expected, run(q, *caches, None, layouts, mask=seen[..., :1]))
    assert_same("length past the end", expected, run(q, *caches, key.capacity, layouts, mask=seen))


@every_layout
def test_leaves_the_cache_alone(layout):
    key, value = case_of(layout), case_of(of_values(layout))
    caches, q = (key.pack(), value.pack()), randn(2, 2, 1, layout.head_dim, dtype=layout.dtype)
    fresh = (key.x[:, :, :1] * 5, key.x[:, :, :1] * 5, torch.tensor([10]))
    run(q, *caches, 11, (layout, value.layout), fresh=fresh).fill_(7)
    for before, after in zip(key.pack() + value.pack(), caches[0] + caches[1], strict=True):
        assert_same("buffer", before, after)


@every_layout
def test_a_cropped_and_continued_cache_is_attended_as_it_reads(layout):
    layouts, q = (layout, of_values(layout)), randn(2, 4, 3, layout.head_dim, dtype=layout.dtype)
    caches = [case_of(each).pack() for each in layouts]
    for cache, each in zip(caches, layouts, strict=True):
        append(cache, case_of(each).x[:, :, :2] * 3, torch.tensor([6, 7]), None, None, str(each))
    for length in (5, 8):
        k, v = (read(cache, length, each) for cache, each in zip(caches, layouts, strict=True))
        assert_close("out", oracle(q, k, v), run(q, *caches, length, layouts))


@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("rows", ((1, 1), (6, 1), (1, 3), (5, 16)), ids=lambda rows: f"group{rows[0]}-q{rows[1]}")
@pytest.mark.parametrize("layout", WIDE.values(), ids=WIDE)
def test_many_tokens_and_wide_heads(layout, rows, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layouts = layout, of_values(layout)
    key, value = (case_of(each, B=2, H=2, T=1203, capacity=1203, seed=seed) for seed, each in enumerate(layouts))
    if layout.blocks:
        key.x = drifting(1203, 2, 2, layout.head_dim)
    caches = key.pack(), value.pack()
    q = randn(2, 2 * rows[0], rows[1], layout.head_dim, seed=2) * 3  # peaks that move from chunk to chunk
    k, v = (read(cache, 1203, each) for cache, each in zip(caches, layouts, strict=True))
    assert_close("out", oracle(q, k, v), run(q, *caches, 1203, layouts))
    late = torch.arange(1203) >= 900  # nothing is seen in the first chunks, nothing at all in row 0
    mask = late.expand(2, 1, 1, -1) & torch.tensor([False, True])[:, None, None, None]
    out = run(q, *caches, 1203, layouts, mask=mask)
    assert_close("masked", oracle(q[1:], k[1:], v[1:], mask[1:]), out[1:])
    assert (out[0] == 0).all(), "nothing seen gives 0, as in torch"
    asked = AttendCall(q, *caches, 1203, mask, None, False, None, None, None, *layouts, restore=True)
    restored = attend_cpu.attend(asked)
    assert_close("restored", out.double() @ matrix(layout.head_dim), restored)


def test_fresh_tokens_may_begin_a_block():
    """Before they are appended their block has no mean yet; what the buffer holds there does not matter."""
    layout = Layout(32, f32, body_bits=2, window=20, blocks=True, **UNEVEN)
    values, x = of_values(layout), drifting(131, B=2, D=32)
    affine = lambda each: random_affine(2, 2, 32, uneven=each.uneven)
    key, value = (Case(each, x[:, :, :127], None, None, affine(each), 131) for each in (layout, values))
    caches = [poison(case.pack(), case.layout, 127) for case in (key, value)]
    at, q = torch.arange(127, 131), randn(2, 4, 4, 32)
    k, v = (torch.cat([read(cache, 127, case.layout), x[:, :, 127:]], 2) for cache, case in
            zip(caches, (key, value), strict=True))  # fmt: skip
    out = run(q, *caches, 131, (layout, values), fresh=(x[:, :, 127:], x[:, :, 127:], at))
    assert_close("out", oracle(q, k, v), out)


@pytest.mark.parametrize("mask_dtype", (torch.bool, f32, f16, bf16), ids=str)
def test_masks_of_any_strides(mask_dtype):
    layout = LAYOUTS["2bit-text4-bf16"]
    key, value = case_of(layout), case_of(layout, seed=1)
    noise = randn(11, 3, 4, 2, seed=3).permute(3, 2, 1, 0)
    mask = noise > -1 if mask_dtype == torch.bool else noise.to(mask_dtype)
    q = randn(2, 3, 4, 16, dtype=bf16).transpose(1, 2)
    assert not q.is_contiguous() and not mask.is_contiguous()
    out = call(q, key, value, mask=mask)
    assert_close("out", oracle(q, key.expected(), value.expected(), mask), out)
    assert_same("columns apart", out, call(q, key, value, mask=torch.stack([mask, mask], -1).flatten(3)[..., ::2]))


@pytest.mark.parametrize("lowest", (-torch.inf, torch.finfo(f32).min), ids=str)
def test_rows_that_see_nothing(lowest):
    key = case_of(LAYOUTS["2bit"])
    q, mask = randn(2, 2, 1, 16), torch.full((2, 1, 1, 11), lowest)
    cache = key.pack()
    expected = reference(AttendCall(q, cache, cache, 11, mask, None, False, *[None] * 3, key.layout, key.layout))
    assert_close("out", expected, run(q, cache, cache, 11, (key.layout,) * 2, mask=mask))
    assert expected.any() == (lowest > -torch.inf)


@pytest.mark.parametrize("broken", (torch.nan, torch.inf, -torch.inf), ids=str)
@pytest.mark.parametrize("window", (0, 3))
@pytest.mark.parametrize("dtype", (f32, f16), ids=str)
@pytest.mark.parametrize("levels", ({}, UNEVEN | {"blocks": True}), ids=("minima", "uneven"))
def test_a_broken_token_spoils_only_queries_that_see_it(levels, broken, dtype, window):
    layout = Layout(16, dtype, body_bits=2, window=window, **levels)
    key, value = case_of(layout), case_of(of_values(layout), seed=1)
    q = randn(2, 2, 9, 16, dtype=dtype)
    clean = call(q, key, value, length=9, is_causal=True)
    for in_key, in_value in ((True, False), (False, True), (True, True)):
        key.x[1, :, 4, 3] = broken if in_key else 1.0
        value.x[1, :, 4, 3] = broken if in_value else 1.0
        out = call(q, key, value, length=9, is_causal=True)
        assert_close("rows without it", clean[0], out[0])
        assert_close("queries before it", clean[1, :, :4], out[1, :, :4])
        assert not out[1, :, 4:].isfinite().any()
        unseen = torch.arange(11) != 4
        assert call(q, key, value, mask=unseen[None]).isfinite().all()


@pytest.mark.parametrize("bits, symmetric", ((2, False), (4, False), (8, False), (2, True), (4, True)))
def test_numbers_past_fp16_saturate_as_they_read(bits, symmetric):
    layout = Layout(16, f16, body_bits=bits, symmetric=symmetric)
    key, value = case_of(layout), case_of(layout, seed=1)
    for case in (key, value):
        case.x[..., ::2], case.x[..., 1::2] = 65504.0, -65504.0
    k, v = key.expected(), value.expected()
    assert (v.abs() == 65504).all()
    q = (randn(2, 2, 2, 16) * 1e-5).half()
    out = call(q, key, value)
    assert out.isfinite().all()
    assert_close("out", oracle(q, k, v), out)


@pytest.mark.parametrize("at", (-1, 9))
def test_a_fresh_token_out_of_range_is_an_error(at):
    key = case_of(LAYOUTS["2bit"])
    fresh = (key.x[:, :, :1], key.x[:, :, :1], torch.tensor([at]))
    with pytest.raises(IndexError, match="akvq::attend: a fresh token's position is out of range"):
        call(randn(2, 2, 1, 16), key, key, length=9, fresh=fresh)


def args_for(layout=LAYOUTS["2bit"], **changes):
    """Arguments of one good call, some of them changed."""
    cache = case_of(layout).pack()
    values = dict(q=randn(2, 2, 1, layout.head_dim, dtype=layout.dtype), key=cache, value=cache, length=11, mask=None)
    values |= dict(scale=None, is_causal=False, fresh_key=None, fresh_value=None, at=None)
    return AttendCall(**{**values, "key_layout": layout, "value_layout": layout, **changes})


REFUSED = {
    "float64": (dict(q=randn(2, 2, 1, 16).double()), r"q is .* torch.float64, accepted: .*\[torch.float32"),
    "long q": (dict(q=randn(2, 2, 17, 16)), r"q is \[2, 2, 17, 16\]"),
    "other heads": (dict(q=randn(2, 3, 1, 16)), "a multiple of 2 heads"),
    "lossless": (dict(layout=LAYOUTS["lossless-f16"]), "key cache: body_bits is 16, accepted: 2, 4 or 8"),
    "other dtype": (dict(q=randn(2, 2, 1, 16).half()), "q is torch.float16 over torch.float32 keys and torch.float32"),
    "uneven values": (
        dict(value_layout=LAYOUTS["2bit-uneven"]),
        "value cache: uneven is True, accepted: False",
    ),
    "values in blocks": (
        dict(value_layout=LAYOUTS["2bit-blocks"]),
        "value cache: blocks is True, accepted: False",
    ),
    "other layout": (dict(value_layout=LAYOUTS["2bit-no-overlay"]), "value cache: 7 buffers, accepted:"),
    "too long": (dict(length=14), "length is 14, accepted: 0 to the capacity 13"),
    "short mask": (dict(mask=torch.ones(1, 10)), r"mask is \[1, 10\] .* accepted: broadcastable to \[2, 2, 1, 11 or"),
    "float64 mask": (dict(mask=torch.ones(1, 11).double()), r"mask is \[1, 11\] torch.float64"),
    "mask and causal": (dict(mask=torch.ones(1, 11), is_causal=True), "both a mask and is_causal"),
    "half fresh": (dict(fresh_key=randn(2, 2, 1, 16)), "fresh tokens are not complete"),
    "other fresh": (
        dict(fresh_key=randn(2, 2, 2, 16), fresh_value=randn(2, 2, 1, 16), at=torch.tensor([3])),
        r"fresh tokens are \[2, 2, 2, 16\] and",
    ),
}


@pytest.mark.parametrize("changes, reason", REFUSED.values(), ids=REFUSED)
def test_says_why_not(changes, reason):
    with pytest.raises(AssertionError, match=reason):
        refused = attend_cpu.refusal(args_for(**changes))
        assert not refused, refused


def test_says_which_buffer_does_not_fit():
    args = args_for()
    args = args._replace(key=[torch.stack([buffer, buffer], -1)[..., 0] for buffer in args.key])
    assert attend_cpu.refusal(args).startswith("key cache: state is [3] torch.int32, strides (2,), on cpu, accepted:")
    assert attend_cpu.refusal(args_for(length=None)) == ""


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """Nothing built yet, and another folder to build in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpp, "FLAGS", QUICK_FLAGS)
    cpp.function.cache_clear()
    yield tmp_path / "cache" / "akvq_fx"
    cpp.function.cache_clear()


@pytest.mark.parametrize("chosen, named", ((None, r"c\+\+, g\+\+, clang\+\+"), ("no-such-c++ -m64", r"no-such-c\+\+")))
def test_without_a_compiler_the_reference_answers(fresh_build, monkeypatch, caplog, chosen, named):
    monkeypatch.setenv("PATH", str(fresh_build))
    monkeypatch.delenv("CXX", raising=False)
    if chosen:
        monkeypatch.setenv("CXX", chosen)
    args = args_for()
    with caplog.at_level(logging.INFO, "akvq_fx"), pytest.raises(RuntimeError, match=named):
        reasons = {attend_cpu.refusal(args) for _ in range(3)}
        assert len(reasons) == len(caplog.records) == 1
        raise RuntimeError(*reasons)
    tokens = read(args.key, 11, args.key_layout)
    out = torch.ops.akvq.attend(*args[:10], str(args.key_layout), str(args.value_layout))
    assert_close("out", oracle(args.q, tokens, tokens), out)


def test_a_compiler_that_fails_is_a_reason(fresh_build, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert attend_cpu.refusal(args_for()).startswith("no C++ kernel: false failed")
    assert list(fresh_build.iterdir()) == []


def test_a_damaged_library_is_built_again(fresh_build):
    fresh_build.mkdir(parents=True)
    cpp.library_path(attend_cpu.SOURCES).write_bytes(b"not a library")
    assert attend_cpu.refusal(args_for()) == ""


def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path):
    script = (
        "import sys; from akvq_fx.kernels import attend_cpu, cpp; "
        f"cpp.FLAGS = {QUICK_FLAGS}; sys.exit(attend_cpu.library()[1] or 0)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    start = lambda: subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
    for process in [start(), start()]:
        assert (process.communicate()[1], process.returncode) == ("", 0)
    assert [path.suffix for path in (tmp_path / "akvq_fx").iterdir()] == [".so"]
