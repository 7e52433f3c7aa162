"""Caches of other axes than [B, H, T, D]: packed as they would be with these, seen by the caller as the model has them.

The models are those of tests/attention_models.py; that each is found is tests/test_find_sites.py.
"""

import copy
import functools
import itertools
import pickle
import warnings

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import akvq_fx
from akvq_fx.kernels.cache_axes import STANDARD, CacheAxes, moved
from akvq_fx.packed_kv import PackedKV, Storage
from tests import attention_models as models
from tests.attention_models import LOSSLESS, Decoder, evidence, token_ids
from tests.kernel_cases import LAYOUTS, case_of
from tests.test_find_sites import untouched
from tests.test_packed_kv import on_codes

AXES = [CacheAxes.parse(text) for text in ("b t h d", "b t (h d)", "t b h d", "b h d t", "t b (h d)")]
every_axes = pytest.mark.parametrize("axes", AXES, ids=str)
SPELLINGS = {  # spelling: axes of its keys and values
    models.TokensFirst: ("b t h d", "b t h d"),
    models.TokensFirstStart: ("b t h d", "b t h d"),
    models.TokensFirstEinsum: ("b t h d", "b t h d"),
    models.GrowsTransposed: ("b t h d", "b t h d"),
    models.FlatHeads: ("b t (h d)", "b t (h d)"),
    models.FlatMqa: ("b t (h d)", "b t (h d)"),
    models.FlatExpanded: ("b t (h d)", "b t (h d)"),
    models.FlatWritten: ("b t (h d)", "b t (h d)"),
    models.TimeFirst: ("t b h d", "t b h d"),
    models.ChannelsFirst: ("b h d t", "b h t d"),
}
name = lambda x: x.__name__ if isinstance(x, type) else ""
every_spelling = pytest.mark.parametrize("spelling", SPELLINGS, ids=name)


# the axes themselves


@given(st.permutations(["b", "h", "t", "d"]) | st.permutations(["b", "t", "hd"]))
def test_there_and_back_is_the_same_tensor(groups):
    axes = CacheAxes(tuple(groups))
    assert CacheAxes.parse(str(axes)) == axes
    x = torch.arange(2 * 3 * 5 * 8).view(2, 3, 5, 8)
    outside = moved(x, axes.from_standard())
    assert outside.shape == axes.shape(2, 3, 5, 8) and outside.shape[axes.tokens] == 5 and outside.shape[axes.rows] == 2
    assert torch.equal(moved(outside, axes.to_standard(3, 8)), x)


WRONG = ("", "b t h", "b t h d d", "b t (d h)", "(b h) t d", "b t hd", "b  t h d", "2 b h t d")


@pytest.mark.parametrize("text", WRONG)
def test_no_other_axes(text):
    with pytest.raises(ValueError, match="the axes of a cache are"):
        CacheAxes.parse(text)


# what is done to a cache outside of a graph


def in_axes(axes: CacheAxes, layout: str = "2bit", rows: int = 2) -> PackedKV:
    case = case_of(LAYOUTS[layout], B=rows, H=3)
    return PackedKV.view_of(Storage(case.layout, case.pack(), case.length, case.length, None, axes), case.length)


def of_axis(axis: int, index) -> tuple:
    return (*(slice(None) for _ in range(axis)), index)


ROWS = torch.tensor([1, 0, 1])
OPS = {  # op(x, axis of rows, axis of tokens), the same on a plain tensor
    "index_select": lambda x, b, t: x.index_select(b, ROWS),
    "index": lambda x, b, t: x[of_axis(b, ROWS)],
    "row slice": lambda x, b, t: x[of_axis(b, slice(1, 2))],
    "repeat_interleave": lambda x, b, t: x.repeat_interleave(2, dim=b),
    "repeat": lambda x, b, t: x.repeat([2 if axis == b else 1 for axis in range(x.dim())]),
    "row chunk": lambda x, b, t: x.chunk(2, b)[1],
    "rows joined": lambda x, b, t: torch.cat([x, x], b),
    "crop": lambda x, b, t: x[of_axis(t, slice(None, -2))],
    "narrow": lambda x, b, t: x.narrow(t, 1, 3),
    "tokens": lambda x, b, t: x.index_select(t, torch.tensor([0, 2, 3])),
    "token mask": lambda x, b, t: x[of_axis(t, torch.arange(x.shape[t]) % 2 == 0)],
    "token split": lambda x, b, t: x.split(2, t)[0],
    "tokens joined": lambda x, b, t: torch.cat([x[of_axis(t, slice(None, 2))], x[of_axis(t, slice(3, None))]], t),
    "clone": lambda x, b, t: x.clone(),
    "deepcopy": lambda x, b, t: copy.deepcopy(x),
    "pickle": lambda x, b, t: pickle.loads(pickle.dumps(x)),
    "contiguous": lambda x, b, t: x.contiguous(),
}


def assert_same_as_standard(op, axes: CacheAxes, layout: str = "2bit", rows: int = 2) -> None:
    """op(x, axis of rows, axis of tokens) gives codes, and those that it gives of a cache of standard axes."""
    want = op(in_axes(STANDARD, layout, rows), STANDARD.rows, STANDARD.tokens)
    got = on_codes(op, in_axes(axes, layout, rows), axes.rows, axes.tokens)
    assert type(got) is PackedKV and got.axes == axes
    plain = moved(want.dequantize(), axes.from_standard())
    assert got.shape == plain.shape and torch.equal(got.dequantize(), plain)


@every_axes
@pytest.mark.parametrize("op", OPS)
def test_ops_go_along_the_models_axes(axes, op):
    assert_same_as_standard(OPS[op], axes)


@every_axes
def test_one_row_expands(axes):
    size = lambda x, b: [3 if axis == b else -1 for axis in range(x.dim())]
    assert_same_as_standard(lambda x, b, t: x.expand(size(x, b)), axes, rows=1)


@every_axes
def test_left_padding(axes):
    pad = lambda x, t: [0, 0] * (x.dim() - 1 - t) + [3, 0]
    assert_same_as_standard(lambda x, b, t: torch.nn.functional.pad(x, pad(x, t)), axes)


@every_axes
def test_cat_appends(axes):
    new = torch.randn(2, 3, 4, 16)
    outside = lambda x, new: new if x.axes == STANDARD else moved(new, axes.from_standard())
    assert_same_as_standard(lambda x, b, t: torch.cat([x, outside(x, new)], dim=t), axes)
    with pytest.raises(ValueError, match="a cache from another model or batch cannot be continued"):
        torch.cat([in_axes(axes), moved(torch.randn(5, 3, 4, 16), axes.from_standard())], dim=axes.tokens)


@every_axes
def test_files_keep_axes(axes, tmp_path):
    x = in_axes(axes)
    PackedKV.save({"x": x}, tmp_path / "cache")
    y = PackedKV.load(tmp_path / "cache")["x"]
    assert y.axes == axes and y.shape == x.shape and torch.equal(x.dequantize(), y.dequantize())


@every_axes
def test_what_codes_do_not_cover_is_plain_in_the_models_axes(axes):
    x = in_axes(axes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first one says so
        assert torch.equal(x.mul(2), x.dequantize().mul(2))
    assert str(axes) in repr(x) and str(STANDARD) not in repr(in_axes(STANDARD))


# whole models


def same_in_standard_axes(spelling) -> type:
    """The same model with a cache [B, H, T, D]: neither the cache's axes nor their moves change a number."""
    written = issubclass(spelling, models.WrittenOut)
    fields = {"kv_heads": spelling.kv_heads, **({"group": models.Mqa.group} if spelling.kv_heads == 1 else {})}
    return models.mixed(models.WrittenOut if written else models.Attention, **fields)


LOSSY = {"window": 4, "pivots": 2}


@functools.cache
def two_layers(spelling, lossy: bool):
    return evidence(Decoder(spelling, layers=2), LOSSY if lossy else LOSSLESS, prompt=24, chunk=3)


@every_spelling
def test_two_layers_lossless_are_the_model(spelling):
    seen = two_layers(spelling, False)
    assert seen.error <= 2e-6
    for pair in seen.cache:
        for x, axes in zip(pair, SPELLINGS[spelling], strict=True):
            assert type(x) is PackedKV and str(x.axes) == axes
            assert x.shape == x.axes.shape(2, spelling.kv_heads, 30, spelling.dim)
    assert not akvq_fx.report(seen.model).refused


@pytest.mark.parametrize("spelling", [models.TokensFirstEinsum, models.ChannelsFirst], ids=name)
def test_codes_are_those_of_a_cache_of_standard_axes(spelling):
    seen, standard = two_layers(spelling, True), two_layers(same_in_standard_axes(spelling), True)
    for got, want in zip(seen.compiled, standard.compiled, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert seen.error > 1e-4, "something was quantized"
    for x, y in zip(itertools.chain(*seen.cache), itertools.chain(*standard.cache), strict=True):
        torch.testing.assert_close(x.storage.as_model(y.dequantize()), x.dequantize(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("spelling", [models.FlatHeads, models.TimeFirst], ids=name)
def test_any_batch_size_and_what_beam_search_does(spelling):
    """Sizes in a row on few graphs; between steps a crop on the model's own token axis, and rows that change places."""
    model = Decoder(spelling)
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(model, backend="akvq", options={**LOSSLESS, "inner": "eager"})
    rows, tokens = (getattr(CacheAxes.parse(SPELLINGS[spelling][0]), which) for which in ("rows", "tokens"))
    with torch.no_grad():
        for batch in (2, 3, 1, 5):
            ids, caches = token_ids(batch, 12), [None, None]
            for a, b in ((0, 6), (6, 7), (7, 8), (6, 8), (8, 12)):
                logits = []
                for i, one in enumerate((model, run)):
                    if (a, b) == (6, 8):  # go back two tokens
                        caches[i] = tuple(tuple(x[of_axis(tokens, slice(None, 6))] for x in pair) for pair in caches[i])
                    if a == 8:
                        order = torch.arange(batch).flip(0)
                        caches[i] = tuple(tuple(x.index_select(rows, order) for x in pair) for pair in caches[i])
                    out, caches[i] = one(ids[:, a:b], caches[i])
                    logits.append(out)
                torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-6)
                assert all(isinstance(x, PackedKV) for x in caches[1][0])
    # as many as with a cache [B, H, T, D]: the prompt, one and several tokens, for one row and for more
    assert not akvq_fx.report(model).gave_up and counters["stats"]["unique_graphs"] <= 9


@pytest.mark.parametrize("spelling", [models.GrowsTransposed, models.FlatHeads, models.ChannelsFirst], ids=name)
def test_a_plain_cache_is_packed_by_the_first_step(spelling):
    model, ids = Decoder(spelling), token_ids(2, 9)
    torch._dynamo.reset()
    run = torch.compile(model, backend="akvq", options={**LOSSLESS, "inner": "eager"})
    with torch.no_grad():
        want, cache = model(ids[:, :8])
        want, _ = model(ids[:, 8:], cache)
        _, cache = model(ids[:, :8])
        got, cache = run(ids[:, 8:], cache)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert [str(x.axes) for x in cache[0]] == list(SPELLINGS[spelling])


orders = st.permutations(["b", "h", "t", "d"]) | st.permutations(["b", "t", "hd"])
readers = st.sampled_from([
    models.Attention, models.EnableGqa, models.Interleave, models.WrittenEinsum, models.WrittenGrouped,
    models.WrittenFolded, models.WrittenKeysFirst,
])  # fmt: skip


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(orders, orders, readers, st.booleans())
def test_any_order_of_keys_and_of_values_read_in_any_way(keys, values, reader, empty):
    order = [CacheAxes(tuple(groups)) for groups in (keys, values)]

    class Ordered(reader):
        def write(self, past, k, v, at):
            new = [moved(x, axes.from_standard()) for x, axes in zip((k, v), order, strict=True)]
            if past is None and empty:
                past = [x.narrow(axes.tokens, 0, 0) for x, axes in zip(new, order, strict=True)]
            if past is not None:
                new = [torch.cat([old, x], axes.tokens) for old, x, axes in zip(past, new, order, strict=True)]
            read = (moved(x, axes.to_standard(self.kv_heads, self.dim)) for x, axes in zip(new, order, strict=True))
            return *read, tuple(new)

    Ordered.tokens = order[0].tokens
    seen = evidence(Decoder(Ordered), LOSSLESS, steps=2, chunk=2)
    assert seen.error <= 2e-6
    letters = ["".join(axes.groups) for axes in order]
    if issubclass(reader, models.WrittenOut) and any(text.index("h") < text.index("b") for text in letters):
        # products do not tell batch from heads, so that the first is taken for the batch, or keys and values disagree
        assert all(capture.state.sites or capture.state.refused for capture in seen.captures[1:])
        return
    assert all(len(capture.state.sites) == 1 for capture in seen.captures) and len(seen.captures) == 3
    assert all(type(x) is PackedKV for x in seen.cache[0])


class ReadsItself(models.Attention):
    """[B, T, H, D], which the attention that reads it transposes: two layers may read one cache."""

    tokens = 1

    def write(self, past, k, v, at):
        k, v, kept = models.TokensFirst.write(self, past, k, v, at)
        return *kept, kept

    def attend(self, q, k, v, mask):
        return super().attend(q, k.transpose(1, 2), v.transpose(1, 2), mask)


def test_two_layers_read_one_cache():
    seen = evidence(models.SharedDecoder(ReadsItself), LOSSLESS)
    assert seen.error <= 1e-6 and all(len(capture.state.sites) == 2 for capture in seen.captures)
    for capture in seen.captures:
        assert sum(str(n.target).startswith(("akvq.append", "akvq.pack")) for n in capture.state.graph.nodes) == 2


class CrossTokensFirst(models.CrossDecoder):
    """Keys and values of a memory are kept as [B, T, H, D], and only read in later calls."""

    def forward(self, tokens, cache=None, memory=None):
        x, kept = self.embed(tokens), []
        for i, layer in enumerate(self.layers):
            part = layer.attention
            if cache is None:
                made = (part.split_heads(p(memory), part.kv_heads) for p in (part.k_proj, part.v_proj))
                pair = tuple(x.transpose(1, 2) for x in made)
            else:
                pair = cache[i]
            kept.append(pair)
            k, v = (part.group(x.transpose(1, 2)) for x in pair)
            x = x + part.output(torch.nn.functional.scaled_dot_product_attention(self.query(part, x), k, v), x)
        return self.head(x), tuple(kept)

    def query(self, part, x):
        return part.split_heads(part.q_proj(x), part.heads)


@torch.no_grad()
def test_a_cache_that_is_only_read():
    model, memory, tokens = CrossTokensFirst(layers=2), torch.randn(2, 9, models.WIDTH), token_ids(2, 3)
    spy = models.Spy(**LOSSLESS)
    run = torch.compile(model, backend=spy)
    want, plain = model(tokens, None, memory)
    want_next, _ = model(tokens[:, :1], plain)
    got, cache = run(tokens, None, memory)
    got_next, after = run(tokens[:, :1], cache)
    assert [[s.key.kind for s in c.state.sites] for c in spy.captures] == [["first"] * 2, ["read"] * 2]
    assert after[0][0] is cache[0][0] and cache[0][0].shape[1] == 9
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(got_next, want_next, rtol=0, atol=1e-6)


class TokensFirstSine(models.TokensFirst, models.SwitchesToSine):
    """The prompt is packed as [B, T, H, D], steps read it through a sine: dequantized for them."""


class FlatSine(models.FlatHeads, models.SwitchesToSine):
    """The same of [B, T, H * D]."""


@pytest.mark.parametrize("spelling", [TokensFirstSine, FlatSine], ids=name)
def test_a_packed_cache_that_is_read_in_another_way(spelling):
    seen = evidence(Decoder(spelling), LOSSLESS)
    assert seen.error <= 1e-6 and [len(capture.state.sites) for capture in seen.captures] == [1, 0]
    assert all(type(x) is PackedKV and x.shape[1] == 9 for x in seen.cache[0])
    assert "dequantized for it" in str(akvq_fx.report(seen.model))


class Overwrites(models.TokensFirst):
    """[B, T, H, D], whose first token every step sets to zero: back to 16 bits."""

    def write(self, past, k, v, at):
        if past is not None:
            past[0][:, 0] = 0.0
        return super().write(past, k, v, at)


class FlatOverwrites(models.FlatHeads):
    """The same of [B, T, H * D], which is no view of the buffers."""

    def write(self, past, k, v, at):
        if past is not None:
            past[0][:, 0] = 0.0
        return super().write(past, k, v, at)


def test_a_packed_cache_that_the_graph_overwrites():
    seen = evidence(Decoder(Overwrites), LOSSLESS)
    assert seen.error <= 1e-6
    with pytest.raises(NotImplementedError, match=r"a packed cache \[B, T, H \* D\] is written into"):
        evidence(Decoder(FlatOverwrites), LOSSLESS)


@torch.no_grad()
def test_a_cache_that_is_refused_later_comes_back_in_its_axes():
    """Layers that text_bits keeps at 16 bits are refused after the exchange."""
    model = models.VisionDecoder("mark")
    model.layers, model.tokens = torch.nn.ModuleList(models.Block(models.TokensFirst) for _ in range(3)), 1
    ids, at_image = token_ids(2, 12), torch.zeros(2, 12, dtype=torch.bool)
    at_image[:, 2:6] = True
    images = torch.randn(4, models.WIDTH)
    want, plain = model(ids, None, images, at_image)
    spy = models.Spy(text_bits=16)
    got, cache = torch.compile(model, backend=spy)(ids, None, images, at_image)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert [type(x) is PackedKV for pair in cache for x in pair] == [False] * 4 + [True] * 2
    for x, y in zip(itertools.chain(*cache[:2]), itertools.chain(*plain[:2]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
        assert x.is_contiguous()


@pytest.mark.parametrize(
    "spelling, batch, prompt",
    [(models.TokensFirst, 1, 6), (models.TokensFirst, 2, 1), (models.FlatMqa, 1, 1), (models.TimeFirst, 1, 1)],
    ids=name,
)
def test_axes_of_one(spelling, batch, prompt):
    """Sizes of one tell nothing of their axis."""
    seen = evidence(Decoder(spelling), LOSSLESS, batch=batch, prompt=prompt, pad=0)
    assert seen.error <= 2e-6
    assert [str(x.axes) for x in seen.cache[0]] == list(SPELLINGS[spelling])


def test_default_options():
    """As users compile: Inductor, the default recipe."""
    model, ids = Decoder(models.TokensFirst, layers=2), token_ids(2, 72)
    standard = Decoder(models.Attention, layers=2)
    results = []
    for one, options in ((standard, {"inner": "eager"}), (model, {})):
        torch._dynamo.reset()
        one.compile(backend="akvq", options=options)
        with torch.no_grad():
            logits, cache = one(ids[:, :70])
            steps = [logits]
            for a in (70, 71):
                logits, cache = one(ids[:, a : a + 1], cache)
                steps.append(logits)
        results.append(steps)
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert cache[0][0].layout_of.body_bits == 2 and not akvq_fx.report(model).refused


# left alone


class KeepsSlice(models.TokensFirst):
    """[B, T, H, D], of which a slice is kept."""

    def write(self, past, k, v, at):
        k, v, kept = super().write(past, k, v, at)
        return k, v, tuple(x[:, -4:] for x in kept)

    def mask(self, at, total, padding, past, dtype):
        return None if past is None else torch.ones(at.shape[0], past[0].shape[1] + at.shape[0], dtype=torch.bool)


class TokensFirstDim12(models.TokensFirst):
    """[B, T, H, D] of a head dim that does not pack."""

    dim = 12


class TokensFirstCapped(models.TokensFirst, models.Softcap):
    """[B, T, H, D], read through a softcap."""


class HeadsInRows(models.Attention):
    """The cache is [B * H, T, D]."""

    tokens = 1

    def write(self, past, k, v, at):
        B = k.shape[0]
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        if past is not None:
            k, v = (torch.cat([old, new], dim=1) for old, new in zip(past, (k, v), strict=True))
        return k.unflatten(0, (B, -1)), v.unflatten(0, (B, -1)), (k, v)


ALONE = {
    KeepsSlice: "the cache keeps a slice of what attention reads (sliding window)",
    TokensFirstDim12: "the head dim of the keys is 12, accepted: a multiple of 8",
    TokensFirstCapped: "[batch, heads, tokens, channels], which is accepted without softcap and sinks",
    HeadsInRows: "the cache grows along axis 1 of 3, accepted: ",
}


@pytest.mark.parametrize("spelling", ALONE, ids=name)
def test_what_cannot_be_packed_stays_and_says_why(spelling):
    seen = evidence(Decoder(spelling), LOSSLESS)
    for eager, compiled in zip(seen.eager, seen.compiled, strict=True):
        assert torch.equal(eager, compiled)
    report = akvq_fx.report(seen.model)
    assert not report.packed and {row.label for row in report.refused} == {"layers.0.attention"}
    assert any(ALONE[spelling] in row.reason and row.node for row in report.refused), report
    assert all(untouched(capture) for capture in seen.captures)


def test_the_state_of_a_convolution_is_no_cache():
    def step(state, x, weight):
        both = torch.cat([state, x], dim=1)
        return torch.einsum("btc,tc->bc", both[:, -3:], weight), both[:, 1:]

    (capture,) = models.captured(step, torch.randn(2, 4, 8), torch.randn(2, 1, 8), torch.randn(3, 8))
    assert capture.state.sites == [] and capture.state.refused == [] and untouched(capture)
