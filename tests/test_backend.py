"""The backend's edges: options, errors, odd input, threads, and what a long generation costs."""

import copy
import gc
import subprocess
import sys
import threading

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

import akvq_fx
from akvq_fx import AKVQConfig, PackedKV, backend
from akvq_fx.transformers_names import cache_argument, cache_of
from tests import zoo
from tests.zoo import ZOO

SMALL = {"inner": "eager", "window": 8, "pivots": 3}


@pytest.fixture
def llama(monkeypatch):
    """Of one layer: tracing is what takes time."""
    torch._dynamo.reset()
    monkeypatch.setattr(zoo, "LAYERS", 1)
    return ZOO["llama"]()


def greedy(model, inputs, tokens, cache=None):
    """(logits per step, cache) of a plain decode loop on one unpadded row."""
    ids, logits = inputs["input_ids"][:1], []
    with torch.no_grad():
        for _ in range(tokens):
            out = model(input_ids=ids, **{cache_argument(model): cache}, use_cache=True)
            cache, ids = cache_of(out), out.logits[:, -1:].argmax(-1)
            logits.append(out.logits[:, -1])
    return logits, cache


@pytest.mark.parametrize(
    "options, message",
    [
        ({"windw": 8}, "unknown option 'windw'. Did you mean 'window'"),
        ({"body_bits": 3}, "body_bits=3"),
        ({"body_bits": True}, "body_bits"),
        ({"window": -1}, "window=-1"),
        ({"body_clip": 0}, "body_clip"),
        ({"recipe": "best"}, "accepted: one of 'akvq-vl', 'akvq'"),
        ({"inner": "xla"}, "inner='xla'"),
        ({"inner": "eager", "mode": "max-autotune"}, "only Inductor has modes"),
        ({"tsa_layers": "01"}, "tsa_layers"),
        ({"tsa_layers": 1}, "tsa_layers=1 is not accepted"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    model = torch.compile(torch.nn.Linear(2, 2), backend="akvq", options=options)
    with pytest.raises(Exception, match=message.replace("(", r"\(")), torch.no_grad():
        model(torch.ones(1, 2))


def test_known_options_are_listed():
    with pytest.raises(ValueError, match="Known options: recipe, body_bits, text_bits"):
        AKVQConfig.from_options({"x": 1})


def test_backend_needs_no_import():
    code = (
        "import torch; model = torch.nn.Linear(2, 2)\n"
        "torch.compile(model, backend='akvq', options={'inner': 'eager'})(torch.ones(1, 2)); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "ok", done.stderr
    assert "Failed to load" not in done.stderr


def test_without_a_cache_numbers_are_exact(llama):
    model, inputs = llama
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        model.compile(backend="akvq", options=SMALL)
        assert torch.equal(model(**inputs, use_cache=False).logits, expected)
    assert not akvq_fx.report(model).rows


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])  # Inductor: test_ways_in
def test_gradients_on_gives_a_packed_cache_and_refuses_a_backward_pass(llama, inner):
    """With gradients on, which is PyTorch's default, a call works as under no_grad; a backward pass is refused."""
    model, inputs = llama
    expected = model(**inputs, use_cache=False).logits
    expected.sum().backward()
    weight = model.lm_head.weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="akvq", options={**SMALL, "inner": inner})
    out = compiled(**inputs, use_cache=True)
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-4)
    layer = cache_of(out).layers[0]
    assert isinstance(layer.keys, PackedKV) and isinstance(layer.values, PackedKV)
    step = compiled(input_ids=inputs["input_ids"][:, -1:], **{cache_argument(model): cache_of(out)}, use_cache=True)
    for result in (out, step):
        with pytest.raises(RuntimeError, match="no gradient goes through a packed cache.*use_cache=False"):
            result.logits.sum().backward()
    if inner == "eager":
        compiled(**inputs, use_cache=False).logits.sum().backward()
        torch.testing.assert_close(model.lm_head.weight.grad, weight)


def test_bypass_is_noticed(llama):
    """Without the backend nothing is packed, and report says that nothing was compiled: other tests rely on this."""
    model, inputs = llama
    _, cache = greedy(model, inputs, 2)
    assert not any(isinstance(layer.keys, PackedKV) for layer in cache.layers)
    assert "nothing was compiled" in str(akvq_fx.report(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_broken_keys_stay_where_they_are(llama, bad):
    """A non-finite embedding spoils what a 16-bit cache would spoil, and no other row of the batch."""
    model, inputs = llama
    model.compile(backend="akvq", options=SMALL)
    inputs = {k: v.clone() for k, v in inputs.items()}
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    clean = model.generate(
        inputs_embeds=embeds, **inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True
    )
    embeds[0, -3] = bad
    broken = model.generate(
        inputs_embeds=embeds, **inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True
    )
    for one, other in zip(clean.logits, broken.logits, strict=True):
        assert not other[0].isfinite().any()
        torch.testing.assert_close(one[1], other[1])


def test_empty_prompt_is_an_error_not_a_crash(llama):
    model, inputs = llama
    model.compile(backend="akvq", options=SMALL)
    with pytest.raises((RuntimeError, ValueError, IndexError)), torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :0], use_cache=True)


def test_batch_change_between_calls(llama):
    """Another batch is another cache; continuing a cache with another batch is refused."""
    model, inputs = llama
    model.compile(backend="akvq", options=SMALL)
    both = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    one = model.generate(**{k: v[1:] for k, v in inputs.items()}, max_new_tokens=3, return_dict_in_generate=True)
    assert both.sequences.shape[0] == 2 and one.sequences.shape[0] == 1
    with pytest.raises(Exception, match="Sizes of tensors must match|batch"), torch.no_grad():
        model(input_ids=torch.ones(1, 1, dtype=torch.long), **{cache_argument(model): cache_of(both)})


def test_recompiled_in_the_middle_of_a_generation(llama):
    model, inputs = llama
    expected, _ = greedy(model, inputs, 8)
    model.compile(backend="akvq", options={**SMALL, "body_bits": 16})
    _, cache = greedy(model, inputs, 4)
    torch._dynamo.reset()
    with torch.no_grad():
        logits = model(
            input_ids=expected[3].argmax(-1)[:, None], **{cache_argument(model): cache}, use_cache=True
        ).logits[:, -1]
    torch.testing.assert_close(logits, expected[4], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rotation", ["online", "fold"])
def test_a_plain_cache_goes_on(llama, rotation):
    model, inputs = llama
    next_token = {"input_ids": inputs["input_ids"][:, -1:]}
    _, plain = greedy(model, inputs, 2)
    expected, _ = greedy(model, next_token, 1, copy.deepcopy(plain))
    model.compile(backend="akvq", options={**SMALL, "body_bits": 16, "rotate": True, "value_rotation": rotation})
    greedy(model, inputs, 2)
    got, cache = greedy(model, next_token, 1, plain)
    assert isinstance(cache.layers[0].keys, PackedKV)
    torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=1e-4)


def test_folding_leaves_the_weights_alone(llama):
    model, inputs = llama
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.compile(backend="akvq", options={**SMALL, "value_rotation": "fold"})
    greedy(model, inputs, 2)
    assert {row.values for row in akvq_fx.report(model).packed} == {"folded"}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert akvq_fx.unfold(model) == 1 and akvq_fx.unfold(model) == 0


def test_two_threads_two_models():
    """Compilation and decoding from two threads at once, which take turns in the graphs that the models share."""
    torch._dynamo.reset()
    pairs = [ZOO["llama"](seed=seed) for seed in (0, 1)]
    expected = [model.generate(**inputs, max_new_tokens=6) for model, inputs in pairs]
    found: list[list] = [[], []]

    def work(i):
        model, inputs = pairs[i]
        model.compile(backend="akvq", options={**SMALL, "body_bits": 16})
        for _ in range(10):
            found[i].append(model.generate(**inputs, max_new_tokens=6))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, expected, strict=True):
        assert len(got) == 10 and all(torch.equal(tokens, want) for tokens in got)


def test_a_long_generation_compiles_twice_and_leaks_nothing(llama):
    """200 tokens over two capacity steps: a prompt graph, a decode graph, and memory that is the cache."""
    model, inputs = llama
    model.compile(backend="akvq", options={**SMALL, "capacity_step": 64})
    counters.clear()
    _, cache = greedy(model, inputs, 3)
    graphs = counters["stats"]["unique_graphs"]
    gc.collect()
    alive = tensors_alive()
    ids = torch.full((1, 1), 33)
    with torch.no_grad():
        for _ in range(200):
            cache = cache_of(model(input_ids=ids, **{cache_argument(model): cache}, use_cache=True))
    assert counters["stats"]["unique_graphs"] == graphs == 2
    gc.collect()
    assert tensors_alive() - alive <= 8
    packed = cache.layers[0].keys
    assert packed.shape[2] == 23 + 202 and packed.storage.capacity == 256
    assert len(packed.storage.views) <= 10


def tensors_alive() -> int:
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


def test_prompt_memory_is_packed_before_the_call_returns(llama):
    """No 16-bit copy of the cache outlives the call: the only tensors left are the packed buffers."""
    model, inputs = llama
    model.compile(backend="akvq", options=SMALL)
    greedy(model, inputs, 2)
    gc.collect()
    known = {id(x) for x in gc.get_objects() if isinstance(x, torch.Tensor)}
    _, cache = greedy(model, inputs, 1)
    gc.collect()
    shape = tuple(cache.layers[0].keys.shape)
    new = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and id(x) not in known]
    assert not [x for x in new if tuple(x.shape) == shape and not isinstance(x, PackedKV)]


def test_static_cache_object_keeps_its_interface(llama):
    model, inputs = llama
    model.compile(backend="akvq", options=SMALL)
    out = model.generate(**inputs, max_new_tokens=4, cache_implementation="static", return_dict_in_generate=True)
    cache = cache_of(out)
    assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1] + 3
    stats = akvq_fx.cache_stats(cache)
    assert stats.packed_tensors == 2 and stats.plain_tensors == 0
    cache.reset()
    assert int(cache.get_seq_length()) == 0 and not cache.layers[0].keys.dequantize().any()


def test_cache_stats_of_a_plain_cache(llama):
    model, inputs = llama
    with torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
    stats = akvq_fx.cache_stats(cache)
    assert stats.packed_tensors == 0 and stats.plain_tensors == 2 and stats.ratio == 0.5  # float32 here, 16 bits there
    with pytest.raises(TypeError, match="no cache tensors"):
        akvq_fx.cache_stats(DynamicCache())


def test_cache_stats_of_an_output_count_its_cache_alone(llama):
    """A forward's logits are [B, T, V] and hidden states [B, T, C]: floats of three axes as well."""
    model, inputs = llama
    with torch.no_grad():
        output = model(**inputs, use_cache=True, output_hidden_states=True)
    assert akvq_fx.cache_stats(output) == akvq_fx.cache_stats(cache_of(output))
    legacy = {"past_key_values": ((output.logits, output.logits.clone()),), "logits": output.logits.clone()}
    assert akvq_fx.cache_stats(legacy).plain_tensors == 2
    with pytest.raises(TypeError, match="no cache tensors found in CausalLMOutput"):
        akvq_fx.cache_stats(model(**inputs, use_cache=False))


def test_report_of_a_function_names_what_to_ask():
    with pytest.raises(TypeError, match="accepted: the module"):
        akvq_fx.report(torch.compile(torch.nn.Linear(2, 2).forward, backend="akvq"))


def test_explain_changes_nothing(llama):
    model, inputs = llama
    before = [p.detach().clone() for p in model.parameters()]
    report = akvq_fx.explain(model, **inputs, akvq_options=SMALL)
    assert [row.status for row in report.packed] == ["prompt"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert "nothing was compiled" in str(akvq_fx.report(model))


def test_two_bits_through_aot_eager(llama):
    model, inputs = llama
    small = {k: v[1:, 6:] for k, v in inputs.items()}
    expected = model.generate(**small, max_new_tokens=4)
    model.compile(backend="akvq", options={**SMALL, "inner": "aot_eager", "window": 64})
    out = model.generate(**small, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert all(isinstance(layer.keys, PackedKV) for layer in cache_of(out).layers)


def test_no_gradient_is_lost_in_silence(llama):
    """Neither where a packed cache is only one of the terms of a loss."""
    model, inputs = llama
    model.compile(backend="akvq", options=SMALL)
    ids = inputs["input_ids"][1:, 6:]
    cache = cache_of(model(ids[:, :-1], use_cache=True))
    assert isinstance(cache.layers[0].keys, PackedKV)
    loss = model(ids[:, -1:], **{cache_argument(model): cache}).logits.sum() + model.lm_head.weight.square().sum()
    with pytest.raises(RuntimeError, match="no gradient goes through a packed cache"):
        loss.backward()


@torch.no_grad()
def test_a_graph_on_disk_is_of_these_ops(monkeypatch, tmp_path):
    """Inductor's disk cache goes by the names of ops; another version's graph expects other buffers of them."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.ones(2, 16)

    def found_on_disk(version):
        monkeypatch.setattr(backend, "ops_digest", lambda: version)
        torch._dynamo.reset()
        counters.clear()
        options = {"inner": "inductor", "compile_uncached": True}
        torch.compile(lambda x: torch.ops.akvq.rotate(x) + 1, backend="akvq", options=options)(x)
        return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > 0

    assert [found_on_disk(version) for version in ("1", "1", "2", "2")] == [False, True, False, True]
    assert not torch.compiler.config.cache_key_tag


@pytest.mark.parametrize("dynamic", (None, True))
def test_every_batch_size_is_packed(llama, dynamic):
    model, inputs = llama
    reference, _ = ZOO["llama"]()
    model.compile(backend="akvq", dynamic=dynamic, options={**SMALL, "body_bits": 16})
    for batch in (1, 2, 3, 1):
        ids = inputs["input_ids"][:1, : 8 + batch].expand(batch, -1).contiguous()
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
        out = model.generate(**arguments, return_dict_in_generate=True)
        assert isinstance(cache_of(out).layers[0].keys, PackedKV), batch
        assert torch.equal(out.sequences, reference.generate(**arguments)), batch
    assert not akvq_fx.report(model).refused
