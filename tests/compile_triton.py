"""Compile the Triton kernels that some calls launch for a GPU that need not be there, and launch none.

    TRITON_INTERPRET=0 python -m tests.compile_triton

Prints a line a kernel. Triton's interpreter, in which tests run without a GPU, takes code that its compiler refuses.
"""

import dataclasses
import inspect

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from akvq_fx.kernels import attend_triton, cache_triton, rotate_triton, salience_triton
from akvq_fx.kernels.attend import AttendCall
from akvq_fx.kernels.layout import Layout

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
LAYOUTS = {
    "text": Layout(64, torch.float16, 2, text_bits=4, window=64),
    "moved text": Layout(64, torch.float16, 2, text_bits=4, window=64, blocks=True, moved=True),
    "uneven blocks": Layout(
        64, torch.bfloat16, 2, window=64, pivots=3, rotated=True, affine=True, symmetric=True, uneven=True, blocks=True
    ),
}
LAYOUTS["moved"] = dataclasses.replace(LAYOUTS["uneven blocks"], moved=True)
done: set[tuple] = set()


def compiled(kernel: JITFunction, grid):
    """In place of a launch: kernel[grid](...) compiles for the arguments given."""

    def launch(*args, num_warps=4, num_stages=2, **kwargs):
        given = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
        signature, constants = {}, {}
        for parameter in kernel.params:
            value = given.get(parameter.name, parameter.default)
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        key = (kernel.__name__, str(signature), str(constants))
        if key not in done:
            done.add(key)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            triton.compile(ASTSource(kernel, signature, constants), target=TARGET, options=options)
            print(kernel.__name__, flush=True)

    return launch


def main() -> None:
    JITFunction.__getitem__ = compiled
    for keys in LAYOUTS.values():
        values = dataclasses.replace(keys, uneven=False, affine=False, blocks=False, moved=False)
        x = torch.zeros(1, 2, 1, keys.head_dim, dtype=keys.dtype)
        key, value = (layout.allocate(1, 2, 128, 128 if layout.text_bits else 0) for layout in (keys, values))
        for cache, layout in ((key, keys), (value, values)):
            cache_triton.append(cache, x, torch.arange(1), torch.ones(1, 1, dtype=torch.uint8), None, layout, True)
        q = torch.zeros(1, 4, 1, keys.head_dim, dtype=keys.dtype)
        nothing = (None, None, None, False, None, None, None)
        attend_triton.attend(AttendCall(q, key, value, *nothing, keys, values), 2)
        rotate_triton.rotate(x)
        pairs = (keys.head_dim // 2, keys.head_dim) if keys.uneven else (0, 0)
        salience_triton.key_affine(x, q, None, True, True, keys.uneven, *pairs)
    attend_triton.attend(AttendCall(q, key, value, *nothing, keys, values, softcap=30.0, sinks=torch.zeros(4)), 2)
    salience_triton.find_pivots(torch.zeros(1, 8, 64, dtype=torch.float16), None, 3, "massive", 100.0, 1000.0)


if __name__ == "__main__":
    main()
