"""ablation(model, prompts, option, values): akvq_fx.evaluate's fidelity along one option, e.g. the window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from akvq_fx.evaluate.fidelity import Fidelity, Prompt, prompt_fidelity
from akvq_fx.report import _table

STEP = 16  # tokens per call for option="window", so that tokens leave the window between calls


@dataclass
class Ablation:
    """One option's values, and what each did to the model's predictions; str() is a table."""

    option: str
    values: list[Any]
    results: list[Fidelity]

    def mean(self, measure: str) -> list[float]:
        return [result.mean(measure) for result in self.results]

    def __str__(self) -> str:
        lines = [(self.option, "bits", "dNLL", "KL", "top-1 agreement", "1 - TV")]
        for value, found in zip(self.values, self.results, strict=True):
            kl, tv = found.mean("kl"), found.mean("tv")
            dnll, agree = found.mean("dnll"), found.mean("agree")
            cells = (f"{found.bits:.2f}", f"{dnll:+.4f}", f"{kl:.4f}", f"{agree:.3f}", f"{1 - tv:.4f}")
            lines.append((str(value), *cells))
        return _table(lines)


def ablation(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    option: str,
    values: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    progress=None,
    step: int | None = None,
) -> Ablation:
    """prompt_fidelity(model, prompts, {**options, option: value}) for each value; `progress` as there.

    prompts   akvq_fx.evaluate.fidelity's: prompts_of(windows, prefix) of a text, or inputs with images and the text
              after them
    step      tokens after the prefix that are read in one call. None: all of them, but STEP for option="window", since
              tokens read in one call see each other at full precision whatever the window
    Raises ValueError where there are no values.
    """
    if not values:
        raise ValueError(f"akvq_fx.analysis: no values of {option} to compare")
    step = step or (STEP if option == "window" else None)
    results = [prompt_fidelity(model, prompts, {**(options or {}), option: value}, progress, step) for value in values]
    return Ablation(option, list(values), results)
