"""Folded copies of projection weights: W_V' = H W_V, b_V' = H b_V and W_O' = W_O H per head, computed in float64.

A graph whose values are folded gets the copies in place of the model's own weights, which stay as they are: whatever
the model saves, copies, merges or prunes is the original. The copies of a weight are shared by all graphs that run it
and keep their addresses. They are computed again with every prompt and after every change that akvq_fx.digest.mark
sees, so a change of the originals takes effect with the next prompt at the latest. They cost the memory of the value
and output projections once more.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from akvq_fx.digest import mark, parts
from akvq_fx.kernels.rotate import matrix


class Folded:
    """Copies of one value projection and its output projection.

    rows, columns    [H, D] and [Hq, D] int64: rows of the value weight and columns of the output weight by head and
                     channel
    """

    def __init__(self, value: Tensor, bias: Tensor | None, output: Tensor, rows: Tensor, columns: Tensor):
        self.rows, self.columns = rows, columns
        self.sources = [None if x is None else weakref.ref(x) for x in (value, bias, output)]
        self.copies: list[Tensor | None] = [None, None, None]
        self.marks: list = []

    def is_of(self, sources: Sequence[Tensor | None], rows: Tensor, columns: Tensor) -> bool:
        known = [None if ref is None else ref() for ref in self.sources]
        same = all(a is b for a, b in zip(known, sources, strict=True))
        return same and torch.equal(rows, self.rows) and torch.equal(columns, self.columns)

    def renew(self, sources: Sequence[Tensor | None], anew: bool) -> None:
        """Compute the copies where a source changed, or `anew`."""
        marks = [None if x is None else mark(x) for x in sources]
        if marks == self.marks and not anew:
            return
        # inference tensors could not be updated outside inference mode
        with torch.inference_mode(False), torch.no_grad():
            for i, source in enumerate(sources):
                if source is not None:
                    self.copies[i] = into(self.copies[i], self.rotated(i, source))
        self.marks = marks

    def rotated(self, i: int, source: Tensor) -> Tensor:
        h = matrix(self.rows.shape[1], device=source.device)
        rows, columns = self.rows.to(source.device), self.columns.to(source.device)
        made = source.detach().clone()
        (part,) = parts(made)  # all of it, or what this process has of it
        if i == 0:
            part[rows] = torch.einsum("ij,hjf->hif", h, part[rows].double()).to(part.dtype)
        elif i == 1:
            part[rows] = (part[rows].double() @ h).to(part.dtype)
        else:
            part[:, columns] = (part[:, columns].double() @ h).to(part.dtype)
        return made


def into(place: Tensor | None, made: Tensor) -> Tensor:
    """made, at the address of `place` where it fits: CUDA graphs hold addresses."""
    if place is None or (place.shape, place.dtype, place.device) != (made.shape, made.dtype, made.device):
        return made
    return place.copy_(made)


class FoldedWeights:
    """The folded copies of this process, by value weight; weak, so a model that goes away takes its copies along."""

    def __init__(self):
        self.known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.lock = threading.Lock()

    def of(self, sources: Sequence[Tensor | None], rows: Tensor, columns: Tensor, anew: bool) -> list[Tensor | None]:
        """Copies of (value weight, value bias or None, output weight)."""
        with self.lock:
            entries = self.known.setdefault(sources[0], [])
            folded = next((entry for entry in entries if entry.is_of(sources, rows, columns)), None)
            if folded is None:
                folded = Folded(*sources, rows, columns)
                alive = [entry for entry in entries if all(ref is None or ref() is not None for ref in entry.sources)]
                self.known[sources[0]] = [*alive, folded]
            folded.renew(sources, anew)
            return folded.copies

    def forget(self, weight: Tensor) -> bool:
        """Free the copies of a value weight; False where there are none."""
        with self.lock:
            return self.known.pop(weight, None) is not None


FOLDED = FoldedWeights()


def unfold(model: nn.Module) -> int:
    """Free the folded copies of a model's weights; returns the number of value projections that had any.

    The model's own weights were never changed. A graph that was compiled with value_rotation="fold" makes its copies
    again when it next runs; compile with value_rotation="online" to do without them.
    """
    return sum(FOLDED.forget(parameter) for parameter in model.parameters())
