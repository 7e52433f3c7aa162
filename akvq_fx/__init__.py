"""akvq_fx: torch.compile(model, backend="akvq") gives any traced vision-language model a 2-bit KV cache (AKVQ-VL).

import torch
model.compile(backend="akvq")            # or torch.compile(model, backend="akvq"); no import of akvq_fx is needed
model.generate(...)                      # the cache object, generate and the model stay as they are

akvq_fx.report(model)                    # what was packed, and why not where it was not
akvq_fx.cache_stats(output)              # tokens by class, bytes, bits per number
akvq_fx.calibrate(model, inputs)         # where its attention goes; decides tsa_layers="auto"
akvq_fx.Slots(model, rows=8)             # requests that come and go while others decode
akvq_fx.Prefixes("folder")               # images or a document encoded once, kept on disk, asked many times
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

_here = _Path(__file__).parent
if not (_here / "passes").is_dir():  # a checkout: passes/ and kernels/ lie beside akvq_fx/
    __path__.append(str(_here.parent))

from akvq_fx import torch_internals as _torch_internals  # noqa: E402
from akvq_fx.config import AKVQConfig  # noqa: E402
from akvq_fx.explain import explain, report  # noqa: E402
from akvq_fx.kernels import autocast as _autocast  # noqa: E402, F401 - registers every op of torch.ops.akvq
from akvq_fx.report import Report  # noqa: E402
from akvq_fx.tokens import mark_vision  # noqa: E402

if TYPE_CHECKING:
    from akvq_fx.analysis.calibrate import calibrate
    from akvq_fx.backend import akvq
    from akvq_fx.folding import unfold
    from akvq_fx.kept_buffers import free_kept_buffers
    from akvq_fx.packed_bundle import PackedBundle
    from akvq_fx.packed_kv import PackedKV
    from akvq_fx.policy import load_policy
    from akvq_fx.prefixes import Prefixes
    from akvq_fx.slots import Slots
    from akvq_fx.stats import cache_stats

# Imported when first asked for: they bring torch._dynamo, torchao or sympy, which takes seconds. None may have the name
# of a module of akvq_fx, which Python would put in its place.
_LATER = {
    "PackedBundle": "akvq_fx.packed_bundle",
    "PackedKV": "akvq_fx.packed_kv",
    "Prefixes": "akvq_fx.prefixes",
    "Slots": "akvq_fx.slots",
    "akvq": "akvq_fx.backend",
    "cache_stats": "akvq_fx.stats",
    "calibrate": "akvq_fx.analysis.calibrate",
    "free_kept_buffers": "akvq_fx.kept_buffers",
    "load_policy": "akvq_fx.policy",
    "unfold": "akvq_fx.folding",
}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module 'akvq_fx' has no attribute {name!r}")
    found = getattr(_import_module(_LATER[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# a checkout that is not installed: dynamo must be told, so it is loaded
if not _torch_internals.has_entry_point("akvq"):
    _import_module("akvq_fx.backend").register()

__version__ = "0.1.0"
__all__ = [
    "AKVQConfig",
    "PackedBundle",
    "PackedKV",
    "Prefixes",
    "Report",
    "Slots",
    "akvq",
    "cache_stats",
    "calibrate",
    "explain",
    "free_kept_buffers",
    "load_policy",
    "mark_vision",
    "report",
    "unfold",
]
