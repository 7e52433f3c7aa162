"""rotate(x): the normalised Walsh-Hadamard transform of the last axis; rotate_keys, rotate_queries: after a map.

x       [..., D]  floating, D a multiple of 8; computed in float32 (float64 stays), returned in x's dtype
H is Sylvester's matrix / sqrt(n) of order n = the largest power of two that divides D, repeated on the diagonal: it is
symmetric and its own inverse for every D, so (qH)(kH)^T = q k^T.

affine  [B, 2, H, D] float16: centre c, gain s. Keys become H((k - c)/s) and queries H(q*s): q (k - c) differs from q k
by a constant per query, which softmax does not see, and (q*s)(k/s) = q k. Both hold for c and s as stored, rounded.
A third row is an order of channels: then these are sorted, and rotated part by part (kernels/uneven.py).
Raises ValueError for a D that is not a multiple of 8. Sources: QuaRot, arXiv 2404.00456; AKVQ-VL eq. 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx.kernels import uneven
from akvq_fx.kernels.choose import choose
from akvq_fx.kernels.layout import CENTRE, GAIN, ORDER

FASTER = {"cuda": ("rotate_triton",)}  # before the reference, by device


def order_of(head_dim: int) -> int:
    """Order of the Walsh-Hadamard blocks: the largest power of two dividing head_dim."""
    if head_dim <= 0 or head_dim % 8:
        raise ValueError(f"akvq::rotate: the last dim must be a positive multiple of 8, got {head_dim}")
    return head_dim & -head_dim


def matrix(head_dim: int, dtype: torch.dtype = torch.float64, device=None) -> Tensor:
    """The [D, D] matrix that rotate multiplies by."""
    order = order_of(head_dim)
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while h.shape[0] < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return torch.block_diag(*[h * order**-0.5] * (head_dim // order))


_matrices: dict = {}  # (D, dtype, device) -> matrix; a matmul with it is the quickest way in plain PyTorch for D <= 256


def rotate_wide(x: Tensor) -> Tensor:
    """H x in float32, or in float64 for float64."""
    x = x if x.dtype == torch.float64 else x.float()
    key = (x.shape[-1], x.dtype, x.device)
    if key not in _matrices:
        _matrices[key] = matrix(*key)
    return x @ _matrices[key]


def reference(x: Tensor) -> Tensor:
    return rotate_wide(x).to(x.dtype)


def keys_reference(k: Tensor, affine: Tensor) -> Tensor:
    wide = torch.promote_types(k.dtype, torch.float32)
    rows = affine.to(wide).unsqueeze(3)
    return mapped((k.to(wide) - rows[:, CENTRE]) * rows[:, GAIN].reciprocal(), affine).to(k.dtype)


def queries_reference(q: Tensor, affine: Tensor) -> Tensor:
    """Heads of q may be a multiple of affine's (GQA)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    gain = affine[:, GAIN, :, None, None].to(wide)  # [B, H, 1, 1, D]
    grouped = q.to(wide).unflatten(1, (affine.shape[2], -1)) * gain
    return mapped(grouped.flatten(1, 2), affine).to(q.dtype)


def order_in(affine: Tensor) -> Tensor | None:
    """[B, H, D] int64: the order of channels in an affine map; None where channels stay where they are."""
    return affine[:, ORDER].long() if affine.shape[1] > ORDER else None


def mapped(x: Tensor, affine: Tensor) -> Tensor:
    """x [B, Hq, T, D] centred and scaled -> the stored space."""
    order = order_in(affine)
    if order is None:
        return rotate_wide(x)
    return uneven.to_stored(x, order.repeat_interleave(x.shape[1] // order.shape[1], 1))


def rotate_directly(x: Tensor) -> Tensor:
    """akvq::rotate without the dispatcher, for other ops; the next two are the same for rotate_keys, rotate_queries."""
    kernel = choose("rotate", FASTER.get(x.device.type, ()), x)
    return reference(x) if kernel is None else kernel(x)


def rotate_keys_directly(k: Tensor, affine: Tensor) -> Tensor:
    kernel = choose("rotate_keys", FASTER.get(k.device.type, ()), k)
    if kernel is not None:
        return kernel(k, affine)
    return keys_reference(k, affine)


def rotate_queries_directly(q: Tensor, affine: Tensor) -> Tensor:
    kernel = choose("rotate_queries", FASTER.get(q.device.type, ()), q)
    if kernel is not None:
        return kernel(q, affine)
    return queries_reference(q, affine)


rotate = torch.library.custom_op("akvq::rotate", rotate_directly, mutates_args=())
rotate_keys = torch.library.custom_op("akvq::rotate_keys", rotate_keys_directly, mutates_args=())
rotate_queries = torch.library.custom_op("akvq::rotate_queries", rotate_queries_directly, mutates_args=())


def _fake(x: Tensor, affine: Tensor | None = None) -> Tensor:
    order_of(x.shape[-1])
    return x.new_empty(x.shape)


for _op in (rotate, rotate_keys, rotate_queries):
    _op.register_fake(_fake)


def rotate_as_stored(x: Tensor, affine: Tensor | None, rotated: bool) -> Tensor:
    """Keys or values as the model made them -> the space of the buffers, [B, H, T, D]."""
    if affine is not None:
        return rotate_keys_directly(x, affine)
    return rotate_directly(x) if rotated else x


def restore(stored: Tensor, affine: Tensor | None, rotated: bool) -> Tensor:
    """Undo rotate_as_stored: stored [B, H, T, D] -> keys or values as the model made them."""
    order = None if affine is None else order_in(affine)
    x = rotate_wide(stored) if rotated and order is None else stored
    if order is not None:
        x = uneven.from_stored(stored.to(torch.promote_types(stored.dtype, torch.float32)), order)
    if affine is not None:
        rows = affine.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(3)
        x = x * rows[:, GAIN] + rows[:, CENTRE]
    return x.to(stored.dtype)
