"""Recipe, Simulator, Simulation: what a published KV-cache quantization method changes, and how it is carried out here.

A *packed* recipe is a set of options: its layout is one that kernels/layout.py packs. A *simulated* one keeps the
original tokens and quantizes and dequantizes them whenever attention reads them, by a pure function of the tokens and
their positions: groups have fixed boundaries, so this gives the numbers that quantizing at write time gives, and no
memory is saved.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

WRITTEN = re.compile(r"([a-z0-9_]+)\(([a-z]+=[0-9.]+(?:,[a-z]+=[0-9.]+)*)?\)")


@dataclasses.dataclass(frozen=True)
class Context:
    """What a simulated read knows beside the tokens x [R, H, T, D], all of them real ones (no padding).

    past    tokens cached before this call; the ones after them are read as they are
    vision  [R, T] bool
    gains   [R, H, D] float32 divisor of the keys chosen from the prompt, where the method has one; 0 for none chosen
    """

    past: int
    vision: Tensor
    gains: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Simulator:
    """A method's arithmetic for one half of the cache; **numbers are the keyword parameters of `read`, in its order.

    read    (x [R, H, T, D], context, **numbers) -> what attention reads, in x's shape and dtype
    bits    (head_dim, heads, tokens, vision, **numbers) -> bits per cached number in a real cache of the method, every
            overhead counted; vision is the share of vision tokens
    scores  (a [R, Hq, q, T] scaled scores, seen [R, T] bool, **numbers) -> scores; seen are the vision tokens cached
            before
    """

    read: Callable[..., Tensor]
    bits: Callable[..., float]
    scores: Callable[..., Tensor] | None = None


SIMULATORS: dict[str, Simulator] = {}  # by name; filled by the files of this folder


@dataclasses.dataclass(frozen=True)
class Simulation:
    """A simulator with its numbers; travels in a layout as its text, `Simulation.parse(str(simulation))`."""

    name: str
    numbers: tuple[tuple[str, float], ...]

    @property
    def simulator(self) -> Simulator:
        return SIMULATORS[self.name]

    @property
    def alpha(self) -> float | None:
        """SmoothQuant's exponent, where the prompt's keys and queries choose gains."""
        return dict(self.numbers).get("alpha")

    def read(self, x: Tensor, context: Context) -> Tensor:
        return self.simulator.read(x, context, **dict(self.numbers))

    def bits(self, head_dim: int, heads: int, tokens: int, vision: float = 0.0) -> float:
        return self.simulator.bits(head_dim, heads, tokens, vision, **dict(self.numbers))

    def scores(self, scores: Tensor, seen: Tensor) -> Tensor:
        return self.simulator.scores(scores, seen, **dict(self.numbers))

    def __str__(self) -> str:
        return f"{self.name}({','.join(f'{name}={number:g}' for name, number in self.numbers)})"

    @staticmethod
    @functools.cache
    def parse(text: str) -> Simulation:
        """The inverse of str(). Raises ValueError for anything str() cannot have written."""
        match = WRITTEN.fullmatch(text)
        if match is None or match[1] not in SIMULATORS:
            raise ValueError(
                f"akvq: simulation {text!r} is unknown, accepted: name(number=...,...) of {list(SIMULATORS)}"
            )
        given = [part.split("=") for part in (match[2] or "").split(",") if part]
        numbers = tuple((name, int(number) if number.isdigit() else float(number)) for name, number in given)
        made, known = Simulation(match[1], numbers), parameters_of(match[1])
        if str(made) != text or [name for name, _ in numbers] != known:
            raise ValueError(f"akvq: simulation {text!r} is not how one is written, accepted numbers: {known}")
        return made


def parameters_of(name: str) -> list[str]:
    """The numbers of a simulator, as its read function names them."""
    return list(inspect.signature(SIMULATORS[name].read).parameters)[2:]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """options: fields of AKVQConfig that the recipe changes where the user did not set them.

    keys, values  texts of Simulations for a simulated recipe, "" for a packed one
    """

    name: str
    source: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: str = ""
    values: str = ""

    @property
    def simulated(self) -> bool:
        return bool(self.keys or self.values)
