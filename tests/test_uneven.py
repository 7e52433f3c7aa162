"""Channels with 4, 2 and 0 bits: order and rotation are exact identities, and slots of 2 bits hold what is read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from akvq_fx.kernels import uneven
from akvq_fx.kernels.rotate import restore, rotate_keys, rotate_queries
from akvq_fx.kernels.salience import key_affine
from tests.kernel_cases import assert_close, assert_same, few, randn, random_affine, seeds

DIMS = (8, 16, 24, 64, 72, 80, 96, 128, 256)
dims = pytest.mark.parametrize("head_dim", DIMS)


@dims
def test_stored_channels_are_all_channels(head_dim):
    dealt = uneven.dealt(head_dim, torch.device("cpu"))
    assert sorted(dealt.tolist()) == list(range(head_dim))
    first, middle, last = uneven.parts(head_dim)
    for start, size in ((0, first), (first, middle)):
        order, number = uneven.blocks(size)
        assert order * number == size
        ranks = dealt[start : start + size].view(number, order)
        assert int(ranks.min()) == start and int(ranks.max()) == start + size - 1
        # dealt in turn: blocks hold neighbours in rank, so that they are alike
        assert (ranks[-1] - ranks[0] == number - 1).all()
    assert dealt[-last:].tolist() == list(range(head_dim - last, head_dim))


@dims
def test_matrix_is_its_own_inverse(head_dim):
    matrix = uneven.matrix(head_dim, torch.float64, torch.device("cpu"))
    assert_same("symmetric", matrix, matrix.T)
    assert_close("identity", torch.eye(head_dim, dtype=torch.float64), matrix @ matrix)


@given(st.sampled_from(DIMS), st.integers(1, 2), st.integers(1, 3), seeds)
@few
def test_scores_stay_as_they_were(head_dim, heads, shared, seed):
    """(q, k - c) of the stored space equal those of the model's, with grouped queries too; keys come back."""
    k = randn(2, heads, 5, head_dim, seed=seed, dtype=torch.float64)
    q = randn(2, heads * shared, 3, head_dim, seed=seed + 1, dtype=torch.float64)
    affine = random_affine(2, heads, head_dim, seed, uneven=True)
    stored, asked = rotate_keys(k, affine), rotate_queries(q, affine)
    centred = (k - affine[:, 0, :, None].double()).repeat_interleave(shared, 1)
    found = asked @ stored.repeat_interleave(shared, 1).mT
    assert_close("scores", q @ centred.mT, found)
    assert_close("keys", k, restore(stored, affine, rotated=True))


@given(st.sampled_from(DIMS), seeds)
@few
def test_slots_are_asked_as_the_tokens_they_hold(head_dim, seed):
    """q . x' = the sum of two groups: scale * (code - 1.5) of each slot times (4 q, q, q)."""
    x, q = randn(7, head_dim, seed=seed).double(), randn(head_dim, seed=seed + 1).double()
    codes, scales = uneven.encode(x)
    assert codes.min() >= 0 and codes.max() <= 3 and scales.dtype == torch.float16
    first, middle, last = uneven.parts(head_dim)
    slots = torch.cat([4 * q[:first], q[:first], q[first : first + middle]])
    by_group = ((codes - 1.5) * slots).unflatten(-1, (2, -1)).sum(-1)
    read = uneven.decode(codes, scales, torch.float64)
    assert_close("scores", read @ q, (by_group * scales).sum(-1), torch.float32)
    assert (read[:, -last:] == 0).all()


@given(st.sampled_from((16, 64, 128)), seeds)
@few
def test_more_bits_read_better_and_lengths_stay(head_dim, seed):
    x = randn(50, head_dim, seed=seed)
    read = uneven.decode(*uneven.encode(x), torch.float32)
    first, middle, _ = uneven.parts(head_dim)
    error = (read - x).square().mean(0)
    assert error[:first].mean() < error[first : first + middle].mean() / 4 < 0.1
    for part in (slice(0, first), slice(first, first + middle)):
        along = (read[:, part] * x[:, part]).sum(-1) / x[:, part].square().sum(-1)
        assert_close("its own part along itself", torch.ones(50), along, torch.float16)


@pytest.mark.parametrize("broken", (torch.nan, torch.inf), ids=str)
def test_a_broken_part_stays_alone(broken):
    x = randn(3, 16)
    x[1, 2] = broken
    read, clean = (uneven.decode(*uneven.encode(t), torch.float32) for t in (x, x.nan_to_num(0.0, 0.0)))
    first = uneven.parts(16)[0]
    assert not read[1, :first].isfinite().any()
    assert_same("the other part", clean[1, first:], read[1, first:])
    assert_same("other tokens", clean[[0, 2]], read[[0, 2]])


def test_zeros_read_as_zeros():
    assert_same("zeros", torch.zeros(2, 24), uneven.decode(*uneven.encode(torch.zeros(2, 24)), torch.float32))


@pytest.mark.parametrize("padded", (False, True))
def test_the_order_is_by_the_part_in_scores(padded):
    """Large keys alone do not lead, nor large queries: their product does."""
    k, q = randn(1, 2, 400, 16), randn(1, 4, 400, 16, seed=1)
    k[..., 3] *= 50
    q[..., 3] *= 0.01
    k[..., 5] *= 4
    q[..., 5] *= 4
    k[..., 9] += 1000  # a constant moves no score
    valid = torch.ones(1, 400, dtype=torch.bool)
    if padded:
        valid[:, :100] = False
        k[:, :, :100], q[:, :, :100] = 1e4, 1e4
    found = key_affine(k, q, valid if padded else None, True, True, None, True)
    assert_same("centre and gain", key_affine(k, q, valid if padded else None, True, True), found[:, :2])
    first, _, last = uneven.parts(16)
    for order in found[0, 2].long():
        assert sorted(order.tolist()) == list(range(16))
        assert 5 in order[:first] and 3 in order[-last:]
