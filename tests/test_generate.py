"""generate() with everything it does to a cache outside the graph: beams, crops, copies, dialogues; lossless is the
uncompiled model's."""

import copy
import warnings

import pytest
import torch

import akvq_fx
from akvq_fx import PackedKV
from akvq_fx.transformers_names import cache_argument, cache_of
from tests import zoo
from tests.both_bits import BothBits
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_layer")
SMALL = {"inner": "eager", "window": 8, "pivots": 3}
LOSSLESS = {**SMALL, "body_bits": 16}


def text_only(inputs, rows=slice(None)):
    return {k: inputs[k][rows] for k in ("input_ids", "attention_mask")}


def run(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": 8, "return_dict_in_generate": True, **kwargs})


def continued(model, out, mask, extra):
    ids = torch.cat([out.sequences, extra], 1)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    return run(
        model, {"input_ids": ids, "attention_mask": mask}, **{cache_argument(model): cache_of(out)}, max_new_tokens=5
    )


def turns(model, inputs):
    return continued(
        model, run(model, inputs), inputs["attention_mask"], torch.full((inputs["input_ids"].shape[0], 5), 33)
    )


def prefix(model, inputs):
    """A cache copied and continued twice: the copy does not see the first continuation."""
    out = run(model, inputs)
    kept = copy.deepcopy(cache_of(out))
    first = torch.full((inputs["input_ids"].shape[0], 3), 44)
    continued(model, out, inputs["attention_mask"], first)
    setattr(out, "cache" if hasattr(out, "cache") else "past_key_values", kept)
    return continued(model, out, inputs["attention_mask"], torch.full_like(first, 35))


def assisted(model, inputs):
    assistant, _ = ZOO["llama"](seed=3)
    assistant.generation_config.num_assistant_tokens = 3
    return run(model, text_only(inputs, slice(1, 2)), assistant_model=assistant, max_new_tokens=12)


def sampled(model, inputs):
    torch.manual_seed(0)
    return run(model, inputs, do_sample=True, top_k=20, num_return_sequences=2)


MODES = {
    "beams": lambda m, x: run(m, x, num_beams=3),
    "beams_static": lambda m, x: run(m, x, num_beams=3, cache_implementation="static"),
    "prompt_lookup": lambda m, x: run(m, text_only(x, slice(1, 2)), prompt_lookup_num_tokens=3, max_new_tokens=12),
    "assisted": assisted,
    "chunked_prefill": lambda m, x: run(m, x, prefill_chunk_size=7),
    "static_twice": lambda m, x: (run(m, x, cache_implementation="static"), run(m, x, cache_implementation="static"))[
        1
    ],
    "turns": turns,
    "prefix_copied": prefix,
    "sampled": sampled,
}


def test_all_modes():
    """One model with images through all modes, as a program would have it: lossless equals uncompiled. Then at two bits
    those that change a cache between steps: caches stay codes."""
    (model, inputs), (plain, _) = ZOO["llava"](), ZOO["llava"]()
    backend = BothBits({**SMALL, "tsa_layers": (0,)})
    model.compile(backend=backend)
    for name, mode in MODES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", module="transformers|torch")
            out = mode(model, inputs)
        assert torch.equal(out.sequences, mode(plain, inputs).sequences), name
        assert all(isinstance(layer.keys, PackedKV) for layer in cache_of(out).layers), name
    backend.runs = 2
    for name in ("beams", "chunked_prefill", "turns", "prefix_copied"):
        for layer in cache_of(MODES[name](model, inputs)).layers:
            for tensor in (layer.keys, layer.values):
                assert isinstance(tensor, PackedKV) and tensor.codes.dtype == torch.int16, name
    assert all(row.status in ("packed", "prompt") for row in akvq_fx.report(model).packed)


def test_growing_and_static_cache_agree(monkeypatch):
    monkeypatch.setattr(zoo, "LAYERS", 2)  # one for each policy
    model, inputs = ZOO["llava"]()
    model.compile(backend="akvq", options={**SMALL, "tsa_layers": (0,)})
    logits = [
        run(model, inputs, output_logits=True, **extra).logits for extra in ({}, {"cache_implementation": "static"})
    ]
    for growing, static in zip(*logits, strict=True):
        torch.testing.assert_close(growing, static, atol=1e-4, rtol=1e-4)


def test_left_padding_changes_nothing():
    """A padded batch row decodes as it does alone: the codes know nothing of padding."""
    model, inputs = ZOO["llama"]()
    model.compile(backend="akvq", options=SMALL)
    together = run(model, inputs, output_logits=True)
    for row in (0, 1):
        keep = inputs["attention_mask"][row].bool()
        alone = {k: v[row : row + 1, keep] for k, v in text_only(inputs).items()}
        single = run(model, alone, output_logits=True)
        assert torch.equal(together.sequences[row, -8:], single.sequences[0, -8:])
        for batched, one in zip(together.logits, single.logits, strict=True):
            torch.testing.assert_close(batched[row], one[0], atol=1e-3, rtol=1e-3)


def test_compiled_module_generate():
    """torch.compile(model).generate is compiled too, for this backend only, and the module is restored."""
    torch._dynamo.reset()
    model, inputs = ZOO["llama"]()
    expected = run(model, inputs).sequences
    compiled = torch.compile(model, backend="akvq", options=LOSSLESS)
    out = run(compiled, inputs)
    assert torch.equal(out.sequences, expected)
    assert all(isinstance(layer.keys, PackedKV) for layer in cache_of(out).layers)
    assert model._compiled_call_impl is None
    assert not any(isinstance(layer.keys, PackedKV) for layer in cache_of(run(model, inputs)).layers)
    other = torch.compile(model, backend="eager")
    assert not any(isinstance(layer.keys, PackedKV) for layer in cache_of(run(other, inputs)).layers)


def test_compiled_module_without_generate():
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="akvq")
    assert not hasattr(compiled, "generate")
    with pytest.raises(AttributeError):
        compiled.generate()


def decode_after_eager_prompt(model, step, inputs):
    """(tokens, cache) of a prompt run uncompiled and six decode steps run by `step`."""
    ids = inputs["input_ids"][:1]
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        for _ in range(6):
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
            out = step(input_ids=ids[:, -1:], **{cache_argument(model): cache_of(out)}, use_cache=True)
    return ids, cache_of(out)


@pytest.mark.parametrize("bits", [16, 2])
def test_plain_growing_cache_is_packed_on_first_contact(bits):
    """Prefill uncompiled, decode compiled: the 16-bit cache is packed once, in the first decode step."""
    torch._dynamo.reset()
    model, inputs = ZOO["llama"]()
    expected, _ = decode_after_eager_prompt(model, model, inputs)
    compiled = torch.compile(
        model, backend="akvq", options={**SMALL, "body_bits": bits, "window": 64 if bits == 2 else 8}
    )
    ids, cache = decode_after_eager_prompt(model, compiled, inputs)
    assert torch.equal(ids, expected)
    assert all(isinstance(layer.keys, PackedKV) for layer in cache.layers)
    assert {row.values.split(":")[0] for row in akvq_fx.report(model).packed} == {"online" if bits == 2 else "off"}


def test_two_models_share_code_not_caches():
    torch._dynamo.reset()
    models = [ZOO["llama"](seed=seed)[0] for seed in (0, 1)]
    inputs = ZOO["llama"]()[1]
    with torch.no_grad():
        for parameter in models[1].parameters():  # the builder gives both the same weights
            parameter.mul_(1.0 + 0.05 * torch.randn_like(parameter))
    expected = [run(model, inputs).sequences for model in models]
    for model in models:
        model.compile(backend="akvq", options={**SMALL, "window": 64})  # all tokens are recent: nothing but rotation
    outs = [run(model, inputs) for model in models]
    for model, out, tokens in zip(models, outs, expected, strict=True):
        assert torch.equal(out.sequences, tokens)
        assert len({row.label for row in akvq_fx.report(model).packed}) == 1
    with pytest.raises(ValueError, match="made by other weights"):
        continued(models[1], outs[0], inputs["attention_mask"], torch.full((2, 1), 33))


STATIC = {"cache_implementation": "static"}
BEFORE = {"growing": {}, "another_capacity": {**STATIC, "max_new_tokens": 4}}  # what runs first


@pytest.mark.parametrize("seed, before", [(0, "another_capacity"), (1, "growing")])
def test_static_cache_is_packed_after_a_cache_of_other_length(seed, before):
    """Dynamo remembers lengths by code and argument: now keys and values have a symbol each for one capacity."""
    torch._dynamo.reset()
    first, inputs = ZOO["llama"]()
    model, plain = first if seed == 0 else ZOO["llama"](seed=seed)[0], ZOO["llama"](seed=seed)[0]
    expected = [run(plain, inputs, **STATIC, max_new_tokens=n).sequences for n in (8, 12)]
    for each in {first, model}:
        each.compile(backend="akvq", options=LOSSLESS)
    run(first, inputs, **BEFORE[before])
    for tokens, n in zip(expected, (8, 12), strict=True):
        assert torch.equal(run(model, inputs, **STATIC, max_new_tokens=n).sequences, tokens)
    assert {row.status for _, row in akvq_fx.report(model).rows} == {"prompt", "packed"}
