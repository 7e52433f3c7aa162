"""Every name of transformers that akvq_fx uses and that changes between versions. Nothing is imported from it: a user
of plain PyTorch need not have it.

    5.17 to 5.23   model(past_key_values=cache), output.past_key_values
    5.24           model(cache=cache), output.cache; the old names warn
"""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

OLDEST, NEWEST = (5, 17), (5, 24)  # tried; docs/versions.md has the combinations
CACHE_NAMES = ("cache", "past_key_values")  # of an argument and of an output's field, the newest first


def cache_argument(model: Any) -> str:
    """The name under which a model's forward, and so its generate, takes a cache: "cache" or "past_key_values"."""
    original = getattr(model, "_orig_mod", model)
    known = inspect.signature(getattr(original, "forward", original)).parameters
    inner = getattr(original, "get_base_model", None)  # an adapter's forward takes anything and hands it on
    if inner is not None and not any(name in known for name in CACHE_NAMES) and inner() is not original:
        return cache_argument(inner())
    return next((name for name in CACHE_NAMES if name in known), "past_key_values")


def cache_of(output: Any) -> Any:
    """The cache that a forward or a generate returned, under whatever name; None for an output without one."""
    for name in CACHE_NAMES:
        if hasattr(output, name):
            return getattr(output, name)
    return None


def version() -> tuple[int, ...] | None:
    """(major, minor) of the transformers that is installed, None where there is none."""
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in found.split(".")[:2])
