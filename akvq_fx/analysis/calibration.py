"""Calibration: what was measured about a model, which layers are text-salient by it, and the policy to save.

The rule. Both kinds of layer keep the recent window at 16 bits, so only attention outside of it counts, and of that not
what goes to pivots. A layer is text-salient if
    a text token gets on average at least `ratio` times the attention of a vision token, and
    all text tokens together get at least as much attention as the pivots.
The first condition says that bits are better spent on text than on images; the second that text matters beyond the few
tokens that PSA keeps anyway: in later layers most of the attention to text goes to a pivot, usually the first token.
TSA layers are the unbroken run of text-salient layers from the first measured layer on; in the paper they are the first
layers too. The paper gives no threshold; this rule is ours, and every row shows the numbers behind it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from akvq_fx.analysis.measure import FORMS, SHARES
from akvq_fx.policy import FORMAT
from akvq_fx.report import _table

FLOAT32 = 1e-6  # what a softmax in float32 may miss of a sum of 1
COLUMNS = ("layer", "policy", "text", "vision", "sink", "recent", "far pivots", "far text", "far vision", "text:vision",
           "massive", "top |h|", "at", "median", *FORMS)  # fmt: skip


@dataclass
class Massive:
    """The largest activations of one prompt at one layer's input, by token.

    positions, values, channels   [P] of the tokens with the largest |h|, largest first
    massive                       positions of the tokens that pass the floor and the ratio
    median                        median |h| of the real tokens
    peaks                         [T] largest |h| of every token, padding 0
    """

    positions: Tensor
    values: Tensor
    channels: Tensor
    massive: Tensor
    median: float
    peaks: Tensor


@dataclass
class LayerStatistics:
    """One decoder layer, over all prompts.

    sums     share -> [Hq] attention probability, summed over `queries` queries
    tokens   far share -> number of tokens in it, summed over the queries
    massive  one for each prompt row; empty where the graph shows no residual stream
    largest, mean   form of keys or values -> [H, D] |x| by KV head and channel: the largest, and the mean over prompts
    """

    layer: int
    label: str
    queries: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    massive: list[Massive] = field(default_factory=list)
    largest: dict[str, Tensor] = field(default_factory=dict)
    mean: dict[str, Tensor] = field(default_factory=dict)
    calls: int = 0

    def by_head(self, share: str) -> Tensor:
        """[Hq] mean share of a query's attention."""
        return self.sums[share] / self.queries

    def share(self, name: str) -> float:
        return self.by_head(name).mean().item()

    def per_token(self, name: str) -> float:
        """Mean attention of a query to one token of a far share; 0 where there is none."""
        count = self.tokens[name]
        return self.sums[name].mean().item() / count if count else 0.0

    @property
    def text_over_vision(self) -> float:
        """Attention to a text token over that to a vision token, outside window and pivots; nan without either."""
        text, vision = self.per_token("far_text"), self.per_token("far_vision")
        return text / vision if text and vision else float("nan")

    def text_salient(self, ratio: float) -> bool:
        """The rule of this module."""
        return self.text_over_vision >= ratio and self.share("far_text") >= self.share("far_pivots")

    def outlier(self, form: str) -> float:
        """How far the largest channel stands out: its largest |x| over the channels' mean, averaged over heads."""
        largest = self.largest[form]
        return (largest.amax(-1) / largest.mean(-1).clamp_min(torch.finfo(largest.dtype).tiny)).mean().item()

    def top(self) -> Massive | None:
        """The largest activations of the prompt that has the very largest."""
        return max(self.massive, key=lambda m: m.values[0].item(), default=None)


@dataclass(frozen=True)
class Prompt:
    """What was measured on: rows, tokens (padding included), and how many are vision or query tokens."""

    batch: int
    tokens: int
    vision: int
    queries: int


@dataclass
class Calibration:
    """str() is a table, .policy() and .save(path) are what the backend takes, .layers is the data.

    refused   label -> reason, of attention that was not measured because its cache would stay at 16 bits
    settings  the numbers that measured and decided: window, pivots, massive_floor, massive_ratio, queries, ratio
    """

    model: str
    layers: list[LayerStatistics]
    prompts: list[Prompt]
    settings: dict[str, Any]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def tsa_layers(self) -> tuple[int, ...]:
        """The leading run of text-salient layers; none where no prompt had a vision token."""
        found: list[int] = []
        if any(prompt.vision for prompt in self.prompts):
            for layer in self.layers:
                if not layer.text_salient(self.settings["ratio"]):
                    break
                found.append(layer.layer)
        return tuple(found)

    @property
    def notes(self) -> list[str]:
        found = [f"{label} was not measured: {reason}" for label, reason in self.refused.items()]
        if not any(prompt.vision for prompt in self.prompts):
            found.append("no vision tokens were seen: TSA does not apply, every layer is PSA")
        if all(layer.share("recent") > 1 - FLOAT32 for layer in self.layers):
            found.append(
                f"everything lies in the recent window of {self.settings['window']} tokens: measure on longer prompts"
            )
        if not all(layer.massive for layer in self.layers):
            found.append("some graphs show no residual stream: there the pivot is the first real token")
        return found

    def options(self) -> dict[str, Any]:
        """Options of torch.compile(backend="akvq") that this calibration decides."""
        return {"tsa_layers": list(self.tsa_layers)}

    def policy(self) -> dict[str, Any]:
        """Plain data: the options, and what they were decided from."""
        rows = []
        for layer in self.layers:
            row: dict[str, Any] = {"layer": layer.layer, "policy": "TSA" if layer.layer in self.tsa_layers else "PSA"}
            row |= {name: round(layer.share(name), 4) for name in SHARES}
            row["text_over_vision"] = round(layer.text_over_vision, 2) if layer.text_over_vision >= 0 else None
            row["massive"] = sorted({int(i) for found in layer.massive for i in found.massive})
            rows.append(row)
        measured = {
            "model": self.model,
            "prompts": [dataclasses.asdict(prompt) for prompt in self.prompts],
            "settings": self.settings,
            "layers": rows,
        }
        return {"format": FORMAT, "options": self.options(), "measured": measured}

    def save(self, path: str | Path) -> None:
        """Write the policy as JSON, for akvq_fx.load_policy."""
        Path(path).write_text(json.dumps(self.policy(), indent=1) + "\n")

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of COLUMNS for each layer; those of keys and values are `outlier`."""
        tsa, found = self.tsa_layers, []
        for layer in self.layers:
            top = layer.top()
            massive = ("-",) * 4
            if top is not None:
                count = max(len(m.massive) for m in layer.massive)
                massive = (str(count), f"{top.values[0].item():.4g}", str(int(top.positions[0])), f"{top.median:.3g}")
            names = ("text", "vision", "sink", "recent", "far_pivots", "far_text", "far_vision")
            shares = [f"{layer.share(name):.3f}" for name in names]
            shares.append(f"{layer.text_over_vision:.1f}")
            outliers = [f"{layer.outlier(form):.2f}" for form in FORMS]
            found.append((str(layer.layer), "TSA" if layer.layer in tsa else "PSA", *shares, *massive, *outliers))
        return found

    def __str__(self) -> str:
        decided = (
            f"{self.model}: tsa_layers={self.tsa_layers}, {len(self.prompts)} prompts, {self.layers[0].queries} queries"
        )
        return "\n".join([decided, _table([COLUMNS, *self.rows()]), *(f"note: {note}" for note in self.notes)])
