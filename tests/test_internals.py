"""A test for each private name of PyTorch, torchao and transformers that we use: it says what broke."""

import types
import warnings
import weakref
from unittest import mock

import pytest
import torch
from torch import nn

import akvq_fx
from akvq_fx import torch_internals, transformers_names, versions
from akvq_fx.cuda_graph import compared_one_by_one


def test_optimized_module_has_what_generate_needs():
    module = torch.compile(nn.Linear(2, 2), backend="akvq", options={"inner": "eager"})
    assert type(module) is torch_internals.optimized_module(), "torch.compile(module) is no OptimizedModule"
    assert torch_internals.backend_of(module) is akvq_fx.akvq, "the chain of wrappers to the backend is another"
    assert torch_internals.backend_of(torch.compile(nn.Linear(2, 2), backend="eager")) is not akvq_fx.akvq
    assert torch_internals.compiled_call(module)(torch.ones(1, 2)).shape == (1, 2), (
        "dynamo_ctx no longer wraps a function"
    )


def test_a_module_tells_how_it_was_compiled():
    """Both ways of compiling, and what is not compiled."""
    own, how = nn.Linear(2, 2), {"options": {"inner": "eager"}}
    assert torch_internals.compiled_with(own) == (None, {})
    own.compile(backend="akvq", **how)
    for module in (own, torch.compile(nn.Linear(2, 2), backend="akvq", **how)):
        backend, given = torch_internals.compiled_with(module)
        assert backend is akvq_fx.akvq and given["options"] == how["options"], "the wrappers keep options elsewhere"
    assert torch_internals.compiled_with(torch.compile(nn.Linear(2, 2), backend="akvq"))[1].get("options") is None


def test_a_module_calls_what_is_put_in_its_place():
    module = nn.Linear(2, 2)
    assert torch_internals.own_call(module) is None
    torch_internals.set_own_call(module, lambda x: x + 1)
    assert module(torch.zeros(1)) == 1, "nn.Module.__call__ no longer asks _compiled_call_impl"


def test_backends_are_registered_by_name():
    fn = lambda gm, inputs: gm
    torch_internals.register("akvq_test_name", fn)
    torch_internals.register("akvq_test_name", None)  # known already
    from torch._dynamo.backends.registry import lookup_backend

    assert lookup_backend("akvq_test_name") is fn


@pytest.mark.parametrize(
    "compile_graph", [torch_internals.aot_eager, lambda g, x: torch_internals.inductor(g, x, "default")]
)
def test_inner_compilers_take_a_graph(compile_graph):
    found = []

    def backend(gm, inputs):
        found.append(compile_graph(gm, inputs))
        return found[-1]

    torch.testing.assert_close(
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(4)), torch.ones(4).sin() + 1
    )
    assert found


def test_inductor_finds_out_about_itself_once():
    found = torch_internals.identify_inductor()
    assert len(found) == 2
    assert all(key() is key() for key in found)


def test_dynamo_says_what_it_compiles():
    """The names of dynamo's own frame, and that the hook runs before its limits are checked."""
    seen, frames = [], []

    def backend(gm, inputs):
        seen.append(torch_internals.compiling())
        return gm.forward

    def listener():
        frames.append(torch_internals.compiling())
        return ""

    module = nn.Linear(2, 2)
    torch_internals.before_compiling(listener)
    torch_internals.before_compiling(listener)
    try:
        with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
            run = torch.compile(module, backend=backend)
            run(torch.ones(1, 2)), run(torch.ones(3, 2))
    finally:
        torch._dynamo.utils.get_hook_for_recompile_user_context().remove(listener)
    assert torch_internals.compiling() is None
    assert len(seen) == 1 and seen[0].backend is backend and isinstance(seen[0].code, types.CodeType)
    assert any(value is module for value in seen[0].locals.values()), (
        "dynamo's frame no longer holds the function's arguments"
    )
    assert [frame.limit for frame in frames] == ["", "recompile_limit"] and "size mismatch" in torch_internals.guard_of(
        frames[1].reason
    )


@torch._dynamo.config.patch(automatic_dynamic_shapes=False)
def test_a_limit_that_nobody_chose_can_be_passed():
    compiled, passed = [], []

    def listener():
        passed.append(torch_internals.compiling().let_pass(10))
        return ""

    torch_internals.before_compiling(listener)
    try:
        run = torch.compile(lambda x: x + 1, backend=lambda gm, inputs: compiled.append(1) or gm.forward)
        [run(torch.ones(n)) for n in range(2, 14)]
        assert len(compiled) == 10 and passed == 8 * [False] + [True, True] + passed[10:] and not any(passed[10:])
        with torch._dynamo.config.patch(recompile_limit=3):
            run = torch.compile(lambda x: x + 2, backend=lambda gm, inputs: compiled.append(1) or gm.forward)
            [run(torch.ones(n)) for n in range(2, 14)]
        assert len(compiled) == 13, "a chosen limit is kept"
    finally:
        torch._dynamo.utils.get_hook_for_recompile_user_context().remove(listener)


@torch._dynamo.config.patch(recompile_limit=1)
def test_what_is_compiled_in_isolation_leaves_nothing_behind():
    module, calls = nn.Linear(2, 2), []
    look = lambda n: lambda gm, inputs: calls.append(n) or gm.forward
    for n in range(3):
        torch_internals.compile_isolated(module._call_impl, look(n))(torch.ones(1, 2))
    torch.compile(module, backend=look("user"))(torch.ones(1, 2))
    assert calls == [0, 1, 2, "user"]


def sizes_of(gm):
    """Sizes of a graph's tensor inputs as dynamo traced them."""
    values = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    return [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]


def test_marks_of_dynamic_sizes_can_be_copied():
    marks = torch_internals.dynamic_marks([2])
    assert marks, "maybe_mark_dynamic no longer leaves attributes"
    shapes = []

    def backend(gm, inputs):
        shapes.append([type(size) for size in sizes_of(gm)])
        return gm.forward

    x = torch.ones(1, 2, 5, 4)
    x.__dict__.update(marks)
    torch.compile(lambda x: x + 1, backend=backend)(x)
    assert torch.SymInt in shapes[0], "copied marks mean nothing to dynamo"


def test_static_marks_can_be_read():
    x = torch.ones(2, 3)
    assert not torch_internals.static_dims(x)
    torch._dynamo.mark_static(x, 1)
    assert torch_internals.static_dims(x) == {1}, "mark_static no longer leaves _dynamo_static_indices"


def test_sizes_have_hints():
    found = []

    def backend(gm, inputs):
        found.extend(torch_internals.hint(size) for size in sizes_of(gm))
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(torch.ones(7, 5))
    assert found == [7, 5]


def test_nvrtc_is_there_or_named_as_missing(monkeypatch):
    found = torch_internals.nvrtc()
    assert isinstance(found, tuple) and all(map(callable, found)), found
    monkeypatch.setattr(torch.cuda, "_utils", object())
    assert "torch.cuda._utils._nvrtc_compile" in torch_internals.nvrtc()


def test_addresses_are_compared_as_plain_python_would():
    from akvq_fx.cuda_graph import same_addresses

    tensors = [torch.ones(2), torch.ones(2)]
    addresses = [x.data_ptr() for x in tensors]
    for compare in (same_addresses, compared_one_by_one):
        assert compare(tensors, addresses, [0, 1]) and not compare(tensors, [0, 0], [0, 1])


def test_tensors_that_share_memory_are_counted(monkeypatch):
    """By kept cache buffers, which nobody else may have."""
    users, x = torch_internals.users_of_memory, torch.ones(4, 3)
    assert users(x) == 1
    alias, row, memory = x.detach(), x[1], x.untyped_storage()
    assert users(x) == users(row) == 3
    del alias, row, memory
    assert users(x) == 1 == users(torch.ones(0))
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert users(x) > 1, "what cannot be known counts as used"


def test_what_is_inside_of_a_tensor_can_be_exchanged(monkeypatch):
    class Other(torch.Tensor):
        pass

    one, other = torch.zeros(2), torch.ones(3).as_subclass(Other)
    one.mark = "one"
    reference = weakref.ref(one)
    assert torch_internals.held_elsewhere(one) == ""
    torch_internals.exchange_inside(one, other)
    assert reference() is one and type(one) is Other and one.shape == (3,) and not hasattr(one, "mark")
    assert type(other) is torch.Tensor and torch.equal(other, torch.zeros(2)) and other.mark == "one"
    assert torch_internals.is_view(other[:1]) and not torch_internals.is_view(other)
    monkeypatch.delattr(torch._C, "_swap_tensor_impl")
    assert "cannot exchange" in torch_internals.held_elsewhere(one)


def test_aot_autograd_s_tracing_is_known():
    functional = torch._subclasses.functional_tensor
    with functional.FunctionalTensorMode():
        x = functional.FunctionalTensor.to_functional(torch.ones(2))
    assert torch_internals.is_functional(x) and not torch_internals.is_functional(torch.ones(2))


def test_many_tensors_are_copied_at_once():
    dtypes = (torch.int32, torch.float16, torch.int32, torch.uint8)
    sources = [torch.arange(6).to(dtype).view(2, 3) for dtype in dtypes]
    targets = [torch.zeros(4, 3, dtype=dtype)[::2] for dtype in dtypes]
    torch_internals.copy_all([*targets, torch.ones(0)], [*sources, torch.ones(0)])
    assert all(torch.equal(into, out_of) for into, out_of in zip(targets, sources, strict=True))


def test_torchao_has_the_base_class():
    base = torch_internals.tensor_base()
    assert issubclass(akvq_fx.PackedKV, base) and hasattr(base, "implements")


def test_the_name_of_the_cache_is_found():
    class Old(nn.Module):
        def forward(self, input_ids=None, past_key_values=None): ...

    class New(nn.Module):
        def forward(self, input_ids=None, cache=None, **kwargs): ...

    class Adapter(nn.Module):
        def forward(self, *args, **kwargs): ...

        def get_base_model(self):
            return New()

    names = [transformers_names.cache_argument(model()) for model in (Old, New, Adapter)]
    assert names == ["past_key_values", "cache", "cache"]
    assert transformers_names.cache_argument(torch.compile(New(), backend="eager")) == "cache"
    out = types.SimpleNamespace
    assert [transformers_names.cache_of(o) for o in (out(cache=1), out(past_key_values=2), out())] == [1, 2, None]


def test_a_version_never_tried_is_told_once(monkeypatch):
    monkeypatch.setattr(torch_internals, "version", lambda: (2, 99))
    monkeypatch.setattr(transformers_names, "version", lambda: None)
    versions.warn_of_untried.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"PyTorch 2.99 was never tried; 2.11 to 2.15 were"):
            versions.warn_of_untried()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            versions.warn_of_untried()
    finally:
        versions.warn_of_untried.cache_clear()


def test_without_a_cpp_compiler_inductors_error_says_what_to_do(monkeypatch):
    from torch._inductor import compile_fx, exc

    for raised, says in (
        (exc.InductorError(exc.InvalidCxxCompiler(), None), r'install g\+\+ or clang\+\+.*"inner": "eager"'),
        (exc.InductorError(ValueError("another fault"), None), "^ValueError: another fault"),
    ):
        monkeypatch.setattr(compile_fx, "compile_fx", mock.Mock(side_effect=raised))
        with pytest.raises(RuntimeError, match=says):
            torch_internals.inductor(None, [], None)
