"""Simulated caches: rows stand alone, attention reads earlier tokens through the recipe, models run with them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import akvq_fx
from akvq_fx import PackedKV
from akvq_fx.kernels import append_cuda, attend_cpu, attend_cuda, cache_triton
from akvq_fx.kernels import attend as attend_module  # noqa: F401 - registers the op
from akvq_fx.kernels import cache as ops
from akvq_fx.kernels.attend import AttendCall
from akvq_fx.kernels.layout import CODES, PADDING, TEXT, VISION, Layout
from akvq_fx.recipes import RECIPES, SIMULATORS, Context, Recipe, Simulation, Simulator
from akvq_fx.transformers_names import cache_of
from tests.attention_models import Attention, Decoder, StaticIndexCopy, VisionDecoder, roll, token_ids
from tests.kernel_cases import Case, assert_close, assert_same, poison, randn
from tests.test_calibrate import images

f32 = torch.float32
akvq = torch.ops.akvq
SIMULATED = [name for name, recipe in RECIPES.items() if recipe.simulated]
TEXTS = {
    "kivi_keys": "kivi_keys(bits=2,group=2,residual=4)",
    "kivi_values": "kivi_values(bits=2,group=8,residual=4)",
    "skvq": "skvq(bits=2,group=8,window=3,sink=2,clip=0.92,calibrate=6)",
    "turboquant": "turboquant(bits=2)",
    "calibquant_keys": "calibquant_keys(bits=1,shrink=0.5,shift=3)",
    "calibquant_values": "calibquant_values(bits=1,shrink=0.3)",
    "smoothquant_keys": "smoothquant_keys(bits=2,group=8,alpha=0.5)",
    "rtn": "rtn(bits=2,group=8)",
    "fp8": "fp8()",
}
texts = pytest.mark.parametrize("text", list(TEXTS.values()), ids=list(TEXTS))


def case_of(text: str, T: int = 14, B: int = 3) -> Case:
    """Rows with padding at the left, in the middle, and none; every class."""
    layout = Layout(16, f32, simulate=text)
    classes = torch.tensor([TEXT, VISION, VISION]).repeat(T)[:T].expand(B, -1).to(torch.uint8).clone()
    classes[0, :3] = PADDING
    if B > 1:
        classes[1, 5:7] = PADDING
    gains = randn(B, 2, 16, seed=9).abs() + 0.1
    affine = torch.stack([0 * gains, gains], 1).half() if "affine" in layout.fields else None
    return Case(layout, randn(B, 2, T, 16) * 3, classes, None, affine, T + 2)


def alone(case: Case, row: int, past: int) -> torch.Tensor:
    """Row by row what attention should read of a case: the recipe's arithmetic on the row's real tokens."""
    real = (case.classes[row] != PADDING).nonzero()[:, 0]
    gains = None if case.affine is None else case.affine[row : row + 1, 1].float()
    context = Context(int((real < past).sum()), (case.classes[row] == VISION)[real][None], gains)
    out = case.x[row].clone()
    out[:, real] = case.layout.simulation.read(case.x[row : row + 1, :, real], context)[0]
    return out


@texts
def test_a_row_reads_as_if_it_stood_alone(text):
    case = case_of(text)
    read = akvq.dequantize(case.pack(), case.length, str(case.layout))
    assert_same("rows", torch.stack([alone(case, row, case.length) for row in range(3)]), read)
    assert (read != case.x)[0].any()


@texts
def test_padding_and_unwritten_slots_have_no_influence(text):
    case = case_of(text)
    cache = case.pack()
    spoilt = poison(cache, case.layout, case.length)
    padding = (case.classes == PADDING)[:, None, :, None].expand_as(case.x)
    spoilt[CODES][:, :, : case.length].masked_fill_(padding, torch.nan)
    read, again = (akvq.dequantize(c, case.length, str(case.layout)) for c in (cache, spoilt))
    assert_same("real tokens", read[~padding], again[~padding])


@texts
@pytest.mark.parametrize("turned_around", [False, True], ids=["append first", "attend first"])
@pytest.mark.parametrize("count", [1, 4])
def test_attention_reads_the_past_quantized_and_its_own_tokens_exactly(text, count, turned_around):
    if SIMULATORS[text.split("(")[0]].scores is not None:
        pytest.skip("its scores change too: tested below")
    case = case_of(text, T=15)
    past, layout, value = 15 - count, str(case.layout), Layout(16, f32)
    before = Case(case.layout, case.x[:, :, :past], case.classes[:, :past], None, case.affine, 17).pack()
    plain = Case(value, case.x[:, :, :past], case.classes[:, :past], None, None, 17).pack()
    q, at, new = randn(3, 4, count, 16, seed=5), torch.arange(past, 15), case.x[:, :, past:]
    fresh = (None, None, None) if count == 1 and not turned_around else (new, new, at)
    write = lambda: [
        akvq.append(cache, new, at, case.classes[:, past:], None, text)
        for cache, text in ((before, layout), (plain, str(value)))
    ]
    if not turned_around:
        write()
    mask = None if turned_around else (case.classes != PADDING)[:, None, None]
    out = akvq.attend(q, before, plain, 15, mask, None, False, *fresh, layout, str(value))
    keys = torch.stack([alone(case, row, past) for row in range(3)])
    due = F.scaled_dot_product_attention(q, keys, case.x, attn_mask=mask, enable_gqa=True)
    assert_close("attention", due, out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_calibquant_squeezes_the_scores_of_attention(causal, mask):
    """Against softmax written out; with a mask the squeeze comes first, as released."""
    if causal and mask:
        return
    case = case_of(TEXTS["calibquant_keys"], B=1)
    cache, q = case.pack(), randn(1, 4, 3, 16, seed=5)
    given = None
    if mask:
        given = randn(1, 1, 3, case.length, seed=6) > -1
        given = given if mask == "bool" else given.float().log()
    layout, value = str(case.layout), Layout(16, f32)
    plain = Case(value, case.x, case.classes, None, None, case.capacity).pack()
    out = akvq.attend(q, cache, plain, case.length, given, None, causal, None, None, None, layout, str(value))
    keys = alone(case, 0, case.length).repeat_interleave(2, 0)[None]
    scores, chosen = q @ keys.transpose(-1, -2) / 4, case.classes[0] == VISION
    for h in range(4):
        a = scores[0, h][:, chosen]
        scores[0, h][:, chosen] = (a - a.min()) / (a.max() - a.min()) * (a.max() - 3 - a.min()) + a.min()
    if causal:
        scores = scores.masked_fill(~torch.ones(3, case.length, dtype=torch.bool).tril(), -torch.inf)
    if mask:
        scores = scores + (given if mask == "float" else given.float().log())
    assert_close("attention", scores.softmax(-1) @ case.x.repeat_interleave(2, 1), out)


@pytest.mark.parametrize("name", ["calibquant_keys", "smoothquant_keys", "kivi_keys"])
def test_registration(name):
    case = case_of(TEXTS[name])
    layout, at, n = str(case.layout), torch.arange(case.length), case.length
    torch.library.opcheck(ops.pack, (case.x, at, case.classes, None, case.affine, case.capacity, layout))
    torch.library.opcheck(ops.append, (case.pack(), case.x[:, :, :1], torch.tensor([n]), None, None, layout))
    torch.library.opcheck(ops.dequantize, (case.pack(), n, layout))
    torch.library.opcheck(ops.restart, (case.pack(), torch.arange(3), case.affine, layout))
    args = (randn(3, 4, 1, 16), case.pack(), case.pack(), n, None, None, False, None, None, None, layout, layout)
    torch.library.opcheck(attend_module.attend, args)


def test_restart_takes_the_new_prompts_gains():
    case = case_of(TEXTS["smoothquant_keys"])
    cache, other = case.pack(), case.affine * 2
    akvq.restart(cache, torch.arange(3, 6), other, str(case.layout))
    assert_same("goes on", case.affine, cache[-1])
    akvq.restart(cache, torch.arange(3), other, str(case.layout))
    assert_same("starts", other, cache[-1])


def test_faster_kernels_refuse():
    case = case_of("fp8()")
    q, cache, layout = randn(3, 2, 1, 16), case.pack(), case.layout
    call = (AttendCall(q, cache, cache, case.length, None, None, False, None, None, None, layout, layout),)
    from akvq_fx.kernels import attend_triton

    for module, about in ((attend_cpu, call), (attend_cuda, call), (attend_triton, call), (append_cuda, (q, layout)),
                          (cache_triton, (q, layout))):  # fmt: skip
        assert "simulate" in module.refusal(*about), module.__name__


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(T=150, padding=9) -> dict:
    ids = torch.randint(1, 97, (2, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, **kwargs):
    return model.generate(
        **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )


class Padded(Attention):
    """Padding sees nothing and is seen by nothing."""

    def mask(self, at, total, padding, past, dtype):
        return super().mask(at, total, padding, past, dtype) if padding is None else seen_of(at, total, padding)


def seen_of(at, total, padding):
    return (torch.arange(total)[None] <= at[:, None])[None, None] & padding[:, None, None]


class Roomy(StaticIndexCopy):
    """A static cache with room for long prompts."""

    slots = 200


def compiled(model, **options):
    model.compile(backend="akvq", options={"inner": "eager", **options})
    return model


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_compiles_packs_and_decodes(name):
    model = compiled(Decoder(Padded), recipe=name)
    logits, cache = roll(model, prompt=150, steps=1, pad=9)
    report, stats = akvq_fx.report(model), akvq_fx.cache_stats(cache)
    assert {row.status for row in report.packed} == {"prompt", "packed"} and not report.refused
    assert all(x.isfinite().all() for x in logits) and stats.packed_tensors == 2
    assert sum(next(iter(stats.tokens.values())).values()) == 2 * 151
    if not RECIPES[name].simulated:
        assert stats.simulated_tensors == 0 and stats.method_bits is None and list(stats.tokens) == ["PSA"]
        return
    assert {row.policy for row in report.packed} == {f"simulated {name.split('-')[0]}"}
    assert stats.simulated_tensors == 2 and list(stats.tokens) == ["simulated"]
    assert stats.bits_per_element > 32, "the originals, spare capacity and classes are all there"
    keys, values = Simulation.parse(RECIPES[name].keys), Simulation.parse(RECIPES[name].values)
    bits = [
        simulation.bits(16, 2, 146, 0) for simulation in (keys, values)
    ]  # real tokens: 151, and 142 in the other row
    assert stats.method_bits == pytest.approx(sum(bits) / 2, abs=0.05)
    assert "save no bytes" in str(stats)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in SIMULATED if name != "smoothquant"])
def test_decode_equals_the_plain_model_over_quantized_tokens(name):
    """An uncompiled step over a plain cache whose tokens went through the recipe's arithmetic by hand."""
    model, ids = Decoder(layers=2), token_ids(2, 150)
    context = Context(149, torch.zeros(2, 149, dtype=torch.bool))
    texts = (RECIPES[name].keys, RECIPES[name].values)
    cache = tuple(
        tuple(Simulation.parse(text).read(x, context) for text, x in zip(texts, layer, strict=True))
        for layer in model(ids[:, :-1])[1]
    )
    due, plain = model(ids[:, -1:], cache)[0], model(ids)[0][:, -1:]
    run = compiled(Decoder(layers=2), recipe=name)
    got, _ = run(ids[:, -1:], run(ids[:, :-1])[1])
    torch.testing.assert_close(got, due, rtol=1e-4, atol=1e-5)
    assert name == "calibquant" or (got - plain).abs().max() > 1e-3, "nothing was quantized"


@torch.no_grad()
def test_smoothquant_asks_the_same_of_smoothed_keys():
    """Gains are in the cache, the same for a row with padding and for that row without."""
    model, inputs = compiled(tiny(), recipe="smoothquant"), prompt()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    gains = cache_of(model(**inputs)).layers[0].keys._storage()["affine"]
    alone = cache_of(model(inputs["input_ids"][:1, 9:])).layers[0].keys._storage()["affine"]
    assert gains.shape == (2, 2, 2, 16) and (gains[:, 1:] > 0).all() and not gains[:, 0].any()
    torch.testing.assert_close(gains[:1], alone, rtol=2**-10, atol=0)


@pytest.fixture
def identity(monkeypatch):
    """A recipe that reads tokens as they are."""
    monkeypatch.setitem(SIMULATORS, "identity", Simulator(lambda x, context: x, lambda *sizes: 16.0))
    monkeypatch.setitem(RECIPES, "identity", Recipe("identity", "test", keys="identity()", values="identity()"))
    return {"inner": "eager", "recipe": "identity"}


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8},
                                    {"prefill": "quantized"}], ids=str)  # fmt: skip
def test_a_simulation_of_nothing_changes_nothing(identity, kwargs):
    inputs, kwargs = prompt(T=40), dict(kwargs)
    options = {**identity, "prefill": kwargs.pop("prefill", "exact")}
    due = generate(tiny(), inputs, **kwargs)
    model = compiled(tiny(), **options)
    out = generate(model, inputs, **kwargs)
    assert torch.equal(due.sequences, out.sequences)
    torch.testing.assert_close(torch.stack(due.logits), torch.stack(out.logits), rtol=1e-4, atol=1e-5)
    assert akvq_fx.cache_stats(cache_of(out)).simulated_tensors == 2
    assert [r.status for r in akvq_fx.report(model).packed].count("packed") >= 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["kivi", "smoothquant"])
def test_static_caches_and_a_second_prompt_read_the_same(name):
    ids, other = token_ids(2, 153), token_ids(2, 153, seed=5)
    growing, static, cache = compiled(Decoder(), recipe=name), compiled(Decoder(Roomy), recipe=name), None
    for tokens in (other, ids):
        due, past = [], None
        got = []
        for a, b in ((0, 150), (150, 151), (151, 152), (152, 153)):
            logits, past = growing(tokens[:, a:b], past)
            due.append(logits)
            logits, cache = static(tokens[:, a:b], cache, None, torch.arange(a, b))
            got.append(logits)
        for one, two in zip(due, got, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    assert {row.status for row in akvq_fx.report(static).packed} == {"prompt", "packed"}


@torch.no_grad()
def test_prompt_attends_to_quantized_tokens_where_asked():
    ids, outs = token_ids(2, 150), []
    for prefill in ("exact", "quantized"):
        outs.append(compiled(Decoder(layers=2), recipe="turboquant", prefill=prefill)(ids)[0])
    assert torch.equal(outs[0], Decoder(layers=2)(ids)[0]) and (outs[0] - outs[1]).abs().max() > 1e-2


@torch.no_grad()
def test_a_copied_cropped_saved_cache_reads_the_same(tmp_path):
    _, cache = roll(compiled(Decoder(Padded), recipe="smoothquant"), prompt=150, steps=0, pad=9)
    keys = cache[0][0]
    read = keys.dequantize()
    assert_same("copy", read, copy.deepcopy(keys).dequantize())
    assert_same("rows", read[[1, 0, 0]], keys[torch.tensor([1, 0, 0])].dequantize())
    assert_same("cropped", read[:, :, :100], keys[:, :, :100].dequantize())  # per token: no group changes
    PackedKV.save({"keys": keys}, tmp_path / "cache")
    assert_same("loaded", read, PackedKV.load(tmp_path / "cache")["keys"].dequantize())


@torch.no_grad()
def test_calibquant_takes_vision_tokens_only():
    model = compiled(VisionDecoder("masked_scatter", layers=1), recipe="calibquant")
    _, cache = model(**images(2, 40, 3, 20))
    for step in range(2):
        _, cache = model(token_ids(2, 1, seed=step), cache)
    for packed in cache[0]:
        changed = (packed.dequantize() != packed._storage().codes[:, :, : packed.shape[2]]).any(-1).any(1)
        vision = packed.classes() == VISION
        assert vision.any() and torch.equal(changed, vision)
        assert len(packed.dequantize()[0, 0, vision[0], 0].unique()) == 2  # one bit a channel
    stats = akvq_fx.cache_stats(cache)
    assert 1 < stats.method_bits < 16
