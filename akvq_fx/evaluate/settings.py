"""Settings of a table ("none": the model's own cache; or a recipe and options), and running a model under one."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import akvq_fx
from akvq_fx.transformers_names import cache_argument, cache_of

OWN = "none"
ALWAYS = {"inner": "eager", "value_rotation": "online"}  # unless the options say otherwise


class NothingPacked(RuntimeError):
    """The backend ran and left every cache as it was: a number measured like this would be the model's own."""


def options_of(text: str) -> dict[str, Any] | None:
    """recipe[:option=value,...] as backend options, None for "none". Raises ValueError as AKVQConfig does."""
    if text == OWN:
        return None
    recipe, _, rest = text.partition(":")
    options: dict[str, Any] = {"recipe": recipe}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"setting {text!r}: {part!r} is no option=value")
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name] = value
    akvq_fx.AKVQConfig.from_options(options)
    return options


def described(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Every field of the configuration, for a store's key: a changed default is another setting."""
    return None if options is None else dataclasses.asdict(akvq_fx.AKVQConfig.from_options({**ALWAYS, **options}))


@contextmanager
def running(model: torch.nn.Module, options: Mapping[str, Any] | None) -> Iterator[Any]:
    """The model as it runs under these options: itself for None, else compiled with the backend.

    Values are rotated in the graph unless the options say otherwise, so weights stay as they are. Dynamo's compiled
    code is reset before and after.
    """
    if options is None:
        yield model
        return
    torch._dynamo.reset()
    try:
        yield torch.compile(model, backend="akvq", options={**ALWAYS, **options})
    finally:
        torch._dynamo.reset()


def original(model: Any) -> Any:
    """The module that `running` was given."""
    return getattr(model, "_orig_mod", model)


def to_model(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Inputs on the model's device, floating-point ones in its dtype."""
    weight = next(original(model).parameters())

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(weight.device, weight.dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in inputs.items()}


def prefill(model: Any, inputs: Mapping[str, Any]) -> Any:
    """The cache of a prefix: input_ids [1, T] and whatever else the model takes (pixel_values, ...), in one call."""
    known = inspect.signature(original(model).forward).parameters
    spare = {"logits_to_keep": 1} if "logits_to_keep" in known else {}  # the prefix predicts nothing that is measured
    return cache_of(model(**to_model(inputs, model), use_cache=True, **spare))


def read(model: Any, ids: Tensor, cache: Any, step: int | None = None) -> tuple[Tensor, Any]:
    """Logits [n, V] of ids [n] read over a cache, `step` a call (None: all in one), and the cache after them."""
    logits, name = [], cache_argument(model)
    for part in ids.split(step or len(ids)):
        out = model(**to_model({"input_ids": part[None]}, model), **{name: cache}, use_cache=True)
        cache = cache_of(out)
        logits.append(out.logits[0])
    return torch.cat(logits), cache


def bits_of(cache: Any, model: Any) -> float:
    """Bits per cached number of a cache that `model` filled; of a simulated recipe, what its real cache would take.

    Raises NothingPacked where a compiled model left no packed tensor.
    """
    stats = akvq_fx.cache_stats(cache)
    if model is not original(model) and not stats.packed_tensors:
        raise NothingPacked(f"akvq_fx.evaluate: nothing was packed\n{akvq_fx.report(original(model))}")
    packed = 8 * stats.packed_bytes if stats.method_bits is None else stats.method_bits * stats.elements
    return (packed + 8 * stats.plain_bytes) / (stats.elements + stats.plain_elements)
