"""CacheAxes: the order in which a model keeps the axes of its cache tensors.

Buffers (kernels/layout.py) hold a cache in one order, and passes and ops see it as [batch, heads, tokens, channels].
The tensor that the model's own code sees keeps the order that this code has:

    b h t d      [B, H, T, D], STANDARD
    b t h d      [B, T, H, D]
    b t (h d)    [B, T, H * D], heads and channels in one axis
    t b h d      [T, B, H, D], and so on
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from torch import Tensor

LETTERS = "bhtd"
NAMES = dict(zip(LETTERS, "BHTD", strict=True))
Step = tuple  # (name of a tensor's method, its arguments)


@dataclass(frozen=True)
class CacheAxes:
    """groups: the letters that each axis of the tensor stands for, outermost first; only "hd" is an axis of two.

    Raises ValueError for anything else.
    """

    groups: tuple[str, ...]

    def __post_init__(self):
        if sorted("".join(self.groups)) != sorted(LETTERS) or any(len(g) > 1 and g != "hd" for g in self.groups):
            raise ValueError(f"akvq: the axes of a cache are {self}, accepted: b, h, t and d in any order, or (h d)")

    def __str__(self) -> str:
        return self.text

    @functools.cached_property
    def text(self) -> str:
        """As `parse` takes it; guards compare it for every cache in every step."""
        return " ".join(g if len(g) == 1 else f"({' '.join(g)})" for g in self.groups)

    @property
    def shown(self) -> str:
        """As comments and reports have it: [B, T, H * D]."""
        return f"[{', '.join(' * '.join(NAMES[letter] for letter in group) for group in self.groups)}]"

    @staticmethod
    @functools.cache
    def parse(text: str) -> CacheAxes:
        """The inverse of str(). Raises ValueError for anything that str() cannot have written."""
        axes = CacheAxes(tuple(group.strip("()").replace(" ", "") for group in re.findall(r"\([^()]*\)|\w", text)))
        if str(axes) != text:
            raise ValueError(f"akvq: the axes of a cache are {text!r}, accepted: text such as {axes}")
        return axes

    @functools.cached_property
    def rows(self) -> int:
        """The axis of the batch."""
        return self.groups.index("b")

    @functools.cached_property
    def tokens(self) -> int:
        return self.groups.index("t")

    @property
    def rank(self) -> int:
        return len(self.groups)

    def shape(self, batch, heads, length, channels) -> tuple:
        """The tensor's shape; sizes may be symbols, but for heads * channels."""
        sizes = {"b": batch, "h": heads, "t": length, "d": channels}
        return tuple(sizes[group] if len(group) == 1 else heads * channels for group in self.groups)

    def to_standard(self, heads: int, channels: int) -> list[Step]:
        """What makes [B, H, T, D] of a tensor in these axes."""
        steps, letters = [], "".join(self.groups)
        if "hd" in self.groups:
            steps.append(("unflatten", self.groups.index("hd"), (heads, channels)))
        order = tuple(letters.index(letter) for letter in LETTERS)
        return steps if order == (0, 1, 2, 3) else [*steps, ("permute", *order)]

    def from_standard(self) -> list[Step]:
        """What makes a tensor in these axes of [B, H, T, D]."""
        order = tuple(LETTERS.index(letter) for group in self.groups for letter in group)
        steps = [] if order == (0, 1, 2, 3) else [("permute", *order)]
        if "hd" in self.groups:
            steps.append(("flatten", self.groups.index("hd"), self.groups.index("hd") + 1))
        return steps


STANDARD = CacheAxes(tuple(LETTERS))


def moved(x: Tensor, steps: list[Step]) -> Tensor:
    """x after these steps: a view of it, but where axes are merged that do not lie together."""
    for method, *arguments in steps:
        x = getattr(x, method)(*arguments)
    return x
