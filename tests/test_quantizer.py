"""Quantizer: the error bound of equations 3-6, finite in gives finite out, and a broken token stays alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from akvq_fx.kernels.quantizer import FP16_MAX, SCALE_FLOOR, dequantize, quantize
from tests.kernel_cases import assert_same, few, randn, seeds

FP16_HALF_ULP = 2.0**-11  # relative, of a normal fp16 number
FP16_TINY = 2.0**-25  # half of fp16's smallest subnormal
FP32_STEPS = 2.0**-21  # eight roundings at 2**-24: subtract, divide, multiply, add, there and back

shapes = st.tuples(
    st.sampled_from((2, 4, 8)), st.sampled_from((0.8, 1.0)), st.sampled_from((1, 2, 5)), st.integers(1, 6)
)


def read_back(x, bits, clip, groups, dtype=torch.float32):
    return dequantize(*quantize(x, bits, clip, groups), bits, dtype)


def outside(x, lo, hi):
    """Distance of x to the range."""
    return (lo - x).clamp_min(0) + (x - hi).clamp_min(0)


@given(shapes, st.floats(-7, 4), st.floats(-7, 4), seeds)
@few
def test_error_against_the_clipped_range(shape, spread, offset, seed):
    bits, clip, groups, width = shape
    top = 2**bits - 1
    x = randn(5, groups * 8 * width, seed=seed) * 10**spread + 10**offset
    grouped = x.double().unflatten(-1, (groups, -1))
    lo, hi = grouped.amin(-1, keepdim=True) * clip, grouped.amax(-1, keepdim=True) * clip
    scale = ((hi - lo) / top).clamp_min(SCALE_FLOOR)
    stored_lo = lo.abs() * FP16_HALF_ULP + FP16_TINY
    stored_scale = scale * FP16_HALF_ULP + FP16_TINY
    size = torch.maximum(lo.abs(), hi.abs()) + top * scale + grouped.abs()
    slack = stored_lo + (top + 0.5) * stored_scale + size * FP32_STEPS
    error = (read_back(x, bits, clip, groups).double().unflatten(-1, (groups, -1)) - grouped).abs()
    assert (error <= outside(grouped, lo, hi) + scale / 2 + slack).all()


@given(shapes, st.floats(-7, 30), st.floats(-7, 30), seeds)
@few
def test_error_against_the_stored_range(shape, spread, offset, seed):
    bits, clip, groups, width = shape
    x = randn(5, groups * 8 * width, seed=seed) * 10**spread + 10**offset
    codes, range_ = quantize(x, bits, clip, groups)
    scale, lo = (part.double()[..., None] for part in range_.chunk(2, -1))
    hi = lo + (2**bits - 1) * scale
    grouped = x.double().unflatten(-1, (groups, -1))
    size = torch.maximum(lo.abs(), hi.abs()) + grouped.abs()
    error = (dequantize(codes, range_, bits, torch.float32).double().unflatten(-1, (groups, -1)) - grouped).abs()
    distance = outside(grouped, lo, hi)
    bound = torch.where(distance > 0, distance, scale / 2) + size * FP32_STEPS
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@given(st.data(), st.sampled_from((2, 4, 8)), st.sampled_from((0.8, 1.0)))
@few
def test_finite_in_finite_out(dtype, data, bits, clip):
    limit = torch.finfo(dtype).max
    values = data.draw(st.lists(st.floats(-limit, limit), min_size=8, max_size=8))
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    codes, range_ = quantize(x, bits, clip, 1)
    assert range_.isfinite().all()
    assert dequantize(codes, range_, bits, dtype).isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_the_widest_group_of_a_dtype_stays_finite(dtype, bits):
    limit = torch.finfo(dtype).max
    x = torch.tensor([[limit, -limit, 0, 1, -1, 2, limit, -limit]], dtype=dtype)
    out = read_back(x, bits, 1.0, 1, dtype)
    assert out.isfinite().all()
    assert (out[0, 0] >= 0.9 * FP16_MAX) and (out[0, 1] <= -0.9 * FP16_MAX)


@pytest.mark.parametrize("clip", (0.8, 1.0))
@pytest.mark.parametrize("value", (0.0, 1.0, -3.5, 1e-7, 6e4, -6e4))
def test_a_constant_group_reads_as_its_clipped_value(value, clip):
    codes, range_ = quantize(torch.full((3, 16), value), 2, clip, 1)
    assert_same("scale", torch.full((3, 1), SCALE_FLOOR).half(), range_[:, :1])
    out = dequantize(codes, range_, 2, torch.float32)
    assert (out - value * clip).abs().max() <= 3.01 * SCALE_FLOOR + FP16_TINY + abs(value) * FP16_HALF_ULP


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_levels_come_back_exactly(bits):
    top = 2**bits - 1
    levels = torch.arange(256).remainder(top + 1)[None].float() - 1
    assert_same("levels", levels, read_back(levels, bits, 1.0, 1))


@pytest.mark.parametrize("broken", (torch.nan, torch.inf, -torch.inf), ids=str)
@given(shapes, st.integers(0, 6), st.data(), seeds)
@few
def test_a_broken_group_stays_broken_and_alone(broken, shape, token, data, seed):
    bits, clip, groups, width = shape
    x = randn(7, groups * 8 * width, seed=seed)
    channel = data.draw(st.integers(0, x.shape[1] - 1))
    spoiled = x.clone()
    spoiled[token, channel] = broken
    clean, dirty = read_back(x, bits, clip, groups), read_back(spoiled, bits, clip, groups)
    hit = torch.zeros(7, groups, 8 * width, dtype=torch.bool)
    hit[token, channel // (8 * width)] = True
    hit = hit.flatten(1)
    assert not dirty[hit].isfinite().any()
    assert_same("other groups", clean[~hit], dirty[~hit])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_shapes_and_dtypes(dtype):
    x = randn(2, 3, 5, 48, dtype=dtype)
    codes, range_ = quantize(x, 4, 1.0, 3)
    assert (codes.shape, codes.dtype) == ((2, 3, 5, 12), torch.int16)
    assert (range_.shape, range_.dtype) == ((2, 3, 5, 6), torch.float16)
    out = dequantize(codes, range_, 4, dtype)
    assert (out.shape, out.dtype) == (x.shape, dtype)
