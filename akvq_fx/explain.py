"""explain: what would be packed, before compiling. report: what was packed, after the model ran.

Everything that brings the passes with it is imported in the functions: `import akvq_fx` imports this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from akvq_fx import torch_internals
from akvq_fx.config import AKVQConfig
from akvq_fx.report import Report

if TYPE_CHECKING:
    from akvq_fx import gave_up


class ExplainBackend:
    """A backend that plans as the real one would, for a report, and runs the graph as it is."""

    def __init__(self, config: AKVQConfig):
        self.config, self.found = config, Report()

    def __call__(self, gm, example_inputs):
        from akvq_fx import records
        from akvq_fx.backend import rewrite

        graph = records.graph_report(rewrite(gm, example_inputs, self.config))
        self.found.graphs.append(graph)
        return gm.forward

    def dynamo_gave_up(self, event: gave_up.Event) -> None:
        self.found.gave_up.append(event.gave_up)


def explain(model: nn.Module, *args: Any, akvq_options: dict | None = None, **kwargs: Any) -> Report:
    """Run model(*args, **kwargs) once, uncompiled, and report per attention site what the backend would do and why.

    The model, its weights, its cache and what is compiled of it stay as they are, however often this is called.
    akvq_options: the `options` of torch.compile(backend="akvq"). What dynamo gave up on before is in the report too:
    compiling would not pack it.
    """
    from akvq_fx import gave_up, records

    look = ExplainBackend(AKVQConfig.from_options(akvq_options))
    found = look.found
    original = getattr(model, "_orig_mod", model)
    is_module = isinstance(original, nn.Module)
    gave_up.register_hook()
    with torch.no_grad():
        torch_internals.compile_isolated(original._call_impl if is_module else original, look)(*args, **kwargs)
    earlier = records.of(original).gave_up if is_module else ()
    found.gave_up += [event for event in earlier if event not in found.gave_up]
    find_kernels(found)
    if not found.rows:
        found.hints.append(
            "no attention over a cache was seen; is the cache on (use_cache=True), "
            "and does this module hold the decoder?"
        )
    return found


def find_kernels(found: Report) -> None:
    """Fill in which kernels answer; to be called when nothing is being traced."""
    from akvq_fx import which_kernel

    for graph in found.graphs:
        graph.kernels = which_kernel.answers(graph.kernels)


def report(model: nn.Module) -> Report:
    """What was compiled for a model so far: one row per attention site and graph, packed or why not.

    Raises TypeError for what is no module, such as a compiled function: report the module whose layers it runs.
    """
    from akvq_fx import records

    original = getattr(model, "_orig_mod", model)
    if not isinstance(original, nn.Module):
        raise TypeError(
            f"akvq: report of a {type(model).__name__}; accepted: the module whose layers it runs, compiled or not"
        )
    found = records.of(original)
    find_kernels(found)
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
    if {graph.told_images for graph in found.graphs} & {True, False} == {False}:
        found.hints.append(
            "no compiled code has placed images so far, so all tokens have the bits of text above; if there were "
            "images, compile the model that places them, not its language model alone, or use akvq_fx.mark_vision"
        )
    return found
