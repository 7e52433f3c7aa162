"""CUDA C++ kernels of a graph are compiled in a thread of their own, while the inner compiler works on the graph.

NVRTC takes a second or two for each form of a kernel. Whoever launches a kernel waits only where it is not there yet
(kernels/nvrtc.py). A form that is guessed wrongly costs nothing but that thread's time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from akvq_fx import which_kernel
from akvq_fx.kernels import choose

log = logging.getLogger(__name__)
OPS = ("pack", "append", "attend")  # that have kernels in CUDA C++


def begin(calls: list[which_kernel.Call]) -> threading.Thread | None:
    """Start on what these calls will launch on CUDA devices; None where that needs no compiling."""
    tasks = []
    for call in calls:
        if call.device.type != "cuda" or call.op not in OPS:
            continue
        for answer, given in which_kernel.answers_with(call):
            compile_ahead = answer.kernel and getattr(choose.module_of(answer.kernel), "compile_ahead", None)
            if compile_ahead:
                tasks.append((compile_ahead, list(given.values() if isinstance(given, dict) else given)))
    if not tasks:
        return None
    thread = threading.Thread(target=_run, args=(tasks,), name="akvq_fx compiles kernels", daemon=True)
    thread.start()
    return thread


def _run(tasks: list[tuple[Callable, list]]) -> None:
    for compile_ahead, given in tasks:
        try:
            compile_ahead(*given)
        except Exception as error:  # whoever launches the kernel meets it again, and says what it means
            log.info("%s: a kernel was not compiled ahead: %s", compile_ahead.__module__, error)
