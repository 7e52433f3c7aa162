"""README's ways in, by inner compiler, gradients, batch sizes and kinds of cache: a lossless cache gives the uncompiled
model's tokens, every tensor of it is packed, and few graphs serve all batches."""

import contextlib

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import akvq_fx
from akvq_fx import PackedKV, backend
from akvq_fx.transformers_names import cache_argument, cache_of
from tests import zoo
from tests.attention_models import token_ids
from tests.zoo import ZOO, T, finish

LOSSLESS = {"body_bits": 16, "rotate": True}  # rotation is on, so that one left out shows
BATCHES = (1, 3, 8, 2)
TOKENS = 5
GRADIENTS = {"no_grad": torch.no_grad, "gradients": contextlib.nullcontext}


def llama(layers: int = 2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return finish(transformers.LlamaForCausalLM(transformers.LlamaConfig(**T(num_hidden_layers=layers))))


def prompt(batch: int, static: bool = False) -> dict:
    """Another length for each batch size; not so with a static cache, whose capacity follows from it."""
    ids = token_ids(batch, 8 if static else 6 + batch % 5, seed=batch) + 10
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def decoded(step, model, inputs, static: bool):
    """(tokens, cache) of a greedy loop over what a call of the model returns."""
    ids, name = inputs["input_ids"], cache_argument(model)
    cache = StaticCache(config=model.config, max_cache_len=24) if static else None
    at, fed = 0, ids
    for _ in range(TOKENS):
        positions = {"position_ids": torch.arange(at, at + fed.shape[1])[None].expand(len(ids), -1)}
        out = step(input_ids=fed, use_cache=True, **positions, **({} if cache is None else {name: cache}))
        at, cache, fed = at + fed.shape[1], cache_of(out), out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, fed], 1)
    return ids, cache


def generated(model, inputs, static: bool, **more):
    kind = {"cache_implementation": "static"} if static else {}
    arguments = {"max_new_tokens": TOKENS, "do_sample": False, **kind, **more}
    out = model.generate(**inputs, **arguments, return_dict_in_generate=True)
    return out.sequences, cache_of(out)


def call(model, options):
    model.compile(backend="akvq", options=options)
    return lambda inputs, static: decoded(model, model, inputs, static)


def call_of_a_compiled_one(model, options):
    compiled = torch.compile(model, backend="akvq", options=options)
    return lambda inputs, static: decoded(compiled, model, inputs, static)


def function_of_ones_own(model, options):
    @torch.compile(backend="akvq", options=options)
    def step(**inputs):
        return model(**inputs)

    return lambda inputs, static: decoded(step, model, inputs, static)


def generate(model, options):
    model.compile(backend="akvq", options=options)
    return lambda inputs, static: generated(model, inputs, static)


def generate_of_a_compiled_one(model, options):
    compiled = torch.compile(model, backend="akvq", options=options)
    return lambda inputs, static: generated(compiled, inputs, static)


def compile_config(model, options):
    """Together with model.compile; on a device that transformers compiles for."""
    model.compile(backend="akvq", options=options)
    config = CompileConfig(backend="akvq", options=options, mode=None, fullgraph=False)
    config._compile_all_devices = True
    return lambda inputs, static: generated(model, inputs, static, **({"compile_config": config} if static else {}))


name = lambda x: x.__name__ if callable(x) else None


@pytest.fixture(scope="module")
def plain():
    return llama(layers=1)


def right(run, plain, static: bool, batches=BATCHES) -> None:
    """Tokens as the uncompiled model's, and every tensor of the cache packed."""
    for batch in batches:
        inputs = prompt(batch, static)
        want, _ = generated(plain, inputs, static=False)
        tokens, cache = run(inputs, static)
        assert torch.equal(tokens, want), batch
        stats = akvq_fx.cache_stats(cache)
        assert (stats.packed_tensors, stats.plain_tensors) == (2 * plain.config.num_hidden_layers, 0), batch


@pytest.mark.parametrize(
    "way, static, gradients",
    [
        (call, False, "no_grad"),
        (call, True, "gradients"),
        (call_of_a_compiled_one, False, "gradients"),
        (call_of_a_compiled_one, True, "no_grad"),
        (function_of_ones_own, False, "no_grad"),
        (function_of_ones_own, False, "gradients"),
        (function_of_ones_own, True, "gradients"),
    ],
    ids=name,
)
def test_calls(plain, way, static, gradients):
    """Every pair of way, cache and gradients; a function of one's own has gradients both ways."""
    run = way(llama(layers=1), {**LOSSLESS, "inner": "eager"})
    counters.clear()
    with GRADIENTS[gradients]():
        right(run, plain, static)
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize(
    "way, static",
    [(generate, False), (generate, True), (generate_of_a_compiled_one, True)]  # growing: test_generate
    + [(compile_config, True)],  # which growing caches do without
    ids=name,
)
def test_generates(plain, way, static):
    run = way(llama(layers=1), {**LOSSLESS, "inner": "eager"})
    counters.clear()
    right(run, plain, static)
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_aot_eager(static):
    model, plain, options = llama(layers=1), llama(layers=1), {**LOSSLESS, "inner": "aot_eager"}
    counters.clear()
    right(generate(model, options), plain, static)
    assert counters["stats"]["unique_graphs"] <= 4
    right(generate_of_a_compiled_one(model, options), plain, static, batches=(1, 3))
    assert counters["stats"]["unique_graphs"] <= 4, "the same graphs"
    if static:
        return
    torch._dynamo.reset()  # calls without a mask are other graphs
    right(call_of_a_compiled_one(model, options), plain, static, batches=(3,))  # with gradients on


def test_inductor():
    """Every way over one model of one layer: dynamo finds the code that another way compiled."""
    model, plain = llama(layers=1), llama(layers=1)
    counters.clear()
    right(generate(model, LOSSLESS), plain, static=False)
    assert counters["stats"]["unique_graphs"] <= 4
    right(generate_of_a_compiled_one(model, LOSSLESS), plain, static=False, batches=(3,))
    torch._dynamo.reset()  # calls without a mask are other graphs; dynamo keeps eight of a function
    with torch.no_grad():
        for way in (call, call_of_a_compiled_one):
            right(way(model, LOSSLESS), plain, static=False, batches=(3,))
    right(function_of_ones_own(model, LOSSLESS), plain, static=False, batches=(2, 3))  # with gradients on
    torch._dynamo.reset()
    right(compile_config(model, LOSSLESS), plain, static=True, batches=(2,))


def several(model, inputs, **more):
    torch.manual_seed(3)
    return generated(model, inputs, **{"static": False, **more})


SEARCHES = {
    "shrinking": [(batch, {}) for batch in (8, 5, 3, 2, 4)],
    "down to one": [(batch, {}) for batch in (8, 3, 1, 2, 1)],
    "all": [
        (1, {"num_beams": 3}),
        (2, {"num_beams": 3}),
        (2, {"num_beams": 4, "num_return_sequences": 2}),
        (3, {"do_sample": True, "num_return_sequences": 2}),
        (1, {"do_sample": True, "num_return_sequences": 5}),
        (4, {}),
        (3, {}),
        (2, {"num_beams": 2}),
        (1, {}),
    ],
}


@pytest.mark.parametrize(
    "searches, static, dynamic",
    [
        ("down to one", False, None),
        ("all", False, None),
        ("shrinking", False, True),
        ("all", False, True),
        ("all", True, None),
    ],
)
def test_rows_that_multiply_and_shrink(static, dynamic, searches):
    """Beams, several samples of a prompt under one seed, shrinking batches: few graphs, and every cache packed."""
    model, plain = llama(layers=1), llama(layers=1)
    model.compile(backend="akvq", dynamic=dynamic, options={**LOSSLESS, "inner": "eager"})
    counters.clear()
    for batch, how in SEARCHES[searches]:
        want, _ = several(plain, prompt(batch, static), static=static, **how)
        tokens, cache = several(model, prompt(batch, static), static=static, **how)
        assert torch.equal(tokens, want), (batch, how)
        assert akvq_fx.cache_stats(cache).plain_tensors == 0, (batch, how)
    assert not akvq_fx.report(model).refused and not akvq_fx.report(model).gave_up
    # positions of beams are a view of a tensor, whose sizes dynamic=True makes symbols too: a prompt graph of their own
    assert counters["stats"]["unique_graphs"] <= (5 if dynamic and searches == "all" else 4)


@torch.no_grad()
def test_rows_leave_in_the_middle():
    """A server drops rows that are done and takes their cache along."""
    model, plain = llama(), llama()
    model.compile(backend="akvq", options={**LOSSLESS, "inner": "eager"})
    ids, argument, caches = prompt(8)["input_ids"], cache_argument(model), [None, None]
    rows = torch.arange(8)
    for kept in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 3, 6, 7], [1, 2, 4], [2], [0]):
        rows, ids = rows[kept], ids[kept]
        logits = []
        for i, one in enumerate((plain, model)):
            if caches[i] is not None:
                caches[i].batch_select_indices(torch.tensor(kept))
            fed = ids if caches[i] is None else ids[:, -1:]
            out = one(input_ids=fed, **{argument: caches[i]}, use_cache=True)
            caches[i] = cache_of(out)
            logits.append(out.logits[:, -1])
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
        ids = torch.cat([ids, logits[0].argmax(-1, keepdim=True)], 1)
        assert all(isinstance(layer.keys, PackedKV) and len(layer.keys) == len(rows) for layer in caches[1].layers)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_images(static, monkeypatch):
    monkeypatch.setattr(zoo, "LAYERS", 1)
    reference, _ = ZOO["llava"]()
    model, _ = ZOO["llava"]()
    model.compile(backend="akvq", options={**LOSSLESS, "inner": "eager"})
    kind = {"cache_implementation": "static"} if static else {}
    for batch in (1, 3) if static else (1, 3, 2):  # images come as a list: each number of them is another graph
        _, inputs = ZOO["llava"](batch=batch)
        arguments = {**inputs, **kind, "max_new_tokens": TOKENS, "return_dict_in_generate": True}
        out = model.generate(**arguments)
        assert torch.equal(out.sequences, reference.generate(**arguments).sequences), batch
        stats = akvq_fx.cache_stats(cache_of(out))
        assert (stats.packed_tensors, stats.plain_tensors) == (2, 0), batch
    assert not akvq_fx.report(model).refused


def test_after_an_interrupted_compilation_the_next_call_compiles(monkeypatch):
    """Ctrl-C while the rewritten graph of the prompt, then that of the decode step, is compiled."""
    model, ids = llama(), token_ids(1, 12) + 10
    due = model.generate(ids, max_new_tokens=4)
    model.compile(backend="akvq", options={**LOSSLESS, "inner": "eager", "compile_prompts": True})
    whole, calls = backend.compile_inner, []

    def interrupted_twice(*given):
        calls.append(None)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(backend, "compile_inner", interrupted_twice)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, max_new_tokens=4)
    assert torch.equal(model.generate(ids, max_new_tokens=4), due)
    assert {row.status for _, row in akvq_fx.report(model).rows} == {"prompt", "packed"}
