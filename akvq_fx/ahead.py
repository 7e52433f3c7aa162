"""What would be waited for later is done in a thread, while dynamo traces or the inner compiler works on a graph.

- CUDA C++ kernels of a graph: NVRTC takes a second or two for each form of a kernel. Whoever launches a kernel waits
  only where it is not there yet (kernels/nvrtc.py). A form that is guessed wrongly costs that thread's time alone.
- Inductor's digests of PyTorch's and Triton's files, once a process: prompts are not compiled, so a thread has the
  whole of a prompt's tracing for them.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

from akvq_fx import torch_internals, which_kernel
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
    return _start(tasks) if tasks else None


@functools.cache
def begin_inductor() -> threading.Thread | None:
    """Start on what Inductor finds out about itself, in the first graph of a process."""
    # imported here: modules that import each other are not safe to import in two threads at once
    tasks = [(key, []) for key in torch_internals.identify_inductor()]
    return _start(tasks) if tasks else None


def _start(tasks: list[tuple[Callable, list]]) -> threading.Thread:
    thread = threading.Thread(target=_run, args=(tasks,), name="akvq_fx works ahead", daemon=True)
    thread.start()
    return thread


def _run(tasks: list[tuple[Callable, list]]) -> None:
    for task, given in tasks:
        try:
            task(*given)
        except Exception as error:  # whoever needs it meets it again, and says what it means
            log.info("%s: not done ahead: %s", task.__module__, error)
