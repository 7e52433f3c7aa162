"""TORCH_AKVQ_DISABLE: a pass that can be missing is left out, and answers stay; the others say why they cannot be."""

import pytest
import torch

from akvq_fx.backend import rewrite
from akvq_fx.config import AKVQConfig
from akvq_fx.passes import DISABLE, PIPELINE, without
from tests import attention_models as models
from tests.attention_models import Decoder, captured, evidence, token_ids

OPTIONAL = ("canonicalize", "batch_axes", "rewrite_attention", "find_sites", "prefer_causal", "fuse_rotations")
OPTIONAL += ("split_decode",)
NAMES = [step.__name__ for step in PIPELINE]
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("attention", (models.Direct, models.StaticSetItem, models.WrittenOut))
@pytest.mark.parametrize("name", OPTIONAL)
def test_answers_stay_without_it(name, attention, monkeypatch):
    monkeypatch.setenv(DISABLE, name)
    seen = evidence(Decoder(attention), {"body_bits": 16, "rotate": True})
    for graph in seen.captures:
        assert [report.name for report in graph.state.reports] == [other for other in NAMES if other != name]
    assert seen.error < 1e-5
    if name == "find_sites" or (name == "rewrite_attention" and attention is models.WrittenOut):
        assert not any(graph.state.sites for graph in seen.captures)


def test_a_decode_step_stays_whole(monkeypatch):
    step = evidence(Decoder(models.Direct), steps=2).captures[-1]
    config = AKVQConfig.from_options({"mode": "reduce-overhead"})
    assert rewrite(step.gm, step.inputs, config).split is not None
    monkeypatch.setenv(DISABLE, "split_decode")
    assert rewrite(step.gm, step.inputs, config).split is None


def test_codes_are_the_same_whoever_rotates(monkeypatch):
    fused = evidence(Decoder(models.Direct), steps=2)
    monkeypatch.setenv(DISABLE, "fuse_rotations")
    separate = evidence(Decoder(models.Direct), steps=2)
    called = [[str(node.target) for node in seen.captures[-1].state.graph.nodes] for seen in (fused, separate)]
    assert ["akvq.rotate_queries.default" in targets for targets in called] == [False, True]
    for a, b in zip(fused.compiled, separate.compiled, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OPTIONAL])
def test_others_say_why_they_cannot_be_left_out(name):
    with pytest.raises(
        ValueError, match=f"^{DISABLE}=fuse_rotations,{name}: {name} cannot be switched off: [a-z].{{30}}"
    ):
        without(PIPELINE, f"fuse_rotations,{name}")


def test_an_unknown_name_is_an_error_that_lists_the_accepted(monkeypatch):
    monkeypatch.setenv(DISABLE, "fuse")
    with pytest.raises(Exception, match=f"'fuse' is no pass; accepted: {', '.join(OPTIONAL)}, separated by commas"):
        captured(Decoder(), token_ids(2, 6))


def test_names_are_parted_by_commas():
    assert without(PIPELINE, "") == PIPELINE
    kept = [step.__name__ for step in without(PIPELINE, " split_decode ,fuse_rotations,")]
    assert kept == [name for name in NAMES if name not in ("split_decode", "fuse_rotations")]
