"""rotate, rotate_keys, rotate_queries as Triton kernels: equal to the matrix product in float64, for any strides."""

import pytest
import torch

from akvq_fx.kernels import rotate_triton
from akvq_fx.kernels.rotate import keys_reference, matrix, queries_reference
from tests.kernel_cases import assert_close, assert_same, bf16, f16, f32, randn, random_affine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_DIMS = (8, 16, 24, 80, 96, 128, 256)
every_dtype = pytest.mark.parametrize("dtype", (f16, bf16, f32), ids=str)
MEANING = {"rotate_keys": keys_reference, "rotate_queries": queries_reference}
SHAPES = {"decode": (2, 9, 1), "few": (1, 3, 5), "prompt": (1, 2, 70)}  # B, H, T
# every shape in float32 and in one of the 16-bit dtypes, which differ in nothing but how numbers are read and written
every_shape = pytest.mark.parametrize(
    "shape, dtype", [(name, f32) for name in SHAPES] + [("decode", bf16), ("few", f16), ("prompt", bf16)], ids=str
)


def made(*shape):
    return randn(*shape).to(DEVICE)


def exact(name, x, affine):
    """The op's meaning in float64, on the CPU; affine with or without an order of channels."""
    if name == "rotate":
        return x.double() @ matrix(x.shape[-1])
    return MEANING[name](x.double(), affine)


def rotated(name, x, affine):
    args = (x.to(DEVICE),) if name == "rotate" else (x.to(DEVICE), affine.to(DEVICE))
    return getattr(rotate_triton, name)(*args).cpu()


@every_shape
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_equals_the_matrix_product(shape, head_dim, dtype):
    shape = SHAPES[shape]
    x = randn(*shape, head_dim, dtype=dtype) * 10
    affine = random_affine(*shape[:2], head_dim)
    for name in ("rotate", "rotate_keys", "rotate_queries"):
        y = rotated(name, x, affine)
        assert y.dtype == dtype
        assert_close(name, exact(name, x, affine), y)


@every_shape
@pytest.mark.parametrize("head_dim", (*HEAD_DIMS, 64, 200))
def test_channels_in_order_equal_the_matrix_product(shape, head_dim, dtype):
    shape = SHAPES[shape]
    x = randn(*shape, head_dim, dtype=dtype) * 10
    affine = random_affine(*shape[:2], head_dim, uneven=True)
    for name in ("rotate_keys", "rotate_queries"):
        y = rotated(name, x, affine)
        assert y.dtype == dtype
        assert_close(name, exact(name, x, affine), y)


@pytest.mark.parametrize("head_dim", (16, 64, 256))
def test_float32_keeps_its_last_digit(head_dim):
    """One channel that is not zero, in blocks whose sqrt(order) is a power of two: nothing has to be rounded."""
    x = torch.zeros(1, 2, 40, head_dim)
    x.scatter_(-1, torch.arange(80).view(1, 2, 40, 1) % head_dim, randn(1, 2, 40, 1) * 1e3)
    ones = (torch.ones(1, 2, 2, head_dim) * torch.tensor([0.0, 1.0])[:, None, None]).half()
    for name in ("rotate", "rotate_keys", "rotate_queries"):
        assert_same(name, exact(name, x, ones).float(), rotated(name, x, ones))


@pytest.mark.parametrize("tokens", (1, 20))
@pytest.mark.parametrize("ordered", (False, True))
def test_queries_take_their_key_head_s_map(tokens, ordered):
    q, affine = randn(2, 6, tokens, 24), random_affine(2, 2, 24, uneven=ordered)
    assert_close("queries", exact("rotate_queries", q, affine), rotated("rotate_queries", q, affine))


STRIDED = {
    "transposed": lambda: made(2, 5, 3, 16).transpose(1, 2),
    "heads of a wide row": lambda: made(2, 20, 3 * 48)[..., 48:96].unflatten(-1, (3, 16)).transpose(1, 2),
    "every other channel": lambda: made(2, 3, 5, 32)[..., ::2],
    "channels first": lambda: made(2, 16, 3, 5).permute(0, 2, 3, 1),
    "one head for all": lambda: made(2, 1, 5, 16).expand(2, 3, 5, 16),
    "last tokens": lambda: made(2, 3, 9, 16)[:, :, 3:],
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("ordered", (False, True))
def test_takes_any_strides(make, ordered):
    x, affine = make(), random_affine(2, 3, 16, uneven=ordered)
    for name, args in (("rotate", ()), ("rotate_keys", (affine.to(DEVICE),))):
        y = getattr(rotate_triton, name)(x, *args)
        assert y.is_contiguous()
        assert_close(name, exact(name, x.cpu(), affine), y.cpu())


@pytest.mark.parametrize("shape", [(24,), (3, 40), (7, 2, 8), (2, 2, 1, 3, 16), (2, 0, 5, 16)], ids=str)
def test_takes_any_number_of_axes(shape):
    x = randn(*shape)
    assert_same("y", rotated("rotate", x.reshape(-1, shape[-1]), None).view(shape), rotated("rotate", x, None))
    if x.numel():
        assert_close("y", exact("rotate", x, None), rotated("rotate", x, None))


def test_several_tiles_a_program(monkeypatch):
    monkeypatch.setattr(rotate_triton, "PROGRAMS", 1)
    x, affine, ordered = randn(1, 2, 700, 16), random_affine(1, 2, 16), random_affine(1, 2, 16, uneven=True)
    assert rotate_triton.plan_of(2, 700, 16).steps > 1
    for name, given in (("rotate", affine), ("rotate_keys", affine), ("rotate_keys", ordered)):
        assert_close(name, exact(name, x, given), rotated(name, x, given))


@pytest.mark.parametrize("broken", (torch.nan, torch.inf), ids=str)
@every_dtype
@pytest.mark.parametrize("ordered", (False, True))
def test_a_broken_row_stays_alone(dtype, broken, ordered):
    x, affine = randn(2, 3, 5, 24, dtype=dtype), random_affine(2, 3, 24, uneven=ordered)
    clean = [rotated(name, x, affine) for name in ("rotate", "rotate_keys")]
    x[1, 2, 3, 9] = broken
    others = torch.ones(x.shape[:3], dtype=torch.bool)
    others[1, 2, 3] = False
    for name, before in zip(("rotate", "rotate_keys"), clean, strict=True):
        after = rotated(name, x, affine)
        assert_same("other rows", before[others], after[others])
        assert not after[1, 2, 3].isfinite().any()


def test_refuses_what_it_cannot_hold():
    assert rotate_triton.refusal(randn(2, 16)) == ""
    for x, reason in ((randn(2, 16, dtype=torch.float64), "x is torch.float64"), (randn(2, 264), "head dim is 264")):
        assert reason in rotate_triton.refusal(x)
        with pytest.raises(ValueError, match=f"akvq::rotate: .*{reason}"):
            rotate_triton.rotate(x)
    with pytest.raises(ValueError, match="multiple of 8, got 20"):
        rotate_triton.rotate(randn(2, 20))


@pytest.mark.parametrize("shape", [(1, 2, 3, 16), (2, 2, 3, 8), (2, 2, 2, 16), (2, 1, 3, 16)], ids=str)
def test_refuses_another_map(shape):
    with pytest.raises(ValueError, match=r"akvq::rotate_keys: affine is .*, accepted: float16 \[2, 2, heads, 16\]"):
        rotate_triton.rotate_keys(randn(2, 3, 5, 16), randn(*shape).half())


def test_refuses_more_rows_than_an_order_of_channels():
    with pytest.raises(ValueError, match=r"affine is .*\[2, 4, 3, 16\], accepted: float16 \[2, 3, heads, 16\]"):
        rotate_triton.rotate_keys(randn(2, 3, 5, 16), randn(2, 4, 3, 16).half())
