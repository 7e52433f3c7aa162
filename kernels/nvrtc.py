"""CUDA C++ kernels without a toolkit: compiled by NVRTC, which comes with PyTorch's CUDA builds, and launched by the driver.

Sources are the .cu files beside the modules that launch them; what varies is a macro. A kernel takes one struct by value.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from akvq_fx.kernels.choose import Unavailable

COMPUTE_CAPABILITY = (8, 0)  # bf16 conversions and mma.m16n8k16 (PTX ISA)
REASON_LENGTH = 500  # characters of a compiler's words that a reason keeps

_failed: dict[tuple[int, str], str] = {}  # (device index, source) -> why it could not be compiled or loaded


def refusal(index: int, source: str) -> str:
    """Why kernels of kernels/<source>.cu cannot run on a device; "" where they can, as far as is known before the first launch."""
    return device_refusal(index) or _failed.get((index, source), "")


@functools.cache
def device_refusal(index: int) -> str:
    """Why no such kernel can run on a device; "" where they can."""
    if torch.version.hip or torch.cuda.get_device_capability(index) < COMPUTE_CAPABILITY:
        return "the device is no NVIDIA GPU of compute capability 8.0 or more"
    missing = [name for name in ("_nvrtc_compile", "_cuda_load_module") if not hasattr(torch.cuda._utils, name)]
    return f"this PyTorch has no torch.cuda._utils.{missing[0]}" if missing else ""


@functools.cache
def compiled(
    index: int, source: str, names: tuple[str, ...], macros: tuple[tuple[str, object], ...], shared: int = 0
) -> dict:
    """Functions of kernels/<source>.cu by name, for one device; `shared` bytes of memory are allowed to the first of them.

    Raises Unavailable where the compiler is not there or cannot compile them, or the driver cannot load them (one older than the
    compiler); from then on `refusal` says so, for every form of the source, and nothing is compiled in vain again.
    """
    text = Path(__file__).with_name(f"{source}.cu").read_text()
    options = ["--std=c++17", *(f"-D{name}={number}" for name, number in macros)]
    try:
        with torch.cuda.device(index):
            binary, _ = torch.cuda._utils._nvrtc_compile(text, names[0], nvcc_options=options)
            kernels = torch.cuda._utils._cuda_load_module(binary, list(names))
            if shared:  # below 48 KiB that does nothing, though what the kernel declares itself counts too
                kernels[names[0]].set_shared_memory_config(max(shared, 48 << 10))
        _driver()
    except (RuntimeError, OSError, TypeError, AttributeError) as error:
        # of compiler and driver; a library that is not there; PyTorch's own functions with other arguments
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
