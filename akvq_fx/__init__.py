"""akvq_fx: torch.compile(model, backend="akvq") gives any traced vision-language model a 2-bit KV cache (AKVQ-VL).

import torch
model.compile(backend="akvq")            # or torch.compile(model, backend="akvq"); no import of akvq_fx is needed
model.generate(...)                      # the cache object, generate and the model stay as they are

akvq_fx.report(model)                    # what was packed, and why not where it was not
akvq_fx.cache_stats(output.cache)        # tokens by class, bytes, bits per element
akvq_fx.calibrate(model, inputs)         # where its attention goes; decides tsa_layers="auto"
"""

from pathlib import Path as _Path

_here = _Path(__file__).parent
if not (_here / "passes").is_dir():  # a checkout: passes/ and kernels/ lie beside akvq_fx/
    __path__.append(str(_here.parent))

from akvq_fx.backend import _register_checkout, akvq  # noqa: E402
from akvq_fx.calibrate import calibrate  # noqa: E402
from akvq_fx.config import AKVQConfig  # noqa: E402
from akvq_fx.explain import explain, report  # noqa: E402
from akvq_fx.folding import unfold  # noqa: E402
from akvq_fx.packed_kv import PackedKV  # noqa: E402
from akvq_fx.policy import load_policy  # noqa: E402
from akvq_fx.report import Report  # noqa: E402
from akvq_fx.stats import cache_stats  # noqa: E402
from akvq_fx.tokens import mark_vision  # noqa: E402

_register_checkout()
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
