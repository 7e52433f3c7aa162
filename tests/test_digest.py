"""Digests: every bit of a weight counts, and the same contents have the same digest wherever they lie."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from akvq_fx.digest import CHUNK, MIX, STEP, Digests, compute, sums, words_of

PRINT = """
import torch
from akvq_fx.digest import compute
kinds = ((1, torch.float16), (77, torch.float64), (300_000, torch.bfloat16))
print(*compute([torch.arange(n).to(dtype) for n, dtype in kinds]))
"""


def digest(x) -> str:
    (text,) = compute([x])
    return text


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from([(1,), (7,), (3, 5), (64, 33), (2 * CHUNK["cpu"] + 3,)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8]),
    at=st.integers(0, 10**9),
    bit=st.integers(0, 63),
)
def test_every_bit_counts(size, dtype, at, bit):
    x = torch.randn(size, generator=torch.Generator().manual_seed(at)).mul(9).to(dtype)
    changed = x.clone()
    place = changed.view(-1).view(torch.uint8)
    place[at % len(place)] ^= 1 << bit % 8
    assert digest(x) == digest(x.clone()) != digest(changed)


def test_order_shape_and_dtype_count():
    x = torch.randn(16, 8)
    others = [
        x[torch.randperm(15).tolist() + [15]].roll(1, 0),
        x.T.contiguous(),
        -x,
        x.flatten(),
        x.view(torch.int32),
        x[:8],
    ]
    assert len({digest(y) for y in (x, *others)}) == 1 + len(others)
    assert digest(x.T) == digest(x.T.contiguous())
    odd = torch.randn(9, dtype=torch.float64).half()[1:8]  # neither aligned to 8 bytes nor a multiple of them
    assert digest(odd) == digest(odd.clone())


def test_another_process_sees_the_same():
    runs = [subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True) for _ in range(2)]
    here = compute(
        [torch.arange(n).to(t) for n, t in ((1, torch.float16), (77, torch.float64), (300_000, torch.bfloat16))]
    )
    assert runs[0].stdout == runs[1].stdout == " ".join(here) + "\n"


def test_computed_once_a_change_and_anew_when_asked(monkeypatch):
    digests, weight = Digests(), nn.Parameter(torch.randn(4, 4))
    (first,) = digests.of([weight])
    weight.data[1, 1] += 1  # leaves no mark
    assert digests.of([weight]) == [first]
    (second,) = digests.of([weight], anew=True)
    assert second != first and digests.of([weight]) == [second]
    with torch.no_grad():
        weight[0, 0] += 1
    assert digests.of([weight]) != [second]


def test_a_quantized_weight_has_one():
    layers = [nn.Linear(32, 32, bias=False) for _ in range(2)]
    for layer in layers:
        quantize_(layer, Int8WeightOnlyConfig())
    one, other = compute([layer.weight for layer in layers])
    assert one != other and compute([layers[0].weight]) == [one]


@pytest.mark.parametrize("sizes", [(1,), (5000, 3, 4096), (0, 9)])
def test_triton_gives_the_same_sums(sizes):
    digest_triton = pytest.importorskip("akvq_fx.kernels.digest_triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    words = [torch.randint(-(2**62), 2**62, (n,), device=device) for n in sizes]
    assert torch.equal(digest_triton.sums(words, STEP, MIX), torch.stack([sums(some) for some in words]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_devices_agree():
    x = torch.randn(300, 77).bfloat16()
    assert digest(x) == digest(x.cuda())
    assert torch.equal(words_of(x), words_of(x.cuda()).cpu())
