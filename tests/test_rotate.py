"""rotate, rotate_keys, rotate_queries: registered right, equal to Sylvester's matrix, softmax(q k^T) unchanged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from akvq_fx.kernels.rotate import keys_reference, matrix, restore, rotate, rotate_keys, rotate_queries
from tests.kernel_cases import TOLERANCE, assert_close, assert_same, few, randn, random_affine, seeds

HEAD_DIMS = (8, 16, 24, 40, 48, 64, 80, 96, 128, 256)
DTYPES = tuple(TOLERANCE)


def sylvester(head_dim):
    """H[i, j] = (-1)**popcount(i & j) / sqrt(n) in blocks of the largest power of two n that divides D."""
    n = next(2**p for p in range(20, -1, -1) if head_dim % 2**p == 0)
    out = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    for i in range(head_dim):
        for j in range(i // n * n, i // n * n + n):
            out[i, j] = (-1) ** bin(i % n & j % n).count("1") / n**0.5
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24,), (3, 40), (2, 1, 7, 16)], ids=str)
def test_hadamard_registration(shape, dtype):
    torch.library.opcheck(rotate, (randn(*shape, dtype=dtype),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, heads", [(rotate_keys, 2), (rotate_queries, 6)], ids=("rotate_keys", "rotate_queries"))
def test_affine_registration(op, heads, dtype):
    torch.library.opcheck(op, (randn(2, heads, 5, 24, dtype=dtype), random_affine(2, 2, 24)))


def test_registration_of_strided_inputs():
    x = randn(2, 5, 3, 16).transpose(1, 2)
    torch.library.opcheck(rotate, (x,))
    torch.library.opcheck(rotate_keys, (x, random_affine(2, 3, 16)))
    assert rotate(x).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_equals_sylvester(head_dim, dtype):
    x = randn(2, 3, 5, head_dim, dtype=dtype)
    y = rotate(x)
    assert y.dtype == dtype
    assert_close("y", x.double() @ sylvester(head_dim), y)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_matrix_is_orthonormal_and_symmetric(head_dim):
    h = matrix(head_dim)
    assert_close("H H^T", torch.eye(head_dim, dtype=torch.float64), h @ h.T)
    assert_same("H^T", h, h.T)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@given(st.sampled_from(HEAD_DIMS), st.integers(1, 9), seeds)
@few
def test_own_inverse_keeps_norms_and_scores(dtype, head_dim, tokens, seed):
    q, k = randn(3, head_dim, seed=seed, dtype=dtype), randn(tokens, head_dim, seed=seed + 1, dtype=dtype)
    assert_close("H(H(k))", k, rotate(rotate(k)))
    assert_close("norm", k.norm(dim=-1), rotate(k).norm(dim=-1))
    assert_close("scores", q @ k.T, rotate(q) @ rotate(k).T)


def test_spreads_an_outlier_channel():
    x = torch.zeros(64)
    x[5] = 64.0
    assert_same("|y|", torch.full((64,), 8.0), rotate(x).abs())


@pytest.mark.parametrize("fake", (False, True), ids=("eager", "fake"))
@pytest.mark.parametrize("head_dim", (1, 4, 12, 20, 63))
def test_refuses_other_dims(head_dim, fake):
    message = f"akvq::rotate: the last dim must be a positive multiple of 8, got {head_dim}"
    with FakeTensorMode() if fake else torch.no_grad():
        x, affine = torch.ones(2, 2, 3, head_dim), torch.ones(2, 2, 2, head_dim).half()
        for op, args in ((rotate, (x,)), (rotate_keys, (x, affine)), (rotate_queries, (x, affine))):
            with pytest.raises(ValueError, match=message):
                op(*args)


def attention_weights(q, k):
    groups = q.shape[1] // k.shape[1]
    return (q @ k.repeat_interleave(groups, 1).transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@given(st.sampled_from(HEAD_DIMS), st.integers(1, 2), st.integers(1, 3), st.sampled_from((1, 2, 3)), seeds)
@few
def test_affine_leaves_softmax_unchanged(dtype, head_dim, batch, heads, groups, seed):
    q = randn(batch, heads * groups, 4, head_dim, seed=seed, dtype=dtype)
    k = randn(batch, heads, 7, head_dim, seed=seed + 1, dtype=dtype)
    affine = random_affine(batch, heads, head_dim, seed + 2)
    rotated = attention_weights(rotate_queries(q, affine), rotate_keys(k, affine))
    assert_close("weights", attention_weights(q, k), rotated)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine_equals_its_formula(dtype):
    k, q, affine = randn(2, 2, 5, 24, dtype=dtype), randn(2, 6, 3, 24, dtype=dtype), random_affine(2, 2, 24)
    centre, gain = affine.double().unsqueeze(3).unbind(1)
    assert_close("keys", (k.double() - centre) / gain @ sylvester(24), rotate_keys(k, affine))
    asked = q.double() * gain.repeat_interleave(3, 1) @ sylvester(24)
    assert_close("queries", asked, rotate_queries(q, affine))


@pytest.mark.parametrize("rotated", (False, True), ids=("plain", "rotated"))
@pytest.mark.parametrize("mapped", (False, True), ids=("no-affine", "affine"))
def test_restore_undoes(rotated, mapped):
    k, affine = randn(2, 3, 5, 40, dtype=torch.float64), random_affine(2, 3, 40) if mapped else None
    stored = keys_reference(k, affine) if mapped else rotate(k)
    if not rotated:
        stored = rotate(stored)
    assert_close("k", k, restore(stored, affine, rotated))
