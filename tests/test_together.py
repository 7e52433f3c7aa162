"""Caches that a model keeps in one tensor: packed each by itself, seen by the caller as the model has them.

The models are those of tests/attention_models.py; what is left alone is in tests/test_find_sites.py.
"""

import functools
import io

import pytest
import torch

import akvq_fx
from akvq_fx import bundle_ops, packed_ops
from akvq_fx.packed_bundle import PackedBundle, bundled, joined
from akvq_fx.packed_kv import PackedKV, Storage
from tests import attention_models as models
from tests.attention_models import LOSSLESS, Decoder, evidence, token_ids
from tests.drawn_decoders import Choice, play
from tests.kernel_cases import LAYOUTS, case_of
from tests.test_cache_axes import OPS as OF_ONE_CACHE
from tests.test_cache_axes import of_axis
from tests.test_packed_kv import on_codes

SPELLINGS = {  # spelling: how its parts lie, along which axis, and how many tokens its tensor has in the end
    models.Stacked: ("stack", 0, 12),
    models.StackedFromEmpty: ("stack", 0, 12),
    models.StackedBehindRows: ("stack", 1, 12),
    models.StackedBeforeHeads: ("stack", 2, 12),
    models.ProjectedTogether: ("stack", 2, 12),
    models.Joined: ("cat", 3, 12),
    models.JoinedSlices: ("cat", 3, 12),
    models.JoinedFlat: ("cat", 2, 12),
    models.StackedWindow: ("stack", 0, 5),
    models.StackedStatic: ("stack", 0, 16),
    models.StackedStaticAtOnce: ("stack", 0, 16),
}
name = lambda x: x.__name__ if isinstance(x, type) else ""


class StackedDecoder(Decoder):
    """The cache is one tensor [L, 2, B, H, T, D]."""

    def start(self, tokens, cache, at):
        return super().start(tokens, None if cache is None else ((cache[0][0],),), at)

    def forward(self, tokens, cache=None, padding=None, at=None):
        at, total = self.start(tokens, cache, at)
        layers = None if cache is None else [(x,) for x in cache[0]]
        logits, kept = self.run(self.embed(tokens), layers, at, total, padding)
        return logits, (torch.stack([both for (both,) in kept]),)


# whole models


@functools.cache
def seen(spelling):
    return evidence(Decoder(spelling), LOSSLESS, chunk=0 if spelling is models.StackedWindow else 3)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=name)
def test_lossless_is_the_model_and_the_tensor_keeps_its_shape(spelling):
    (x,) = seen(spelling).cache[0]
    how, axis, tokens = SPELLINGS[spelling]
    assert seen(spelling).error <= 2e-6
    assert type(x) is PackedBundle and (x.how, x.axis, len(x.parts)) == (how, axis, 2)
    assert all(type(part) is PackedKV for part in x.parts) and x.shape[x.tokens] == tokens
    report = akvq_fx.report(seen(spelling).model)
    assert not report.refused and {row.status for row in report.packed} == {"prompt", "packed"}


@pytest.mark.parametrize("spelling", SPELLINGS, ids=name)
def test_a_step_appends_to_the_parts_and_reads_nothing_else(spelling):
    graph = seen(spelling).captures[1].state.graph
    count = lambda op: sum(str(node.target).startswith(f"akvq.{op}") for node in graph.nodes)
    assert (count("append"), count("attend"), count("dequantize")) == (2, 1, 0)
    assert not any("stack" in node.name for node in graph.nodes)


def test_codes_are_those_of_tensors_by_themselves():
    lossy = {"window": 4, "pivots": 2}
    apart, together = (evidence(Decoder(x, layers=2), lossy, prompt=24) for x in (models.Attention, models.Stacked))
    for want, got in zip(apart.compiled, together.compiled, strict=True):
        assert torch.equal(want, got)
    assert together.error > 1e-4, "something was quantized"
    for pair, (both,) in zip(apart.cache, together.cache, strict=True):
        for want, got in zip(pair, both.parts, strict=True):
            assert want.layout_text == got.layout_text and torch.equal(want.storage.codes, got.storage.codes)
    stats = akvq_fx.cache_stats(together.cache)
    assert (stats.packed_tensors, stats.plain_tensors) == (4, 0)
    assert stats.packed_bytes == akvq_fx.cache_stats(apart.cache).packed_bytes
    bits = [{row.bits for row in akvq_fx.report(x.model).packed} for x in (apart, together)]
    assert bits[0] == bits[1] and len(akvq_fx.report(together.model).packed) == 4


@pytest.mark.parametrize("spelling", [models.Stacked, models.JoinedFlat], ids=name)
def test_layers_in_one_tensor_and_what_beam_search_does(spelling):
    """Batches in a row on few graphs, gradients on; between steps rows change places and tokens are dropped."""
    model, count = StackedDecoder(spelling, layers=2), []
    torch._dynamo.reset()
    run = torch.compile(model, backend=models.Spy(**LOSSLESS))
    for batch in (1, 3, 2):
        ids, caches = token_ids(batch, 12), [None, None]
        for a, b in ((0, 6), (6, 7), (6, 7), (7, 8)):
            outs = []
            for i, one in enumerate((model, run)):
                if caches[i] is not None:
                    rows, tokens = (2, 4) if spelling is models.Stacked else (1, 2)
                    (x,) = caches[i]
                    x = x.narrow(tokens, 0, a) if a < x.shape[tokens] else x
                    caches[i] = (x.index_select(rows, torch.arange(batch).flip(0)),)
                out, caches[i] = one(ids[:, a:b], caches[i])
                outs.append(out.detach())
            torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=2e-6)
            assert type(caches[1][0]) is PackedBundle and caches[1][0].shape == caches[0][0].shape
            assert len(caches[1][0].leaves) == 4
        count.append(len(akvq_fx.report(model).graphs))
    assert count[1] == count[2] and not akvq_fx.report(model).gave_up


def test_layers_in_one_buffer():
    choice = Choice(container="layers in one tensor", together="stacked", write="x[:, :, a:b] = new", position="int")
    seen = play(choice, batches=(2,))
    assert seen.error <= 2e-6 and seen.packed == [True] and not seen.reasons and seen.graphs == 2


def test_default_options():
    """As users compile: Inductor, gradients on, a lossless cache; several batches in a row."""
    model, twin = Decoder(models.StackedBeforeHeads), Decoder(models.StackedBeforeHeads)
    torch._dynamo.reset()
    model.compile(backend="akvq", options=LOSSLESS)
    for batch in (1, 3, 2):
        ids, cache, plain = token_ids(batch, 9), None, None
        for a, b in ((0, 7), (7, 8), (8, 9)):
            got, cache = model(ids[:, a:b], cache)
            want, plain = twin(ids[:, a:b], plain)
            assert torch.equal(got.argmax(-1), want.argmax(-1)) and type(cache[0][0]) is PackedBundle
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_plain_cache_is_packed_by_the_first_step():
    model, ids = Decoder(models.Stacked), token_ids(2, 9)
    torch._dynamo.reset()
    run = torch.compile(model, backend=models.Spy(**LOSSLESS))
    with torch.no_grad():
        _, cache = model(ids[:, :8])
        want, _ = model(ids[:, 8:], cache)
        got, cache = run(ids[:, 8:], cache)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert type(cache[0][0]) is PackedBundle


class UsedElsewhere(models.Stacked):
    """A step adds the mean of all that is cached to what attention gives."""

    def write(self, past, k, v, at):
        k, v, kept = super().write(past, k, v, at)
        self.extra = kept[0].mean()
        return k, v, kept

    def output(self, y, x):
        return super().output(y, x) + self.extra


class Overwrites(models.Stacked):
    """A step sets the first token's keys to zero."""

    def write(self, past, k, v, at):
        if past is not None:
            past[0][0][:, :, 0] = 0.0
        return super().write(past, k, v, at)


class Swaps(models.Stacked):
    """Steps read as keys what the prompt read as values."""

    def part(self, both):
        return super().part(both)[:: 1 if both.shape[3] == 6 else -1]


@pytest.mark.parametrize("spelling", [UsedElsewhere, Overwrites, Swaps], ids=name)
def test_other_uses_of_the_tensor_see_the_same_numbers(spelling):
    assert evidence(Decoder(spelling), LOSSLESS).error <= 2e-6


class ClearsAll(models.Stacked):
    """A step multiplies all that is cached in place."""

    def write(self, past, k, v, at):
        if past is not None:
            past[0].mul_(0.5)
        return super().write(past, k, v, at)


def test_a_write_that_parts_cannot_take_is_an_error():
    with pytest.raises(Exception, match="packed caches in one tensor are written by mul_"):
        evidence(Decoder(ClearsAll), LOSSLESS)


# what is done to a tensor outside of a graph


def bundle(how: str, axis: int, layout: str = "2bit") -> PackedBundle:
    parts = []
    for seed in (0, 1):
        case = case_of(LAYOUTS[layout], B=2, H=3, seed=seed)
        storage = Storage(case.layout, case.pack(), case.length, case.length, None)
        parts.append(PackedKV.view_of(storage, case.length))
    return bundled(how, axis, parts)


# op(x, axis of rows, axis of tokens), the same on a plain tensor
OPS = {name: op for name, op in OF_ONE_CACHE.items() if name not in ("repeat", "token split")} | {
    "left padding": lambda x, b, t: torch.nn.functional.pad(x, [0, 0] * (x.dim() - 1 - t) + [3, 0]),
    "one row expands": lambda x, b, t: x[of_axis(b, slice(0, 1))].expand([3 if i == b else -1 for i in range(x.dim())]),
    "detach": lambda x, b, t: x.detach(),
    "save": lambda x, b, t: saved(x),
    "to": lambda x, b, t: x.to("cpu", copy=True),
    "rows replaced": lambda x, b, t: x.clone().index_copy_(b, torch.tensor([1, 0]), x),
}


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


on_codes = functools.partial(on_codes, module=bundle_ops)


@pytest.mark.parametrize("how, axis", [("stack", 0), ("stack", 1), ("stack", 3), ("cat", 3), ("cat", 1)])
@pytest.mark.parametrize("op", OPS)
def test_ops_go_to_the_parts(op, how, axis):
    x = bundle(how, axis)
    got = on_codes(OPS[op], x, x.rows, x.tokens)
    assert type(got) is PackedBundle
    want = joined(how, axis, [OPS[op](part, 0, 2).dequantize() for part in x.parts])
    assert got.shape == want.shape and torch.equal(got.dequantize(), want)
    assert got.shape == OPS[op](x.dequantize(), x.rows, x.tokens).shape


@pytest.mark.parametrize("how, axis", [("stack", 0), ("stack", 1), ("cat", 3)])
def test_parts_are_taken_and_tokens_come_behind(how, axis):
    x = bundle(how, axis)
    plain = x.dequantize()
    if how == "stack":
        taken = [x.select(axis, 1), x.unbind(axis)[1], x[of_axis(axis, 1)]]
    else:
        taken = [x.chunk(2, axis)[1], x.split(16, axis)[1], x[of_axis(axis, slice(16, None))]]
    for part in taken:
        assert type(part) is PackedKV and torch.equal(part.dequantize(), x.parts[1].dequantize())
    new = torch.randn([2 if i == x.tokens else n for i, n in enumerate(plain.shape)])
    longer = on_codes(torch.cat, [x, new], x.tokens)
    assert type(longer) is PackedBundle and longer.shape == torch.cat([plain, new], x.tokens).shape
    assert torch.equal(longer.dequantize().narrow(x.tokens, plain.shape[x.tokens], 2), new), "in the ring"
    with pytest.raises(ValueError, match="Sizes of tensors must match except in dimension"):
        torch.cat([x, new[..., :8]], x.tokens)


def test_what_parts_do_not_cover_is_plain_and_writes_are_refused():
    x = bundle("stack", 0)
    with pytest.warns(UserWarning, match="is not defined on packed caches in one tensor"):
        packed_ops._warned.clear()
        assert torch.equal(x.mul(2), x.dequantize().mul(2))
    assert "PackedBundle(shape=[2, 2, 3, 11, 16], stack along 0" in repr(x)
    with pytest.raises(NotImplementedError, match="would write into a packed cache"):
        x.mul_(2)


def test_parts_that_are_not_alike_are_a_plain_tensor():
    x = bundle("stack", 0)
    made = bundled("stack", 0, [x.parts[0], x.parts[1].dequantize()])
    assert type(made) is torch.Tensor and torch.equal(made, x.dequantize())
