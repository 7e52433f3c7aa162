"""Events: functions that dynamo gave up on, kept for report(model). akvq_fx/gave_up.py detects them."""

from __future__ import annotations

import types
import weakref

from torch import nn

from akvq_fx.report import GaveUp

LIMIT = 256  # events kept at a time


class Event:
    """A function that dynamo gave up on, and the modules that it was called with."""

    def __init__(self, gave_up: GaveUp, code: types.CodeType, modules: list[nn.Module]):
        self.gave_up, self.code = gave_up, code
        self.modules = [weakref.ref(module) for module in modules]

    def concerns(self, modules: set[int], codes: set[int]) -> bool:
        """Whether it belongs to a model, given the ids of its modules and of the code behind its graphs."""
        return id(self.code) in codes or any(id(ref()) in modules for ref in self.modules if ref() is not None)


EVENTS: list[Event] = []


def modules_among(values: dict) -> list[nn.Module]:
    """Modules among a function's arguments, `self` first; for a bound method, the module that it is bound to."""
    found: list[nn.Module] = []
    for name, value in values.items():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "__self__", part) if isinstance(part, types.MethodType) else part
            if isinstance(part, nn.Module) and not any(part is other for other in found):
                found.insert(0 if name == "self" else len(found), part)
    return found
