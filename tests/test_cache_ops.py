"""pack, append, restart, dequantize: registered right, equal to a token-by-token model, blind to how tokens came."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from akvq_fx.kernels import uneven
from akvq_fx.kernels.cache import append, create, dequantize, named, pack, read, restart
from akvq_fx.kernels.layout import PADDING, PIVOT, STATE_TEXT, TEXT, VISION, Layout
from akvq_fx.kernels.rotate import matrix, rotate_keys
from tests.kernel_cases import (
    LAYOUTS,
    assert_caches_same,
    assert_close,
    assert_same,
    case_of,
    cases,
    expected_tokens,
    few,
    layouts,
    poison,
    randn,
    random_affine,
    splits,
)

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def append_in(cache, case, sizes):
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        append(
            cache, case.x[:, :, rows], torch.arange(start, start + size), case.classes[:, rows], None, str(case.layout)
        )
        start += size


@every_layout
def test_pack_registration(layout):
    case = case_of(layout)
    at = torch.arange(case.length)
    torch.library.opcheck(pack, (case.x, at, case.classes, case.pivots, case.affine, case.capacity, str(layout)))


@every_layout
def test_append_registration(layout):
    case = case_of(layout)
    pivots = None if case.pivots is None else case.pivots.clamp(-1, 1)
    args = (case.pack(), case.x[:, :, :2], torch.arange(2), case.classes[:, :2], pivots, str(layout))
    torch.library.opcheck(append, args)


def test_append_registration_without_classes_behind_the_end():
    case = case_of(LAYOUTS["2bit"])
    pivots = case.pivots.clamp(-1, 1)
    args = (case.pack(), case.x[:, :, :2], torch.tensor([11, 12]), None, pivots, str(case.layout))
    torch.library.opcheck(append, args)


@every_layout
def test_dequantize_registration(layout):
    case = case_of(layout)
    for length in (case.length, 4):
        torch.library.opcheck(dequantize, (case.pack(), length, str(layout)))


@given(cases())
@few
def test_pack_reads_as_the_model_says(case):
    cache = case.pack()
    assert_same("tokens", case.expected(), read(cache, case.length, case.layout))
    b = named(cache, case.layout)
    assert b["state"].tolist() == [case.length, max(0, case.length - case.layout.window), 0]
    assert ("classes" in b) is not case.layout.shares_classes
    assert case.layout.shares_classes or (b["classes"][:, case.length :] == PADDING).all()
    if case.affine is not None:
        assert_same("affine", case.affine, b["affine"])


@given(layouts(shares=(False,)).flatmap(cases))
@few
def test_pack_marks_pivots_but_not_padding(case):
    classes = named(case.pack(), case.layout)["classes"][:, : case.length]
    pivots = case.pivots if case.layout.pivots else -torch.ones(len(classes), 1)
    for row in range(len(classes)):
        for t in range(case.length):
            given_class = case.classes[row, t].item()
            due = PIVOT if t in pivots[row].tolist() and given_class != PADDING else given_class
            assert classes[row, t] == due


@given(st.data(), cases())
@few
def test_append_in_any_chunks_equals_pack(data, case):
    case.pivots = None
    sizes = data.draw(splits(case.length), label="sizes")
    one_by_one, at_once, in_chunks = case.empty(), case.empty(), case.empty()
    append_in(one_by_one, case, [1] * case.length)
    append_in(at_once, case, [case.length])
    append_in(in_chunks, case, sizes)
    packed = case.pack()
    for cache in (one_by_one, at_once, in_chunks):
        assert_caches_same(packed, cache, case.layout)


@given(st.data(), cases())
@few
def test_pack_then_append_equals_pack_of_all(data, case):
    prompt = data.draw(st.integers(1, case.length), label="prompt")
    if case.pivots is not None:
        case.pivots[case.pivots >= prompt] = -1
    at = torch.arange(prompt)
    args = (case.x[:, :, :prompt], at, case.classes[:, :prompt], case.pivots, case.affine, case.capacity)
    cache, start = pack(*args, str(case.layout)), prompt
    for size in data.draw(splits(case.length - prompt), label="sizes") if prompt < case.length else ():
        rows = slice(start, start + size)
        append(
            cache, case.x[:, :, rows], torch.arange(start, start + size), case.classes[:, rows], None, str(case.layout)
        )
        start += size
    assert_caches_same(case.pack(), cache, case.layout, skip=("pivots",))
    assert_same("tokens", case.expected(), read(cache, case.length, case.layout))


@given(cases())
@few
def test_class_defaults_to_text(case):
    given_text, omitted = case.empty(), case.empty()
    at = torch.arange(case.length)
    append(given_text, case.x, at, torch.full_like(case.classes, TEXT), None, str(case.layout))
    append(omitted, case.x, at, None, None, str(case.layout))
    assert_caches_same(given_text, omitted, case.layout)


@given(cases(), st.integers(1, 23))
@few
def test_a_shorter_read_is_a_prefix(case, length):
    length = min(length, case.length)
    cache = case.pack()
    whole, part = read(cache, case.length, case.layout), read(cache, length, case.layout)
    assert_same("prefix", whole[:, :, :length], part)


@given(st.data(), cases())
@few
def test_what_was_never_written_is_never_read(data, case):
    cache = case.pack()
    length = case.length
    dirty = poison(cache, case.layout, length)
    text = str(case.layout)
    assert_same("stored", read(cache, length, case.layout), read(dirty, length, case.layout))
    assert_same("restored", dequantize(cache, length, text), dequantize(dirty, length, text))
    more = data.draw(st.integers(0, case.capacity - length), label="appended")
    for t in range(length, length + more):
        token = randn(*case.x.shape[:2], 1, case.x.shape[3], seed=t, dtype=case.layout.dtype)
        append(cache, token, torch.tensor([t]), None, None, text)
        append(dirty, token, torch.tensor([t]), None, None, text)
    length += more
    assert_same("stored, continued", read(cache, length, case.layout), read(dirty, length, case.layout))
    assert not read(dirty, length, case.layout).isnan().any()


class Model:
    """A cache as plain lists: what each position holds, and which position each ring slot was last written by."""

    def __init__(self, case):
        self.case, self.window = case, case.layout.window
        self.x, self.classes, self.pivots, self.ring = case.x[:, :, :0], case.classes[:, :0], None, {}
        self.write(case.x, case.classes)
        self.pivots = None if case.pivots is None else case.pivots.clone()

    def crop(self, length):
        self.x, self.classes = self.x[:, :, :length], self.classes[:, :length]

    def write(self, x, classes):
        start = self.x.shape[2]
        self.ring = {slot: position for slot, position in self.ring.items() if position < start}
        if self.pivots is not None:
            self.pivots[self.pivots >= start] = -1
        self.x, self.classes = torch.cat([self.x, x], 2), torch.cat([self.classes, classes], 1)
        if self.window:
            self.ring.update({p % self.window: p for p in range(start, self.x.shape[2])[-self.window :]})

    def tokens(self):
        return expected_tokens(self.case.layout, self.x, self.classes, self.pivots, set(self.ring.values()))


@given(st.data(), cases())
@few
def test_a_cropped_cache_reads_no_token_that_is_gone(data, case):
    text, cache, model = str(case.layout), case.pack(), Model(case)
    for step in range(data.draw(st.integers(1, 4), label="steps")):
        length = data.draw(st.integers(0, model.x.shape[2]), label="crop to")
        model.crop(length)
        assert_same("after the crop", model.tokens(), read(cache, length, case.layout))
        size = data.draw(st.integers(0, case.capacity - length), label="append")
        if not size:
            continue
        fresh = randn(*case.x.shape[:2], size, case.x.shape[3], seed=step, dtype=case.layout.dtype)
        kinds = torch.tensor(data.draw(st.lists(st.sampled_from((VISION, TEXT)), min_size=size, max_size=size)))
        kinds = kinds.to(torch.uint8).expand(len(case.x), -1)
        append(cache, fresh, torch.arange(length, length + size), kinds, None, text)
        model.write(fresh, kinds)
        assert_same("after the append", model.tokens(), read(cache, length + size, case.layout))


def test_a_crop_into_a_longer_ring_keeps_what_the_ring_still_holds():
    layout = Layout(8, torch.float32, body_bits=2, window=4)
    case = case_of(layout, T=8, capacity=12)
    cache, new = case.pack(), randn(2, 2, 1, 8, seed=1)
    append(cache, new, torch.tensor([6]), None, None, str(layout))
    tokens = torch.cat([case.x[:, :, :6], new], 2)
    assert_same("tokens", expected_tokens(layout, tokens, None, None, (4, 5, 6)), read(cache, 7, layout))


def gather_text(cache, layout, length):
    """A one-row cache that keeps the text slots of the first `length` tokens and one for each token still to come."""
    b = dict(named(cache, layout))
    kept = ((b["text_at"][0] >= 0) & (b["text_at"][0] < length)).nonzero()[:, 0]
    free = b["codes"].shape[2] - length
    for name, axis, fill in (("text_codes", 2, 0), ("text_at", 1, -1)):
        rows = b[name].index_select(axis, kept)
        tail = rows.new_full((*rows.shape[:axis], free, *rows.shape[axis + 1 :]), fill)
        b[name] = torch.cat([rows, tail], axis)
    b["state"][STATE_TEXT] = len(kept) - length
    return list(b.values())


def test_a_gathered_text_overlay_continues_after_crops():
    layout = Layout(8, torch.float32, body_bits=2, text_bits=8)
    case = case_of(layout, B=1, T=8, capacity=12)
    case.classes = torch.tensor([[TEXT, TEXT, TEXT, VISION, VISION, TEXT, VISION, TEXT]], dtype=torch.uint8)
    cache, x, classes = case.pack(), case.x, case.classes
    cache = gather_text(cache, layout, 8)
    assert_same("gathered", case.expected(), read(cache, 8, layout))
    steps = [
        (8, TEXT),
        (9, VISION),
        (10, TEXT),
        (8, VISION),
        (9, TEXT),
        (10, TEXT),
        (5, VISION),
        (6, TEXT),
        (7, VISION),
    ]
    for start, kind in steps:
        if start == 5:
            cache = gather_text(cache, layout, start)
        new, kinds = randn(1, 2, 1, 8, seed=start), torch.tensor([[kind]], dtype=torch.uint8)
        append(cache, new, torch.tensor([start]), kinds, None, str(layout))
        x, classes = torch.cat([x[:, :, :start], new], 2), torch.cat([classes[:, :start], kinds], 1)
        assert_same(f"end {start + 1}", expected_tokens(layout, x, classes, None, ()), read(cache, start + 1, layout))


@every_layout
def test_dequantize_undoes_what_the_layout_says(layout):
    case = case_of(layout)
    B, H, _, D = case.x.shape
    made = randn(B, H, case.length, D, seed=3, dtype=layout.dtype)
    affine = case.affine if layout.affine else None
    if layout.rotated:
        neutral = torch.stack([torch.zeros(B, H, D), torch.ones(B, H, D)], 1).half()
        case.x = rotate_keys(made, neutral if affine is None else affine)
    else:
        case.x = made
    out = dequantize(case.pack(), case.length, str(layout))
    assert (out.dtype, out.is_contiguous()) == (layout.dtype, True)
    stored = read(case.pack(), case.length, layout).double()
    if layout.uneven:
        where = affine[:, 2].argsort(-1)[:, :, None].expand(stored.shape)
        stored = (stored @ uneven.matrix(D, stored.dtype, stored.device)).gather(-1, where)
    elif layout.rotated:
        stored = stored @ matrix(D)
    if affine is not None:
        stored = stored * affine[:, 1, :, None].double() + affine[:, 0, :, None].double()
    assert_close("restored", stored, out)
    if layout.window or layout.lossless:
        size = 1.0 if affine is None else affine[:, 1].max().item()
        assert_close("exact token", made[:, :, -1] / size, out[:, :, -1] / size)


@every_layout
def test_dequantize_is_no_view_of_the_cache(layout):
    case = case_of(layout, T=11, capacity=11)
    cache = case.pack()
    before = [buffer.clone() for buffer in cache]
    dequantize(cache, 11, str(layout)).fill_(7)
    assert_caches_same(before, cache, layout)


@pytest.mark.parametrize("broken", (torch.nan, torch.inf), ids=str)
@every_layout
def test_a_broken_token_stays_alone(layout, broken):
    case = case_of(layout)
    clean = read(case.pack(), case.length, layout).clone()
    for t in range(case.length):
        spoiled = case_of(layout)
        spoiled.x[1, :, t, 3] = broken
        out = read(spoiled.pack(), case.length, layout)
        assert not out[1, :, t, 3].isfinite().any()
        others = torch.ones(clean.shape[:3], dtype=torch.bool)
        others[1, :, t] = False
        assert_same("other tokens", clean[others], out[others])


def test_more_bits_read_closer():
    errors = []
    for bits in (2, 4, 8, 16):
        case = case_of(Layout(64, torch.float32, body_bits=bits))
        errors.append((read(case.pack(), case.length, case.layout) - case.x).abs().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_append_works_at_compiled_call_sites():
    case = case_of(LAYOUTS["2bit-text4-bf16"])
    eager, compiled = case.pack(), case.pack()

    def step(cache, x, at):
        append(cache, x, at, None, None, str(case.layout))
        return dequantize(cache, 12, str(case.layout))

    x, at = case.x[:, :, :1] * 2, torch.tensor([11])
    expected = step(eager, x, at)
    assert_same("read", expected, torch.compile(step, backend="aot_eager", fullgraph=True)(compiled, x, at))
    assert_caches_same(eager, compiled, case.layout)


def test_refuses_buffers_of_another_layout():
    case = case_of(LAYOUTS["2bit"])
    cache, other = case.pack(), str(LAYOUTS["2bit-no-overlay"])
    message = r"akvq cache: got 7 buffers, layout f32/d16/b2/c1/g128 has 4: \('state', 'codes', 'classes', 'range'\)"
    with pytest.raises(ValueError, match=message):
        dequantize(cache, 3, other)
    with pytest.raises(ValueError, match=message):
        append(cache, case.x[:, :, :1], torch.tensor([3]), None, None, other)


@pytest.mark.parametrize("shape", [(2, 2, 1, 24), (1, 2, 1, 16), (2, 3, 1, 16), (2, 2, 16)], ids=str)
def test_append_refuses_other_shapes(shape):
    case = case_of(LAYOUTS["2bit"])
    with pytest.raises(ValueError, match=r"akvq::append: x is \[.*\], accepted: \[B, H, q, D\] of a cache with codes"):
        append(case.pack(), torch.ones(shape), torch.tensor([11]), None, None, str(case.layout))


def test_a_refused_append_leaves_the_cache_alone():
    case = case_of(LAYOUTS["2bit"])
    cache = case.pack()
    with pytest.raises(ValueError, match="akvq::append"):
        append(cache, torch.ones(2, 2, 1, 24), torch.tensor([11]), None, None, str(case.layout))
    assert_caches_same(case.pack(), cache, case.layout)


def test_pivots_beyond_the_layout_are_dropped_and_missing_ones_are_free():
    layout = Layout(8, torch.float32, body_bits=2, pivots=2)
    x, at = randn(1, 1, 5, 8), torch.arange(5)
    for pivots, kept in ((None, [-1, -1]), ([[-1, 4]], [-1, 4]), ([[3, 1, 2]], [3, 1])):
        pivots = None if pivots is None else torch.tensor(pivots, dtype=torch.int32)
        cache = create(x, at, None, pivots, None, 5, layout)
        assert named(cache, layout)["pivot_at"].tolist() == [kept]
        assert_same("tokens", expected_tokens(layout, x, None, torch.tensor([kept]), ()), read(cache, 5, layout))


@every_layout
def test_restart_registration(layout):
    case = case_of(layout)
    torch.library.opcheck(restart, (case.pack(), torch.tensor([0]), case.affine, str(layout)))


@every_layout
def test_restart_forgets_ring_and_pivots_and_takes_the_map(layout):
    case = case_of(layout)
    cache, other = case.pack(), None if case.affine is None else case.affine + 1
    restart(cache, torch.tensor([0, 1]), other, str(layout))
    b = named(cache, layout)
    assert not b["state"].any()
    assert "pivot_at" not in b or (b["pivot_at"] == -1).all()
    assert other is None or torch.equal(b["affine"], other)


@given(st.data(), cases())
@few
def test_a_restarted_cache_reads_as_a_fresh_one(data, case):
    layout, text = case.layout, str(case.layout)
    old = case_of(layout, *case.x.shape[:2], T=case.capacity, capacity=case.capacity, seed=5)
    cache = old.pack()
    restart(cache, torch.arange(case.length), case.affine, text)
    append(cache, case.x, torch.arange(case.length), case.classes, case.pivots, text)
    assert_same("tokens", case.expected(), read(cache, case.length, layout))
    assert_same("restored", dequantize(case.pack(), case.length, text), dequantize(cache, case.length, text))
    more = data.draw(st.integers(0, case.capacity - case.length), label="appended")
    fresh = case.pack()
    for t in range(case.length, case.length + more):
        token = randn(*case.x.shape[:2], 1, case.x.shape[3], seed=t, dtype=layout.dtype)
        append(cache, token, torch.tensor([t]), None, None, text)
        append(fresh, token, torch.tensor([t]), None, None, text)
    end = case.length + more
    assert_same("tokens, continued", read(fresh, end, layout), read(cache, end, layout))


@every_layout
def test_restart_leaves_a_cache_that_goes_on(layout):
    case = case_of(layout)
    cache = case.pack()
    other = None if case.affine is None else case.affine + 1
    restart(cache, torch.tensor([case.length]), other, str(layout))
    assert_caches_same(case.pack(), cache, layout)


def test_pivots_of_a_later_prompt_do_not_count():
    case = case_of(LAYOUTS["2bit"])
    given_pivots, without = case.pack(), case.pack()
    for cache, pivots in ((given_pivots, torch.zeros(2, 2, dtype=torch.int32)), (without, None)):
        append(cache, case.x[:, :, :2], torch.tensor([11, 12]), None, pivots, str(case.layout))
    assert_caches_same(without, given_pivots, case.layout)


def test_affine_is_stored_whole():
    layout = Layout(8, torch.float16, body_bits=2, affine=True)
    affine = random_affine(2, 1, 8)
    cache = pack(randn(2, 1, 3, 8, dtype=torch.float16), torch.arange(3), None, None, affine, 4, str(layout))
    assert_same("affine", affine, named(cache, layout)["affine"])
