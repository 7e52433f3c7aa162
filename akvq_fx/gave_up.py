"""Where dynamo gives up: functions that run uncompiled from then on, though this backend was asked for.

Dynamo makes at most eight graphs of a function (torch._dynamo.config.recompile_limit) and 256 in all
(accumulated_recompile_limit). After that, calls that fit none of its graphs run uncompiled. Dynamo logs this once and
calls no backend any more, so a backend never learns of it. This module therefore uses the hook that dynamo runs before
every compilation, and checks there whether a limit is reached for a function that this backend is to compile. Other
backends are left alone.

Eight graphs are too few for a cache, which would then stay at 16 bits: all models of transformers share one decorator's
function, a prompt's images come as a list of any length, a model of many layers may be compiled layer by layer, and
each is another graph of one function. So unless the user chose a limit, functions of this backend may have GRAPHS
graphs; after those the user is warned.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch

from akvq_fx import mark_sizes, progress, records, torch_internals
from akvq_fx.events import EVENTS, LIMIT, Event, modules_among
from akvq_fx.report import GaveUp

GRAPHS = 64  # per function that this backend compiles, where the user did not set torch._dynamo.config.recompile_limit
_wrappers: list[weakref.ref] = []  # the user's own backend functions that call this backend


def register_hook() -> None:
    """Have dynamo call _before_compiling before every compilation; registering again changes nothing."""
    torch_internals.before_compiling(_before_compiling)


def _before_compiling() -> str:
    frame = torch_internals.compiling()
    if frame is None:
        return ""
    handle = getattr(frame.backend, "dynamo_gave_up", None)
    if handle is None and any(ref() is frame.backend for ref in _wrappers):
        handle = warn_and_keep
    if handle is not None:
        mark_sizes.mark(frame.locals)
        modules = modules_among(frame.locals)
        progress.begin(f"akvq: PyTorch traces {type(modules[0]).__name__ if modules else frame.code.co_name}")
        torch_internals.after_compiling(progress.end)
    if handle is not None and frame.limit and not frame.let_pass(GRAPHS) and not frame.hard:
        value = GRAPHS if frame.limit_is_default() else getattr(torch._dynamo.config, frame.limit)
        handle(event_of(frame, f"torch._dynamo.config.{frame.limit}", value, frame.reason))
    return ""


def event_of(frame: torch_internals.Compiling, option: str, value, reason: str) -> Event:
    modules = modules_among(frame.locals)
    owner = f" of {type(modules[0]).__name__}" if modules else ""
    function = f"'{frame.code.co_name}'{owner} ({frame.code.co_filename}:{frame.code.co_firstlineno})"
    return Event(GaveUp(function, option, value, torch_internals.guard_of(reason)), frame.code, modules)


def warn_and_keep(event: Event) -> None:
    """Warn the user, and keep the event for report(model)."""
    EVENTS[:] = [other for other in EVENTS if other.code is not event.code][-LIMIT:]
    EVENTS.append(event)
    packed = records.layers_packed(event.code)
    text = f"akvq: {event.gave_up} So far {packed} attention layers in it are packed; further ones stay as they are."
    warnings.warn(text, UserWarning, stacklevel=2)


@contextlib.contextmanager
def compiling_for(backend: Callable) -> Iterator[None]:
    """Entered while the backend compiles a graph. Remembers the function that dynamo calls as its backend, where that
    is a wrapper of the user's around this one, and warns of errors that dynamo is going to suppress."""
    register_hook()  # dynamo's hooks may have been cleared
    frame = torch_internals.compiling()
    if frame is not None and frame.backend is not backend and not any(ref() is frame.backend for ref in _wrappers):
        with contextlib.suppress(TypeError):  # not every callable can be weakly referenced
            _wrappers[:] = [ref for ref in _wrappers if ref() is not None] + [weakref.ref(frame.backend)]
    if frame is not None:  # it compiles again: after torch._dynamo.reset(), or under a raised limit
        EVENTS[:] = [event for event in EVENTS if event.code is not frame.code]
    try:
        yield
    except Exception as error:
        if frame is not None and torch._dynamo.config.suppress_errors:
            reason = f"{type(error).__name__}: {error}"
            warn_and_keep(event_of(frame, "torch._dynamo.config.suppress_errors", True, reason))
        raise
