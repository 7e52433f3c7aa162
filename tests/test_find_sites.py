"""find_sites: every spelling of a cache is matched, its RoPE named; what cannot be packed keeps graph and bits."""

import pytest
import torch

import akvq_fx
from akvq_fx.config import AKVQConfig
from akvq_fx.packed_kv import PackedKV
from akvq_fx.passes.canonicalize import canonicalize
from akvq_fx.passes.patterns.arguments import argument_of
from akvq_fx.passes.patterns.nodes import op
from akvq_fx.passes.state import GraphState
from tests import attention_models as models
from tests.attention_models import Decoder, captured, lossless, roll, token_ids

GROWING = ("first", "grow")
STATIC = ("fill", "place")

MUST_FIRE = {  # spelling: RoPE, q:kv heads, forms of the prompt's and the step's write
    models.Attention: ("rope half", "4:2", GROWING),
    models.CatTuple: ("rope half", "4:2", GROWING),
    models.Concat: ("rope half", "4:2", GROWING),
    models.FlatStart: ("rope half", "4:2", GROWING),
    models.Direct: ("rope half", "4:2", GROWING),
    models.StaticIndexCopy: ("rope half", "4:2", STATIC),
    models.StaticSetItem: ("rope half", "4:2", STATIC),
    models.StaticScatter: ("rope half", "4:2", STATIC),
    models.UnsqueezeFlatten: ("rope half", "4:2", GROWING),
    models.Interleave: ("rope half", "4:2", GROWING),
    models.EnableGqa: ("rope half", "4:2", GROWING),
    models.Mqa: ("rope half", "4:1", GROWING),
    models.Mha: ("rope half", "4:4", GROWING),
    models.BoolMask: ("rope half", "4:2", GROWING),
    models.FloatMask: ("rope half", "4:2", GROWING),
    models.PerHeadMask: ("rope half", "4:2", GROWING),
    models.QueryMask: ("rope half", "4:2", GROWING),
    models.FloatQueryMask: ("rope half", "4:2", GROWING),
    models.HeadQueryMask: ("rope half", "4:2", GROWING),
    models.TokenMask: ("rope half", "4:2", GROWING),
    models.EagerSoftmax: ("rope half", "4:2", GROWING),
    models.WrittenOut: ("rope half", "4:2", GROWING),
    models.WrittenSinglePrecision: ("rope half", "4:2", GROWING),
    models.WrittenEinsum: ("rope half", "4:2", GROWING),
    models.WrittenGrouped: ("rope half", "4:2", GROWING),
    models.WrittenBroadcast: ("rope half", "4:2", GROWING),
    models.WrittenFolded: ("rope half", "4:2", GROWING),
    models.WrittenBaddbmm: ("rope half", "4:2", GROWING),
    models.WrittenKeysFirst: ("rope half", "4:2", GROWING),
    models.WrittenInPlace: ("rope half", "4:2", GROWING),
    models.WrittenMaximum: ("rope half", "4:2", GROWING),
    models.WrittenQueryMask: ("rope half", "4:2", GROWING),
    models.WrittenStatic: ("rope half", "4:2", STATIC),
    models.Softcap: ("rope half", "4:2", GROWING),
    models.SoftcapInPlace: ("rope half", "4:2", GROWING),
    models.SoftcapGrouped: ("rope half", "4:2", GROWING),
    models.SoftcapStatic: ("rope half", "4:2", STATIC),
    models.Sink: ("rope half", "4:2", GROWING),
    models.SinkFirst: ("rope half", "4:2", GROWING),
    models.SinkGrouped: ("rope half", "4:2", GROWING),
    models.SinkStatic: ("rope half", "4:2", STATIC),
    models.TokensFirst: ("rope half", "4:2", GROWING),
    models.TokensFirstStart: ("rope half", "4:2", GROWING),
    models.TokensFirstEinsum: ("rope half", "4:2", GROWING),
    models.GrowsTransposed: ("rope half", "4:2", GROWING),
    models.FlatHeads: ("rope half", "4:2", GROWING),
    models.FlatMqa: ("rope half", "4:1", GROWING),
    models.FlatExpanded: ("rope half", "4:1", GROWING),
    models.FlatWritten: ("rope half", "4:2", GROWING),
    models.TimeFirst: ("rope half", "4:2", GROWING),
    models.ChannelsFirst: ("rope half", "4:2", GROWING),
    models.RopeInterleaved: ("rope interleaved", "4:2", GROWING),
    models.RopePartial: ("rope half, partial", "4:2", GROWING),
    models.RopeComplex: ("rope complex", "4:2", GROWING),
    models.DirectComplex: ("rope complex", "4:2", GROWING),
    models.NoRope: ("no rope", "4:2", GROWING),
    models.NormBefore: ("rope half, key norm", "4:2", GROWING),
    models.NormAfter: ("rope half, key norm", "4:2", GROWING),
    models.FusedSplit: ("rope half", "4:2", GROWING),
    models.FusedSlices: ("rope half", "4:2", GROWING),
    models.FusedChunk: ("rope half", "4:4", GROWING),
    models.FusedView: ("rope half", "4:2", GROWING),
    models.Unflatten: ("rope half", "4:2", GROWING),
    models.ChannelMajor: ("rope half", "4:2", GROWING),
    models.Biased: ("rope half", "4:2", GROWING),
    models.Dim8: ("rope half", "4:2", GROWING),
    models.Dim24: ("rope half", "4:2", GROWING),
    models.Dim80: ("rope half", "4:2", GROWING),
    models.WindowMask: ("rope half", "4:2", GROWING),
    models.SlidingSlice: ("rope half", "4:2", GROWING),
    models.SlidingDirect: ("rope half", "4:2", GROWING),
    models.SlidingNarrow: ("rope half", "4:2", GROWING),
    models.SlidingStart: ("rope half", "4:2", GROWING),
    models.SlidingReadsLast: ("rope half", "4:2", GROWING),
    models.SlidingOneColumn: ("rope half", "4:2", GROWING),
}

UNREAD = "no scaled_dot_product_attention reads this cache directly"
MUST_NOT_FIRE = {
    models.MiddleSlice: "the cache keeps a slice of what attention reads, accepted: all of it, or its last tokens",
    models.WeightsUsed: "its attention weights are used by mean too, so they are computed",
    models.WeakMask: "masked scores are set to -50.0, accepted: a number up to -10000",
    models.WrittenDropout: "attention dropout is on (p=0.5)",
    models.Latent: UNREAD,
    models.Dropout: "attention dropout is on (dropout_p=0.5)",
    models.Dim12: "the head dim of the keys is 12, accepted: a multiple of 8",
    models.IntegerCache: UNREAD,
    models.TiledRepeat: UNREAD,
    models.StaticScatterApart: "scatter_",
    models.ChunkedValues: "the values reach attention through cat, not straight from the cache",
}

name = lambda x: x.__name__ if isinstance(x, type) else ""


def pairs_due(rope, head_dim):
    """Which channels are turned together; of a partial form, half of the head is turned."""
    turned = head_dim // 2 if "partial" in rope else head_dim
    form = rope.removesuffix(", key norm").removesuffix(", partial")
    return {"rope half": (turned // 2, turned), "no rope": (0, 0)}.get(form, (1, turned))


@pytest.mark.parametrize("spelling", MUST_FIRE, ids=name)
def test_fires_once_in_both_graphs(spelling):
    rope, groups, kinds = MUST_FIRE[spelling]
    seen = lossless(spelling)
    assert len(seen.captures) == 2, "a prompt and a decode graph, no recompile"
    for capture, kind in zip(seen.captures, kinds, strict=True):
        assert capture.state.refused == []  # else: name, layer, reason, node
        (site,) = capture.state.sites
        assert (site.key.kind, site.value.kind, site.rope, site.groups) == (kind, kind, rope, groups)
        assert site.head_dim == spelling.dim
        assert site.pairs == pairs_due(rope, spelling.dim)
        assert (site.layer, site.label) == (0, "layers.0.attention")
        assert len(capture.report("find_sites").matched) == 1
    assert [row.status for row in akvq_fx.report(seen.model).packed] == ["prompt", "packed"]


@pytest.mark.parametrize("spelling", MUST_FIRE, ids=name)
def test_cache_is_packed_not_bypassed_and_lossless_equals_eager(spelling):
    seen = lossless(spelling)
    assert seen.error <= 1e-6
    keys, values = seen.cache[0]
    assert isinstance(keys, PackedKV) and isinstance(values, PackedKV)
    assert len(keys._storage()["classes"]) == 2


@pytest.mark.parametrize("spelling", MUST_NOT_FIRE, ids=name)
def test_says_why_not_and_keeps_the_bits(spelling):
    seen = lossless(spelling)
    for eager, compiled in zip(seen.eager, seen.compiled, strict=True):
        assert torch.equal(eager, compiled)
    assert not akvq_fx.report(seen.model).packed
    for capture in seen.captures:
        assert capture.state.sites == []
        reasons = [reason for _, _, reason, _ in capture.state.refused]
        assert any(MUST_NOT_FIRE[spelling] in reason for reason in reasons), reasons
        assert all(miss.node for miss in capture.report("find_sites").missed)


def untouched(capture) -> bool:
    """What was compiled differs from the original in spelling only, and every output is returned as it comes."""
    plain = GraphState(capture.gm, AKVQConfig(inner="eager"), {})
    canonicalize(plain)
    inner = getattr(capture.compiled, "inner", capture.compiled)
    same_nodes = str(capture.state.graph) == str(plain.graph) and str(inner.graph) in (capture.before, str(plain.graph))
    as_they_come = all(output is None for output in capture.state.program.outputs)
    return same_nodes and as_they_come and str(capture.gm.graph) == capture.before


@pytest.mark.parametrize("spelling", MUST_NOT_FIRE, ids=name)
def test_refused_graph_is_untouched(spelling):
    assert all(untouched(capture) for capture in lossless(spelling).captures)


EXTENDED = {  # softcap, and whether there are sinks
    models.Softcap: (1.5, False),
    models.SoftcapInPlace: (1.5, False),
    models.SoftcapGrouped: (1.5, False),
    models.SoftcapStatic: (1.5, False),
    models.Sink: (0.0, True),
    models.SinkFirst: (0.0, True),
    models.SinkGrouped: (1.5, True),
    models.SinkStatic: (0.0, True),
}


@pytest.mark.parametrize("spelling", EXTENDED, ids=name)
def test_softcap_and_sinks_are_arguments_in_steps_and_stay_as_written_in_prompts(spelling):
    softcap, sinks = EXTENDED[spelling]
    graphs = [capture.state.graph for capture in lossless(spelling).captures]
    prompt, step = ([op(node).strip("_") for node in graph.nodes] for graph in graphs)
    count = lambda ops: [ops.count(name) for name in ("tanh", "softmax", "extended_attention")]
    assert count(prompt) == [bool(softcap), 1, 0] and count(step) == [0, 0, 0]
    (attend,) = (node for node in graphs[1].nodes if node.target is torch.ops.akvq.attend.default)
    assert argument_of(attend, "softcap") == pytest.approx(softcap)
    assert (argument_of(attend, "sinks") is not None) == sinks


@pytest.mark.parametrize("batch, pad", [(1, 0), (3, 2)])
@pytest.mark.parametrize(
    "spelling", [models.WrittenFolded, models.WrittenGrouped, models.WrittenStatic, models.SinkGrouped], ids=name
)
def test_written_out_for_other_batches_padding_and_chunks(spelling, batch, pad):
    seen = models.evidence(Decoder(spelling), models.LOSSLESS, batch=batch, pad=pad, chunk=3)
    assert seen.error <= 2e-6 and all(len(capture.state.sites) == 1 for capture in seen.captures)
    assert all(isinstance(t, PackedKV) for t in seen.cache[0])


PARTS = "keys and values, or several layers, are parts of one tensor"
OTHER_FORMS = {
    models.StackedDim12: f"{PARTS}, and the head dim of the keys is 12",
    models.StackedAnew: f"{PARTS}, and the cache is made anew by index_copy",
    models.StackedThreeWays: f"{PARTS}, and ",
}


@pytest.mark.parametrize("spelling", OTHER_FORMS, ids=name)
def test_a_cache_of_another_form_has_a_row(spelling):
    """It says what is in the way."""
    seen = lossless(spelling)
    for eager, compiled in zip(seen.eager, seen.compiled, strict=True):
        assert torch.equal(eager, compiled)
    report = akvq_fx.report(seen.model)
    assert not report.packed and {row.label for row in report.refused} == {"layers.0.attention"}
    assert all(OTHER_FORMS[spelling] in row.reason and row.node for row in report.refused)
    assert all(untouched(capture) for capture in seen.captures)


def test_attention_without_a_cache_is_no_site_and_no_refusal():
    tower, x = models.VisionTower(), torch.randn(2, 5, models.WIDTH)
    (capture,) = captured(tower, x)
    assert capture.state.sites == [] and capture.state.refused == [] and untouched(capture)
    with torch.no_grad():
        assert torch.equal(tower(x), capture.compiled(*capture.inputs)[0])


def test_plain_placeholders_are_no_cache():
    q, k, v = torch.randn(3, 2, 4, 5, 16)
    (capture,) = captured(models.plain_read, q, k, v)
    assert capture.state.sites == [] and capture.state.refused == [] and untouched(capture)
    with torch.no_grad():
        assert torch.equal(models.plain_read(q, k, v), capture.compiled(q, k, v)[0])


def test_cached_layers_beside_a_tower_are_found_alone():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.decoder = models.VisionTower(), Decoder()

        def forward(self, x, tokens):
            return self.tower(x), self.decoder(tokens)

    (capture,) = captured(Pair(), torch.randn(2, 5, models.WIDTH), token_ids(2, 6))
    (site,) = capture.state.sites
    assert site.label == "decoder.layers.0.attention" and capture.state.refused == []
    calls = [n for n in capture.state.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert len(calls) == 2


def test_layers_are_numbered_in_order():
    (capture,) = captured(Decoder(layers=3), token_ids(2, 6))
    assert [(s.layer, s.label) for s in capture.state.sites] == [(i, f"layers.{i}.attention") for i in range(3)]


def test_two_layers_share_one_cache():
    seen = models.evidence(models.SharedDecoder(), models.LOSSLESS)
    for capture in seen.captures:
        first, second = capture.state.sites
        assert first.key.whole is second.key.whole and first.value.whole is second.value.whole
        assert sum(str(n.target).startswith(("akvq.append", "akvq.pack")) for n in capture.state.graph.nodes) == 2
    assert len(seen.captures) == 2 and seen.error <= 1e-6
    assert all(isinstance(t, PackedKV) for t in seen.cache[0])


def test_read_only_cache_of_cross_attention():
    model, memory, tokens = models.CrossDecoder(layers=2), torch.randn(2, 9, models.WIDTH), token_ids(2, 3)
    with torch.no_grad():
        want, plain = model(tokens, None, memory)
        want_next, _ = model(tokens[:, :1], plain)
    spy = models.Spy(**models.LOSSLESS)
    run = torch.compile(model, backend=spy)
    with torch.no_grad():
        got, cache = run(tokens, None, memory)
        got_next, after = run(tokens[:, :1], cache)
    prompt, step = spy.captures
    assert [s.key.kind for s in prompt.state.sites] == ["first"] * 2
    assert [(s.key.kind, s.rope) for s in step.state.sites] == [("read", "read only")] * 2
    assert not any("akvq.append" in str(n.target) for n in step.state.graph.nodes)
    assert after[0][0] is cache[0][0] and cache[0][0].shape[2] == 9
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(got_next, want_next, rtol=0, atol=1e-6)


class StaticNoMask(models.StaticIndexCopy):
    """A static cache read without a mask."""

    def mask(self, at, total, padding, past, dtype):
        return None


class WrittenTwice(models.StaticIndexCopy):
    """A second write into the same static cache in one step."""

    def put(self, cache, at, new):
        cache.index_copy_(2, at, new)
        cache.index_copy_(2, at, new * 2)


class UnequalHeads(models.Mha):
    """More value heads than key heads."""

    def attend(self, q, k, v, mask):
        return super().attend(q, k[:, :2].repeat_interleave(2, dim=1), v, mask)


class CastCache(models.Attention):
    """The cache is kept in half precision and read in single."""

    def write(self, past, k, v, at):
        k, v, kept = super().write(past, k.half(), v.half(), at)
        return k.float(), v.float(), kept


class ThreeParts(models.Attention):
    """The new tokens come in two parts."""

    def write(self, past, k, v, at):
        past = (self.start(k), self.start(v)) if past is None else past
        k, v = (torch.cat([old, new[:, :, :1], new[:, :, 1:]], 2) for old, new in zip(past, (k, v), strict=True))
        return k, v, (k, v)


class Scratch(models.StaticIndexCopy):
    """The buffers are read, and something else is kept."""

    def write(self, past, k, v, at):
        keys, values, _ = super().write(past, k, v, at)
        return keys, values, (k * 1, v * 1)


@pytest.mark.parametrize(
    "spelling, reason",
    [
        (StaticNoMask, "a static cache is read without a mask"),
        (WrittenTwice, "the cache is written twice in one step"),
        (UnequalHeads, "the keys reach attention through getitem"),
        (CastCache, UNREAD),
        (ThreeParts, "the cache is a cat of 3 tensors, accepted: cat([past, new])"),
        (Scratch, "but the graph does not return it"),
    ],
    ids=name,
)
def test_prompt_refusals(spelling, reason):
    at = torch.arange(6) if hasattr(spelling, "slots") else None
    (capture,) = captured(Decoder(spelling), token_ids(2, 6), at=at, options=models.LOSSLESS)
    assert capture.state.sites == []
    assert any(reason in why for _, _, why, _ in capture.state.refused), capture.state.refused
    assert untouched(capture)


@pytest.mark.parametrize(
    "index, new, reason",
    [
        ("(slice(None), slice(None), at)", "0.0", "no tensor of the cache's dtype torch.float32"),
        ("(slice(None), slice(None), at)", "new[:, :, :1]", "what is written is [2, 3, 1, 8], accepted: [2, 3, 4, 8]"),
        ("(slice(None), slice(None), slice(0, 8, 2))", "new", "the write is not x[:, :, at] = new"),
        ("(slice(None), 0, at)", "new[:, 0]", "the write is not x[:, :, at] = new"),
    ],
)
def test_writes_into_a_cache_that_are_left_alone_say_why(index, new, reason):
    write = eval(f"lambda cache, new, at: cache.__setitem__({index}, {new})")

    def prompt(new, at):
        cache = torch.zeros(2, 3, 9, 8)
        write(cache, new, at)
        return cache

    (capture,) = captured(prompt, torch.randn(2, 3, 4, 8), torch.arange(4))
    (miss,) = capture.report("canonicalize").missed
    assert reason in miss.reason and miss.node and "index_copy_" not in str(capture.state.graph)


def test_refusal_of_one_layer_leaves_the_others():
    model = Decoder(layers=2)
    model.layers[1] = models.Block(models.Dim12)
    seen = models.evidence(model, models.LOSSLESS)
    assert isinstance(seen.cache[0][0], PackedKV) and not isinstance(seen.cache[1][0], PackedKV)
    assert [row.label for row in akvq_fx.report(model).refused] == ["layers.1.attention"] * 2
    assert seen.error <= 1e-6


def test_plain_cache_from_an_eager_prompt_is_packed_on_first_contact():
    model, ids = Decoder(), token_ids(2, 9)
    want, _ = roll(model)
    with torch.no_grad():
        _, plain = model(ids[:, :6])
        spy = models.Spy(**models.LOSSLESS)
        run, got, cache = torch.compile(model, backend=spy), [], plain
        for i in range(6, 9):
            out, cache = run(ids[:, i : i + 1], cache)
            got.append(out)
    assert [s.key.kind for c in spy.captures for s in c.state.sites] == ["grow", "grow"]
    assert isinstance(cache[0][0], PackedKV)
    for a, b in zip(want[1:], got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
