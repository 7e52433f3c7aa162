"""The one thing outside itself that akvq_fx touches: `torch.compile(model, backend="akvq").generate(...)`.

In plain PyTorch that call reaches the original module (OptimizedModule forwards unknown attributes), whose generate
then calls the uncompiled forward: nothing is compiled, silently. Here OptimizedModule gets a `generate` attribute that,
for modules compiled with this backend and for no others, runs the same method with the compiled forward in place for as
long as the call lasts.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable

from akvq_fx import torch_internals

OptimizedModule = torch_internals.optimized_module()
_calls: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # OptimizedModule -> its compiled _call_impl
# original module -> (generate calls under way, what to restore)
_depth: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def compiled_forward(module: OptimizedModule):
    """The original module calls its compiled forward inside; nested and concurrent calls share one switch."""
    original = module._orig_mod
    with _lock:
        if module not in _calls:
            _calls[module] = torch_internals.compiled_call(module)
        count, before = _depth.get(original, (0, torch_internals.own_call(original)))
        _depth[original] = count + 1, before
        torch_internals.set_own_call(original, _calls[module])
    try:
        yield
    finally:
        with _lock:
            count, before = _depth.pop(original)
            if count > 1:
                _depth[original] = count - 1, before
            else:
                torch_internals.set_own_call(original, before)


class Generate:
    """Descriptor: OptimizedModule.generate, for modules compiled with `backend`, given by name or itself."""

    def __init__(self, backend: Callable):
        self.backend = backend

    def __get__(self, module: OptimizedModule | None, owner=None):
        if module is None:
            return self
        method = module._orig_mod.generate  # AttributeError where the model has none, as before
        if torch_internals.backend_of(module) is not self.backend:
            return method

        @functools.wraps(method)
        def generate(*args, **kwargs):
            with compiled_forward(module):
                return method(*args, **kwargs)

        return generate

    def __set__(self, module: OptimizedModule, value) -> None:
        # as OptimizedModule does for attributes that it does not know
        setattr(module._orig_mod, "generate", value)  # noqa: B010


def install(backend: Callable) -> None:
    """Give OptimizedModule its `generate`; once is enough."""
    if not isinstance(OptimizedModule.__dict__.get("generate"), Generate):
        OptimizedModule.generate = Generate(backend)
