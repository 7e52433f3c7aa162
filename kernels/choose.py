"""choose: which implementation of an op answers a call: the first that does not refuse it. Each refusal is logged once.

An implementation is a module akvq_fx.kernels.<name> with a function of the op's name and `refusal(...) -> str`, ""
where it takes the call. Modules are imported when they are first asked, since triton and a C++ compiler are optional.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """A kernel turned out not to run here. It has written nothing, and its refusal gives the reason from now on."""


def choose(op: str, names: tuple[str, ...], *about) -> Callable | None:
    """The op's function in the first of these modules whose refusal(*about) is empty; None where all refuse."""
    return dispatch(lambda kernel: kernel, op, names, *about)


def dispatch(run: Callable, op: str, names: tuple[str, ...], *about):
    """run(kernel) with the first kernel that neither refuses nor raises Unavailable; with None where there is none."""
    for name in names:
        module = module_of(name)
        reason = module if isinstance(module, str) else module.refusal(*about)
        if not reason:
            try:
                return run(getattr(module, op))
            except Unavailable as error:
                reason = str(error)
        _log_refusal(op, name, reason)
    return run(None)


@functools.cache
def module_of(name: str):
    """The module, or why it cannot be had."""
    try:
        return importlib.import_module(f"akvq_fx.kernels.{name}")
    except ImportError as error:
        return f"it cannot be imported: {error}"


@functools.lru_cache(1024)
def _log_refusal(op: str, name: str, reason: str) -> None:
    log.info("akvq::%s is not answered by %s: %s", op, name, reason)
