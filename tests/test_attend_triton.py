"""attend_triton equals torch's attention over the dequantized cache, in every segment, tile and split.

On the CPU the kernels run in Triton's interpreter (tests/conftest.py), on a GPU they are compiled.
"""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is an optional dependency")

from akvq_fx.kernels import attend_triton
from akvq_fx.kernels.attend import AttendCall, reference
from akvq_fx.kernels.cache import append, named, read, restart
from akvq_fx.kernels.layout import PADDING, TEXT, Layout
from tests.kernel_cases import (
    FEWER,
    LAYOUTS,
    Case,
    assert_close,
    assert_same,
    bf16,
    case_of,
    f16,
    f32,
    few,
    poison,
    randn,
    seeds,
)
from tests.test_attend import assert_chunk, capped_oracle, draw_chunk, masks, oracle, sunk_oracle
from tests.test_cache_ops import gather_text

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKED = {name: layout for name, layout in LAYOUTS.items() if not layout.lossless}
every_layout = pytest.mark.parametrize("layout", PACKED.values(), ids=PACKED)
TEXT_BF16, GROUPED, UNEVEN_KEYS = (LAYOUTS[name] for name in ("2bit-text4-bf16", "2bit-groups", "2bit-uneven"))
ALL_OVERLAYS = Layout(16, f32, body_bits=2, text_bits=4, window=5, pivots=3)
NO_TEXT = dataclasses.replace(ALL_OVERLAYS, text_bits=0)  # values may lack the text overlay that the keys have
some = settings(few, max_examples=12 // FEWER)  # a GPU compiles a kernel for nearly every example
NO_FRESH = (None, None, None)


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch):
    """Shows what kernels leave out of their outputs, or read before it is written."""
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: spoil(plain(*args, **kwargs)))


def spoil(made):
    return made.fill_(torch.nan) if made.is_floating_point() else made


def values_of(layout: Layout) -> Layout:
    """The layout of values beside such keys: only keys can be uneven, and have means of blocks."""
    layout = dataclasses.replace(layout, uneven=False, affine=False) if layout.uneven else layout
    return dataclasses.replace(layout, blocks=False, moved=False)


def pair(layout: Layout, value_layout: Layout | None = None, **sizes) -> tuple[Case, Case]:
    """A prompt's keys and values: other numbers, the same classes and pivots; no pivot is padding."""
    key = case_of(layout, **{"T": 41, "capacity": 45, **sizes})
    for row, at in enumerate(key.pivots.tolist() if key.pivots is not None else ()):
        key.classes[row, [p for p in at if p >= 0]] = TEXT
    value = case_of(value_layout or values_of(layout), *key.x.shape[:3], capacity=key.capacity + 3, seed=1)
    return key, dataclasses.replace(value, classes=key.classes, pivots=key.pivots)


def launch(
    q,
    key,
    value,
    layouts,
    length=None,
    mask=None,
    scale=None,
    is_causal=False,
    fresh=NO_FRESH,
    splits=None,
    softcap=0.0,
    sinks=None,
):
    """The kernel on DEVICE, its answer on the CPU."""
    there = lambda t: None if t is None else t.to(DEVICE)
    caches = [[buffer.to(DEVICE) for buffer in cache] for cache in (key, value)]
    asked = AttendCall(there(q), *caches, length, there(mask), scale, is_causal, *map(there, fresh), *layouts)
    asked = asked._replace(softcap=softcap, sinks=there(sinks))
    out = attend_triton.attend(asked, splits)
    assert (out.dtype, out.is_contiguous()) == (q.dtype, True)
    return out.cpu()


def call(q, key: Case, value: Case, length=None, **rest):
    length = key.length if length is None else length
    return launch(q, key.pack(), value.pack(), (key.layout, value.layout), length, **rest)


@every_layout
@pytest.mark.parametrize("tokens, groups", [(1, 3), (3, 1), (16, 2), (70, 1)], ids=str)
def test_equals_torch_on_the_dequantized_cache(layout, tokens, groups):
    key, value = pair(layout)
    q = randn(2, 2 * groups, tokens, layout.head_dim, seed=2, dtype=layout.dtype)
    assert_close("out", oracle(q, key.expected(), value.expected()), call(q, key, value))


@pytest.mark.parametrize(
    "softcap, masked", [(0.5, "no mask"), (2.0, "bool"), (30.0, "float"), (5.0, "causal")], ids=str
)
def test_caps_scores(softcap, masked):
    key, value = pair(Layout(64, bf16, body_bits=2, text_bits=4, window=5, pivots=2))
    q, noise = randn(2, 4, 3, 64, seed=2, dtype=bf16), randn(2, 1, 3, 41, seed=3)
    mask = {"bool": noise > -1, "float": noise.masked_fill(noise > 1, -torch.inf)}.get(masked)
    due = capped_oracle(q, key.expected(), value.expected(), mask, None, masked == "causal", softcap)
    out = call(q, key, value, mask=mask, is_causal=masked == "causal", softcap=softcap, splits=2)
    assert_close("out", due, out)


@pytest.mark.parametrize("splits", (1, 3))
@pytest.mark.parametrize("masked", ("no mask", "bool", "causal"))
def test_sinks_take_their_share(masked, splits):
    key, value = pair(Layout(64, bf16, body_bits=2, text_bits=4, window=5, pivots=2))
    q, sinks = randn(2, 4, 3, 64, seed=2, dtype=bf16), 2 * randn(4, seed=4, dtype=bf16)
    mask = randn(2, 1, 3, 41, seed=3) > -1 if masked == "bool" else None
    due = sunk_oracle(q, key.expected(), value.expected(), mask, None, masked == "causal", sinks)
    assert_close("out", due, call(q, key, value, mask=mask, is_causal=masked == "causal", sinks=sinks, splits=splits))


DIMS = [
    (8, f16, 8),
    (16, f16, 2),
    (24, bf16, 4),
    (64, f32, 2),
    (80, f16, 2),
    (96, bf16, 2),
    (128, f16, 2),
    (256, f32, 4),
]


@pytest.mark.parametrize("D, dtype, bits", DIMS, ids=str)
def test_head_dims(D, dtype, bits):
    layout = Layout(D, dtype, body_bits=bits, text_bits=8 if D == 96 else 2 * bits % 16, window=3, pivots=2)
    key, value = pair(layout, B=1, T=19, capacity=19)
    q = randn(1, 4, 2, D, seed=2, dtype=dtype)
    assert_close("out", oracle(q, key.expected(), value.expected()), call(q, key, value, splits=2))


UNEVEN = dict.fromkeys(("symmetric", "uneven", "rotated", "affine"), True)
LEVELS = [  # of keys, of values
    (8, f16, 2, UNEVEN, {"symmetric": True}),
    (16, f32, 2, UNEVEN, {}),
    (64, bf16, 2, UNEVEN, {"symmetric": True}),
    (80, f16, 2, UNEVEN, {"symmetric": True, "group": 16}),
    (128, f16, 2, UNEVEN, {"symmetric": True, "group": 32}),
    (256, f32, 2, UNEVEN, {"symmetric": True}),
    (64, f16, 2, {}, {"symmetric": True}),
    (24, bf16, 4, {"symmetric": True}, {}),
    (96, f16, 4, {"symmetric": True, "group": 24}, {"symmetric": True, "group": 48}),
    (40, f32, 2, {"text_bits": 4}, {"symmetric": True}),
]


@pytest.mark.parametrize("D, dtype, bits, of_keys, of_values", LEVELS, ids=str)
def test_levels_of_keys_and_values(D, dtype, bits, of_keys, of_values):
    layouts = [Layout(D, dtype, body_bits=bits, window=3, pivots=2, **levels) for levels in (of_keys, of_values)]
    key, value = pair(*layouts, B=1, T=35, capacity=37)
    q, at = randn(1, 4, 2, D, seed=2, dtype=dtype), torch.tensor([33, 34])
    dirty = [poison(case.pack(), case.layout, 35) for case in (key, value)]
    assert_close("out", oracle(q, key.expected(), value.expected()), launch(q, *dirty, layouts, 35, splits=2))
    mask, fresh = randn(1, 1, 2, 35, seed=3) > -1, (key.x[:, :, at] * 2, value.x[:, :, at] + 1, at)
    k, v = key.expected().index_copy(2, at, fresh[0]), value.expected().index_copy(2, at, fresh[1])
    assert_close("fresh", oracle(q, k, v, mask), launch(q, *dirty, layouts, None, mask=mask, fresh=fresh))


@pytest.mark.parametrize("dims", [(24, 64), (128, 16)], ids=str)
def test_values_may_have_another_head_dim_group_and_dtype(dims):
    layout = Layout(dims[0], f32, body_bits=2, window=3, group=8, rotated=True)
    key, value = pair(layout, Layout(dims[1], f16, body_bits=2, window=3, body_clip=0.8))
    q = randn(2, 2, 3, dims[0], seed=2)
    assert_close("out", oracle(q, key.expected(), value.expected()), call(q, key, value))


@st.composite
def calls(draw):
    """Caches of one prompt, queries, and the other arguments of attention; few layouts, as each is compiled anew."""
    layout = draw(st.sampled_from((LAYOUTS["2bit"], LAYOUTS["2bit-f16-rotated"], TEXT_BF16, ALL_OVERLAYS, UNEVEN_KEYS)))
    value_layout = NO_TEXT if layout == ALL_OVERLAYS and draw(st.booleans()) else values_of(layout)
    T = draw(st.integers(1, 75))
    B, H, groups = draw(st.sampled_from(((1, 1, 5), (2, 2, 1), (3, 2, 2))))
    key, value = pair(layout, value_layout, B=B, H=H, T=T, capacity=T + 2, seed=draw(seeds))
    tokens = draw(st.sampled_from((1, 2, 9, 33)))
    q = randn(B, H * groups, tokens, layout.head_dim, seed=draw(seeds), dtype=layout.dtype)
    mask = draw(masks(B, H * groups, tokens, T, layout.dtype))
    rest = {
        "mask": mask,
        "scale": draw(st.sampled_from((None, 0.1, 0.5))),
        "is_causal": mask is None and draw(st.booleans()),
        "splits": draw(st.sampled_from((1, 2, 5))),
    }
    return q, key, value, rest


def expected_of(q, k, v, rest):
    return oracle(q, k, v, rest["mask"], rest["scale"], rest["is_causal"])


@given(calls())
@some
def test_masks_scales_and_splits(drawn):
    q, key, value, rest = drawn
    assert_close("out", expected_of(q, key.expected(), value.expected(), rest), call(q, key, value, **rest))


@given(calls(), st.data())
@some
def test_fresh_tokens_are_read_at_full_precision(drawn, data):
    q, key, value, rest = drawn
    start = data.draw(st.integers(0, key.length - 1), label="start")
    at = torch.arange(start, key.length)
    fresh = (key.x[:, :, at] * 2, value.x[:, :, at] + 1, at)
    k, v = key.expected().clone(), value.expected().clone()
    k[:, :, at], v[:, :, at] = fresh[0], fresh[1]
    assert_close("out", expected_of(q, k, v, rest), call(q, key, value, fresh=fresh, **rest))


@st.composite
def chunk_calls(draw):
    """As calls(), a chunk after a prompt that may have been cropped."""
    layout = draw(st.sampled_from((LAYOUTS["2bit"], TEXT_BF16, ALL_OVERLAYS, UNEVEN_KEYS)))
    B, H, groups = draw(st.sampled_from(((1, 1, 5), (2, 2, 1))))
    key, value = pair(layout, B=B, H=H, T=draw(st.integers(1, 75)), seed=draw(seeds), capacity=75)
    return draw_chunk(draw, key, value, groups, draw(st.sampled_from((1, 4, 37)))), draw(st.sampled_from((1, 3)))


@given(chunk_calls())
@some
def test_a_chunk_sees_the_cache_before_it_and_itself(drawn):
    chunk, splits = drawn

    def run(q, key, value, layouts, length, **rest):
        stale = max(chunk[1].end, chunk[1].case.length)  # slots that were written once; the others hold NaN
        key, value = (poison(cache, layout, stale) for cache, layout in zip((key, value), layouts, strict=True))
        return launch(q, key, value, layouts, length, splits=splits, **rest)

    assert_chunk(run, chunk)


@given(calls(), st.data())
@some
def test_sees_the_first_length_tokens_only(drawn, data):
    q, key, value, rest = drawn
    length = data.draw(st.integers(1, key.length), label="length")
    rest |= {"mask": None, "is_causal": False}
    k, v = key.expected()[:, :, :length], value.expected()[:, :, :length]
    assert_close("out", expected_of(q, k, v, rest), call(q, key, value, length=length, **rest))


@given(calls())
@settings(some, max_examples=6 // FEWER)
def test_what_was_never_written_does_not_matter(drawn):
    q, key, value, rest = drawn
    layouts, clean = (key.layout, value.layout), (key.pack(), value.pack())
    dirty = [poison(cache, case.layout, case.length) for cache, case in zip(clean, (key, value), strict=True)]
    out = launch(q, *dirty, layouts, key.length, **rest)
    assert out.isfinite().all()
    assert_same("out", launch(q, *clean, layouts, key.length, **rest), out)
    assert_close("length on the device", out, launch(q, *dirty, layouts, None, **rest))


@pytest.mark.parametrize("columns", (45, 60), ids=str)
def test_a_mask_over_the_capacity_sees_what_was_written(columns):
    """A static cache: attention sees every slot, the mask none that is empty; only the device knows the length."""
    key, value = pair(ALL_OVERLAYS)
    q = randn(2, 4, 2, 16, seed=2)
    dirty = [poison(case.pack(), case.layout, case.length) for case in (key, value)]
    mask = torch.ones(2, 1, 2, columns, dtype=torch.bool)
    expected = oracle(q, key.expected(), value.expected())
    for length, seen in ((None, mask), (45, mask), (None, torch.where(mask, 0.0, -1.0)), (None, mask[..., :1])):
        assert_close("out", expected, launch(q, *dirty, (key.layout, value.layout), length, mask=seen))


@pytest.mark.parametrize("start", (57, 2), ids=("new", "over-pivots-and-text"))
def test_a_chunk_after_a_filled_cache(start):
    """Chunked prefill: a causal mask with an offset, left padding, fresh tokens that are more than the ring holds."""
    key, value = pair(ALL_OVERLAYS, T=90, capacity=96)
    at, layouts = torch.arange(start, 90), (key.layout, value.layout)
    fresh = (key.x[:, :, at], value.x[:, :, at], at)
    mask = torch.arange(90) <= at[:, None]
    mask = mask.expand(2, 1, -1, -1).clone()
    mask[1, :, :, 1:13] = False
    k, v = key.expected().clone(), value.expected().clone()
    k[:, :, at], v[:, :, at] = fresh[0], fresh[1]
    q = randn(2, 4, len(at), 16, seed=2)
    out = launch(q, key.pack(), value.pack(), layouts, 90, mask=mask, fresh=fresh)
    assert_close("out", oracle(q, k, v, mask), out)


@pytest.mark.parametrize("is_causal", (False, True), ids=("all", "causal"))
@pytest.mark.parametrize(
    "value_layout, splits",
    [(ALL_OVERLAYS, splits) for splits in (1, 2, 3, 7)] + [(NO_TEXT, 7)],
    ids=("text-1", "text-2", "text-3", "text-7", "no-text-7"),
)
def test_splits_of_any_number_agree(value_layout, splits, is_causal):
    """Six tiles or fewer of body, text, pivots and ring: uneven shares, and splits that get none."""
    key, value = pair(ALL_OVERLAYS, value_layout, B=1, T=75, capacity=80)
    q = randn(1, 4, 3, 16, seed=2)
    out = call(q, key, value, is_causal=is_causal, splits=splits)
    assert_close("out", oracle(q, key.expected(), value.expected(), is_causal=is_causal), out)


@pytest.mark.parametrize("splits", (1, 3), ids=str)
@pytest.mark.parametrize("kind", ("bool", "infinite", "smallest"))
def test_a_row_that_sees_nothing_is_as_torch_gives_it(kind, splits):
    """0 under False or -inf; the mean of all values under the smallest number, which drowns every score."""
    key, value = pair(LAYOUTS["2bit"])
    q = randn(2, 2, 3, 16, seed=2)
    seen = randn(2, 1, 3, 41, seed=3) > 0
    seen[0, :, 1] = seen[1, :, 2] = False
    hidden = {"infinite": -torch.inf, "smallest": torch.finfo(f32).min}
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, hidden[kind])
    expected = reference(
        AttendCall(q, key.pack(), value.pack(), 41, mask, None, False, *NO_FRESH, key.layout, value.layout)
    )
    assert (expected[0, :, 1] == 0).all() == (kind != "smallest")
    assert_close("out", expected, call(q, key, value, mask=mask, splits=splits))


def test_masks_of_any_strides():
    key, value = pair(LAYOUTS["2bit"])
    q = randn(2, 4, 3, 16, seed=2)
    wide = randn(41, 3, 2, 8, seed=4)
    views = (
        wide[..., ::2].permute(2, 3, 1, 0),
        wide[:, :, 0, 0].t(),
        wide[:, 0, 0, 0][None],
        wide[:1, :, :1, :1].permute(3, 2, 1, 0).expand(1, 1, 3, 41),
        (wide > 0)[..., ::2].permute(2, 3, 1, 0),
        wide[..., :1].permute(2, 3, 1, 0).expand(2, 4, 3, 41),
    )
    for mask in views:
        assert_close("out", oracle(q, key.expected(), value.expected(), mask), call(q, key, value, mask=mask))


def test_queries_and_fresh_tokens_of_any_strides():
    key, value = pair(LAYOUTS["2bit"])
    at = torch.arange(38, 41)
    wide = randn(2, 3, 4, 32, seed=2)
    for q in (wide[..., :16].transpose(1, 2), wide[..., ::2].transpose(1, 2)):
        for tokens in (wide[:, :, :2, 16:].transpose(1, 2), wide[:, :, :2, 1::2].transpose(1, 2)):
            k, v = key.expected().clone(), value.expected().clone()
            k[:, :, at] = v[:, :, at] = tokens
            assert_close("out", oracle(q, k, v), call(q, key, value, fresh=(tokens, tokens, at)))


def test_reads_buffers_that_are_views():
    key, value = pair(ALL_OVERLAYS)
    q = randn(2, 2, 1, 16, seed=2)
    strided = [torch.stack([b, torch.ones_like(b)], -1)[..., 0] for b in key.pack()]
    out = launch(q, strided, value.pack(), (key.layout, value.layout), 41)
    assert_close("out", oracle(q, key.expected(), value.expected()), out)


@pytest.mark.parametrize(
    "layouts", ((TEXT_BF16, TEXT_BF16), (ALL_OVERLAYS, ALL_OVERLAYS), (ALL_OVERLAYS, NO_TEXT)), ids=str
)
def test_a_cropped_and_continued_cache_is_attended_as_it_reads(layouts):
    key, value = pair(*layouts)
    caches, q = [key.pack(), value.pack()], randn(2, 4, 1, 16, dtype=layouts[0].dtype)
    for start in (36, 1):  # the ring keeps some; pivots and text are gone
        for cache, case in zip(caches, (key, value), strict=True):
            append(cache, case.x[:, :, :2] * 3, torch.tensor([start, start + 1]), None, None, str(case.layout))
        tokens = [read(cache, start + 2, layout) for cache, layout in zip(caches, layouts, strict=True)]
        for length in (start + 2, None):
            assert_close("out", oracle(q, *tokens), launch(q, *caches, layouts, length))


@pytest.mark.parametrize("value_text", (8, 0), ids=str)
def test_a_compacted_text_overlay(value_text):
    layout = Layout(8, f32, body_bits=2, text_bits=8)
    layouts = layout, dataclasses.replace(layout, text_bits=value_text)
    key, value = pair(*layouts, B=1)
    caches, q = [gather_text(key.pack(), layout, 41), value.pack()], randn(1, 2, 1, 8)
    if value_text:
        caches[1] = gather_text(caches[1], layout, 41)
    for length in (41, 42, 43):
        tokens = [read(cache, length, layout) for cache, layout in zip(caches, layouts, strict=True)]
        assert_close(f"{length} tokens", oracle(q, *tokens), launch(q, *caches, layouts, None))
        for cache, layout in zip(caches, layouts, strict=True):
            append(cache, key.x[:, :, :1] * length, torch.tensor([length]), None, None, str(layout))


def test_a_restarted_cache_forgets_the_last_prompt():
    key, value = pair(ALL_OVERLAYS)
    caches, q, at = [key.pack(), value.pack()], randn(2, 4, 1, 16), torch.arange(7)
    for cache, case in zip(caches, (key, value), strict=True):
        restart(cache, at, None, str(ALL_OVERLAYS))
        append(cache, case.x[:, :, 20:27], at, case.classes[:, 21:28] % PADDING, case.pivots % 5, str(ALL_OVERLAYS))
    tokens = [read(cache, 7, ALL_OVERLAYS) for cache in caches]
    mask = torch.ones(1, 1, 1, 45, dtype=torch.bool)
    out = launch(q, *caches, (ALL_OVERLAYS, ALL_OVERLAYS), None, mask=mask)
    assert_close("out", oracle(q, *tokens), out)


@pytest.mark.parametrize("filled", (1, 4, 5, 6, 11), ids=str)
def test_rings_that_are_not_full_and_rings_that_turned(filled):
    layout = LAYOUTS["2bit"]
    key, value = pair(layout, T=filled, capacity=12)
    q = randn(2, 2, 1, 16)
    dirty = [poison(case.pack(), layout, filled) for case in (key, value)]
    assert_close("out", oracle(q, key.expected(), value.expected()), launch(q, *dirty, (layout, layout)))


def test_an_empty_cache_gives_zeros():
    layout = LAYOUTS["2bit"]
    empty = layout.allocate(2, 2, 5)
    assert_same("out", torch.zeros(2, 4, 3, 16), launch(randn(2, 4, 3, 16), empty, empty, (layout, layout)))


def test_no_queries():
    key, value = pair(LAYOUTS["2bit"])
    assert call(torch.ones(2, 2, 0, 16), key, value).shape == (2, 2, 0, 16)


@pytest.mark.parametrize("layout", (TEXT_BF16, ALL_OVERLAYS), ids=str)
def test_leaves_the_cache_alone(layout):
    key, value = pair(layout)
    there = [[b.to(DEVICE) for b in case.pack()] for case in (key, value)]
    q = randn(2, 2, 1, 16, dtype=layout.dtype).to(DEVICE)
    attend_triton.attend(AttendCall(q, *there, 41, None, None, False, *NO_FRESH, layout, layout)).fill_(7)
    for case, cache in zip((key, value), there, strict=True):
        for before, after in zip(case.pack(), cache, strict=True):
            assert_same("buffer", before, after.cpu())


@pytest.mark.parametrize("cache_dtype, q_dtype", list(itertools.permutations((f32, f16, bf16), 2)), ids=str)
def test_answers_in_the_dtype_of_q(cache_dtype, q_dtype):
    key, value = pair(Layout(24, cache_dtype, body_bits=2, window=3, pivots=1))
    q = randn(2, 2, 3, 24, dtype=q_dtype)
    loose = max((f16, cache_dtype, q_dtype), key=(f32, f16, bf16).index)
    assert_close("out", oracle(q, key.expected(), value.expected()), call(q, key, value), loose)


@pytest.mark.parametrize("splits", (1, 2), ids=str)
@pytest.mark.parametrize("broken", (torch.nan, torch.inf), ids=str)
@pytest.mark.parametrize(
    "place, levels", [(4, {}), (8, {}), (18, {}), (4, UNEVEN)], ids=("body", "text", "ring", "uneven")
)
def test_a_broken_token_spoils_only_queries_that_may_see_it(broken, place, levels, splits):
    layout = Layout(16, f32, body_bits=2, text_bits=0 if levels else 4, window=3, **levels)
    key, value = pair(layout, H=1, T=20)
    key.classes[:, place] = TEXT if place == 8 else PADDING
    q = randn(2, 1, 20, 16)
    clean = call(q, key, value, is_causal=True, splits=splits)
    key.x[1, :, place, 3] = value.x[1, :, place, 3] = broken
    out = call(q, key, value, is_causal=True, splits=splits)
    assert_same("row without it", clean[0], out[0])
    expected = oracle(q, key.expected(), value.expected(), is_causal=True)
    assert not expected[1, :, place:, 3].isfinite().any()
    assert not out[1, :, place:][~expected[1, :, place:].isfinite()].isfinite().any()
    before = call(q[:, :, :place], key, value, length=place, is_causal=True)
    assert_close("length before it", clean[:, :, :place], before)


def test_steps_past_half_precision_saturate():
    key, value = pair(Layout(16, f16, body_bits=2))
    value.x[:] = randn(2, 2, 41, 16, seed=3).sign() * 65504
    value.x[:, :, :, :3] = torch.tensor([-65504.0, 65504.0, 0.0])
    q = randn(2, 2, 3, 16, dtype=f16)
    assert value.expected().isfinite().all()
    assert_close("out", oracle(q, key.expected(), value.expected()), call(q, key, value))


def test_large_scores_keep_the_softmax_finite():
    key, value = pair(LAYOUTS["2bit"])
    q = randn(2, 2, 3, 16) * 1e4
    assert_close("out", oracle(q, key.expected(), value.expected()), call(q, key, value, splits=2))


@pytest.mark.parametrize(
    "programs, bound, splits",
    [(1, 10, 1), (1, 256, 1), (1, 257, 2), (8, 32768, 33), (1, 10**6, 64), (264, 32768, 1), (133, 32768, 1), (0, 0, 1)],
    ids=str,
)
def test_splits_fill_the_processors(programs, bound, splits):
    assert attend_triton.count_splits(programs, bound, processors=132) == splits


REFUSALS = {
    "lossless": (
        LAYOUTS["lossless-f16"],
        LAYOUTS["lossless-f16"],
        f16,
        None,
        "keys: body_bits is 16, accepted: 2, 4 or 8",
    ),
    "overlays": (GROUPED, dataclasses.replace(GROUPED, window=4), f32, None, "accepted: equal body bits, window"),
    "body": (GROUPED, dataclasses.replace(GROUPED, body_bits=4), f32, None, "accepted: equal body bits, window"),
    "uneven": (UNEVEN_KEYS, UNEVEN_KEYS, f32, None, "values are uneven, which only keys can be"),
    "blocks": (*(LAYOUTS["2bit-blocks"],) * 2, f32, None, "values have means of blocks, which only keys can have"),
    "text": (NO_TEXT, ALL_OVERLAYS, f32, None, "accepted: values with the text bits of the keys, or without"),
    "queries": (
        GROUPED,
        GROUPED,
        torch.float64,
        None,
        "queries are torch.float64, accepted: torch.float32, torch.float16",
    ),
    "cache": (*(Layout(16, torch.float64, body_bits=2),) * 2, f32, None, "keys: dtype is torch.float64"),
    "head_dim": (*(Layout(264, f32, body_bits=2),) * 2, f32, None, "head_dim is 264, accepted: 8 to 256"),
    "mask": (GROUPED, GROUPED, f32, torch.int64, "the mask is torch.int64, accepted: torch.bool, torch.float32"),
}


@pytest.mark.parametrize("key_layout, value_layout, dtype, mask, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals(key_layout, value_layout, dtype, mask, message):
    q = torch.ones(1, 1, 1, key_layout.head_dim, dtype=dtype)
    mask = None if mask is None else torch.ones(1, 1, dtype=mask)
    caches = [layout.allocate(1, 1, 3) for layout in (key_layout, value_layout)]
    with pytest.raises(ValueError, match=f"akvq::attend: .*{message}"):
        attend_triton.attend(AttendCall(q, *caches, 3, mask, None, False, *NO_FRESH, key_layout, value_layout))


@every_layout
def test_refuses_no_named_layout(layout):
    for mask in (None, torch.ones(1, dtype=torch.bool), torch.ones(1)):
        q = torch.ones(1, dtype=layout.dtype)
        layouts = layout, values_of(layout)
        assert attend_triton.refusal(AttendCall(q, [], [], 1, mask, None, False, *NO_FRESH, *layouts)) == ""


@pytest.mark.parametrize("shape", [(2, 1, 3, 40), (2, 3, 3, 41), (3, 41, 1), (1, 1, 1, 1, 41)], ids=str)
def test_refuses_masks_that_do_not_fit(shape):
    key, value = pair(LAYOUTS["2bit"])
    with pytest.raises(
        ValueError, match=r"akvq::attend: the mask is \[.*\], accepted: broadcastable to \[2, 2, 3, 41\]"
    ):
        call(randn(2, 2, 3, 16), key, value, mask=torch.ones(shape))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_captured_call_follows_the_cache():
    """A call does not wait for the device, and a length of None is read at every replay."""
    key, value = pair(ALL_OVERLAYS)
    caches = [[b.to(DEVICE) for b in case.pack()] for case in (key, value)]
    q = randn(2, 4, 1, 16).to(DEVICE)
    args = AttendCall(q, *caches, None, None, None, False, *NO_FRESH, ALL_OVERLAYS, ALL_OVERLAYS), 4
    attend_triton.attend(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend_triton.attend(*args)
    for end in (41, 42):
        graph.replay()
        tokens = [read(cache, end, ALL_OVERLAYS).cpu() for cache in caches]
        assert_close("out", oracle(q.cpu(), *tokens), out.cpu())
        for cache in caches:
            append(cache, key.x[:, :, :1].to(DEVICE), torch.tensor([end], device=DEVICE), None, None, str(ALL_OVERLAYS))
    assert named(caches[0], ALL_OVERLAYS)["state"][0] == 43
