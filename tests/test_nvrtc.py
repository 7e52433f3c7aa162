"""The .cu sources compile, for every form that they take and for old and new GPUs. Needs no GPU, but NVRTC: the `test`
extra brings it on Linux, as CUDA builds of PyTorch do."""

import ctypes
import ctypes.util
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from akvq_fx.kernels import append_cuda, attend_cuda, nvrtc
from akvq_fx.kernels.layout import Layout

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
# the sources are the same for every GPU: all forms are compiled for the oldest, one of each source for a newer one
OLDEST, NEWER = "sm_80", "sm_90"
PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
SUCCESS = 0  # nvrtcResult
symmetric = functools.partial(Layout, body_bits=2, rotated=True, symmetric=True)
uneven = functools.partial(symmetric, affine=True, uneven=True)
SYMMETRIC = {"symmetric": True}
UNEVEN = dict.fromkeys(("symmetric", "uneven", "rotated", "affine"), True)
BLOCKS, MOVED, TEXT = {"blocks": True}, {"moved": True}, {"text_bits": 4}


def libraries(roots) -> list[str]:
    """NVRTC in the folders of the package `nvidia`: in cu13/lib of CUDA 13's wheels, in cuda_nvrtc/lib of older
    ones."""
    return [str(path) for root in roots for path in sorted(Path(root).glob("*/lib/libnvrtc.so*"))]


def library():
    """(NVRTC, ""): of the package, of PyTorch, or of the system; or None and why."""
    spec = importlib.util.find_spec("nvidia")
    found = libraries(spec.submodule_search_locations if spec else ())
    found += [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libnvrtc.so*"))]
    found += [name for name in [ctypes.util.find_library("nvrtc")] if name]
    try:
        return (ctypes.CDLL(found[0]), "") if found else (None, "no NVRTC here: pip install nvidia-cuda-nvrtc")
    except OSError as error:
        return None, f"NVRTC cannot be loaded: {error}"


NVRTC, REASON = library()
needs_nvrtc = pytest.mark.skipif(NVRTC is None, reason=REASON)


def installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_a_compiler_that_is_installed_is_used():
    """The other tests must not be skipped in silence where the `test` extra is installed, CI among these places."""
    there = any(map(installed, PACKAGES)) or bool(os.environ.get("CI"))
    assert NVRTC is not None or sys.platform != "linux" or not there, REASON


@pytest.mark.parametrize("place", ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12"))
def test_the_compiler_is_found_in_the_wheels_of_either_cuda(place, tmp_path):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.touch()
    path.with_name("libnvrtc-builtins.so.1").touch()
    assert libraries([tmp_path / "other", tmp_path]) == [str(path)]


def compile_for(architecture: str, source: str, macros: dict) -> str:
    """The compiler's messages, "" where there are none."""
    text = nvrtc.text_of(source).encode()
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in macros.items())]
    program = ctypes.c_void_p()
    assert NVRTC.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None) == SUCCESS
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status, size = NVRTC.nvrtcCompileProgram(program, len(options), given), ctypes.c_size_t()
        NVRTC.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        said = ctypes.create_string_buffer(size.value)
        NVRTC.nvrtcGetProgramLog(program, said)
        return said.value.decode() or ("" if status == SUCCESS else f"nvrtcResult {status}")
    finally:
        NVRTC.nvrtcDestroyProgram(ctypes.byref(program))


@needs_nvrtc
@pytest.mark.parametrize(
    "head_dim, dtype, group, text, tiles, columns, mask, architecture",
    [
        (128, bf16, 128, (0, 0), 1, 1, 0, OLDEST),
        (128, bf16, 128, (4, 0), 1, 2, 1, OLDEST),
        (128, bf16, 128, (4, 0), 1, 2, 1, NEWER),
        (128, f16, 32, (4, 4), 2, 2, 2, OLDEST),
        (64, f16, 32, (4, 0), 2, 2, 0, OLDEST),
        (80, bf16, 128, (4, 0), 1, 1, 1, OLDEST),
        (16, f16, 128, (4, 4), 1, 1, 2, OLDEST),
        (256, bf16, 128, (4, 0), 1, 2, 0, OLDEST),
    ],
    ids=str,
)
def test_attend_compiles(head_dim, dtype, group, text, tiles, columns, mask, architecture):
    layout = Layout(head_dim, dtype, body_bits=2, text_bits=text[0], group=group)
    values = dataclasses.replace(layout, text_bits=text[1])
    macros = attend_cuda.macros(layout, values, tiles, columns, mask)
    assert compile_for(architecture, "attend_cuda", macros) == ""


@needs_nvrtc
@pytest.mark.parametrize(
    "head_dim, dtype, groups, keys, values, tiles, columns, mask",
    [
        (64, f16, (1, 1), UNEVEN, SYMMETRIC, 1, 1, 0),
        (128, bf16, (1, 1), UNEVEN, SYMMETRIC, 2, 2, 1),
        (256, bf16, (2, 2), UNEVEN, SYMMETRIC, 1, 2, 2),
        (80, f16, (1, 1), UNEVEN, {}, 1, 1, 1),
        (128, bf16, (1, 1), {}, SYMMETRIC, 1, 1, 0),
        (16, bf16, (1, 1), SYMMETRIC, SYMMETRIC, 1, 2, 0),
        (64, f16, (4, 1), SYMMETRIC, SYMMETRIC, 2, 2, 2),
        (64, bf16, (2, 4), {}, {}, 1, 1, 0),
        (64, f16, (1, 1), UNEVEN | BLOCKS, SYMMETRIC, 1, 1, 0),
        (128, bf16, (1, 1), UNEVEN | BLOCKS, SYMMETRIC, 2, 2, 1),
        (80, f16, (1, 1), SYMMETRIC | BLOCKS, SYMMETRIC, 1, 2, 1),
        (256, bf16, (2, 2), BLOCKS, {}, 1, 1, 2),
        (128, bf16, (1, 1), TEXT | BLOCKS, {}, 1, 1, 0),
        (64, f16, (1, 1), TEXT | BLOCKS | MOVED, TEXT, 2, 2, 2),
        (64, bf16, (1, 1), UNEVEN | BLOCKS | MOVED, SYMMETRIC, 1, 1, 1),
    ],
    ids=str,
)
def test_attend_compiles_for_other_levels(head_dim, dtype, groups, keys, values, tiles, columns, mask):
    layouts = [
        Layout(head_dim, dtype, body_bits=2, group=head_dim // count, **levels)
        for count, levels in zip(groups, (keys, values), strict=True)
    ]
    assert attend_cuda.layouts_refusal(*layouts) == ""
    macros = attend_cuda.macros(*map(attend_cuda._shape_of, layouts), tiles, columns, mask)
    assert compile_for(OLDEST, "attend_cuda", macros) == ""


@needs_nvrtc
@pytest.mark.parametrize(
    "layout, form, fast, text_only, architecture",
    [
        (Layout(128, bf16, body_bits=2, text_bits=4, body_clip=0.8), 2, True, True, OLDEST),
        (Layout(64, f16, body_bits=2), 1, True, False, OLDEST),
        (Layout(64, f16, body_bits=2), 1, True, False, NEWER),
        (Layout(128, bf16, body_bits=2, text_bits=4), 2, False, True, OLDEST),
        (Layout(80, f32, body_bits=4, text_bits=8), 0, False, False, OLDEST),
        (Layout(96, bf16), 2, False, False, OLDEST),
        (symmetric(64, bf16), 1, False, False, OLDEST),
        (symmetric(64, bf16), 1, True, False, OLDEST),
        (symmetric(128, f16), 1, True, False, NEWER),
        (symmetric(128, f32, body_bits=4, group=64), 0, False, False, OLDEST),
        (uneven(64, bf16), 2, False, False, OLDEST),
        (uneven(128, f16), 2, False, False, NEWER),
        (uneven(80, f32), 2, False, False, OLDEST),
        (uneven(8, bf16), 0, False, False, OLDEST),
        (uneven(512, bf16), 2, False, False, OLDEST),
        (uneven(64, bf16, window=64, blocks=True), 2, False, False, OLDEST),
        (uneven(128, f16, blocks=True), 0, False, False, NEWER),
        (Layout(80, f32, body_bits=4, window=64, blocks=True), 1, False, False, OLDEST),
        (symmetric(64, f16, window=64, blocks=True), 1, False, False, OLDEST),
        (Layout(128, bf16, body_bits=2, text_bits=4, window=64, blocks=True), 2, False, False, OLDEST),
        (Layout(64, f32, body_bits=2, text_bits=4, window=64, blocks=True, moved=True), 0, False, False, OLDEST),
    ],
    ids=str,
)
def test_append_compiles(layout, form, fast, text_only, architecture):
    macros = dict(append_cuda.macros(layout, form, fast, text_only))
    assert compile_for(architecture, "append_cuda", macros) == ""


@needs_nvrtc
def test_what_is_wrong_is_told_with_its_place():
    macros = dict(append_cuda.macros(Layout(64, bf16, body_bits=2), 0, False))
    said = compile_for("sm_90", "append_cuda", {k: v for k, v in macros.items() if k != "HEAD_DIM"})
    lines = Path(nvrtc.__file__).with_name("append_cuda.cu").read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.startswith("constexpr int D = HEAD_DIM"))
    assert f'append_cuda.cu({number}): error: identifier "HEAD_DIM"' in said


def test_a_header_stands_once_in_the_text_that_is_compiled():
    for source in ("attend_cuda", "append_cuda"):
        text = nvrtc.text_of(source)
        assert text.count("u32 half_pair(") == 1, "numbers_cuda.cuh"
        assert "#include" not in text
