"""Every private name of PyTorch and torchao that akvq_fx uses, in one place.

tests/test_internals.py has a test for each, which says what stopped working. Where a name may be missing and something
can be done without it, the function here does that and says so; where nothing can, the error names the PyTorch that was
found.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

OLDEST, NEWEST = (2, 11), (2, 15)  # tried; docs/versions.md has the combinations
COUNT = "num_cache_entries_with_same_id_matched_objs"  # what dynamo compares with recompile_limit
_numbers = itertools.count()


def version() -> tuple[int, ...]:
    """(major, minor) of the PyTorch that runs."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


# ---- torch.compile's wrapper of a module -----------------------------------------------------------------------------


def optimized_module() -> type:
    """The class of what torch.compile(module) returns. Raises ImportError where PyTorch has moved it."""
    from torch._dynamo.eval_frame import OptimizedModule

    return OptimizedModule


def backend_of(module) -> Any:
    """The backend function that an OptimizedModule was compiled with."""
    return innermost(getattr(module.dynamo_ctx, "callback", None))


def compiled_call(module) -> Callable:
    """The compiled `__call__` of the module inside an OptimizedModule."""
    return module.dynamo_ctx(module._orig_mod._call_impl)


def own_call(module: torch.nn.Module) -> Callable | None:
    """What module(...) runs in place of its forward since module.compile(), None before."""
    return module._compiled_call_impl


def set_own_call(module: torch.nn.Module, call: Callable | None) -> None:
    module._compiled_call_impl = call


def compiled_with(module) -> tuple[Any, dict[str, Any]]:
    """The backend function that a module was compiled with, by torch.compile(module) or by module.compile(), and the
    options= and mode= that it was given; (None, {}) where it was not, or where PyTorch keeps that elsewhere."""
    context = getattr(module, "dynamo_ctx", None)
    if context is None and isinstance(module, torch.nn.Module) and own_call(module) is not None:
        context = inspect.getclosurevars(own_call(module)).nonlocals.get("self")
    backend, found = getattr(context, "callback", None), {}
    while (link := link_of(backend)) is not None:
        found = getattr(backend, "kwargs", None) or found
        backend = getattr(backend, link)
    return backend, dict(found)


# ---- backends --------------------------------------------------------------------------------------------------------


def innermost(backend) -> Any:
    """The function that the user gave as a backend, without dynamo's and torch.compile's wrappers."""
    while (link := link_of(backend)) is not None:
        backend = getattr(backend, link)
    return backend


def link_of(backend) -> str | None:
    """The attribute by which a wrapper holds what it wraps, None of what is no wrapper."""
    links = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable", "compiler_fn")  # they differ between versions
    return next((link for link in links if getattr(backend, link, None) is not None), None)


def has_entry_point(name: str, group: str = "torch_dynamo_backends") -> bool:
    """Whether an installed package tells dynamo of a backend, which dynamo then imports when its name is asked for."""
    return name in importlib.metadata.entry_points(group=group).names


def register(name: str, backend: Callable) -> None:
    """Make a backend's name known where no installed package does and nobody registered it yet."""
    from torch._dynamo.backends import registry

    if not has_entry_point(name) and name not in registry._COMPILER_FNS:
        registry.register_backend(backend, name=name)


def inductor(gm: torch.fx.GraphModule, example_inputs: list, mode: str | None) -> Callable:
    """A graph through Inductor in one of its modes. Raises RuntimeError where it finds no C++ compiler."""
    from torch._inductor import exc, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode else {}
    devices = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)}
    if version() < (2, 12) and "cuda" not in devices:
        # its C++ checks an index before the line that computes it, where sizes are symbols
        patches = {**patches, "assert_indirect_indexing": False}
    try:
        return compile_fx(gm, example_inputs, config_patches=patches or None)
    except (exc.InductorError, exc.InvalidCxxCompiler) as error:
        if not isinstance(getattr(error, "inner_exception", error), exc.InvalidCxxCompiler):
            raise
        raise RuntimeError(
            'akvq: inner="inductor" needs a C++ compiler and finds none: install g++ or clang++, name one in $CXX, or '
            'compile without it, options={"inner": "eager"}'
        ) from error


def identify_inductor() -> tuple[Callable, ...]:
    """What Inductor finds out once a process and keeps: digests of its own files, seconds of reading; () where it does
    it otherwise."""
    from torch._inductor import codecache

    keys = getattr(codecache, "torch_key", None), getattr(getattr(codecache, "CacheBase", None), "get_system", None)
    return tuple(key for key in keys if key is not None)


def aot_eager(gm: torch.fx.GraphModule, example_inputs: list) -> Callable:
    """A graph through AOTAutograd and no further."""
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(gm, example_inputs)


# ---- what dynamo is doing --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Compiling:
    """A frame that dynamo is about to compile, or is compiling, on this thread.

    code     the function's
    locals   its arguments (do not keep: they hold tensors)
    backend  as the user gave it
    limit    name of the option of torch._dynamo.config because of which it will not be compiled, "" where it will be
    reason   why it is compiled again, "" the first time
    hard     dynamo raises at a limit (fullgraph=True), so that no warning is needed
    count    dynamo's own count of the graphs that the function has
    """

    code: types.CodeType
    locals: dict[str, Any]
    backend: Any
    limit: str
    reason: str
    hard: bool
    count: Any = None

    def limit_is_default(self) -> bool:
        """Whether it is recompile_limit that is reached, and nobody chose another number than PyTorch's: neither by
        torch._dynamo.config on this thread nor by torch.compile(recompile_limit=...)."""
        config = torch._dynamo.config
        return self.limit == "recompile_limit" and config.recompile_limit == config._config["recompile_limit"].default

    def let_pass(self, most: int) -> bool:
        """Have dynamo compile the function this once beyond recompile_limit, where it has fewer than `most` graphs.

        Nothing but dynamo's count for this one compilation changes. False, and nothing done, where `limit_is_default`
        is False.
        """
        has = getattr(self.count, COUNT, most)
        if has >= most or not self.limit_is_default():
            return False
        setattr(self.count, COUNT, 0)
        return True


def compiling() -> Compiling | None:
    """The innermost frame that dynamo compiles on this thread; None outside of dynamo or where its frames are unknown.

    Dynamo passes a backend neither the function nor why it was called, so both are read off its own frame on the stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_compile" and frame.f_globals.get("__name__") == "torch._dynamo.convert_frame":
            seen = dict(frame.f_locals)  # from Python 3.13 on it is no dict
            if not {"code", "locals", "compiler_fn"} <= seen.keys():
                return None
            hard = bool(seen.get("one_graph")) or torch._dynamo.config.fail_on_recompile_limit_hit
            return Compiling(seen["code"], seen["locals"], innermost(seen["compiler_fn"]), _limit(seen),
                             seen.get("recompile_reason") or "", hard, seen.get("cache_size"))  # fmt: skip
        frame = frame.f_back
    return None


def _limit(seen: dict) -> str:
    from torch._dynamo.cache_size import exceeds_recompile_limit

    if "cache_size" not in seen or "compile_id" not in seen:
        return ""
    exceeded, name = exceeds_recompile_limit(seen["cache_size"], seen["compile_id"])
    return name if exceeded else ""


def guard_of(reason: str) -> str:
    """The guard that failed, out of dynamo's reason for a recompile, which also has code and a stack trace."""
    return " ".join(reason.split("User stack trace")[0].split("  #")[0].split())


def before_compiling(listener: Callable[[], str]) -> None:
    """Have the listener called before dynamo compiles any frame, in time to see that it will not; at most once.

    PyTorch offers this hook for notes in its logs of recompiles: the listener returns such a note, "" for none.
    """
    from torch._dynamo.utils import get_hook_for_recompile_user_context

    if listener not in (get_hook_for_recompile_user_context() or ()):
        torch._dynamo.register_hook_for_recompile_user_context(listener)


def after_compiling(listener: Callable) -> None:
    """Have the listener called whenever dynamo has compiled, or failed to; at most once."""
    handler = torch._dynamo.callback_handler
    if listener not in handler.end_callbacks:
        handler.register_end_callback(listener)


def compile_isolated(function: Callable, backend: Callable) -> Callable:
    """torch.compile(function, backend) that leaves nothing behind for other torch.compile calls.

    Dynamo keeps graphs by code object, at most eight of each, whoever asked for them. So the function is called from a
    frame whose code object is new, and other frames that dynamo compiles (after a graph break) are isolated where
    PyTorch can do that.
    """

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    # dynamo remembers which sizes are dynamic by the code's name, so that is new too
    code = call.__code__.replace(co_name=f"isolated_{next(_numbers)}")
    fresh = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    known = inspect.signature(torch.compile).parameters
    isolated = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}  # from torch 2.13 on
    return torch.compile(fresh, backend=backend, **isolated)


LEAST_SYMBOL = 2  # dynamo takes smaller sizes for constants


def dynamic_marks(dims: list[int]) -> dict[str, Any]:
    """What torch._dynamo.maybe_mark_dynamic(x, dims) leaves on a tensor; a copy is 50 times faster."""
    probe = torch.empty((1,) * (max(dims) + 1))
    others = set(vars(probe))  # a fake tensor has attributes of its own
    torch._dynamo.maybe_mark_dynamic(probe, dims)
    return {name: mark for name, mark in vars(probe).items() if name not in others}


def static_dims(x: torch.Tensor) -> set[int]:
    """The axes that the user marked with torch._dynamo.mark_static."""
    return getattr(x, "_dynamo_static_indices", set())


def hint(size) -> int:
    """The number that dynamo saw for a size when it traced, 2 where it kept none; asks without adding a guard."""
    if isinstance(size, int):
        return size
    known = getattr(size.node, "hint", None)
    return int(known) if known is not None else 2


def as_replaced(example):
    """A size symbol that a guard has replaced by another one as that one, anything else as it is.

    Inductor defines the symbols that its inputs are. The packed tensor that had the other one is no input any more.
    """
    if not isinstance(example, torch.SymInt) or not example.node.expr.is_Symbol:
        return example
    return example.node.shape_env.create_symintnode(example.node.expr, hint=example.node.hint)


def guards(env) -> list:
    """Expressions that a ShapeEnv (None: no symbolic sizes) relies on so far, oldest first; read in 2.11 to 2.15."""
    return [guard.expr for guard in env.guards] if env is not None else []


def holds(env, condition) -> bool:
    """Whether a condition on size symbols is true of the sizes at hand. The ShapeEnv guards on that; 2.11 to 2.15."""
    return bool(env.evaluate_expr(condition))


def part_of(x: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor, the tensor itself: `to_local()` would make a view; 2.11 to 2.15."""
    return x._local_tensor


def is_object(x) -> bool:
    """An input of a graph that is neither a tensor nor a number, a process group say, while tracing; 2.11 to 2.15."""
    return type(x).__name__ == "FakeScriptObject"


# ---- CUDA ------------------------------------------------------------------------------------------------------------


def nvrtc() -> tuple[Callable, Callable] | str:
    """(compile a source text, load the result) of PyTorch's own NVRTC, or why they cannot be had."""
    utils = getattr(torch.cuda, "_utils", None)
    missing = [name for name in ("_nvrtc_compile", "_cuda_load_module") if not hasattr(utils, name)]
    if missing:
        return f"PyTorch {torch.__version__} has no torch.cuda._utils.{missing[0]}"
    return utils._nvrtc_compile, utils._cuda_load_module


def compile_cache_folder() -> str | None:
    """Where Inductor keeps compiled code for later processes; None where the user wants none kept, or where it is not
    known; 2.11 to 2.15."""
    try:
        from torch._inductor import config
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        return None if config.force_disable_caches else cache_dir()
    except (ImportError, AttributeError, OSError):
        return None


def users_of_memory(x: torch.Tensor) -> int:
    """How many tensors, x and views of it among them, share the memory of x; a large number where PyTorch tells not."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    # the object that untyped_storage gives is one user more
    return count(x.untyped_storage()._cdata) - 1 if count is not None else 1 << 30


def is_view(x: torch.Tensor) -> bool:
    """Whether autograd knows x as a view; of inference tensors it keeps no record."""
    return x._is_view()


def held_elsewhere(x: torch.Tensor) -> str:
    """Why what is inside of the object x cannot be exchanged: C++ code holds it, PyTorch has no way; "" if it can."""
    if not hasattr(torch._C, "_swap_tensor_impl") or not hasattr(x, "_use_count"):
        return f"PyTorch {torch.__version__} cannot exchange what is inside of a tensor"
    return "" if x._use_count() == 1 else "C++ code of PyTorch's or an extension's holds it"


def exchange_inside(one: torch.Tensor, other: torch.Tensor) -> None:
    """Exchange what two tensor objects are handles of, their classes and their attributes. torch.utils.swap_tensors
    does the same and refuses tensors with weak references, which every guard of dynamo has.

    Raises RuntimeError, and changes nothing, where PyTorch refuses.
    """
    torch._C._swap_tensor_impl(one, other)
    one.__class__, other.__class__ = other.__class__, one.__class__
    attributes, others = dict(vars(one)), dict(vars(other))
    for x, new in ((one, others), (other, attributes)):
        vars(x).clear()
        vars(x).update(new)


def is_functional(x: torch.Tensor) -> bool:
    """AOTAutograd is tracing x."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(x, FunctionalTensor)


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target, of the same size; on a GPU in a few launches."""
    groups: dict[tuple, tuple[list, list]] = {}
    for into, out_of in zip(targets, sources, strict=True):
        if into.numel():
            pair = groups.setdefault((into.dtype, out_of.dtype, into.device, out_of.device), ([], []))
            pair[0].append(into)
            pair[1].append(out_of)
    for some, others in groups.values():
        torch._foreach_copy_(some, others)


# ---- torchao ---------------------------------------------------------------------------------------------------------


def tensor_base() -> type:
    """torchao's base class of tensor subclasses. Raises ImportError that says which torchao is needed."""
    try:
        from torchao.utils import TorchAOBaseTensor
    except ImportError as error:
        raise ImportError(
            f"akvq_fx needs torchao 0.15 or later, for torchao.utils.TorchAOBaseTensor: {error}"
        ) from error
    return TorchAOBaseTensor
