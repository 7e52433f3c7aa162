"""Static buffers of the caller's of which a step writes and reads parts: cache[:b, s:e] = k; cache[:b, :e]."""

import pytest
import torch

import akvq_fx
from akvq_fx import PackedKV
from akvq_fx.backend import akvq
from tests import attention_models as models
from tests.attention_models import Decoder, evidence, token_ids

LOSSLESS = {"body_bits": 16, "inner": "eager"}
FIRE = (
    models.RowSlices,
    models.RowSlicesWritten,
    models.RowSlicesReassigned,
    models.RowSlicesHeadsFirst,
    models.RowSlicesFlat,
    models.RowViews,
    models.TokenSlices,
    models.PrefixOfPositions,
    models.PrefixOfRows,
)
ALONE = {
    models.SliceFromOne: "16-bit buffers that the caller owns",
    models.WrittenTwice: "the cache is written twice in one step",
    models.ReadBefore: "the cache is read before it is written",
    models.LastRows: "16-bit buffers that the caller owns",
}
name = lambda x: x.__name__ if isinstance(x, type) else ""


def are_packed(model) -> list[bool]:
    return [isinstance(x, PackedKV) for x in model.buffers()]


def rollout(run, batch: int, prompt: int, steps: int, start=None) -> tuple[list, torch.Tensor]:
    """(logits of each call, tokens chosen); start: runs the prompt."""
    ids, first = token_ids(batch, prompt, batch), run if start is None else start
    logits = [first(ids, None, None, 0)[0]]
    for at in range(prompt, prompt + steps):
        logits.append(run(logits[-1][:, -1:].argmax(-1), None, None, at)[0])
    return logits, torch.cat([x[:, -1:].argmax(-1) for x in logits], 1)


@pytest.mark.parametrize("spelling", FIRE, ids=name)
def test_packs_behind_the_first_graph_and_is_exact(spelling):
    seen = evidence(Decoder(spelling), models.LOSSLESS, steps=5, chunk=3)
    assert seen.error <= 2e-6 and are_packed(seen.model) == [True, True]
    report = akvq_fx.report(seen.model)
    assert not report.refused, report
    assert len(seen.captures) == 3, "a prompt, steps, a chunk of tokens"
    assert [len(capture.state.exchanges) for capture in seen.captures] == [1, 0, 0]
    assert [[site.key.kind for site in capture.state.sites] for capture in seen.captures] == [[], ["place"], ["place"]]
    for buffer in seen.model.buffers():
        part = seen.model.layers[0].attention
        assert buffer.shape == part.size(part.rows, part.kv_heads, part.slots, part.dim)


@pytest.mark.parametrize("spelling", ALONE, ids=name)
def test_stays_and_says_why(spelling):
    model, plain = Decoder(spelling), Decoder(spelling)
    torch._dynamo.reset()
    run = torch.compile(model, backend="akvq", options=LOSSLESS)
    with torch.no_grad():
        got, want = rollout(run, 2, 5, 3), rollout(plain, 2, 5, 3)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-6)
    assert are_packed(model) == [False, False]
    report = akvq_fx.report(model)
    assert not report.packed and any(ALONE[spelling] in row.reason and row.node for row in report.refused), report


def compiled(spelling, prompt_too: bool):
    """(model, what runs its prompt, compiled model, graphs)"""
    model, graphs = Decoder(spelling, layers=2), []
    torch._dynamo.reset()

    def backend(gm, inputs):
        graphs.append(gm)
        return akvq(gm, inputs, options=LOSSLESS)

    run = torch.compile(model, backend=backend)
    return model, run if prompt_too else model, run, graphs


@pytest.mark.parametrize("prompt_too, mode", [(True, torch.no_grad), (False, torch.inference_mode)])
def test_batches_in_a_row(prompt_too, mode):
    """1, 3 (all rows) and 2, on graphs that serve every position; the next prompt starts the buffers anew."""
    with mode():
        model, start, run, graphs = compiled(models.RowSlices, prompt_too)
        plain = Decoder(models.RowSlices, layers=2)
        for batch, prompt, steps in ((1, 5, 6), (3, 8, 7), (2, 4, 9), (1, 6, 8)):
            got, want = rollout(run, batch, prompt, steps, start), rollout(plain, batch, prompt, steps)
            assert torch.equal(got[1], want[1]) and all(are_packed(model)), batch
            torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-6)
    assert len(graphs) <= 6 and not akvq_fx.report(model).refused, akvq_fx.report(model)


@torch.no_grad()
def test_rows_that_a_smaller_batch_left_are_still_there():
    """A batch of 3, then of 1 over its first row, then of 3 again where the others left off."""
    model, plain = Decoder(models.RowSlices), Decoder(models.RowSlices)
    torch._dynamo.reset()
    run = torch.compile(model, backend="akvq", options=LOSSLESS)
    ids = token_ids(3, 8)
    for rows, first, end in ((3, 0, 5), (1, 5, 6), (3, 5, 6), (2, 6, 7), (3, 6, 7)):
        got, want = (one(ids[:rows, first:end], None, None, first)[0] for one in (run, plain))
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
        assert all(are_packed(model))


@torch.no_grad()
def test_codes_are_those_of_a_buffer_with_as_many_rows():
    """At 2 bits: rows that the batch does not take change nothing."""
    results = []
    for rows in (4, 2):
        torch._dynamo.reset()
        model = Decoder(models.mixed(models.RowSlices, rows=rows))
        run = torch.compile(model, backend="akvq", options={"inner": "eager", "window": 4, "pivots": 2})
        rollout(run, 2, 5, 1)
        results.append(rollout(run, 2, 9, 6)[0])
        assert all(are_packed(model))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@torch.no_grad()
def test_uncompiled_writes_of_parts():
    """To codes where they go on, and to a plain buffer where they begin anew."""
    model, plain = Decoder(models.RowSlices), Decoder(models.RowSlices)
    torch._dynamo.reset()
    run = torch.compile(model, backend="akvq", options=LOSSLESS)
    rollout(run, 2, 5, 3), rollout(plain, 2, 5, 3)
    new = torch.randn(2, 2, 2, 16)
    for m in (model, plain):
        m.layers[0].attention.k_cache[:2, 8:10] = new
    assert all(are_packed(model))
    got, want = (m.layers[0].attention.k_cache for m in (model, plain))
    assert torch.equal(got.dequantize()[:2, :10], want[:2, :10])
    got, want = rollout(run, 1, 4, 2, model), rollout(plain, 1, 4, 2)
    assert torch.equal(got[1], want[1]) and all(are_packed(model))


def test_default_options():
    """As users compile: Inductor, few bits, all recent tokens at 16; attributes that are no registered buffers."""
    model, plain = Decoder(models.RowSlices), Decoder(models.RowSlices)
    for layer in (*model.layers, *plain.layers):
        part = layer.attention
        for key in ("k_cache", "v_cache"):
            buffer = getattr(part, key)
            delattr(part, key)
            setattr(part, key, buffer)
    torch._dynamo.reset()
    model.compile(backend="akvq", options={"window": 32})
    with torch.no_grad():
        got, want = rollout(model, 2, 5, 2), rollout(plain, 2, 5, 2)
    assert torch.equal(got[1], want[1])
    part = model.layers[0].attention
    assert isinstance(part.k_cache, PackedKV) and part.k_cache.layout_of.body_bits == 2
    assert not akvq_fx.report(model).refused
