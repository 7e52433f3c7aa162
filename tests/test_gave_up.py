"""What users see: where dynamo gives up, reasons with lines of code, kernels, and that explain changes nothing."""

import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import akvq_fx
from akvq_fx import PackedKV, gave_up
from akvq_fx.transformers_names import cache_of
from tests.attention_models import token_ids
from tests.kernel_cases import skip_without_a_compiler

SMALL = {"inner": "eager", "window": 8, "pivots": 3}


@pytest.fixture(autouse=True)
def nothing_given_up():
    gave_up.EVENTS.clear()
    yield
    gave_up.EVENTS.clear()


def llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gave_up_warnings(call) -> list[str]:
    """Warnings of ours that a call gave."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in seen if issubclass(w.category, UserWarning) and "gave up" in str(w.message)]


def widths(function, *sizes):
    """Calls that need a graph each, as every dimension is a static one."""
    return lambda: [function(torch.ones(size)) for size in sizes]


@torch._dynamo.config.patch(recompile_limit=2, assume_static_by_default=True, automatic_dynamic_shapes=False)
def test_a_limit_is_told_at_once_and_only_for_this_backend():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    ours, theirs = Double(), lambda x: 3 * x
    run = torch.compile(ours, backend="akvq", options={"inner": "eager"})
    assert gave_up_warnings(widths(run, 2, 3)) == []
    (text,) = gave_up_warnings(widths(run, 4, 5, 6))
    assert "'forward' of Double" in text and __file__ in text and "it has 2 graphs" in text
    assert "size mismatch at index 0" in text and "torch._dynamo.config.recompile_limit = 16" in text
    (event,) = akvq_fx.report(ours).gave_up
    assert event.option == "torch._dynamo.config.recompile_limit" and str(event) in str(akvq_fx.report(ours))
    assert gave_up_warnings(widths(torch.compile(theirs, backend="eager"), 2, 3, 4, 5)) == []
    assert akvq_fx.report(Double()).gave_up == []


@torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False)
def test_a_function_around_the_backend_is_this_backend():
    mine = lambda gm, inputs: akvq_fx.akvq(gm, inputs, options={"inner": "eager"})
    assert len(gave_up_warnings(widths(torch.compile(lambda x: x + 1, backend=mine), 2, 3, 4, 5))) == 1


@torch._dynamo.config.patch(accumulated_recompile_limit=2, automatic_dynamic_shapes=False)
def test_the_accumulated_limit_is_named():
    run = torch.compile(lambda x: x + 1, backend="akvq", options={"inner": "eager"})
    (text,) = gave_up_warnings(widths(run, 2, 3, 4))
    assert "it has 2 graphs" in text and "torch._dynamo.config.accumulated_recompile_limit = 16" in text


@torch._dynamo.config.patch(suppress_errors=True)
def test_an_error_that_dynamo_swallows_is_told():
    run = torch.compile(lambda x: x + 1, backend="akvq", options={"windw": 8})
    (text,) = gave_up_warnings(widths(run, 2))
    assert "unknown option 'windw'" in text and "suppress_errors" in text


@torch._dynamo.config.patch(recompile_limit=2, automatic_dynamic_shapes=False)
def test_reset_and_another_call_take_it_back():
    module = nn.Linear(3, 3)
    run = torch.compile(module, backend="akvq", options={"inner": "eager"})
    call = lambda: [run(torch.ones(rows, 3)) for rows in (2, 3, 4)]
    assert len(gave_up_warnings(call)) == 1 and akvq_fx.report(module).gave_up
    torch._dynamo.reset()
    run(torch.ones(2, 3))
    assert not akvq_fx.report(module).gave_up


@torch._dynamo.config.patch(recompile_limit=2)
def test_layers_compiled_one_by_one():
    """Each layer is a graph of one function: as many as the limit are packed, as warning and report say."""
    model = llama(4)
    for layer in model.model.layers:
        layer.compile(backend="akvq", options=SMALL)
    found = []
    texts = gave_up_warnings(lambda: found.append(cache_of(model(input_ids=token_ids(1, 12), use_cache=True))))
    assert [isinstance(layer.keys, PackedKV) for layer in found[0].layers] == [True, True, False, False]
    assert len(texts) == 1 and "of LlamaDecoderLayer" in texts[0] and "So far 2 attention layers" in texts[0]
    report = akvq_fx.report(model)
    assert [row.label for row in report.packed] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert "2 of 4 LlamaDecoderLayer have a graph" in str(report)


def test_where_nobody_chose_a_limit_many_layers_are_one_function():
    """Dynamo's own limit of eight, which stays what it is, would leave one of nine layers at 16 bits."""
    model = llama(9)
    for layer in model.model.layers:
        layer.compile(backend="akvq", options=SMALL)
    found = []
    assert gave_up_warnings(lambda: found.append(cache_of(model(input_ids=token_ids(1, 12), use_cache=True)))) == []
    assert [isinstance(layer.keys, PackedKV) for layer in found[0].layers] == [True] * 9
    assert torch._dynamo.config.recompile_limit == 8


@torch._dynamo.config.patch(automatic_dynamic_shapes=False)
def test_functions_of_others_keep_dynamos_limit_and_ours_have_one(monkeypatch):
    monkeypatch.setattr(gave_up, "GRAPHS", 10)
    compiled = []
    backend = lambda gm, inputs: compiled.append(1) or gm.forward
    assert (
        gave_up_warnings(widths(torch.compile(lambda x: 3 * x, backend=backend), *range(2, 16))) == []
        and len(compiled) == 8
    )
    run = torch.compile(lambda x: x + 1, backend="akvq", options={"inner": "eager"})
    assert gave_up_warnings(widths(run, *range(2, 12))) == []
    (text,) = gave_up_warnings(widths(run, 12, 13))
    assert "it has 10 graphs" in text and "torch._dynamo.config.recompile_limit = 80" in text


def test_offloaded_weights_are_reported():
    """accelerate puts other parameters into the modules for every call."""
    accelerate = pytest.importorskip("accelerate")
    model = llama(1)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model.compile(backend="akvq", options=SMALL)
    with torch.no_grad():
        cache = cache_of(model(input_ids=token_ids(1, 12), use_cache=True))
    assert isinstance(cache.layers[0].keys, PackedKV)
    (row,) = akvq_fx.report(model).packed
    assert row.label.startswith("model.layers.0") and row.layer == 0


@torch._dynamo.config.patch(recompile_limit=3)
def test_explain_any_number_of_times_leaves_compile_alone():
    model = llama(1)
    ids = token_ids(1, 12)
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        assert len(akvq_fx.explain(model, input_ids=ids, akvq_options=SMALL).packed) == 1
    model.compile(backend="akvq", options=SMALL)
    generate = lambda: model.generate(ids, max_new_tokens=3, return_dict_in_generate=True)
    packed = lambda: all(isinstance(layer.keys, PackedKV) for layer in cache_of(generate()).layers)
    assert gave_up_warnings(lambda: packed()) == [] and packed()
    graphs = len(akvq_fx.report(model).graphs)
    for length in (12, 5):
        assert len(akvq_fx.explain(model, input_ids=ids[:, :length], akvq_options=SMALL).packed) == 1
    assert packed() and len(akvq_fx.report(model).graphs) == graphs == 2


@torch._dynamo.config.patch(recompile_limit=1)
def test_explain_promises_nothing_that_dynamo_gave_up_on():
    model = llama(3)
    for layer in model.model.layers:
        layer.compile(backend="akvq", options=SMALL)
    texts = gave_up_warnings(lambda: model(input_ids=token_ids(1, 12), use_cache=True))
    assert len(texts) == 1 and "gave up" in str(akvq_fx.explain(model, input_ids=token_ids(1, 12), akvq_options=SMALL))


def test_reasons_are_whole_and_have_their_line():
    model = llama()
    model.config._attn_implementation = "eager"
    found = akvq_fx.explain(model, input_ids=token_ids(1, 12), output_attentions=True, akvq_options=SMALL)
    assert len(found.refused) == 2
    for row in found.refused:
        assert row.reason.endswith("so they are computed") and row.node and "attn_weights" in row.source
        assert f"node {row.node} at {row.source}" in str(found)
    assert row.reason in str(found)


def test_kernels_are_named_with_what_was_passed_over(monkeypatch):
    model = llama()
    model.compile(backend="akvq", options={**SMALL, "capacity_step": 32})
    model.generate(token_ids(1, 12), max_new_tokens=3)
    found = {answer.op: answer for graph in akvq_fx.report(model).graphs for answer in graph.kernels}
    assert {"pack", "append", "attend"} <= found.keys() and found["pack"].kernel == ""
    from akvq_fx.kernels import attend_cpu

    monkeypatch.setattr(attend_cpu, "refusal", lambda call: "no luck")
    found = {answer.op: answer for graph in akvq_fx.report(model).graphs for answer in graph.kernels}
    assert found["attend"].passed_over == (("attend_cpu", "no luck"),)
    assert "attend on cpu: the reference (not attend_cpu: no luck)" in str(akvq_fx.report(model))
    assert "graphs: 1 prefill, 1 decode; 1 of them recompiled, last because" in str(akvq_fx.report(model))


@pytest.mark.parametrize("recipe", ("akvq", "akvq-even"))
def test_on_a_cpu_the_cpp_kernels_answer_steps(recipe):
    """Of a user's call, but for the inner compiler."""
    skip_without_a_compiler()
    model = llama()
    model.compile(backend="akvq", options={"inner": "eager", "recipe": recipe})
    model.generate(token_ids(1, 12), max_new_tokens=3)
    (step,) = [graph.kernels for graph in akvq_fx.report(model).graphs if graph.kind == "decode"]
    assert {answer.op: answer.kernel for answer in step if answer.op in ("append", "attend")} == {
        "append": "append_cpu", "attend": "attend_cpu"}  # fmt: skip
