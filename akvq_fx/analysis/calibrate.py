"""calibrate(model, *prompts): measure where a model's attention goes, and decide its TSA layers by that.

The analysis of section III of the paper (arXiv 2501.15021) for any model that the backend understands. The prompts are
run once each through dynamo's own graphs, uncompiled; attention weights are computed on the side, for a few queries,
block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from akvq_fx import policy, torch_internals
from akvq_fx.analysis import measure
from akvq_fx.analysis.calibration import Calibration, LayerStatistics, Massive, Prompt
from akvq_fx.analysis.watch import AttentionCall, Watch
from akvq_fx.config import AKVQConfig

GRAPHS = 256  # graphs that dynamo may make of one function: prompts differ in length and batch
FEWEST = 16  # largest activations kept per prompt, where fewer pivots are asked for


@torch.no_grad()
def calibrate(
    model: nn.Module | Callable,
    *prompts: Mapping[str, Any] | tuple | Tensor,
    options: Mapping[str, Any] | None = None,
    queries: int = 64,
    ratio: float = 2.0,
    progress: Callable[[], Any] | None = None,
) -> Calibration:
    """Run the model over each prompt and return a Calibration, which tsa_layers="auto" remembers for these weights.

    prompts   each the inputs of one call with an empty cache: a mapping of keyword arguments, a tuple of arguments, or
              a tensor
    options   of torch.compile(backend="akvq"); only window, pivots, pivot_mode and massive_* matter
    queries   at most this many query tokens of each prompt row, counted from its end: its text after the last image
    ratio     how much more attention a text token must get than a vision token in a TSA layer
    progress  called after each prompt

    The model, its weights and its cache stay as they are. Raises ValueError for no prompts or numbers out of range,
    RuntimeError for a prompt in which no attention over a cache was seen.
    """
    if not prompts:
        raise ValueError(
            "akvq_fx.calibrate: no prompts; accepted: the inputs of one or more calls, e.g. a tokenizer's output"
        )
    if not isinstance(queries, int) or queries < 1 or not ratio > 0:
        raise ValueError(
            f"akvq_fx.calibrate: queries={queries}, ratio={ratio}; accepted: an integer >= 1 and a number > 0"
        )
    config = AKVQConfig.from_options(options)
    original = getattr(model, "_orig_mod", model)
    is_module = isinstance(original, nn.Module)
    collector = Collector(config, queries)
    names = {id(p): name for name, p in original.named_parameters()} if is_module else {}
    watch = Watch(config, names, collector.look)
    run = torch_internals.compile_isolated(original._call_impl if is_module else original, watch.backend)
    with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS):
        for number, prompt in enumerate(prompts):
            watch.vision = None
            args, kwargs = arguments(prompt)
            collector.begin()
            run(*args, **kwargs)
            if collector.prompt is None:
                reasons = "".join(f"\n{label}: {reason}" for label, reason in watch.refused.items())
                raise RuntimeError(
                    f"akvq_fx.calibrate: no attention over an empty cache was seen in prompt {number}; is the cache on "
                    f"(use_cache=True), and does this module hold the decoder?{reasons}"
                )
            collector.prompts.append(collector.prompt)
            if progress is not None:
                progress()
    settings = {
        **{
            name: getattr(config, name) for name in ("window", "pivots", "pivot_mode", "massive_floor", "massive_ratio")
        },
        "queries": queries,
        "ratio": ratio,
    }
    layers = sorted(collector.layers.values(), key=lambda found: found.layer)
    calibration = Calibration(type(original).__name__, layers, collector.prompts, settings, dict(watch.refused))
    policy.remember(watch.weights.values(), calibration.tsa_layers)
    return calibration


def arguments(prompt) -> tuple[tuple, dict]:
    if isinstance(prompt, Mapping):
        return (), dict(prompt)
    return (tuple(prompt), {}) if isinstance(prompt, (tuple, list)) else ((prompt,), {})


class Collector:
    """Adds up the statistics of every attention call, by layer."""

    def __init__(self, config: AKVQConfig, queries: int):
        self.config, self.queries = config, queries
        self.layers: dict[str, LayerStatistics] = {}
        self.prompts: list[Prompt] = []
        self.prompt: Prompt | None = None

    def begin(self) -> None:
        self.prompt = None

    def look(self, call: AttentionCall) -> None:
        layer = self.layers.setdefault(call.label, LayerStatistics(call.layer, call.label))
        valid = measure.valid_of(call)
        vision = call.vision & valid if call.vision is not None else torch.zeros_like(valid)
        peaks = measure.peaks_of(call)
        pivots = measure.pivots_of(peaks, valid, self.config)
        asked = 0
        for row in range(len(valid)):
            at = measure.queries_of(valid[row], vision[row], self.queries)
            asked += len(at)
            found, tokens = measure.attention_mass(
                call, row, at, valid[row], vision[row], pivots[row], self.config.window
            )
            layer.sums = {name: layer.sums.get(name, 0) + mass for name, mass in found.items()}
            layer.tokens = {name: layer.tokens.get(name, 0) + count for name, count in tokens.items()}
        layer.queries += asked
        if peaks is not None:
            layer.massive += self.massive(peaks, valid)
        for name, (largest, mean) in measure.channel_magnitudes(call, valid).items():
            before = layer.largest.get(name, largest)
            layer.largest[name] = torch.maximum(before, largest)
            layer.mean[name] = (layer.mean.get(name, 0) * layer.calls + mean) / (layer.calls + 1)
        layer.calls += 1
        if self.prompt is None:
            self.prompt = Prompt(*valid.shape, int(vision.sum()), asked)

    def massive(self, peaks: tuple, valid: Tensor) -> list[Massive]:
        chosen, median = measure.massive_of(peaks, valid, self.config)
        peak = torch.where(valid, peaks[0], 0.0)
        values, at = peak.topk(min(max(self.config.pivots, FEWEST), peak.shape[1]), -1)
        channel = peaks[1].gather(1, at)
        return [
            Massive(
                at[r].cpu(),
                values[r].cpu(),
                channel[r].cpu(),
                chosen[r].nonzero()[:, 0].cpu(),
                median[r].item(),
                peak[r].cpu(),
            )
            for r in range(len(valid))
        ]
