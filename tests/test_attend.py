"""attend: registered right, and torch's own attention over what the packed cache reads as."""

import dataclasses
import importlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from akvq_fx.kernels.attend import attend
from akvq_fx.kernels.cache import append, read
from akvq_fx.kernels.layout import Layout
from akvq_fx.kernels.rotate import matrix, rotate
from tests.kernel_cases import (
    LAYOUTS,
    Case,
    assert_close,
    assert_same,
    bf16,
    case_of,
    cases,
    chunk_of,
    f16,
    f32,
    few,
    layouts,
    poison,
    randn,
    seeds,
)

attend_module = importlib.import_module("akvq_fx.kernels.attend")  # its name in the package may be the op's
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
TEXT_BF16, PLAIN_F16 = LAYOUTS["2bit-text4-bf16"], LAYOUTS["2bit-f16-rotated"]


def oracle(q, k, v, mask=None, scale=None, is_causal=False):
    """torch's attention in float64, every query head with its own copy of keys and values."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return F.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scale, is_causal=is_causal)


def capped_oracle(q, k, v, mask, scale, is_causal, softcap):
    """The same with scores of softcap * tanh(score / softcap)."""
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("bhqd,bhtd->bhqt", q.double(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.where(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1) @ v


def sunk_oracle(q, k, v, mask, scale, is_causal, sinks):
    """torch's attention with a token more, in front, whose score is the head's sink and whose value is 0."""
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("bhqd,bhtd->bhqt", q.double(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.where(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    first = sinks.double().view(-1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([first, scores], -1).softmax(-1)
    return weights @ torch.cat([torch.zeros_like(v[:, :, :1]), v], 2)


def call(
    q, key: Case, value: Case, length=None, mask=None, scale=None, is_causal=False, fresh=(None, None, None), **by
):
    length = key.length if length is None else length
    args = (q, key.pack(), value.pack(), length, mask, scale, is_causal, *fresh)
    return attend(*args, str(key.layout), str(value.layout), **by)


@every_layout
@pytest.mark.parametrize("with_fresh", (False, True), ids=("stored", "fresh"))
def test_registration(layout, with_fresh):
    key, value = case_of(layout), case_of(layout, seed=1)
    q = randn(2, 6, 2, layout.head_dim, seed=2, dtype=layout.dtype)
    at = torch.tensor([key.length - 2, key.length - 1])
    fresh = (key.x[:, :, -2:], value.x[:, :, -2:], at) if with_fresh else (None, None, None)
    mask = torch.ones(2, 1, 2, key.length, dtype=torch.bool)
    args = (q, key.pack(), value.pack(), key.length, mask, 0.3, False, *fresh, str(layout), str(layout))
    torch.library.opcheck(attend, args)


@pytest.mark.parametrize("name", ("2bit-f16-rotated", "lossless-rotated-affine"))
def test_registration_of_what_rotates_and_restores(name):
    layout, cache = LAYOUTS[name], case_of(LAYOUTS[name]).pack()
    q = randn(2, 6, 2, layout.head_dim, dtype=layout.dtype)
    args = (q, cache, cache, 11, None, None, False, None, None, None, str(layout), str(layout), True, True)
    torch.library.opcheck(attend, args)
    torch.library.opcheck(attend, (*args, 30.0, torch.zeros(6)))


@pytest.mark.parametrize("dtype", (f32, f16, bf16), ids=str)
def test_registration_with_two_layouts(dtype):
    key = case_of(Layout(24, dtype, body_bits=2, window=3, text_bits=4))
    value = case_of(Layout(16, dtype, body_bits=16))
    q = randn(2, 2, 5, 24, dtype=dtype)
    args = (q, key.pack(), value.pack(), 7, None, None, True, None, None, None, str(key.layout), str(value.layout))
    torch.library.opcheck(attend, args)


def test_refuses_keys_without_token_classes():
    key, value = (case_of(Layout(16, f32, body_bits=2, shares_classes=True), seed=seed) for seed in range(2))
    args = (key.pack(), value.pack(), 7, None, None, True, None, None, None, str(key.layout), str(value.layout))
    with pytest.raises(ValueError, match="f32/d16/b2/c1/g128/shares, accepted: keys that hold their tokens' classes"):
        attend(randn(2, 2, 5, 16), *args)


@st.composite
def masks(draw, B, Hq, q, T, dtype):
    """None, bool or float, broadcast over any of its dims; every query sees the first token."""
    kind = draw(st.sampled_from(("none", "bool", "float")))
    if kind == "none":
        return None
    shape = draw(st.sampled_from(((B, Hq, q, T), (B, 1, q, T), (1, Hq, 1, T), (1, 1, q, T), (B, 1, 1, T), (q, T))))
    noise = randn(*shape, seed=draw(seeds))
    if kind == "bool":
        seen = noise > 0
        seen[..., 0] = True
        return seen
    return noise.masked_fill((noise > 1) & (torch.arange(T) > 0), -torch.inf).to(dtype)


@st.composite
def calls(draw, value_layouts=layouts):
    """Key and value caches of one prompt with their own layouts, queries, and the other arguments of attention."""
    dtype = draw(st.sampled_from((f32, f32, f16, bf16)))
    key = draw(cases(draw(layouts(dtypes=(dtype,), shares=(False,)))))
    B, H, T, _ = key.x.shape
    value = draw(cases(draw(value_layouts(dtypes=(dtype,))), batch=B, heads=H, length=T))
    tokens, groups = draw(st.integers(1, 16)), draw(st.sampled_from((1, 2, 5)))
    q = randn(B, H * groups, tokens, key.layout.head_dim, seed=draw(seeds), dtype=dtype)
    mask = draw(masks(B, H * groups, tokens, T, dtype))
    scale = draw(st.sampled_from((None, 0.1, 0.5)))
    return q, key, value, mask, scale, mask is None and draw(st.booleans())


@given(calls())
@few
def test_equals_torch_on_the_dequantized_cache(drawn):
    q, key, value, mask, scale, is_causal = drawn
    out = call(q, key, value, mask=mask, scale=scale, is_causal=is_causal)
    assert (out.dtype, out.is_contiguous()) == (q.dtype, True)
    assert_close("out", oracle(q, key.expected(), value.expected(), mask, scale, is_causal), out)


softcaps = st.sampled_from((0.3, 2.0, 50.0))  # scores of these cases are a few in size


def assert_capped(call, drawn, softcap) -> None:
    """call: as this file's."""
    q, key, value, *rest = drawn
    due = capped_oracle(q, key.expected(), value.expected(), *rest, softcap)
    mask, scale, is_causal = rest
    assert_close("out", due, call(q, key, value, mask=mask, scale=scale, is_causal=is_causal, softcap=softcap))


def assert_sunk(call, drawn, seed) -> None:
    """The same with a sink of each head."""
    q, key, value, *rest = drawn
    sinks = 2 * randn(q.shape[1], seed=seed, dtype=q.dtype)
    due = sunk_oracle(q, key.expected(), value.expected(), *rest, sinks)
    mask, scale, is_causal = rest
    assert_close("out", due, call(q, key, value, mask=mask, scale=scale, is_causal=is_causal, sinks=sinks))


@given(calls(), softcaps)
@few
def test_caps_scores(drawn, softcap):
    assert_capped(call, drawn, softcap)


@given(calls(), seeds)
@few
def test_sinks_take_their_share(drawn, seed):
    assert_sunk(call, drawn, seed)


def test_refuses_sinks_of_other_heads():
    key = case_of(LAYOUTS["2bit-f16-rotated"])
    with pytest.raises(ValueError, match=r"sinks are \[2\], accepted: \[4\]"):
        call(randn(2, 4, 1, key.layout.head_dim, dtype=f16), key, key, sinks=torch.zeros(2))


def test_a_capped_row_that_sees_nothing_is_0():
    key, value = case_of(LAYOUTS["2bit-f16-rotated"]), case_of(LAYOUTS["2bit-f16-rotated"], seed=1)
    q, mask = randn(2, 2, 3, key.layout.head_dim, dtype=f16), torch.ones(2, 1, 3, key.length, dtype=torch.bool)
    mask[1, :, 2] = False
    for given_mask in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        for by in (
            {"softcap": 5.0},
            {"sinks": torch.zeros(2)},
            {"softcap": 5.0, "sinks": torch.full((2,), -torch.inf)},
        ):
            out = call(q, key, value, mask=given_mask, **by)
            assert not out[1, :, 2].any() and out[0].all() and out.isfinite().all()


@given(calls(), st.data())
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


def wide_layouts(dtypes):
    wide = layouts((40, 64, 80, 96, 128, 256), dtypes)
    return wide.map(lambda layout: dataclasses.replace(layout, rotated=True))


@st.composite
def restored_calls(draw):
    """Arguments of attend over values that are stored rotated, of every head dim; with fresh tokens or without."""
    q, key, value, mask, scale, is_causal = draw(calls(wide_layouts))
    count = draw(st.integers(0, key.length))
    at = torch.arange(key.length - count, key.length)
    fresh = (key.x[:, :, at], value.x[:, :, at], at) if count else (None, None, None)
    return q, key.pack(), value.pack(), key.length, mask, scale, is_causal, *fresh, key.layout, value.layout


@pytest.mark.parametrize("faster", ({}, {"cpu": ("attend_cpu",)}), ids=("reference", "fastest"))
@given(restored_calls())
@few
def test_restore_rotates_the_output_back(faster, args):
    with mock.patch.object(attend_module, "FASTER", faster):
        stored, out = (attend(*args[:10], *map(str, args[10:]), False, restore) for restore in (False, True))
    assert (out.dtype, out.is_contiguous()) == (stored.dtype, True)
    assert_close("out", stored.double() @ matrix(stored.shape[-1]), out)


@pytest.mark.parametrize("restored", (False, True))
def test_restore_has_no_effect_on_values_that_are_stored_as_they_came(restored):
    key, value = case_of(LAYOUTS["2bit-f16-rotated"]), case_of(Layout(24, f16, body_bits=2, window=3, pivots=1), seed=1)
    value.layout = dataclasses.replace(value.layout, rotated=restored)
    args = (randn(2, 2, 1, 24, dtype=f16), key.pack(), value.pack(), 11, None, None, False, None, None, None)
    texts = str(key.layout), str(value.layout)
    assert torch.equal(attend(*args, *texts), attend(*args, *texts, False, True)) != restored


@pytest.mark.parametrize("fused", ((), ("rotate",), ("restore",), ("rotate", "restore")), ids=" ".join)
def test_what_a_kernel_does_not_do_itself_is_done_around_it(fused):
    asked = []

    def kernel(call):
        asked.append(call)
        return call.q.clone()

    kernel.fused, layout = fused, LAYOUTS["2bit-f16-rotated"]
    cache, q = case_of(layout).pack(), randn(2, 2, 1, 24, dtype=f16)
    with mock.patch.object(attend_module, "dispatch", lambda run, *_: run(kernel)):
        out = attend(q, cache, cache, 11, None, None, False, None, None, None, *[str(layout)] * 2, True, True)
    asked_q = q if "rotate" in fused else rotate(q)
    (call,) = asked
    assert_same("queries", asked_q, call.q)
    assert (call.rotate, call.restore) == ("rotate" in fused, "restore" in fused)
    assert_same("out", asked_q if "restore" in fused else rotate(asked_q), out)


def draw_chunk(draw, key: Case, value: Case, groups: int, tokens: int):
    """Two chunks over caches of one prompt, queries, and mask columns and length up to the capacity."""
    start, spare = draw(st.integers(0, key.length)), draw(st.integers(0, 3))
    chunks = [chunk_of(case, start, tokens, draw(seeds), spare) for case in (key, value)]
    B, H, _, D = key.x.shape
    sizes = (chunks[0].end, chunks[0].case.capacity)
    q = randn(B, H * groups, tokens, D, seed=draw(seeds), dtype=key.layout.dtype)
    mask = draw(masks(B, H * groups, tokens, draw(st.sampled_from(sizes)), q.dtype))
    lengths = [None, *(size for size in sizes if mask is None or size <= mask.shape[-1])]
    rest = {"mask": mask, "scale": draw(st.sampled_from((None, 0.1)))}
    rest["is_causal"] = mask is None and draw(st.booleans())
    return q, *chunks, draw(st.sampled_from(lengths)), rest


def assert_chunk(attend_with, drawn) -> None:
    """attend_with(q, key cache, value cache, layouts, length, fresh=, mask=, ...) reads prompt and chunk, in both
    orders."""
    q, key, value, length, rest = drawn
    fresh, layouts = (key.x, value.x, key.at), (key.case.layout, value.case.layout)
    seen = None if rest["mask"] is None else rest["mask"][..., : key.end]
    for appended in (False, True):
        out = attend_with(q, key.cache(appended), value.cache(appended), layouts, length, fresh=fresh, **rest)
        due = oracle(q, key.expected(appended), value.expected(appended), seen, rest["scale"], rest["is_causal"])
        assert_close("append first" if appended else "attend first", due, out)


@st.composite
def chunk_calls(draw, most: int = 12):
    dtype = draw(st.sampled_from((f32, f32, f16, bf16)))
    key = draw(cases(draw(layouts(dtypes=(dtype,), shares=(False,)))))
    value_layout = draw(layouts(dtypes=(dtype,)))
    value = draw(cases(value_layout, batch=key.x.shape[0], heads=key.x.shape[1], length=key.length))
    return draw_chunk(draw, key, value, draw(st.sampled_from((1, 2, 5))), draw(st.integers(1, most)))


@given(chunk_calls(most=45))
@few
def test_a_chunk_sees_the_cache_before_it_and_itself(drawn):
    def run(q, key, value, layouts, length, fresh, mask, scale, is_causal):
        return attend(q, key, value, length, mask, scale, is_causal, *fresh, *map(str, layouts))

    assert_chunk(run, drawn)


def test_a_chunk_leaves_its_queries_the_whole_ring():
    """A chunk that fills the ring: attended before its append, the prompt's last tokens are still exact."""
    layout = Layout(16, f32, body_bits=2, window=5)
    chunk = chunk_of(case_of(layout), 11, 5)
    exact = (chunk.expected(False)[:, :, :11] == chunk.case.x).all(3).all(1)[0]
    assert exact.tolist() == [False] * 6 + [True] * 5
    q, fresh = randn(2, 2, 5, 16), (chunk.x, chunk.x, chunk.at)
    before, after = (
        attend(q, cache, cache, 16, None, None, False, *fresh, str(layout), str(layout))
        for cache in map(chunk.cache, (False, True))
    )
    assert_close("before", oracle(q, *[chunk.expected(False)] * 2), before)
    assert (before - after).abs().max() > 1e-3


@given(calls(), st.data())
@few
def test_sees_the_first_length_tokens_only(drawn, data):
    q, key, value, _, scale, _ = drawn
    length = data.draw(st.integers(1, key.length), label="length")
    out = call(q, key, value, length=length, scale=scale)
    k, v = key.expected()[:, :, :length], value.expected()[:, :, :length]
    assert_close("out", oracle(q, k, v, scale=scale), out)


@given(calls())
@few
def test_what_was_never_written_does_not_matter(drawn):
    q, key, value, mask, scale, is_causal = drawn
    dirty = [poison(case.pack(), case.layout, case.length) for case in (key, value)]
    args = (key.length, mask, scale, is_causal, None, None, None, str(key.layout), str(value.layout))
    out = attend(q, *dirty, *args)
    assert out.isfinite().all()
    assert_same("out", attend(q, key.pack(), value.pack(), *args), out)


@every_layout
def test_leaves_the_cache_alone_and_is_no_view_of_it(layout):
    key = case_of(layout)
    cache, q = key.pack(), randn(2, 2, 1, layout.head_dim, dtype=layout.dtype)
    fresh = (key.x[:, :, :1] * 5, key.x[:, :, :1] * 5, torch.tensor([10]))
    attend(q, cache, cache, 11, None, None, False, *fresh, str(layout), str(layout)).fill_(7)
    for before, after in zip(key.pack(), cache, strict=True):
        assert_same("buffer", before, after)


def test_a_cropped_and_continued_cache_is_attended_as_it_reads():
    key = case_of(TEXT_BF16)
    cache, q = key.pack(), randn(2, 4, 1, 16, dtype=bf16)
    append(cache, key.x[:, :, :2] * 3, torch.tensor([6, 7]), None, None, str(TEXT_BF16))
    tokens = read(cache, 8, TEXT_BF16)
    assert_same("new tokens", key.x[:, :, :2] * 3, tokens[:, :, 6:])
    out = attend(q, cache, cache, 8, None, None, False, None, None, None, str(TEXT_BF16), str(TEXT_BF16))
    assert_close("out", oracle(q, tokens, tokens), out)


@pytest.mark.parametrize("q_dtype", (torch.float64, f32, bf16), ids=str)
def test_answers_in_the_dtype_of_q(q_dtype):
    key = case_of(PLAIN_F16)
    q = randn(2, 2, 3, 24, dtype=q_dtype)
    out = call(q, key, key)
    assert out.dtype == q_dtype
    assert_close("out", oracle(q, key.expected(), key.expected()), out)


@pytest.mark.parametrize("broken", (torch.nan, torch.inf), ids=str)
def test_a_broken_token_spoils_only_queries_that_may_see_it(broken):
    key = case_of(Layout(16, f32, body_bits=2, window=3))
    value = case_of(key.layout, seed=1)
    q = randn(2, 2, 9, 16)
    clean = call(q, key, value, is_causal=True)
    key.x[1, :, 4, 3] = value.x[1, :, 4, 3] = broken
    out = call(q, key, value, length=9, is_causal=True)
    assert_close("row without it", clean[0], out[0])
    assert not out[1, :, 4:].isfinite().any()
    before = call(q[:, :, :4], key, value, length=4, is_causal=True)
    assert_close("length before it", clean[:, :, :4], before)


@pytest.mark.parametrize("shape", [(2, 2, 1, 24), (2, 3, 1, 16), (2, 2, 16)], ids=str)
def test_fake_refuses_other_queries(shape):
    layout = LAYOUTS["2bit"]
    message = r"akvq::attend: q is \[.*\], accepted: \[B, Hq, q, 16\] with Hq a multiple of 2"
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        cache = layout.allocate(2, 2, 5)
        attend(torch.ones(shape), cache, cache, 3, None, None, False, None, None, None, str(layout), str(layout))


@pytest.mark.parametrize("fake", (False, True), ids=("eager", "fake"))
def test_refuses_buffers_of_another_layout(fake):
    layout, other = LAYOUTS["2bit"], str(LAYOUTS["2bit-no-overlay"])
    with FakeTensorMode() if fake else torch.no_grad():
        cache, q = layout.allocate(2, 2, 5), torch.ones(2, 2, 1, 16)
        for texts in ((other, str(layout)), (str(layout), other)):
            with pytest.raises(ValueError, match="akvq cache: got 7 buffers, layout f32/d16/b2/c1/g128 has 4"):
                attend(q, cache, cache, 3, None, None, False, None, None, None, *texts)
