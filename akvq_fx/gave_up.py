"""Where dynamo gives up: functions that run uncompiled from then on, though this backend was asked for.

Dynamo makes eight graphs of a function (torch._dynamo.config.recompile_limit) and 256 in all (accumulated_recompile_limit). After
that it runs what it has, and everything that no graph fits uncompiled. It logs that once and calls no backend any more, so none
would know. Here dynamo's own hook before every compilation looks whether a limit is reached for a function that this backend is to
compile. The backends of other people are left alone.

Eight are too few for a cache, which would then lie there at 16 bits. All models of transformers share one decorator's function, a
prompt's images come as a list of any length, a model of many layers may be compiled layer by layer: each is another graph of one
function. So unless somebody chose a limit, this backend's functions have GRAPHS, and then the user is told.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch

from akvq_fx import mark_sizes, records, torch_internals
from akvq_fx.events import EVENTS, LIMIT, Event, modules_among
from akvq_fx.report import GaveUp

GRAPHS = 64  # of a function that this backend compiles, where nobody chose torch._dynamo.config.recompile_limit
_wrappers: list[weakref.ref] = []  # functions of the user's that call this backend, given to torch.compile in its place


def listen() -> None:
    """Hear of every compilation that dynamo begins."""
    torch_internals.before_compiling(_before_compiling)


def _before_compiling() -> str:
    seen = torch_internals.compiling()
    if seen is None:
        return ""
    tell = getattr(seen.backend, "dynamo_gave_up", None)
    if tell is None and any(ref() is seen.backend for ref in _wrappers):
        tell = globals()["tell"]
    if tell is not None:
        mark_sizes.mark(seen.locals)
    if tell is not None and seen.limit and not seen.let_pass(GRAPHS) and not seen.hard:
        value = GRAPHS if seen.limit_is_default() else getattr(torch._dynamo.config, seen.limit)
        tell(event_of(seen, f"torch._dynamo.config.{seen.limit}", value, seen.reason))
    return ""


def event_of(seen: torch_internals.Compiling, option: str, value, reason: str) -> Event:
    modules = modules_among(seen.locals)
    owner = f" of {type(modules[0]).__name__}" if modules else ""
    function = f"'{seen.code.co_name}'{owner} ({seen.code.co_filename}:{seen.code.co_firstlineno})"
    return Event(GaveUp(function, option, value, torch_internals.guard_of(reason)), seen.code, modules)


def tell(event: Event) -> None:
    """Keep it for report(model), and warn."""
    EVENTS[:] = [other for other in EVENTS if other.code is not event.code][-LIMIT:]
    EVENTS.append(event)
    packed = records.layers_packed(event.code)
    told = f"akvq: {event.told} So far {packed} attention layers in it are packed; further ones stay as they are."
    warnings.warn(told, UserWarning, stacklevel=2)


@contextlib.contextmanager
def noticed(backend: Callable) -> Iterator[None]:
    """While the backend works on a graph: what called it is known as its own, and errors that dynamo will swallow are told."""
    listen()  # dynamo's hooks may have been cleared
    seen = torch_internals.compiling()
    if seen is not None and seen.backend is not backend and not any(ref() is seen.backend for ref in _wrappers):
        with contextlib.suppress(TypeError):  # what cannot be referred to weakly
            _wrappers[:] = [ref for ref in _wrappers if ref() is not None] + [weakref.ref(seen.backend)]
    if seen is not None:  # it compiles again: after torch._dynamo.reset(), or under a raised limit
        EVENTS[:] = [event for event in EVENTS if event.code is not seen.code]
    try:
        yield
    except Exception as error:
        if seen is not None and torch._dynamo.config.suppress_errors:
            tell(event_of(seen, "torch._dynamo.config.suppress_errors", True, f"{type(error).__name__}: {error}"))
        raise
