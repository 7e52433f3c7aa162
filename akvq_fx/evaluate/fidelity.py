"""fidelity(model, windows, prefix, options): how far a packed cache moves a causal LM's predictions, against its own 16-bit cache.

windows   [N, prefix + count] int64 token ids. The prefix is cached in one call, then the other tokens are read in one call
          over that cache; they see each other at full precision and the prefix as packed. Both caches see the same tokens.
options   as of torch.compile(model, backend="akvq", options=...); values are rotated in the graph unless told otherwise, so
          weights stay as they are.

The product itself is measured, not a simulation: the model is compiled with the backend. Per predicted token, p from its own cache
and p' from the packed one, in nats where they are logarithms:
    nll     -log p(next);   dnll  log p(next) - log p'(next)
    kl      sum p log(p / p')
    agree   argmax p = argmax p'
    tv      total variation, sum |p - p'| / 2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import akvq_fx

MEASURES = ("nll", "dnll", "kl", "agree", "tv")


@dataclasses.dataclass
class Fidelity:
    """Measures by window and position, float64 [N, count - 1] each, and the bits per cached number of the last window."""

    values: dict[str, Tensor]
    bits: float

    def mean(self, name: str) -> float:
        return self.values[name].mean().item()

    def standard_error(self, name: str) -> float:
        """Of the mean, over windows; nan for one window."""
        by_window = self.values[name].mean(1)
        return (by_window.std() / len(by_window) ** 0.5).item()

    def by_position(self, name: str) -> Tensor:
        """[count - 1]: mean over windows at each distance from the prefix."""
        return self.values[name].mean(0)

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        found: dict[str, Any] = {name: self.mean(name) for name in MEASURES}
        found |= {f"{name}_error": self.standard_error(name) for name in MEASURES}
        return {**found, "bits": self.bits, "windows": len(self.values["nll"])}


def windows_of(ids: Tensor, count: int, length: int) -> Tensor:
    """[count, length] token ids, evenly spread over a text's ids [T].

    Raises ValueError where the text is shorter than the windows laid side by side.
    """
    if ids.dim() != 1 or len(ids) < count * length:
        raise ValueError(
            f"akvq_fx.evaluate: the text has {list(ids.shape)} tokens, accepted: a row of {count * length} or more "
            f"for {count} windows of {length}"
        )
    starts = torch.linspace(0, len(ids) - length, count).long()
    return torch.stack([ids[start : start + length] for start in starts])


@torch.no_grad()
def fidelity(
    model: torch.nn.Module, windows: Tensor, prefix: int, options: Mapping[str, Any] | None = None, progress=None
) -> Fidelity:
    """Measure one set of options; `progress` is called after each window. Resets dynamo's compiled code before and after.

    Raises ValueError for windows that leave no token to predict, RuntimeError where the backend packed nothing.
    """
    if windows.dim() != 2 or not 0 < prefix < windows.shape[1] - 1:
        raise ValueError(
            f"akvq_fx.evaluate: windows {list(windows.shape)} with a prefix of {prefix} leave nothing to predict"
        )
    options = {"inner": "eager", "value_rotation": "online", **(options or {})}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="akvq", options=options)
    rows, bits = [], 0.0
    try:
        for window in windows:
            ids = window[None].to(next(model.parameters()).device)
            own, _ = continuation(model, ids, prefix)
            packed, cache = continuation(compiled, ids, prefix)
            rows.append(compare(own, packed, ids[0, prefix + 1 :]))
            stats = akvq_fx.cache_stats(cache)
            if not stats.packed_tensors:
                raise RuntimeError(f"akvq_fx.evaluate: nothing was packed\n{akvq_fx.report(model)}")
            bits = stats.bits_per_element
            if progress is not None:
                progress()
    finally:
        torch._dynamo.reset()
    return Fidelity({name: torch.stack([row[name] for row in rows]) for name in MEASURES}, bits)


def continuation(model, ids: Tensor, prefix: int) -> tuple[Tensor, Any]:
    """Log-probabilities [count - 1, V] of the tokens after the first one past the prefix, and the cache."""
    cache = model(input_ids=ids[:, :prefix], use_cache=True).past_key_values
    out = model(input_ids=ids[:, prefix:], past_key_values=cache, use_cache=True)
    return out.logits[0, :-1].double().log_softmax(-1), out.past_key_values


def compare(own: Tensor, packed: Tensor, following: Tensor) -> dict[str, Tensor]:
    """Measures per position; own, packed [n, V] log-probabilities, following [n] the tokens that came."""
    p, q = own.exp(), packed.exp()
    heard, told = (x.gather(1, following[:, None])[:, 0] for x in (own, packed))
    agree = (own.argmax(-1) == packed.argmax(-1)).double()
    found = {"nll": -heard, "dnll": heard - told, "kl": (p * (own - packed)).sum(-1), "agree": agree}
    found["tv"] = (p - q).abs().sum(-1) / 2
    return {name: value.cpu() for name, value in found.items()}
