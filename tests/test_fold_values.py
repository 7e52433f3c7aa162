"""fold_values: W_O W_V is what it was for any layout of heads; the model's own weights stay; else refused."""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import akvq_fx
from akvq_fx.folding import FOLDED
from akvq_fx.packed_kv import PackedKV
from tests import attention_models as models
from tests.attention_models import Attention, Decoder, evidence, mixed, roll, token_ids

ONLINE = {"body_bits": 16, "rotate": True}
ROTATED = {**ONLINE, "value_rotation": "fold"}
name = lambda x: x.__name__ if isinstance(x, type) else ""


class Swapped(Attention):
    """swapaxes in, movedim and contiguous().view out."""

    def split_heads(self, x, count):
        return x.reshape(*x.shape[:2], count, self.dim).swapaxes(1, 2)

    def merge_heads(self, y):
        return y.movedim(1, 2).contiguous().view(y.shape[0], y.shape[2], self.heads * self.dim)


class TwoSteps(Attention):
    """Channels before heads, put right by two transposes; out through a 5-d view."""

    def split_heads(self, x, count):
        return x.view(*x.shape[:2], self.dim, count).transpose(2, 3).transpose(1, 2).contiguous()

    def merge_heads(self, y):
        B, H, T, D = y.shape
        return y.view(B, 2, H // 2, T, D).permute(0, 3, 2, 1, 4).flatten(2)


class FusedList(models.FusedView):
    """Indexed with a list, [..., [-1], :], as well as a slice."""

    def project(self, x):
        B, T, _ = x.shape
        y = self.qkv_proj(x).view(B, T, self.heads + 2 * self.kv_heads, self.dim)
        at = list(range(self.heads + self.kv_heads, self.heads + 2 * self.kv_heads))
        q, k, v = y[..., : self.heads, :], y[..., self.heads : self.heads + self.kv_heads, :], y[..., at, :]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


QKV = (Attention, models.FusedSplit, models.FusedSlices, models.FusedChunk, models.FusedView, FusedList)
LAYOUTS = (Attention, models.Unflatten, models.ChannelMajor, Swapped, TwoSteps)


def value_weight(model, layer: int = 0) -> nn.Parameter:
    part = model.layers[layer].attention
    return part.v_proj.weight if hasattr(part, "v_proj") else part.qkv_proj.weight


def folded(weight):
    """The folded copy of a value weight, None where there is none."""
    entries = FOLDED.known.get(weight, [])
    return entries[0].copies[0] if entries else None


def compiled(model, **options):
    """(model compiled by akvq with rotation, what was captured)."""
    spy = models.Spy(**{**ROTATED, **options})
    return torch.compile(model, backend=spy), spy


def prompt(model, count: int = 6, batch: int = 2):
    with torch.no_grad():
        return model(token_ids(batch, count))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    qkv=st.sampled_from(QKV),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([8, 24]),
)
def test_any_layout_keeps_the_function(qkv, layout, bias, kv_heads, dim):
    torch._dynamo.reset()
    kv_heads = 4 if qkv is models.FusedChunk else kv_heads
    model = Decoder(mixed(qkv, layout, bias=bias, kv_heads=kv_heads, dim=dim)).double()
    before, (want, _) = value_weight(model).detach().clone(), prompt(model)
    run, spy = compiled(model)
    got, _ = prompt(run)
    (capture,) = spy.captures
    assert capture.report("fold_values").matched, capture.report("fold_values").missed
    after = folded(value_weight(model))
    rotated = (before - after).abs().amax(1) > 1e-6
    assert rotated[-kv_heads * dim :].any() and rotated.sum() <= kv_heads * dim, "only value rows rotate"
    torch.testing.assert_close(after.norm(), before.norm())
    assert torch.equal(value_weight(model), before)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert akvq_fx.unfold(model) == 1


def test_bias_rotates_with_the_weight():
    model = Decoder(models.Biased).double()
    prompt(compiled(model)[0])
    part = model.layers[0].attention
    value, bias, output = FOLDED.known[part.v_proj.weight][0].copies
    h = akvq_fx.kernels.rotate.matrix(16)
    rotate = torch.block_diag(h, h)
    torch.testing.assert_close(value, rotate @ part.v_proj.weight.detach())
    torch.testing.assert_close(bias, rotate @ part.v_proj.bias.detach())
    torch.testing.assert_close(output, part.o_proj.weight.detach() @ torch.block_diag(h, h, h, h))


def test_one_copy_whatever_is_recompiled():
    model = Decoder().double()
    want = [prompt(model, *size)[0] for size in ((6, 2), (6, 1), (9, 3))]
    run, spy = compiled(model)
    prompt(run)
    once = folded(value_weight(model))
    got = [prompt(run, *size)[0] for size in ((6, 2), (6, 1), (9, 3))]
    torch._dynamo.reset()
    prompt(run)
    assert len(spy.captures) > 2
    assert folded(value_weight(model)) is once and len(FOLDED.known[value_weight(model)]) == 1
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def change_in_place(part):
    part.v_proj.weight.mul_(1.5)


def change_through_data(part):
    part.v_proj.weight.data += 1


def change_data(part):
    part.o_proj.weight.data = part.o_proj.weight.data * 1.5


def change_parameter(part):
    part.v_proj.weight = nn.Parameter(part.v_proj.weight.detach() * 1.5)


@pytest.mark.parametrize("change", [change_in_place, change_through_data, change_data, change_parameter])
def test_a_changed_weight_is_folded_anew(change):
    model = Decoder().double()
    run, _ = compiled(model)
    roll(run)
    with torch.no_grad():
        change(model.layers[0].attention)
    want, got = roll(model)[0], roll(run)[0]
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_symbolic_prompt_is_not_pinned_to_one_length():
    model = Decoder().double()
    run, spy = compiled(model)
    for count in (6, 7, 9):
        ids = token_ids(2, count)
        with torch.no_grad():
            want, _ = model(ids)
            torch._dynamo.mark_dynamic(ids, 1)
            got, _ = run(ids)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert len(spy.captures) == 1 and spy.captures[0].report("fold_values").matched


def test_second_model_on_shared_code_is_folded_on_its_first_run():
    one, two = Decoder(seed=1).double(), Decoder(seed=2).double()
    want = roll(two)[0]
    spy = models.Spy(**ROTATED)
    one.compile(backend=spy)
    two.compile(backend=spy)
    roll(one)
    assert folded(value_weight(two)) is None
    got, cache = roll(two)
    assert len(spy.captures) == 2, "dynamo shares the code of two models of one class"
    assert folded(value_weight(two)) is not None and isinstance(cache[0][0], PackedKV)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_every_layer_is_folded_and_nothing_that_is_saved_is():
    model = Decoder(layers=3)
    before = copy.deepcopy(model.state_dict())
    roll(compiled(model)[0])
    assert all(folded(value_weight(model, i)) is not None for i in range(3))
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(tensor, before[key]) for key, tensor in one.state_dict().items())
    assert akvq_fx.unfold(model) == 3 and akvq_fx.unfold(model) == 0


REFUSALS = {
    models.Gated: "the attention output goes through mul",
    models.NormedOutput: "the attention output goes through layer_norm",
    models.TiedWeight: "the values come through a linear whose weight is used elsewhere too",
    models.SharedStorage: "a projection's weight is shared with another parameter",
    models.UsedElsewhere: "the attention output goes through a linear whose weight is used elsewhere too",
    models.OutputUsedTwice: "the attention output is used 2 times before the output projection",
    models.FlatTokens: "the value projection gives 2 axes, accepted: [B, T, features]",
    models.FlatOutput: "tokens and channels mix between attention and the output projection",
    models.ScaledValues: "the values come through mul",
    models.TransposedWeight: "the values come through matmul",
    models.ValueResidual: "the values are read by mul too",
}


@pytest.mark.parametrize("spelling", REFUSALS, ids=name)
def test_refused_and_rotated_online(spelling):
    model = Decoder(spelling)
    before = copy.deepcopy(model.state_dict())
    seen = evidence(model, ROTATED, steps=2)
    assert [s.value_rotation for c in seen.captures for s in c.state.sites] == ["online"] * len(seen.captures)
    (miss,) = seen.captures[0].report("fold_values").missed
    assert miss.reason == REFUSALS[spelling] and miss.node
    assert seen.error <= 1e-5
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert REFUSALS[spelling] in akvq_fx.report(model).packed[0].values


def test_quantized_weight_is_not_folded():
    model = Decoder()
    part = model.layers[0].attention
    quantize_(part.v_proj, Int8WeightOnlyConfig())
    seen = evidence(model, ROTATED, steps=1)
    (miss,) = seen.captures[0].report("fold_values").missed
    assert miss.reason == "a projection's weight is no dense floating-point parameter"
    assert seen.error <= 1e-5 and isinstance(seen.cache[0][0], PackedKV)


def test_shared_cache_is_not_folded():
    seen = evidence(models.SharedDecoder().double(), ROTATED)
    assert [s.value_reason for s in seen.captures[0].state.sites] == ["2 attention calls read these values"] * 2
    assert seen.error <= 1e-12


def test_shared_cache_across_a_graph_break():
    class Broken(models.SharedDecoder):
        """The layer that reads the first layer's cache is compiled in a graph of its own."""

        def run(self, x, cache, at, total, padding=None):
            x, pair = self.layers[0](x, None if cache is None else cache[0], at, total, padding)
            torch._dynamo.graph_break()
            reader = self.layers[1].attention
            y = reader.attend(reader.rope(reader.project(x)[0], at), *pair, models.seen(at, total, padding))
            return self.head(x + reader.output(y, x)), (pair,)

    assert evidence(Broken().double(), ROTATED).error <= 1e-10


def test_cross_attention_reads_folded_values():
    model, memory, tokens = models.CrossDecoder().double(), torch.randn(2, 9, models.WIDTH).double(), token_ids(2, 3)
    with torch.no_grad():
        want, _ = model(tokens[:, :1], model(tokens, None, memory)[1])
        run, _ = compiled(model)
        got, _ = run(tokens[:, :1], run(tokens, None, memory)[1])
    assert folded(value_weight(model)) is not None
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_plain_past_stays_online_and_goes_on():
    """Its values are as the model made them; a prompt of the same model is folded all the same."""
    model, ids = Decoder().double(), token_ids(2, 9)
    (want, *steps), _ = roll(model)
    run, spy = compiled(model)
    with torch.no_grad():
        got, _ = run(ids[:, 6:7], model(ids[:, :6])[1])
    (site,) = spy.captures[0].state.sites
    assert site.value_reason == "the cache so far holds values as the model made them"
    torch.testing.assert_close(got, steps[0], rtol=0, atol=1e-12)
    logits, _ = roll(run)
    assert spy.captures[-1].state.sites[0].value_rotation == "folded"
    for a, b in zip((want, *steps), logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rotation", ["online", "off"])
def test_asked_not_to_fold(rotation):
    model = Decoder().double()
    before = copy.deepcopy(model.state_dict())
    seen = evidence(model, {**ROTATED, "value_rotation": rotation}, steps=1)
    assert {s.value_rotation for c in seen.captures for s in c.state.sites} == {rotation}
    assert seen.cache[0][1].layout_of.rotated == (rotation == "online")
    assert seen.error <= 1e-12
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "options, start",
    [(ROTATED, models.FlatStart), (ONLINE, models.Attention), ({"body_bits": 16}, models.FlatStart)],
    ids=["folded", "online", "as it is"],
)
def test_a_plain_cache_beside_a_packed_one_goes_on(options, start):
    """A prompt that stays and a window of later tokens, which stays plain."""
    model = Decoder(mixed(models.ReferenceWindow, start)).double()
    seen = evidence(model, options, steps=6)
    keys, values, _, late = seen.cache[0]
    assert isinstance(keys, PackedKV) and isinstance(values, PackedKV) and late.shape[2] == 3
    assert seen.error <= 1e-12


def test_a_packed_cache_goes_on_when_the_copies_are_freed():
    model, ids = Decoder(), token_ids(2, 8)
    run, _ = compiled(model)
    with torch.no_grad():
        want = [model(ids[:, :6])[0], *roll(model, steps=2)[0][1:]]
        _, cache = run(ids[:, :6])
        run(ids[:, 6:7], cache)
        akvq_fx.unfold(model)
        got, _ = run(ids[:, 6:7], run(ids[:, :6])[1])
    torch.testing.assert_close(got, want[1], rtol=0, atol=1e-5)


def test_packed_cache_of_another_model_is_refused():
    one, two, ids = Decoder(seed=1), Decoder(seed=2), token_ids(2, 8)
    spy = models.Spy(**ROTATED)
    one.compile(backend=spy)
    two.compile(backend=spy)
    with torch.no_grad():
        _, cache = one(ids[:, :6])
        two(ids[:, :6])
        with pytest.raises(ValueError, match="made by other weights"):
            two(ids[:, 6:7], cache)
        one(ids[:, 6:7], cache)


def test_changed_weights_refuse_their_old_cache():
    model, ids = Decoder(), token_ids(2, 8)
    run, _ = compiled(model)
    with torch.no_grad():
        _, cache = run(ids[:, :6])
        run(ids[:, 6:7], cache)
        model.layers[0].attention.k_proj.weight.mul_(2)
        with pytest.raises(ValueError, match="made by other weights"):
            run(ids[:, 7:8], cache)


def test_without_rotation_nothing_folds():
    model = Decoder()
    before = copy.deepcopy(model.state_dict())
    evidence(model, models.LOSSLESS)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
