"""explain: what would be packed, before anything is. report: what was, after it ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from akvq_fx import records
from akvq_fx.config import AKVQConfig
from akvq_fx.report import Report


def explain(model: nn.Module, *args: Any, akvq_options: dict | None = None, **kwargs: Any) -> Report:
    """Run model(*args, **kwargs) once, uncompiled in effect, and tell per attention site what the backend would do and why.

    The model, its weights and its cache stay as they are. akvq_options: the `options` of torch.compile(backend="akvq").
    """
    from akvq_fx.backend import rewrite

    config = AKVQConfig.from_options(akvq_options)
    found = Report()

    def look(gm, example_inputs):
        state = rewrite(gm, example_inputs, config)
        found.graphs.append(records.graph_report(state))
        return gm.forward

    original = getattr(model, "_orig_mod", model)
    call = original._call_impl if isinstance(original, nn.Module) else original
    with torch.no_grad():
        torch.compile(call, backend=look)(*args, **kwargs)
    if not found.rows:
        found.hints.append(
            "no attention over a cache was seen; is the cache on (use_cache=True), and does this module hold the decoder?"
        )
    return found


def report(model: nn.Module) -> Report:
    """What was compiled for a model so far: one row per attention site and graph, packed or why not."""
    original = getattr(model, "_orig_mod", model)
    found = records.of(original)
    if not found.graphs:
        inner = [name for name, part in original.named_modules() if name and callable(getattr(part, "generate", None))]
        found.hints.append("nothing was compiled for this model yet: call it, or its generate, after compiling it")
        if inner:
            found.hints.append(
                "its generate may run an inner module that was not compiled; compile that one: "
                f'model.{inner[0]}.compile(backend="akvq")'
            )
    elif not found.rows:
        found.hints.append(
            "graphs were compiled, but none holds attention over a cache; is the cache on (use_cache=True)?"
        )
    return found
