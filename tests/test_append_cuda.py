"""append_cuda: what a GPU is not needed for. test_cache_triton.py runs the kernel on one."""

import pytest
import torch

from akvq_fx.kernels import append_cuda, cache_triton
from akvq_fx.kernels.layout import Layout
from tests.test_attend_cuda import struct_fields

bf16 = torch.bfloat16


def test_the_structs_here_and_there_have_the_same_members():
    assert struct_fields("Params", "append_cuda") == [name for name, _ in append_cuda.Params._fields_]


@pytest.mark.parametrize(
    "x, layout, reason",
    [
        (torch.zeros(1, 1, 1, 16), Layout(16, bf16, body_bits=2), "x is torch.float32 and the cache torch.bfloat16"),
        (torch.zeros(1, 1, 1, 16).double(), Layout(16, torch.float64), "accepted: both float16, bfloat16 or float32"),
        (torch.zeros(1, 1, 1, 520), Layout(520, torch.float32), "head dim 520 in 1 groups, accepted: up to 512 in 4"),
        (torch.zeros(1, 1, 1, 64), Layout(64, torch.float32, group=8), "head dim 64 in 8 groups"),
        (torch.zeros(1, 1, 16, 2).mT, Layout(16, torch.float32), "the channels of x are 2 numbers apart"),
    ],
    ids=str,
)
def test_refuses_with_a_reason(x, layout, reason):
    assert reason in append_cuda.refusal(x, layout)


def test_a_layout_is_compiled_with_its_own_numbers():
    macros = dict(append_cuda.macros(Layout(80, bf16, body_bits=2, body_clip=0.8, text_bits=4), 2))
    assert (macros["HEAD_DIM"], macros["DTYPE"], macros["TURN"], macros["BITS"], macros["TEXT_BITS"]) == (
        80,
        1,
        2,
        2,
        4,
    )
    assert (macros["CLIP"], macros["TEXT_CLIP"], macros["NORM"]) == ("0.8f", "1.0f", "0.25f")


def test_what_only_the_triton_kernel_refuses_is_written_by_this_one():
    layout, launched = Layout(512, torch.float32, body_bits=2), []
    x, at = torch.zeros(1, 1, 1, 512), torch.tensor([0])
    assert "head dim is 512" in cache_triton.refusal(x, layout)
    cache_triton.append(layout.allocate(1, 1, 4), x, at, None, None, layout, run=lambda *call: launched.append(call))
    assert len(launched) == 1
