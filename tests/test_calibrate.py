"""calibrate: what it measures against plain definitions, what it decides, and what the backend makes of it."""

import gc
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import akvq_fx
from akvq_fx import policy
from akvq_fx.analysis import measure
from akvq_fx.analysis.calibration import Calibration, LayerStatistics, Prompt
from akvq_fx.analysis.watch import AttentionCall
from akvq_fx.backend import akvq
from akvq_fx.config import AKVQConfig
from akvq_fx.kernels.rotate import matrix
from tests.attention_models import (
    WIDTH,
    Decoder,
    EnableGqa,
    FloatMask,
    Softcap,
    StaticIndexCopy,
    VisionDecoder,
    token_ids,
)
from tests.zoo import ZOO

SMALL = {"window": 3, "pivots": 2}


def images(batch: int, count: int, start: int, stop: int) -> dict:
    """Inputs of a VisionDecoder with vision tokens at start..stop."""
    at = torch.zeros(batch, count, dtype=torch.bool)
    at[:, start:stop] = True
    features = torch.randn(batch * (stop - start), WIDTH, generator=torch.Generator().manual_seed(1))
    return {"tokens": token_ids(batch, count), "images": features, "at_image": at}


def attention_calls(model, monkeypatch, *args, **kwargs) -> list[tuple]:
    """(query, key, value, probabilities [B, Hq, q, C]) of every attention call of an uncompiled run."""
    calls, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False, **rest):
        wide = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q @ wide.transpose(2, 3)).double() * q.shape[-1] ** -0.5
        if is_causal:
            attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        calls.append((q, wide, v, scores.softmax(-1)))
        return real(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa, **rest)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", spy)
        model(*args, **kwargs)
    return calls


@pytest.mark.parametrize("attention", [EnableGqa, FloatMask, StaticIndexCopy], ids=lambda a: a.__name__)
def test_attention_of_the_last_tokens_is_what_the_model_computes(attention, monkeypatch):
    model, ids = Decoder(attention, layers=2), token_ids(2, 12)
    at = torch.arange(12)
    calls = attention_calls(model, monkeypatch, ids, None, None, at)
    found = akvq_fx.calibrate(model, (ids, None, None, at), options=SMALL, queries=4)
    assert [layer.layer for layer in found.layers] == [0, 1]
    for layer, (_, _, _, p) in zip(found.layers, calls, strict=True):
        p = p[:, :, 8:12, :12]
        near = (torch.arange(8, 12)[:, None] - torch.arange(12)) < 3
        assert layer.queries == 8
        torch.testing.assert_close(layer.by_head("sink"), p[..., 0].mean((0, 2)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.by_head("recent"), (p * near).sum(-1).mean((0, 2)), rtol=1e-4, atol=1e-6)
        assert layer.share("text") == pytest.approx(1) and layer.share("vision") == 0


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_shares_are_sums_of_the_softmax(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    B, H, group, q, window = draw(1, 2), draw(1, 2), draw(1, 2), draw(2, 9), draw(0, 5)
    g = torch.Generator().manual_seed(draw(0, 99))
    random = lambda *size: torch.randn(*size, generator=g)
    query, key = random(B, H * group, q, 8), random(B, H, q, 8)
    kind = data.draw(st.sampled_from(["causal", "bool", "float"]))
    mask = torch.ones(q, q, dtype=torch.bool).tril()
    given_mask = {
        "causal": None,
        "bool": mask[None, None],
        "float": torch.where(mask, 0.0, -torch.inf).expand(B, 1, q, q),
    }[kind]
    at = torch.arange(q)
    seen = AttentionCall(0, "", query, key, given_mask, kind == "causal", None, key, key, None, None, at)
    row, vision, valid = draw(0, B - 1), random(q) > 0, torch.ones(q, dtype=torch.bool)
    pivots = torch.tensor([draw(0, q - 1), -1], dtype=torch.int32)
    asked = torch.tensor(sorted(data.draw(st.sets(st.integers(0, q - 1), min_size=1))))
    found, tokens = measure.attention_mass(seen, row, asked, valid, vision, pivots, window)
    scores = query[row] @ key[row].repeat_interleave(group, 0).mT * 8**-0.5
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)[:, asked]
    far = asked[:, None] - at >= window
    pivot = at == pivots[0]
    due = {
        "text": p[..., ~vision].sum((1, 2)),
        "recent": (p * ~far).sum((1, 2)),
        "far_pivots": (p * (far & pivot)).sum((1, 2)),
        "far_text": (p * (far & ~pivot & ~vision)).sum((1, 2)),
        "far_vision": (p * (far & ~pivot & vision)).sum((1, 2)),
    }
    for name, mass in due.items():
        torch.testing.assert_close(found[name], mass.double(), rtol=1e-4, atol=1e-5)
    if window:  # then whatever is outside the window came before the query
        assert tokens["far_text"] == (far & ~pivot & ~vision).sum()
    whole = torch.full((H * group,), float(len(asked))).double()
    torch.testing.assert_close(sum(found[name] for name in measure.PARTS), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(found[name] for name in measure.MODALITIES), whole, rtol=1e-5, atol=1e-5)


def test_a_long_prompt_is_read_in_blocks(monkeypatch):
    ids = token_ids(1, 40)
    whole = akvq_fx.calibrate(Decoder(), ids, options=SMALL)
    monkeypatch.setattr(measure, "BLOCK", 7)
    torch._dynamo.reset()
    blocks = akvq_fx.calibrate(Decoder(), ids, options=SMALL)
    for name in measure.SHARES:
        torch.testing.assert_close(whole.layers[0].by_head(name), blocks.layers[0].by_head(name))


@pytest.mark.parametrize("placement", ["masked_scatter", "setitem", "index_put", "mark_vision"])
@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "broken"])
def test_vision_tokens_are_told_apart(placement, broken):
    model, inputs = VisionDecoder(placement, layers=1, broken=broken), images(2, 14, 3, 9)
    found = akvq_fx.calibrate(model, inputs, options=SMALL)
    assert found.prompts == [Prompt(2, 14, 12, 10)], "queries are the text after the last image"
    for layer in found.layers:
        assert 0 < layer.share("vision") < 1
        assert layer.share("text") + layer.share("vision") == pytest.approx(1)
        assert sum(layer.share(name) for name in measure.PARTS) == pytest.approx(1)
    both = akvq_fx.calibrate(model, inputs, token_ids(2, 14), options=SMALL)
    assert [prompt.vision for prompt in both.prompts] == [12, 0], "no mask of an earlier call is left over"


def test_padding_plays_no_part():
    model, _ = ZOO["llama"]()
    ids = token_ids(1, 20) + 10
    alone = akvq_fx.calibrate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, options=SMALL)
    padded, mask = F.pad(ids, (5, 0)), F.pad(torch.ones_like(ids), (5, 0))
    torch._dynamo.reset()
    both = akvq_fx.calibrate(model, {"input_ids": padded, "attention_mask": mask}, options=SMALL)
    for a, b in zip(alone.layers, both.layers, strict=True):
        for name in measure.SHARES:
            torch.testing.assert_close(a.by_head(name), b.by_head(name), rtol=1e-3, atol=1e-4)
        assert (a.massive[0].positions[:3] + 5).tolist() == b.massive[0].positions[:3].tolist()
        assert a.massive[0].median == pytest.approx(b.massive[0].median, rel=1e-3)
        torch.testing.assert_close(a.largest["values"], b.largest["values"], rtol=1e-3, atol=1e-4)


def test_massive_activations_are_found():
    model, ids = Decoder(layers=2), torch.randperm(60)[None, :20] + 1
    with torch.no_grad():
        model.embed.weight.mul_(0.01)
        model.embed.weight[ids[0, 7], 5] = -4000.0
    layer = akvq_fx.calibrate(model, ids, options=SMALL).layers[0]
    (found,) = layer.massive
    assert (found.positions[0], found.channels[0], found.values[0]) == (7, 5, 4000.0)
    assert found.massive.tolist() == [7] and found.peaks.shape == (20,)
    usual = model.embed.weight[ids[0]].abs().median(-1).values.median()
    assert found.median == pytest.approx(usual.item())


def test_channels_before_and_after_the_transform(monkeypatch):
    model, ids = Decoder(EnableGqa), token_ids(2, 10)
    ((_, key, value, _),) = attention_calls(model, monkeypatch, ids)
    key, h = key[:, ::2].double(), matrix(16)
    layer = akvq_fx.calibrate(model, ids).layers[0]
    for form, x in (
        ("keys", key),
        ("keys WHT", key @ h),
        ("values", value.double()),
        ("values WHT", value.double() @ h),
    ):
        torch.testing.assert_close(layer.largest[form], x.abs().amax((0, 2)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.mean[form], x.abs().mean((0, 2)), rtol=1e-4, atol=1e-5)
    stored = layer.largest["keys centred WHT"]
    assert stored.shape == (2, 16) and not torch.allclose(stored, layer.largest["keys WHT"])


def test_statistics_add_up_over_prompts():
    model, inputs = VisionDecoder("masked_scatter", layers=2), [images(1, n, 3, 9) for n in (14, 17, 21)]
    together = akvq_fx.calibrate(model, *inputs, options=SMALL)
    separate = [akvq_fx.calibrate(model, one, options=SMALL) for one in inputs]
    layer, alone = together.layers[1], [found.layers[1] for found in separate]
    assert layer.queries == 5 + 8 + 12 and len(layer.massive) == 3
    torch.testing.assert_close(layer.sums["far_text"], sum(one.sums["far_text"] for one in alone))
    torch.testing.assert_close(layer.largest["keys"], torch.stack([one.largest["keys"] for one in alone]).amax(0))
    torch.testing.assert_close(layer.mean["keys"], torch.stack([one.mean["keys"] for one in alone]).mean(0))


def test_the_model_stays_as_it_is():
    model, inputs = VisionDecoder("masked_scatter"), images(1, 14, 3, 9)
    kept = {name: p.clone() for name, p in model.named_parameters()}
    before, _ = model(**inputs)
    seen = []
    akvq_fx.calibrate(model, inputs, inputs, progress=lambda: seen.append(1))
    assert all(torch.equal(kept[name], p) for name, p in model.named_parameters()) and len(seen) == 2
    assert torch.equal(before, model(**inputs)[0])


# the decision


def layer_of(number: int, pivots: float, text: float, vision: float, tokens: tuple = (10, 100)) -> LayerStatistics:
    """One head, one query; text and vision hold so much attention over so many tokens."""
    recent = 1 - pivots - text - vision
    mass = dict(
        far_pivots=pivots, far_text=text, far_vision=vision, recent=recent, text=1 - vision, vision=vision, sink=0.0
    )
    sums = {name: torch.tensor([x]).double() for name, x in mass.items()}
    count = dict(far_pivots=2, far_text=tokens[0], far_vision=tokens[1])
    forms = {form: torch.ones(1, 8).double() for form in measure.FORMS}
    return LayerStatistics(number, f"layers.{number}", 1, sums, count, [], dict(forms), dict(forms), 1)


def decided(*layers: LayerStatistics, vision: int = 100, ratio: float = 2.0) -> Calibration:
    return Calibration("Model", list(layers), [Prompt(1, 120, vision, 1)], {"window": 8, "ratio": ratio})


def test_the_leading_run_of_text_salient_layers_is_tsa():
    salient, flat, pivotal = (0.1, 0.4, 0.4), (0.0, 0.1, 0.8), (0.5, 0.3, 0.1)
    run = lambda *kinds: decided(*(layer_of(i, *kind) for i, kind in enumerate(kinds))).tsa_layers
    assert run(salient, salient, pivotal, pivotal) == (0, 1)
    assert run(salient, pivotal, salient) == (0,), "a later layer is not one of the first"
    assert run(flat, salient) == () and run(pivotal) == ()
    assert decided(layer_of(0, *salient), ratio=11).tsa_layers == (), (
        "a text token got ten times as much as a vision token"
    )
    assert decided(layer_of(3, *salient), layer_of(7, *pivotal)).tsa_layers == (3,), "numbers are the decoder's"


def test_no_images_no_tsa():
    found = decided(layer_of(0, 0.1, 0.4, 0.0, (10, 0)), vision=0)
    assert found.tsa_layers == () and "no vision tokens" in str(found)


def test_a_prompt_within_the_window_decides_nothing():
    found = akvq_fx.calibrate(VisionDecoder("masked_scatter"), images(1, 14, 3, 9))
    assert found.tsa_layers == () and any("recent window of 64" in note for note in found.notes)


def test_it_prints_as_a_table():
    found = akvq_fx.calibrate(VisionDecoder("masked_scatter", layers=3), images(1, 14, 3, 9), options=SMALL)
    lines = str(found).splitlines()
    assert lines[0].startswith("VisionDecoder: tsa_layers=") and lines[1].split()[:4] == [
        "layer",
        "policy",
        "text",
        "vision",
    ]
    assert [line.split()[0] for line in lines[3:6]] == ["0", "1", "2"]


def test_refuses_what_cannot_be_measured():
    with pytest.raises(ValueError, match="no prompts"):
        akvq_fx.calibrate(Decoder())
    for wrong in ({"queries": 0}, {"ratio": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            akvq_fx.calibrate(Decoder(), token_ids(1, 6), **wrong)
    with pytest.raises(RuntimeError, match="in prompt 0(.|\n)*matmul, softmax"):
        akvq_fx.calibrate(Decoder(Softcap), token_ids(1, 6))


def test_a_transformers_model_of_two_towers():
    model, inputs = ZOO["llava"]()
    found = akvq_fx.calibrate(model, inputs, options={"window": 4, "pivots": 2})
    assert [layer.label.rsplit(".", 2)[-2] for layer in found.layers] == ["0", "1"], "the vision tower is no cache"
    assert found.prompts[0].vision == (inputs["input_ids"] == 150).sum()


# the policy


def rows_of(model, inputs, options) -> list[str]:
    """TSA or PSA by layer, after the prompt ran through the backend."""
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, backend="akvq", options={"inner": "eager", "value_rotation": "online", **options})(
            **inputs
        )
    return [row.policy for _, row in akvq_fx.report(model).rows], out


def test_a_policy_goes_round(tmp_path):
    model, inputs = VisionDecoder("masked_scatter", layers=3), images(1, 14, 3, 9)
    found = akvq_fx.calibrate(model, inputs, options={**SMALL, "pivots": 0}, ratio=1e-9)
    found.save(tmp_path / "policy.json")
    assert akvq_fx.load_policy(tmp_path / "policy.json") == found.options() == {"tsa_layers": [0, 1, 2]}
    stored = json.loads((tmp_path / "policy.json").read_text())
    assert [row["layer"] for row in stored["measured"]["layers"]] == [0, 1, 2] and stored["measured"]["prompts"][0][
        "vision"
    ] == 6
    assert rows_of(model, inputs, akvq_fx.load_policy(tmp_path / "policy.json"))[0] == ["TSA"] * 3


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is no policy"),
        ("[]", "is no policy"),
        ('{"options": {}}', "is no policy"),
        (json.dumps({"format": policy.FORMAT, "options": {"windw": 3}}), "unknown option 'windw'"),
        (json.dumps({"format": policy.FORMAT, "options": {"tsa_layers": [-1]}}), "tsa_layers"),
    ],
)
def test_refuses_what_is_no_policy(text, message, tmp_path):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        akvq_fx.load_policy(tmp_path / "p.json")


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "broken"])
def test_auto_is_what_was_measured(broken):
    model, inputs = VisionDecoder("masked_scatter", layers=3, broken=broken), images(1, 14, 3, 9)
    found = akvq_fx.calibrate(model, inputs, options={**SMALL, "pivots": 0}, ratio=1e-9)
    found.layers[2].sums["far_text"].zero_()
    assert found.tsa_layers == (0, 1)
    policy.remember(model.parameters(), found.tsa_layers)
    rows, (_, cache) = rows_of(model, inputs, {"tsa_layers": "auto"})
    assert rows == ["TSA", "TSA", "PSA"]
    run = torch.compile(
        model, backend="akvq", options={"inner": "eager", "value_rotation": "online", "tsa_layers": "auto"}
    )
    with torch.no_grad():
        assert run(token_ids(1, 1), cache)[0].shape == (1, 1, 64), "decode steps ask nothing"


def test_auto_forgets_with_the_weights():
    model = Decoder()
    gc.collect()  # of other tests' models
    before = len(policy.REMEMBERED)
    akvq_fx.calibrate(model, token_ids(1, 6))
    assert len(policy.REMEMBERED) > before
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(policy.REMEMBERED) == before


def test_auto_reads_the_papers_table_by_shape(monkeypatch):
    model, inputs = VisionDecoder("masked_scatter", layers=3), images(1, 14, 3, 9)
    monkeypatch.setitem(policy.PAPER, (3, WIDTH, 4, 2, 16, 64), (1,))
    assert rows_of(model, inputs, {"tsa_layers": "auto"})[0] == ["PSA", "TSA", "PSA"]
    model = VisionDecoder("masked_scatter", layers=3)
    policy.remember(model.parameters(), (2,))
    assert rows_of(model, inputs, {"tsa_layers": "auto"})[0] == ["PSA", "PSA", "TSA"], (
        "a measurement goes before the table"
    )


def test_auto_without_knowledge_is_an_error():
    model, inputs = VisionDecoder("masked_scatter", layers=3), images(1, 14, 3, 9)
    with pytest.raises(
        Exception, match=r"layers 3, width 32, query heads 4, KV heads 2, head dim 16, vocabulary 64(.|\n)*calibrate"
    ):
        rows_of(model, inputs, {"tsa_layers": "auto"})
    with pytest.raises(ValueError, match='or "auto"'):
        AKVQConfig(tsa_layers="first")
    with torch.no_grad():
        run = torch.compile(torch.nn.Linear(4, 4), backend=akvq, options={"tsa_layers": "auto", "inner": "eager"})
        assert run(torch.ones(1, 4)).shape == (1, 4), "a graph without a cache asks nothing"


def test_the_papers_models_are_in_the_table():
    assert policy.PAPER[32, 4096, 32, 32, 128, 32064] == policy.PAPER[28, 3584, 28, 4, 128, 152064] == (0, 1)
    assert policy.PAPER[32, 4096, 32, 8, 128, 32064] == ()
