"""pack_caches, attend_packed, rotations: the rewritten graph computes what the model did, prompt, steps and chunks."""

import re
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import akvq_fx
from akvq_fx.kernels import cache
from akvq_fx.packed_kv import PackedKV
from tests import attention_models as models
from tests.attention_models import LOSSLESS, Decoder, captured, evidence, mixed, roll, token_ids

ONLINE = {"body_bits": 16, "rotate": True}
ROTATED = {**ONLINE, "value_rotation": "fold"}
TWO_BITS = {"tsa_layers": ()}
SPELLINGS = (  # where the rotation or the fold takes another way; test_properties mixes the others in
    models.Direct,
    models.StaticSetItem,
    models.Mqa,
    models.PerHeadMask,
    models.RopeComplex,
    models.NormAfter,
    models.FusedView,
    models.ChannelMajor,
    models.Dim24,
)
name = lambda x: x.__name__ if isinstance(x, type) else ""


def ops(capture) -> list[str]:
    """Names of the akvq ops of the rewritten graph, in order."""
    return [str(n.target).split(".")[1] for n in capture.state.graph.nodes if str(n.target).startswith("akvq.")]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=name)
def test_rotated_and_folded_equals_eager(spelling):
    seen = evidence(Decoder(spelling).double(), ROTATED, steps=2, chunk=3)
    assert seen.error <= 1e-10
    assert [s.value_rotation for c in seen.captures for s in c.state.sites] == ["folded"] * len(seen.captures)
    assert all(c.report("rotate_queries_keys").matched for c in seen.captures)


@pytest.mark.parametrize("spelling", [models.StaticIndexCopy, models.Mqa, models.Dim24, models.Gated], ids=name)
def test_rotated_online_equals_eager(spelling):
    seen = evidence(Decoder(spelling).double(), ONLINE, steps=2, chunk=3)
    assert seen.error <= 1e-10
    assert [s.value_rotation for c in seen.captures for s in c.state.sites] == ["online"] * len(seen.captures)
    rotates = lambda c: "rotate" in ops(c) or c.report("fuse_rotations").matched
    assert all(rotates(c) and c.report("rotate_values").matched for c in seen.captures)


@pytest.mark.parametrize(
    "options, batch, prompt, steps, chunk", [(ONLINE, 1, 1, 2, 2), (ROTATED, 3, 130, 1, 5)], ids=["online", "fold"]
)
def test_rotated_in_single_precision(options, batch, prompt, steps, chunk):
    model = Decoder(mixed(models.Biased), layers=2)
    seen = evidence(model, options, batch=batch, prompt=prompt, steps=steps, chunk=chunk)
    assert seen.error <= 1e-4
    assert len(akvq_fx.report(model).packed) >= 4 and not akvq_fx.report(model).refused


@pytest.mark.parametrize(
    "spelling",
    [
        models.Attention,
        models.FloatMask,
        mixed(models.EnableGqa, models.PerHeadMask),
        models.StaticIndexCopy,
    ],
    ids=name,
)
def test_left_padding(spelling):
    seen = evidence(Decoder(spelling), ROTATED, pad=2, chunk=3)
    assert seen.error <= 1e-4
    assert all(isinstance(t, PackedKV) for t in seen.cache[0])


def test_padding_is_a_class_of_its_own():
    class Blind(models.BoolMask):
        """Padding sees nothing and is seen by nothing."""

        def mask(self, at, total, padding, past, dtype):
            return (torch.arange(total)[None] <= at[:, None])[None, None] & padding[:, None, None]

    seen = evidence(Decoder(Blind), TWO_BITS, pad=2)
    classes = seen.cache[0][0].classes()
    with pytest.raises(ValueError, match="ask the keys"):
        seen.cache[0][1].classes()
    assert (classes[0, :2] == 3).all() and (classes[0, 2:] != 3).all() and (classes[1] != 3).all()
    assert akvq_fx.cache_stats(seen.cache).tokens["PSA"]["padding"] == 2
    for a, b in zip(seen.eager, seen.compiled, strict=True):
        torch.testing.assert_close(a[1], b[1], rtol=0, atol=1e-4)


def test_two_bits_really_quantize():
    seen = evidence(Decoder(models.Dim80), {**TWO_BITS, "window": 2, "pivots": 1}, prompt=24, steps=2)
    keys = seen.cache[0][0]
    assert keys._storage()["codes"].dtype == torch.int16 and keys.layout_of.body_bits == 2
    assert torch.equal(seen.eager[0], seen.compiled[0]) or (seen.eager[0] - seen.compiled[0]).abs().max() < 1e-5
    error = max((a - b).abs().max().item() for a, b in zip(seen.eager[1:], seen.compiled[1:], strict=True))
    assert 1e-4 < error < 1, "a step that shows no quantization error did not read codes"
    rows = akvq_fx.report(seen.model).packed
    assert [(r.status, r.bits) for r in rows] == [
        (s, "recent 2: 16, pivots 1: 16, rest: 4, 2, 0 by channel of keys, 2") for s in ("prompt", "packed")
    ]


def test_steps_within_the_window_are_exact():
    seen = evidence(Decoder(layers=2), TWO_BITS, steps=3, chunk=3)
    assert seen.error <= 1e-4
    assert seen.cache[0][0].layout_of.body_bits == 2


def test_prompt_may_read_its_own_codes():
    options = {**TWO_BITS, "prefill": "quantized", "window": 0, "pivots": 1}
    seen = evidence(Decoder(), options, prompt=24)
    prompt, _ = seen.captures
    assert "attend" in ops(prompt) and prompt.report("attend_packed").matched
    assert 1e-4 < (seen.eager[0] - seen.compiled[0]).abs().max() < 1


def test_chunk_reads_itself_at_full_precision():
    options = {**TWO_BITS, "window": 0, "pivots": 1, "center_keys": False, "balance_keys": False}
    model, ids = Decoder(), token_ids(1, 12)
    run = torch.compile(model, backend=models.Spy(**options))
    with torch.no_grad():
        _, cache = run(ids[:, :1])
        got, cache = run(ids[:, 1:], cache)
        want, _ = model(ids)
    torch.testing.assert_close(got, want[:, 1:], rtol=0, atol=1e-4)
    with torch.no_grad():
        stored = cache[0][0].dequantize()
    assert stored.shape[2] == 12


class Roomy(models.StaticIndexCopy):
    """A static cache with room for long prompts."""

    slots = 200


@pytest.mark.parametrize("spelling", [models.Attention, Roomy], ids=name)
def test_channels_in_order_and_scales_alone_change_nothing_within_the_window(spelling):
    """The prompt's own order of channels, on grouped queries: an exact identity before anything is quantized."""
    options = {"inner": "eager", "recipe": "akvq"}
    seen = evidence(Decoder(spelling, layers=2), options, prompt=40, steps=3, chunk=3)
    assert seen.error <= 1e-4
    key, value = (x.layout_of for x in seen.cache[0])
    assert (key.uneven, key.symmetric, value.uneven, value.symmetric) == (True, True, False, True)


def chunk_run(model, ids, cuts, **options):
    """(logits of the last cut, what each cache of the cut before reads as, captures) of a compiled model."""
    spy, cache, before = models.Spy(**options), None, None
    run, static = torch.compile(model, backend=spy), isinstance(model.layers[0].attention, Roomy)
    with torch.no_grad():
        for a, b in zip(cuts, cuts[1:], strict=False):
            before = cache and tuple(tuple(t.dequantize() for t in pair) for pair in cache)
            logits, cache = run(ids[:, a:b], cache, None, torch.arange(a, b) if static else None)
    return logits, before, spy.captures


@pytest.mark.parametrize(
    "spelling, options", [(models.Attention, {"value_rotation": "online"}), (Roomy, {})], ids=["online", "static, fold"]
)
def test_a_chunk_sees_a_prompt_within_the_window_exactly(spelling, options):
    """The chunk is longer than the window, so its append takes the slots of all tokens before it."""
    model, ids = Decoder(spelling, layers=2), token_ids(2, 96)
    with torch.no_grad():
        want, _ = model(ids, None, None, torch.arange(96))
    got, _, captures = chunk_run(model, ids, (0, 32, 96), **TWO_BITS, window=32, **options)
    torch.testing.assert_close(got, want[:, 32:], rtol=0, atol=1e-4)
    first = [name for name in ops(captures[-1]) if name in ("restart", "attend", "append")]
    layer = ["attend", "append", "append"]
    assert first == 2 * (["restart", "restart", *layer] if spelling is Roomy else layer)


@pytest.mark.parametrize("spelling, chunk", [(models.Attention, 5), (Roomy, 64)], ids=["growing, 5", "static, 64"])
def test_a_chunk_sees_what_the_cache_read_as_before_it(spelling, chunk):
    """A prompt of 100 tokens: 68 at 2 bits, then the window at 16, for every token of the chunk."""
    model, ids = Decoder(spelling, layers=2), token_ids(2, 100 + chunk)
    static = torch.arange(100, 100 + chunk) if spelling is Roomy else None
    with torch.no_grad():
        _, exact = model(ids[:, :100], None, None, torch.arange(100))
        exact = [[t.clone() for t in pair] for pair in exact]
    options = {**TWO_BITS, "window": 32, "value_rotation": "online"}
    got, before, _ = chunk_run(model, ids, (0, 100, 100 + chunk), **options)
    for pair, due in zip(before, exact, strict=True):
        for stored, tokens in zip(pair, due, strict=True):
            torch.testing.assert_close(stored[:, :, 68:100], tokens[:, :, 68:100], rtol=0, atol=1e-4)
            assert (stored[:, :, :68] - tokens[:, :, :68]).abs().max() > 1e-2
    with torch.no_grad():
        want, _ = model(ids[:, 100:], before, None, static)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_chunk_is_appended_once_after_all_that_read_its_cache():
    model, ids = models.SharedDecoder(), token_ids(2, 40)
    with torch.no_grad():
        want, _ = model(ids)
    got, _, captures = chunk_run(model, ids, (0, 8, 40), **TWO_BITS, window=8)
    torch.testing.assert_close(got, want[:, 8:], rtol=0, atol=1e-4)
    assert [name for name in ops(captures[-1]) if name in ("attend", "append")] == 2 * ["attend"] + 2 * ["append"]


def test_ops_of_prompt_and_step():
    seen = evidence(Decoder(), TWO_BITS)
    prompt, step = seen.captures
    assert ops(prompt).count("pack") == 2 and "attend" not in ops(prompt) and "append" not in ops(prompt)
    assert ops(step).count("append") == 2 and ops(step).count("attend") == 1 and "dequantize" not in ops(step)
    assert not any("scaled_dot_product_attention" in str(n.target) for n in step.state.graph.nodes)
    assert [r.name for r in step.state.reports] == [f.__name__ for f in akvq_fx.passes.PIPELINE]


def test_one_token_more_is_the_same_storage():
    model, ids = Decoder(), token_ids(1, 8)
    run = torch.compile(model, backend=models.Spy(**LOSSLESS))
    with torch.no_grad():
        _, before = run(ids[:, :6])
        _, after = run(ids[:, 6:7], before)
    (key, _), (longer, _) = before[0], after[0]
    assert longer.shape[2] == key.shape[2] + 1 and longer._storage() is key._storage()


def test_capacity_grows_without_a_recompile():
    seen = evidence(Decoder(), {**LOSSLESS, "capacity_step": 4}, prompt=6, steps=8)
    assert len(seen.captures) == 2 and seen.error <= 1e-6
    assert seen.cache[0][0]._storage().capacity == 16


def test_an_old_cache_can_be_continued_twice():
    model, ids = Decoder(), token_ids(1, 10)
    run = torch.compile(model, backend=models.Spy(**LOSSLESS))
    with torch.no_grad():
        _, prefix = run(ids[:, :6])
        first, kept = run(ids[:, 6:7], prefix)
        second, _ = run(ids[:, 8:9], prefix)
        third, _ = run(ids[:, 7:8], kept)
        want = [model(torch.cat([ids[:, :6], tail], 1))[0][:, -1:] for tail in (ids[:, 6:7], ids[:, 8:9], ids[:, 6:8])]
    for got, expected in zip((first, second, third), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [LOSSLESS, ROTATED], ids=["plain", "rotated"])
def test_static_cache_restarts(options):
    model, ids = Decoder(models.StaticIndexCopy), token_ids(2, 9, seed=3)
    run = torch.compile(model, backend=models.Spy(**options))
    (want, _), (_, cache) = roll(model, seed=3), roll(run)
    for pair in cache:
        for tensor in pair:
            tensor.zero_()
    with torch.no_grad():
        got = [run(ids[:, :6], cache, None, torch.arange(6))[0]]
        got += [run(ids[:, i : i + 1], cache, None, torch.arange(i, i + 1))[0] for i in range(6, 9)]
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_training_mode_backward_through_a_prompt_s_cache_is_refused():
    model, ids = Decoder(), token_ids(2, 6)
    run = torch.compile(model, backend=models.Spy(**LOSSLESS))
    with pytest.raises(RuntimeError, match="no gradient goes through a packed cache"):
        run(ids)[0].square().sum().backward()


def test_golden_graphs(golden):
    seen = evidence(Decoder(), TWO_BITS)
    prompt, step = seen.captures
    golden("prompt_graph", str(prompt.state.graph))
    golden("step_graph", str(step.state.graph))
    golden("chunk_graph", str(evidence(Decoder(), TWO_BITS, steps=0, chunk=3).captures[-1].state.graph))
    again = evidence(Decoder(), TWO_BITS)
    assert [str(c.state.graph) for c in again.captures] == [str(c.state.graph) for c in seen.captures]


def test_golden_report(golden):
    model = Decoder(layers=2)
    model.layers[1] = models.Block(models.Dim12)
    evidence(model, TWO_BITS)
    table, _, counts = str(akvq_fx.report(model)).partition("\ngraphs: ")
    here = Path(models.__file__).parent.parent
    golden("report", re.sub(r"\.py:\d+:", ".py:LINE:", table.replace(f"{here}/", "")))
    assert counts.startswith("1 prefill, 2 decode") and "attend on cpu: " in counts


def test_rewriting_twice_is_rewriting_once():
    (first,) = captured(Decoder(), token_ids(2, 6))
    (second,) = captured(Decoder(), token_ids(2, 6))
    assert str(first.state.graph) == str(second.state.graph)
    assert str(first.gm.graph) == first.before


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_layer_s_unpacked_prompt_is_gone_before_the_next_one_is_packed(inner, monkeypatch):
    """The peak of a prompt holds one layer's 16-bit keys and values, not all layers'."""
    torch._dynamo.reset()
    whole, alive = [], []
    create = cache.create

    def watched(x, *rest):
        alive.append(sum(not storage.expired() for storage in whole))
        whole.append(StorageWeakRef(x.untyped_storage()))
        return create(x, *rest)

    monkeypatch.setattr(cache, "create", watched)
    with torch.no_grad():
        torch.compile(Decoder(layers=3), backend="akvq", options={"inner": inner, "window": 4})(token_ids(2, 40))
    assert len(alive) == 6  # keys and values of three layers
    assert max(alive) <= 2, alive
