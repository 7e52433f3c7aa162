"""find_pivots and key_affine with Triton kernels: peaks and medians to the bit, maps as the reference's in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from akvq_fx.kernels import salience_triton
from akvq_fx.kernels.salience import find_pivots_reference, key_affine_reference
from tests.kernel_cases import assert_close, assert_same, bf16, f16, f32, randn, seeds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
every_dtype = pytest.mark.parametrize("dtype", (f16, bf16, f32), ids=str)
few = settings(max_examples=15, deadline=None)
ORDINARY, MASSIVE = 3.0, 3000.0
BROKEN = (torch.nan, torch.inf, -torch.inf)


def to_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def left_padding(B, T, real):
    """The last row has `real` real tokens, the others are full."""
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[-1, : T - real] = False
    return valid


@every_dtype
@pytest.mark.parametrize("width", (1, 2, 7, 64, 100, 1031))
def test_peaks_and_medians_are_torch_s(width, dtype):
    h = randn(2, 5, width, dtype=dtype) * 100
    h[0, 1], h[0, 2, width // 2 :] = 7.0, -h[0, 2, : width - width // 2]
    h[1, 0, -1], h[1, 1, 0], h[1, 2, 0] = BROKEN[0], BROKEN[1], BROKEN[2]
    h[1, 3], h[1, 4] = 0.0, randn(width, seed=1) * torch.finfo(dtype).tiny
    peaks, medians = (t.cpu() for t in salience_triton.peaks_and_medians(h.to(DEVICE), True))
    due = h.abs().amax(-1).float().nan_to_num(0.0, posinf=torch.finfo(f32).max)
    assert_same("peaks", due, peaks)
    assert_same("medians", h.abs().float().median(-1).values, medians)
    assert_same("peaks alone", due, salience_triton.peaks_and_medians(h.to(DEVICE), False)[0].cpu())


def check_pivots(h, valid, count, mode):
    args = (count, mode, 100.0, 1000.0)
    h, valid = to_device(h, valid)
    found = salience_triton.find_pivots(h, valid, *args)
    assert found.dtype == torch.int32
    due = find_pivots_reference(h, valid, *args)  # on one device: topk orders equals as it likes
    assert_same("pivots", due, found)


@every_dtype
@pytest.mark.parametrize("mode", ("massive", "topk"))
@given(st.data(), st.integers(1, 3), st.integers(1, 12), st.integers(1, 40), st.integers(1, 15), seeds)
@few
def test_pivots_are_the_reference_s(mode, dtype, data, B, T, width, count, seed):
    h = randn(B, T, width, seed=seed, dtype=dtype).clamp(-ORDINARY, ORDINARY)
    for value in (MASSIVE, -2 * MASSIVE, *BROKEN):
        row, token, place = (data.draw(st.integers(0, size - 1)) for size in (B, T, width))
        h[row, token, place] = value
    valid = data.draw(st.sampled_from((None, left_padding(B, T, data.draw(st.integers(0, T))))))
    h += randn(B, T, 1, seed=seed + 1, dtype=dtype) / 8  # no two tokens of one size: their order would be open
    check_pivots(h, valid, count, mode)


def test_pivots_of_strided_activations():
    wide = randn(7, 3, 2, 40)
    wide[4, 1, 1, 8] = MASSIVE
    h = wide.to(DEVICE).permute(2, 0, 1, 3)[:, :, 1, ::2]
    for mode in ("massive", "topk"):
        found = salience_triton.find_pivots(h, None, 3, mode, 100.0, 1000.0).cpu()
        assert_same(mode, find_pivots_reference(h.cpu(), None, 3, mode, 100.0, 1000.0), found)


def check_affine(k, q, valid, centre=True, balance=True):
    affine = salience_triton.key_affine(*to_device(k, q, valid), centre, balance).cpu()
    due = key_affine_reference(k, q, valid, centre, balance)
    assert (affine.shape, affine.dtype) == (due.shape, f32)
    assert_close("map", due, affine)


@every_dtype
@pytest.mark.parametrize("centre, balance", [(True, True), (True, False), (False, True), (False, False)])
def test_map_is_the_reference_s(centre, balance, dtype):
    k = (randn(2, 2, 9, 24) * torch.arange(1, 25) / 8 + 3).to(dtype)
    check_affine(k, randn(2, 6, 9, 24, dtype=dtype), None, centre, balance)


@given(st.data(), st.sampled_from((8, 24, 64, 80)), st.integers(1, 3), st.integers(1, 40), seeds)
@few
def test_map_of_any_prompt(data, head_dim, groups, tokens, seed):
    asked = data.draw(st.sampled_from((tokens, 1, 5)), label="query tokens")
    real = data.draw(st.sampled_from((None, 0, 1, tokens)), label="real tokens")
    valid = None if real is None else left_padding(2, tokens, real)
    k = randn(2, 2, tokens, head_dim, seed=seed) * 2 ** randn(head_dim, seed=seed + 1) + 3
    q = randn(2, 2 * groups, asked, head_dim, seed=seed + 2)
    check_affine(k, q, valid)


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_broken_tokens_count_as_in_the_reference(broken):
    k, q = randn(2, 2, 50, 16) + 2, randn(2, 4, 50, 16)
    k[1, :, 7], k[0, 1, 3, 5], q[1, :, 7], q[0, 1, 3, 5] = broken, broken, broken, broken
    check_affine(k, q, None)
    check_affine(k, q, left_padding(2, 50, 30))
    k[:, :, :, 3] = broken
    check_affine(k, q, None)


@pytest.mark.parametrize("head_dim", (16, 128))
def test_many_chunks_and_tiles(head_dim):
    """Keys that drift, so that every part has another mean."""
    tokens = 2 * salience_triton.CHUNK + 77
    drift = torch.arange(tokens)[:, None] * torch.linspace(0, 0.1, head_dim)
    k, q = randn(1, 2, tokens, head_dim) + drift, randn(1, 2, tokens, head_dim)
    check_affine(k, q, None)
    check_affine(k, q, left_padding(1, tokens, 60))


def test_a_mean_far_above_the_deviation_costs_no_digits():
    """In numbers that float32 holds exactly: keys of 4096 +- 1, whose squares would leave nothing of the deviation."""
    sign = torch.where(randn(1, 2, 600, 16) > 0, 1.0, -1.0)
    k, q = 4096 + sign * torch.arange(1, 17) / 16, torch.ones(1, 2, 600, 16)
    affine = salience_triton.key_affine(*to_device(k, q), None, True, True).cpu()
    gain = k.double().std(2, unbiased=False).sqrt()
    assert_close("centre", k.double().mean(2), affine[:, 0])
    assert_close("gain", gain / gain.log().mean(-1, keepdim=True).exp(), affine[:, 2])


def test_map_of_strided_keys():
    k, q = randn(2, 9, 3, 16).to(DEVICE).transpose(1, 2), randn(2, 16, 6, 9).to(DEVICE).permute(0, 2, 3, 1)
    valid = left_padding(9, 2, 1).to(DEVICE).T
    affine = salience_triton.key_affine(k, q, valid, True, True).cpu()
    assert_close("map", key_affine_reference(k.cpu(), q.cpu(), valid.cpu(), True, True), affine)


def test_refuses_what_it_cannot_hold():
    k = randn(1, 1, 2, 8)
    long, double = torch.ones(1, 1, 16385), randn(1, 2, 8).double()
    for h, reason in ((double, "h is torch.float64"), (long, "the last dim of h is 16385"), (k[0, :, :0], "one token")):
        assert reason in salience_triton.refusal(h)
        with pytest.raises(ValueError, match=f"akvq::find_pivots: .*{reason}"):
            salience_triton.find_pivots(h, None, 3, "topk", 0.0, 0.0)
    with pytest.raises(ValueError, match="mode is 'some', accepted: 'topk', 'massive'"):
        salience_triton.find_pivots(randn(1, 2, 8), None, 3, "some", 0.0, 0.0)
    wide = torch.ones(1, 1, 2, 1025)
    for pair, reason in (
        ((k, k.double()), "q is torch.float64"),
        ((k[:, :, :0], k), r"k is \[1, 1, 0, 8\], accepted: one token or more"),
        ((wide, wide), "the last dim of k is 1025"),
    ):
        assert salience_triton.refusal(*pair)
        with pytest.raises(ValueError, match=f"akvq::key_affine: .*{reason}"):
            salience_triton.key_affine(*pair, None, True, True)
    assert salience_triton.refusal(k, k) == salience_triton.refusal(k[0]) == ""
