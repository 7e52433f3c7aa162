"""split_decode: both parts together compute what the whole graph does, and the body knows nothing of the cache's
length."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import akvq_fx
from akvq_fx.config import CAPTURED_MODE, AKVQConfig
from akvq_fx.cuda_graph import DecodeStep
from akvq_fx.passes.patterns.nodes import value
from akvq_fx.passes.patterns.values import symbols, written
from akvq_fx.passes.split_decode import ATTEND, ATTEND_LENGTH, ATTEND_MASK
from tests import attention_models as models
from tests.attention_models import Attention, Decoder, SharedDecoder, Spy, evidence, mixed, token_ids

CAPTURED = {"inner": "inductor", "mode": CAPTURED_MODE, "capacity_step": 4, "window": 4, "pivots": 2}
PLAIN = {**CAPTURED, "inner": "eager", "mode": None}
name = lambda x: x.__name__ if isinstance(x, type) else ""


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Both parts run as they are: what Inductor makes of them is test_cuda_graph's."""
    monkeypatch.setattr("akvq_fx.backend.compile_inner", lambda gm, examples, config: gm)


def captured_mode(build, options=None, **schedule):
    torch._dynamo.reset()
    return evidence(build(), {**CAPTURED, **(options or {})}, **schedule)


def both_modes(build, options=None, **schedule):
    """(evidence in reduce-overhead mode, with the whole graph); the same tokens and weights."""
    torch._dynamo.reset()
    plain = evidence(build(), {**PLAIN, **(options or {})}, **schedule)
    return captured_mode(build, options, **schedule), plain


def assert_same(seen, plain) -> None:
    """One matmul on the same numbers at other addresses may differ in the last bit."""
    for one, other in zip(seen.compiled, plain.compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def splits(seen) -> list:
    """Of every graph, the prompt's first."""
    return [capture.state.split for capture in seen.captures]


def reasons(seen) -> list[str]:
    return [capture.state.capture and capture.state.capture.reason for capture in seen.captures]


def ops(gm) -> list[str]:
    """Names of the akvq ops of a graph, in order."""
    return [str(n.target).split(".")[1] for n in gm.graph.nodes if str(n.target).startswith("akvq.")]


def assert_body_stands_still(state) -> None:
    """No size in the body but constants and those of the cache's buffers; no length is given to attention."""
    body = state.split.body
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    buffers = symbols([value(n) for b in state.buffers.values() for n in b.nodes])
    assert all(symbols(value(n)) <= buffers for n in inputs)
    for node in body.graph.nodes:
        assert not symbols(value(node)) - buffers, node
        if node.target is ATTEND:
            assert not isinstance(node.args[ATTEND_LENGTH], torch.fx.Node)
    assert len(state.split.held) + len(state.split.numbers) + len(state.split.moved) + len(state.split.pads) + bool(
        state.split.starts
    ) == len(inputs)


GROWING = (Attention, mixed(models.FloatMask, models.Direct), mixed(models.EnableGqa, models.PerHeadMask, models.Mqa))
GROWING += (models.SinkGrouped,)
STATIC = (models.StaticIndexCopy, models.StaticSetItem)
RANKS = (models.QueryMask, models.FloatQueryMask, models.HeadQueryMask, models.TokenMask)


def assert_split(seen) -> None:
    """The prompt's graph is whole, every other one is in two, and together they hold its ops."""
    assert splits(seen)[0] is None and all(splits(seen)[1:]), reasons(seen)
    for capture in seen.captures[1:]:
        assert capture.report("split_decode").matched == ["graph"]
        assert_body_stands_still(capture.state)
        assert ops(capture.state.split.body) == ops(capture.state.gm)
        prologue = capture.state.split.prologue
        assert prologue is None or not ops(prologue)


@pytest.mark.parametrize("spelling", GROWING + STATIC, ids=name)
def test_same_numbers_as_the_whole_graph(spelling):
    seen, plain = both_modes(lambda: Decoder(spelling), prompt=6, steps=4, pad=2)
    assert_same(seen, plain)
    assert_split(seen)


@pytest.mark.parametrize("spelling", RANKS, ids=name)
def test_masks_of_every_rank_are_filled_up(spelling):
    """Columns past the cached tokens are added wherever the last axis is."""
    seen, plain = both_modes(lambda: Decoder(spelling), prompt=6, steps=3)
    assert_same(seen, plain)
    assert_split(seen)


@pytest.mark.parametrize("spelling", [Attention, models.StaticIndexCopy], ids=name)
def test_lossless_equals_eager(spelling):
    seen = captured_mode(lambda: Decoder(spelling, layers=2), {"body_bits": 16}, prompt=6, steps=7)
    assert seen.error <= 1e-5
    assert_split(seen)


def test_a_static_cache_needs_no_prologue():
    seen = captured_mode(lambda: Decoder(models.StaticIndexCopy), prompt=6, steps=2, pad=2)
    split = splits(seen)[-1]
    assert split.prologue is None and not split.starts and not split.pads


def test_a_growing_cache_meets_its_masks_at_the_capacity():
    seen = captured_mode(lambda: Decoder(layers=2), prompt=6, steps=2, pad=2)
    state = seen.captures[-1].state
    split = state.split
    masks = [n.args[ATTEND_MASK] for n in split.body.graph.nodes if n.target is ATTEND]
    assert all(n.op == "placeholder" for n in masks)
    padded = {value(n).shape[-1].node.expr for n in masks}
    assert padded <= {s.node.expr for s in (value(b["codes"]).shape[2] for b in state.buffers.values())}
    assert len(split.starts) == len({str(n.args) for n in split.body.graph.nodes if n.target is torch.select}) >= 2
    assert any(pad is not None for pad in split.pads)


def test_weights_and_buffers_are_held_and_tokens_are_not():
    seen = captured_mode(Decoder, prompt=6, steps=2)
    state = seen.captures[-1].state
    split = state.split
    inputs = [n for n in state.graph.nodes if n.op == "placeholder"]
    buffers = {n for b in state.buffers.values() for n in b.nodes}
    parameters = {n for n in inputs if isinstance(state.weights.get(state.position.get(n)), nn.Parameter)}
    assert {inputs[i] for i in split.held} == buffers | parameters
    assert [value(inputs[i]).dtype for i in split.moved] == [torch.int64]


def test_shared_cache():
    """The last layer reads the first one's cache: one append, two reads of as many tokens as the device says."""
    seen = captured_mode(SharedDecoder, {"body_bits": 16}, prompt=6, steps=4)
    assert seen.error <= 1e-5
    assert ops(splits(seen)[-1].body).count("attend") == 2


def test_cross_attention_has_the_same_length_in_every_step():
    torch._dynamo.reset()
    decoder = models.CrossDecoder(layers=2)
    memory = torch.randn(2, 9, models.WIDTH, generator=torch.Generator().manual_seed(0))
    spy, ids = Spy(**CAPTURED, body_bits=16), token_ids(2, 8)
    compiled = torch.compile(decoder, backend=spy)
    with torch.no_grad():
        _, cache = decoder(ids[:, :1], None, memory)
        expected = [decoder(ids[:, i : i + 1], cache)[0] for i in range(1, 6)]
        _, cache = compiled(ids[:, :1], None, memory)
        for i, wanted in enumerate(expected, 1):
            found, cache = compiled(ids[:, i : i + 1], cache)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    split = spy.captures[-1].state.split
    assert split is not None and split.prologue is None and not split.starts, spy.captures[-1].state.capture


def test_a_fixed_number_of_new_tokens():
    """Three new tokens a step, as speculation has them: each row of positions holds three."""
    torch._dynamo.reset()
    model, ids = Decoder(), token_ids(2, 18)
    with torch.no_grad():
        expected = model(ids)[0]
        _, cache = torch.compile(model, backend=Spy(**PLAIN, body_bits=16))(ids[:, :6])
        torch._dynamo.reset()
        spy = Spy(**CAPTURED, body_bits=16)
        compiled = torch.compile(model, backend=spy)
        for a in range(6, 18, 3):
            out, cache = compiled(ids[:, a : a + 3], cache)
            torch.testing.assert_close(out, expected[:, a : a + 3], rtol=0, atol=1e-5)
    split = spy.captures[-1].state.split
    assert split is not None and split.count == 3
    assert value([n for n in split.body.graph.nodes if n.op == "placeholder"][-1]).shape[1] == 4  # rows stay aligned


@pytest.mark.parametrize("build", [Decoder, SharedDecoder], ids=lambda c: c.__name__)
def test_several_new_tokens_are_attended_before_they_are_appended(build):
    """Within the window everything is exact, though each step takes the ring slots of tokens that its queries see."""
    torch._dynamo.reset()
    model, ids = build(), token_ids(2, 18)
    with torch.no_grad():
        expected = model(ids)[0]
        spy = Spy(**{**CAPTURED, "window": 6, "tsa_layers": ()})
        compiled = torch.compile(model, backend=spy)
        _, cache = compiled(ids[:, :3])
        out, cache = compiled(ids[:, 3:6], cache)
        torch.testing.assert_close(out, expected[:, 3:6], rtol=0, atol=1e-4)
        cropped = tuple((k[:, :, :3], v[:, :, :3]) for k, v in cache)
        for start, pair in ((3, cropped), (6, cache)):
            out, _ = compiled(ids[:, start : start + 3], pair)
            torch.testing.assert_close(out, expected[:, start : start + 3], rtol=0, atol=1e-4)
    state = spy.captures[-1].state
    assert state.split is not None, state.capture
    assert [n for n in ops(state.split.body) if n in ("attend", "append")][0] == "attend"
    assert_body_stands_still(state)


def test_a_crop_is_noticed_by_the_host():
    """The device's own count of tokens is too large after a crop: positions come from the host."""
    torch._dynamo.reset()
    model, ids = Decoder(), token_ids(2, 12)
    compiled = torch.compile(model, backend=Spy(**CAPTURED, body_bits=16))
    with torch.no_grad():
        _, cache = compiled(ids[:, :6])
        for i in range(6, 12):
            _, cache = compiled(ids[:, i : i + 1], cache)
        cache = tuple((k[:, :, :8], v[:, :, :8]) for k, v in cache)
        out, _ = compiled(ids[:, 3:4], cache)
        expected = model(torch.cat([ids[:, :8], ids[:, 3:4]], 1))[0][:, -1:]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


class MaskInPlace(models.FloatMask):
    """A mask that is filled in place before attention sees it."""

    def mask(self, at, total, padding, past, dtype):
        mask = torch.full((1, 1, at.shape[0], total), -torch.inf, dtype=dtype)
        mask[..., : total - 1] = 0.0
        mask[..., -1] = 0.0
        return mask.masked_fill_(~seen_by(at, total), -torch.inf)


def seen_by(at, total):
    return models.seen(at, total, None)


class Counting(Attention):
    """Notes in a buffer how many tokens there are, after a step has used the number of the step before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("tokens", torch.zeros(1))

    def forward(self, x, past, at, total, padding):
        x = x + (0 if past is None else self.tokens)
        self.tokens.fill_(total)
        return super().forward(x, past, at, total, padding)


class PositionsInPlace(Attention):
    """Changes what was made from the number of tokens, where the body would."""

    def rope(self, x, at):
        return super().rope(x, at.add_((0.0 * x.mean()).long()))


def test_a_mask_filled_in_place():
    seen = captured_mode(lambda: Decoder(MaskInPlace), {"body_bits": 16}, prompt=6, steps=3)
    assert seen.error <= 1e-5
    assert splits(seen)[-1] is not None, reasons(seen)


@pytest.mark.parametrize(
    "spelling, reason",
    [
        (Counting, "writes in place what add uses on the other side of the cut"),
        (PositionsInPlace, "writes in place what .* uses on the other side of the cut"),
        (
            models.SwitchesToSine,
            r"dequantize.* reads the cache, and the size of its result depends on the number of tokens",
        ),
    ],
    ids=name,
)
def test_what_cannot_be_cut_runs_whole(spelling, reason):
    seen = captured_mode(lambda: Decoder(spelling, layers=2), {"body_bits": 16}, prompt=6, steps=3)
    assert seen.error <= 1e-5
    assert splits(seen) == [None] * len(seen.captures)
    missed = seen.captures[-1].report("split_decode").missed
    assert len(missed) == 1 and missed[0].node
    assert re.match(reason, reasons(seen)[-1]), reasons(seen)


def test_refusals_of_whole_graphs():
    seen = captured_mode(Decoder, {"body_bits": 16}, prompt=6, steps=2, chunk=3)
    assert seen.error <= 1e-5
    assert reasons(seen)[0] == "a cache is made in this graph, which runs once for it"
    assert reasons(seen)[-1] == "the number of new tokens is not fixed"


def test_wrapped_weights_run_whole():
    """A weight that is a tensor subclass (quantized, say) has no address to know it by."""

    def wrapped():
        model = Decoder()
        model.head.weight = nn.Parameter(TwoTensor(model.head.weight.data, model.head.weight.data.clone()))
        return model

    seen = captured_mode(wrapped, {"body_bits": 16}, prompt=6, steps=2)
    assert seen.error <= 1e-5
    assert reasons(seen)[-1].startswith("an input is a TwoTensor, which has no memory of its own")


def test_other_modes_are_left_alone():
    seen = evidence(Decoder(), {**CAPTURED, "mode": "max-autotune"}, prompt=6, steps=2)
    assert all(c.state.split is None and c.state.capture is None for c in seen.captures)
    assert all(not c.report("split_decode").matched + c.report("split_decode").missed for c in seen.captures)
    assert AKVQConfig.from_options({}, CAPTURED_MODE).mode == CAPTURED_MODE


def test_the_report_says_why():
    model = Decoder()
    evidence(model, CAPTURED, prompt=6, steps=2)
    text = str(akvq_fx.report(model))
    assert "prefill: no CUDA graph: a cache is made in this graph" in text
    assert "decode: no CUDA graph: there is no CUDA device" in text
    plain = Decoder()
    evidence(plain, PLAIN, prompt=6, steps=2)
    assert "CUDA" not in str(akvq_fx.report(plain))


@pytest.mark.parametrize(
    "function, count",
    [
        (lambda x: x.add_(1), 1),
        (lambda x: torch.add(x, 1, out=x), 1),
        (lambda x: x.add(1), 0),
        (lambda x: F.relu(x), 0),
    ],
)
def test_written(function, count):
    graph = torch.fx.symbolic_trace(lambda x: function(x)).graph
    assert sum(len(written(n)) for n in graph.nodes) == count


def test_other_positions_would_be_seen(monkeypatch):
    """A body that gets wrong positions gives wrong numbers: the other tests rely on that."""
    right = DecodeStep.place_rows
    monkeypatch.setattr(DecodeStep, "place_rows", lambda self, inputs, out: right(self, inputs, out) - 1)
    seen = captured_mode(Decoder, {"body_bits": 16}, prompt=6, steps=3)
    assert seen.error > 1e-3
