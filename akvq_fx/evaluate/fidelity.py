"""How far a packed cache moves a model's predictions, against its own 16-bit cache: fidelity, prompt_fidelity.

A prefix (text, or anything the model takes: pixel_values ...) is cached in one call, then the ids that follow are read
over that cache. In one call they see each other at full precision and the prefix as packed; with `step` tokens a call
they are packed as they go, as generated tokens are. Both caches see the same tokens. The product itself is measured,
not a simulation: the model is compiled with the backend. Per predicted token, p from its own cache and p' from the
packed one, in nats where they are logarithms:
    nll     -log p(next);   dnll  log p(next) - log p'(next)
    kl      sum p log(p / p')
    agree   argmax p = argmax p'
    tv      total variation, sum |p - p'| / 2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from akvq_fx.evaluate.settings import bits_of, options_of, original, prefill, read, running
from akvq_fx.evaluate.table import Column

MEASURES = ("nll", "dnll", "kl", "agree", "tv")
Options = Mapping[str, Any] | str | None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """inputs: the prefix, input_ids [1, T] and what else the model takes; following: ids [n >= 2] after it."""

    inputs: Mapping[str, Any]
    following: Tensor


@dataclasses.dataclass
class Fidelity:
    """Measures by prompt and position, float64 [N, n - 1] each, and the bits per cached number of the last prompt.

    Prompts that have fewer tokens than the longest are filled up with nan, which no mean counts.
    """

    values: dict[str, Tensor]
    bits: float

    def mean(self, name: str) -> float:
        return self.values[name].nanmean().item()

    def standard_error(self, name: str) -> float:
        """Of the mean, over prompts; nan for one prompt."""
        by_prompt = self.values[name].nanmean(1)
        return (by_prompt.std() / len(by_prompt) ** 0.5).item()

    def by_position(self, name: str) -> Tensor:
        """[n - 1]: mean over prompts at each distance from the prefix."""
        return self.values[name].nanmean(0)

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


def prompts_of(windows: Tensor, prefix: int) -> list[Prompt]:
    """Windows [N, prefix + n] of token ids as prompts. Raises ValueError for windows that leave no token to predict."""
    if windows.dim() != 2 or not 0 < prefix < windows.shape[1] - 1:
        raise ValueError(
            f"akvq_fx.evaluate: windows {list(windows.shape)} with a prefix of {prefix} leave nothing to predict"
        )
    return [Prompt({"input_ids": window[None, :prefix]}, window[prefix:]) for window in windows]


def fidelity(
    model: torch.nn.Module,
    windows: Tensor,
    prefix: int,
    options: Options = None,
    progress: Callable | None = None,
    step: int | None = None,
) -> Fidelity:
    """prompt_fidelity of windows [N, prefix + n] of token ids."""
    return prompt_fidelity(model, prompts_of(windows, prefix), options, progress, step)


def prompt_fidelity(
    model: torch.nn.Module,
    prompts: Iterable[Prompt],
    options: Options = None,
    progress: Callable | None = None,
    step: int | None = None,
) -> Fidelity:
    """Measure one setting on a causal language model or a vision-language model.

    options    as of torch.compile(model, backend="akvq", options=...), or a setting as on the command line
               ("akvq:window=64", "none"); None: the backend's defaults, with values rotated in the graph, so that
               weights stay as they are
    progress   called after each prompt
    step       tokens after the prefix that are read in a call; None: all of them
    Raises ValueError for a prompt that leaves nothing to predict, NothingPacked (a RuntimeError) where the backend
    packed nothing.
    """
    options = options_of(options) if isinstance(options, str) else dict(options or {})
    found, bits = [], 0.0
    with running(model, options) as run:
        for prompt in prompts:
            values, bits = measure(run, prompt, step)
            found.append(values)
            if progress is not None:
                progress()
    padded = lambda name: torch.nn.utils.rnn.pad_sequence([f[name] for f in found], True, float("nan"))
    return Fidelity({name: padded(name) for name in MEASURES}, bits)


@torch.no_grad()
def measure(run: Any, prompt: Prompt, step: int | None = None) -> tuple[dict[str, Tensor], float]:
    """Measures by position, [n - 1] each, and bits per cached number, of one prompt; run: of settings.running."""
    if prompt.following.dim() != 1 or len(prompt.following) < 2:
        raise ValueError(
            f"akvq_fx.evaluate: {list(prompt.following.shape)} ids after the prefix leave nothing to predict; "
            "accepted: a row of 2 or more"
        )
    own, cache = continuation(original(run), prompt, step)
    packed = own
    if run is not original(run):
        packed, cache = continuation(run, prompt, step)
    return compare(own, packed, prompt.following[1:].to(own.device)), bits_of(cache, run)


def continuation(model: Any, prompt: Prompt, step: int | None) -> tuple[Tensor, Any]:
    """Log-probabilities [n - 1, V] of the tokens after the first one past the prefix, and the cache."""
    logits, cache = read(model, prompt.following, prefill(model, prompt.inputs), step)
    return logits[:-1].double().log_softmax(-1), cache


def compare(own: Tensor, packed: Tensor, following: Tensor) -> dict[str, Tensor]:
    """Measures per position; own, packed [n, V] log-probabilities, following [n] the tokens that came."""
    p, q = own.exp(), packed.exp()
    own_next, packed_next = (x.gather(1, following[:, None])[:, 0] for x in (own, packed))
    agree = (own.argmax(-1) == packed.argmax(-1)).double()
    # a token of probability 0 adds nothing, though its logarithms do not subtract
    gaps = torch.where(p > 0, p * (own - packed), 0)
    found = {"nll": -own_next, "dnll": own_next - packed_next, "kl": gaps.sum(-1), "agree": agree}
    found["tv"] = (p - q).abs().sum(-1) / 2
    return {name: value.cpu() for name, value in found.items()}


BITS = Column("bits", "bits", 2, error=False)
COLUMNS = (  # of `compare`, as tables show them
    Column("dnll", "dNLL", 4),
    Column("kl", "KL", 4),
    Column("agree", "top-1 agreement"),
    Column("overlap", "1 - TV", 4),
)


class FidelityTask:
    """A table.Suite of one task: means over positions, a row for each prompt.

    load     () -> (model, its prompts); called when the first sample is measured, so a finished table needs no model
    about    all that the numbers depend on but the setting and the step
    step     as of prompt_fidelity
    """

    columns = (BITS, *COLUMNS)
    headline = "kl"

    def __init__(
        self, model: str, task: str, count: int, about: Mapping[str, Any], load: Callable, step: int | None = None
    ):
        self.model, self.tasks = model, (task,)
        self._count, self._about, self._load, self._step = count, about, load, step

    def what(self, task: str) -> dict[str, Any]:
        return {"kind": "fidelity", **self._about, **({"step": self._step} if self._step else {})}

    def count(self, task: str) -> int:
        return self._count

    @contextmanager
    def under(self, options: Mapping[str, Any] | None) -> Iterator[Callable[[str, int], dict]]:
        model, prompts = self._load()
        with running(model, options) as run:
            yield lambda task, index: row_of(run, prompts[index], self._step)


def row_of(run: Any, prompt: Prompt, step: int | None) -> dict:
    values, bits = measure(run, prompt, step)
    row = {name: value.mean().item() for name, value in values.items()}
    return {**row, "overlap": 1 - row["tv"], "bits": bits}
