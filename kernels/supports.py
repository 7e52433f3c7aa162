"""Supports: which layouts a kernel takes. A field that it does not name is refused, so that new ones are not misread.

A kernel names every field of Layout with the values that it takes, and properties (`groups`) where these are what
matters to it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container

from akvq_fx.kernels.layout import Layout


class Every:
    """Contains every value: for fields that a kernel handles in general, or that do not concern it."""

    def __contains__(self, value) -> bool:
        return True


ANY = Every()
NOT_SIMULATED = ("",)


class Supports:
    """accepted: by name of a field or property of Layout, the values that are taken: a tuple, a range or ANY."""

    def __init__(self, **accepted: Container):
        self.accepted = accepted
        self.refusal = functools.cache(self._refusal)

    def _refusal(self, layout: Layout) -> str:
        """Why a cache of this layout is not taken; "" where it is. Answers are kept by layout."""
        for name, values in self.accepted.items():
            given = getattr(layout, name)
            if given not in values:
                return f"{name} is {shown(given)}, accepted: {words(values)}"
        unknown = [f for f in dataclasses.fields(layout) if f.name not in self.accepted]
        return f"the layout has {unknown[0].name}, of which the kernel knows nothing" if unknown else ""

    def pair_refusal(self, keys: Layout, values: Layout) -> str:
        """The same of two layouts; says which."""
        for name, layout in (("keys", keys), ("values", values)):
            reason = self.refusal(layout)
            if reason:
                return f"{name}: {reason}"
        return ""


def words(values: Container) -> str:
    if isinstance(values, range):
        steps = f" in steps of {values.step}" if values.step > 1 else ""
        return f"{values[0]} to {values[-1]}{steps}"
    *most, last = map(shown, values)
    return f"{', '.join(most)} or {last}" if most else last


def shown(value) -> str:
    return "none" if value == "" else str(value)
