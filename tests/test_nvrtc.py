"""The .cu sources compile, for every form that they take and for old and new GPUs. Needs no GPU, but NVRTC: CUDA builds of PyTorch
bring it, elsewhere `pip install nvidia-cuda-nvrtc-cu12` does."""

import ctypes
import ctypes.util
import importlib.util
from pathlib import Path

import pytest
import torch

from akvq_fx.kernels import append_cuda, attend_cuda, nvrtc
from akvq_fx.kernels.layout import Layout

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = ("sm_80", "sm_90")
SUCCESS = 0  # nvrtcResult


def library():
    """NVRTC, or None: of the package, of PyTorch, or of the system."""
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    folders = [Path(place) / "lib" for place in (spec.submodule_search_locations if spec else ())]
    folders.append(Path(torch.__file__).parent / "lib")
    found = [str(path) for folder in folders for path in sorted(folder.glob("libnvrtc.so*"))]
    found += [name for name in [ctypes.util.find_library("nvrtc")] if name]
    return ctypes.CDLL(found[0]) if found else None


NVRTC = library()
pytestmark = pytest.mark.skipif(NVRTC is None, reason="no NVRTC here")


def compile_for(architecture: str, source: str, macros: dict) -> str:
    """The compiler's words; "" where it has none to say."""
    text = Path(nvrtc.__file__).with_name(f"{source}.cu").read_bytes()
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "head_dim, dtype, group, text, tiles, columns, mask",
    [
        (128, bf16, 128, (0, 0), 1, 1, 0),
        (128, bf16, 128, (4, 0), 1, 2, 1),
        (128, f16, 32, (4, 4), 2, 2, 2),
        (64, f16, 32, (4, 0), 2, 2, 0),
        (80, bf16, 128, (4, 0), 1, 1, 1),
        (16, f16, 128, (4, 4), 1, 1, 2),
        (256, bf16, 128, (4, 0), 1, 2, 0),
    ],
    ids=str,
)
def test_attend_compiles(architecture, head_dim, dtype, group, text, tiles, columns, mask):
    layout = Layout(head_dim, dtype, body_bits=2, text_bits=text[0], group=group)
    macros = attend_cuda.macros(layout, text[1], tiles, columns, mask)
    assert compile_for(architecture, "attend_cuda", macros) == ""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "layout, form, fast, text_only",
    [
        (Layout(128, bf16, body_bits=2, text_bits=4, body_clip=0.8), 2, True, False),
        (Layout(64, f16, body_bits=2), 1, True, False),
        (Layout(128, bf16, body_bits=2, text_bits=4), 2, False, True),
        (Layout(80, f32, body_bits=4, text_bits=8), 0, False, False),
        (Layout(96, bf16), 2, False, False),
    ],
    ids=str,
)
def test_append_compiles(architecture, layout, form, fast, text_only):
    macros = dict(append_cuda.macros(layout, form, fast, text_only))
    assert compile_for(architecture, "append_cuda", macros) == ""


def test_what_is_wrong_is_told():
    macros = dict(append_cuda.macros(Layout(64, bf16, body_bits=2), 0, False))
    assert "HEAD_DIM" in compile_for("sm_90", "append_cuda", {k: v for k, v in macros.items() if k != "HEAD_DIM"})
