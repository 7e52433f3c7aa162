"""CUDA C++ kernels without a toolkit: NVRTC, which comes with PyTorch's CUDA builds, compiles them.

Sources are the .cu files beside the modules that launch them, and the headers (.cuh) that these include; what varies is
a macro. A kernel takes one struct by value. binaries.py keeps what was compiled for later processes.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import torch

from akvq_fx import torch_internals
from akvq_fx.kernels import binaries
from akvq_fx.kernels.choose import Unavailable

COMPUTE_CAPABILITY = (8, 0)  # bf16 conversions and mma.m16n8k16 (PTX ISA)
REASON_LENGTH = 500  # characters of a compiler's message that a reason keeps
SHARED_LIMIT = 48 << 10  # bytes of shared memory that a block may have without asking the driver
INCLUDE = re.compile(r'#include "(.+)"')

Macros = tuple[tuple[str, object], ...]
_binaries: dict[tuple[int, str, tuple[str, ...], Macros], Future] = {}
_lock = threading.Lock()
_failed: dict[tuple[int, str], str] = {}  # (device index, source) -> why it could not be compiled or loaded


def refusal(index: int, source: str) -> str:
    """Why kernels of kernels/<source>.cu cannot run on a device; "" where they can, as far as is known so far."""
    return device_refusal(index) or _failed.get((index, source), "")


@functools.cache
def device_refusal(index: int) -> str:
    """Why no such kernel can run on a device; "" where they can."""
    if torch.version.hip or torch.cuda.get_device_capability(index) < COMPUTE_CAPABILITY:
        return "the device is no NVIDIA GPU of compute capability 8.0 or more"
    found = torch_internals.nvrtc()
    return found if isinstance(found, str) else ""


def text_of(source: str) -> str:
    """kernels/<source>.cu as one text, which is all that PyTorch's NVRTC takes.

    A header stands in it where it is first included. `#line` has the compiler's messages name the right file and line.
    """
    return "\n".join(_lines(f"{source}.cu", set())) + "\n"


def _lines(name: str, seen: set[str]) -> Iterator[str]:
    seen.add(name)
    yield f'#line 1 "{name}"'
    for number, line in enumerate(Path(__file__).with_name(name).read_text().splitlines(), 1):
        header = INCLUDE.match(line)
        if header is None:
            yield line
        elif header[1] not in seen:
            yield from _lines(header[1], seen)
            yield f'#line {number + 1} "{name}"'
        else:
            yield ""


def binary(index: int, source: str, names: tuple[str, ...], macros: Macros) -> bytes:
    """What the compiler makes of a source for one device, once a process: a thread that asks later waits for the first.

    Raises what the compiler raises.
    """
    key = index, source, names, macros
    with _lock:
        mine = key not in _binaries
        future = _binaries.setdefault(key, Future())
    if mine:
        try:
            future.set_result(_binary(*key))
        except BaseException as error:
            future.set_exception(error)
    return future.result()


def _binary(index: int, source: str, names: tuple[str, ...], macros: Macros) -> bytes:
    compile_text, _ = torch_internals.nvrtc()
    text = text_of(source)
    options = ["--std=c++17", *(f"-D{name}={number}" for name, number in macros)]
    with torch.cuda.device(index):
        return binaries.kept(
            lambda: compile_text(text, names[0], nvcc_options=options)[0],
            *(text, names, options, torch.cuda.get_device_capability(index), torch.version.cuda, torch.__version__),
        )


@functools.cache
def compiled(index: int, source: str, names: tuple[str, ...], macros: Macros, shared: int = 0) -> dict:
    """Functions of kernels/<source>.cu by name, for one device; the first may be given `shared` bytes of shared memory.

    Raises Unavailable where the compiler is not there or cannot compile them, or the driver cannot load them (one
    older than the compiler); from then on `refusal` says so, for every form of the source, and nothing is compiled in
    vain again.
    """
    found = torch_internals.nvrtc()
    if isinstance(found, str):
        raise Unavailable(found)
    try:
        made = binary(index, source, names, macros)
        with torch.cuda.device(index):
            kernels = found[1](made, list(names))
            if shared:
                # The limit holds for `shared` and the arrays that the kernel declares together, but PyTorch asks the
                # driver only where `shared` alone reaches it. So we ask for no less than the limit.
                kernels[names[0]].set_shared_memory_config(max(shared, SHARED_LIMIT))
        _driver()
    except (RuntimeError, OSError, TypeError, AttributeError) as error:
        # of the compiler or driver; of a missing library; of PyTorch's functions where their arguments have changed
        if "out of memory" in str(error):
            raise
        reason = f"kernels/{source}.cu could not be compiled or loaded: {str(error).strip()[:REASON_LENGTH]}"
        _failed[index, source] = reason
        raise Unavailable(reason) from error
    return {name: kernel.func for name, kernel in kernels.items()}


@functools.cache
def _driver():
    library = ctypes.CDLL("libcuda.so.1")
    number, pointer = ctypes.c_uint, ctypes.c_void_p
    library.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
    return library


def launch(function, grid: tuple[int, int, int], threads: int, params: ctypes.Structure, shared: int = 0) -> None:
    """Launch on the current stream of the current device. Raises RuntimeError if the driver refuses."""
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    stream = torch.cuda.current_stream().cuda_stream
    error = _driver().cuLaunchKernel(function, *grid, threads, 1, 1, shared, stream, arguments, None)
    if error:
        raise RuntimeError(f"akvq: a CUDA kernel with grid {grid} did not launch, driver error {error}")
