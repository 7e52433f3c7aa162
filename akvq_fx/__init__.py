"""akvq_fx: torch.compile(model, backend="akvq") gives any traced vision-language model the AKVQ-VL 2-bit key-value cache.

import torch
model.compile(backend="akvq")            # or torch.compile(model, backend="akvq"); no import of akvq_fx is needed
model.generate(...)                      # the cache object, generate and the model stay as they are

akvq_fx.report(model)                    # what was packed, and why not where it was not
akvq_fx.cache_stats(output.cache)        # tokens by class, bytes, bits per element
akvq_fx.calibrate(model, inputs)         # where its attention goes; decides tsa_layers="auto"
"""

import sys as _sys
from importlib import import_module as _import_module
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

_here = _Path(__file__).parent
if not (_here / "passes").is_dir():  # a checkout: passes/ and kernels/ lie beside akvq_fx/
    __path__.append(str(_here.parent))

from akvq_fx import torch_internals as _torch_internals  # noqa: E402
from akvq_fx.config import AKVQConfig  # noqa: E402
from akvq_fx.tokens import mark_vision  # noqa: E402

# loaded when first asked for: the backend brings torch._dynamo, packed tensors bring torchao
_LATER = {
    "PackedKV": "packed_kv",
    "Report": "report",
    "akvq": "backend",
    "cache_stats": "stats",
    "calibrate": "calibrate",
    "explain": "explain",
    "load_policy": "policy",
    "report": "explain",
    "unfold": "folding",
}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module 'akvq_fx' has no attribute {name!r}")
    found = getattr(_import_module(f"akvq_fx.{_LATER[name]}"), name)
    globals()[name] = found
    return found


class _Package(_ModuleType):
    """`akvq_fx.report` is the function, though a submodule has the same name and Python would put that in its place."""

    def __setattr__(self, name: str, value) -> None:
        if name not in _LATER or not isinstance(value, _ModuleType):
            super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package
_torch_internals.register("akvq", "akvq_fx.backend:akvq")
__version__ = "0.1.0"
__all__ = [
    "AKVQConfig",
    "PackedKV",
    "Report",
    "akvq",
    "cache_stats",
    "calibrate",
    "explain",
    "load_policy",
    "mark_vision",
    "report",
    "unfold",
]
