"""Together: a compiled graph of single cache tensors, called as the model calls its own, in which several are one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from akvq_fx.packed_bundle import bundled
from akvq_fx.passes.apart.take_apart import Apart
from akvq_fx.passes.apart.take_apart import Together as Made


class Together:
    """What dynamo gets where a model keeps keys and values, or layers, in one tensor. Host work only."""

    def __init__(self, run: Callable, apart: Apart):
        """run: what takes and returns single cache tensors."""
        self.run, self.inner = run, getattr(run, "inner", run)
        self.bundles, self.outputs = set(apart.bundles), apart.outputs

    def __call__(self, *args):
        given: list = []
        for position, argument in enumerate(args):
            if position in self.bundles:
                given += argument.leaves
            else:
                given.append(argument)
        results = iter(self.run(*given))
        return tuple(next(results) if made is None else together(made, results) for made in self.outputs)


def together(made: Made, results) -> torch.Tensor:
    """One tensor of the next results: a bundle where they are packed."""
    parts = [next(results) if part is None else together(part, results) for part in made.parts]
    return bundled(made.how, made.axis, parts)
