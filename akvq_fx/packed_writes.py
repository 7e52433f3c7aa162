"""What writes into a PackedKV outside a graph: tokens at positions of a static cache, rows or all of another cache,
zeros.

While a graph is traced, nothing is written: only the shape matters. akvq_fx/packed_ops.py has the other handlers, says
how they answer, and refuses all other writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx import exchange
from akvq_fx.kernels import cache as ops
from akvq_fx.packed_ops import implements, implements_function, is_packed, unsupported_write
from akvq_fx.packed_rows import replace_rows

aten = torch.ops.aten


def write_at(packed, at: Tensor, x: Tensor):
    """packed[:, :, at] = x (or on its own token axis) for a static PackedKV; a growing one refuses. Traced, it writes
    nothing."""
    storage = packed.storage
    if storage is None:
        exchange.require_own_tracing(packed)
        return packed
    if storage.end is not None:
        return NotImplemented  # a growing cache takes cat; a write before its end would break ring and text slots
    ops.append(storage.buffers, storage.to_stored(x), at, None, None, packed.layout_text)
    return packed


@implements([aten.index_copy_.default])
def _(func, types, args, kwargs):
    packed, dim, at, x = args
    if is_packed(packed) and is_packed(x) and dim % packed.dim() == packed.axes.rows:
        return replace_rows(packed, at, x)
    return write_at(packed, at, x) if dim % packed.dim() == packed.axes.tokens else NotImplemented


@implements([aten.index_put_.default])
def _(func, types, args, kwargs):
    packed, indices, x = args[:3]
    tokens, rows = packed.axes.tokens, packed.axes.rows
    if is_packed(x) and [at for at, index in enumerate(indices) if index is not None] == [rows]:
        index = indices[rows].nonzero().flatten() if indices[rows].dtype == torch.bool else indices[rows]
        return replace_rows(packed, torch.where(index < 0, index + packed.shape[rows], index), x)
    if len(indices) != tokens + 1 or any(index is not None for index in indices[:tokens]):
        return NotImplemented
    return write_at(packed, indices[tokens], x)


@implements([aten.scatter_.src])
def _(func, types, args, kwargs):
    packed, dim, index, x = args[:4]
    tokens = packed.axes.tokens
    if dim % packed.dim() != tokens:
        return NotImplemented
    if packed.storage is None:  # tracing: sizes and strides of the index are not looked at, which would add guards
        return packed
    if any(index.shape[axis] > 1 and index.stride(axis) for axis in range(packed.dim()) if axis != tokens):
        return NotImplemented  # each channel might have positions of its own
    return write_at(packed, index[tuple(slice(None) if axis == tokens else 0 for axis in range(packed.dim()))], x)


@implements([aten.copy_.default])
def _(func, types, args, kwargs):
    target, source = args[:2]
    if not is_packed(target):
        return NotImplemented
    if target.storage is None:
        return target
    same = is_packed(source) and source.layout_text == target.layout_text and source.shape == target.shape
    same = same and source.static == target.static and source.axes == target.axes and source.first == target.first
    if target.static and not is_packed(source):  # a full sliding window that rolls outside a graph
        target.unpack().copy_(source)
        return target
    if not same or [b.shape for b in source.storage.buffers] != [b.shape for b in target.storage.buffers]:
        return NotImplemented
    target.storage.release_borrowers()
    # caches that were selected from a growing one share its affine map
    if not target.static and "affine" in target.storage.layout.fields:
        target.storage["affine"] = target.storage["affine"].clone()
    for into, out_of in zip(target.storage.buffers, source.storage.buffers, strict=True):
        into.copy_(out_of)
    for name in ("end", "prompt", "owner"):
        setattr(target.storage, name, getattr(source.storage, name))
    return target


@implements([aten.zero_.default])
def _(func, types, args, kwargs):
    if args[0].storage is not None:
        args[0].storage.clear()
    return args[0]


@implements_function([
    torch.Tensor.__setitem__, torch.Tensor.index_copy_, torch.Tensor.scatter_, torch.Tensor.zero_, torch.Tensor.fill_,
    torch.Tensor.copy_, torch.Tensor.index_put_, torch.Tensor.index_fill_, torch.Tensor.masked_fill_,
    torch.Tensor.masked_scatter_, torch.Tensor.index_add_, torch.Tensor.scatter_add_, torch.Tensor.put_,
    torch.Tensor.add_, torch.Tensor.sub_, torch.Tensor.mul_, torch.Tensor.div_,
])  # fmt: skip
def _(func, types, args, kwargs):
    if not torch.compiler.is_compiling():
        part = None
        if is_packed(args[0]):
            part = first_rows(args[0], args[1]) if func is torch.Tensor.__setitem__ else None
            at = positions(args[0], func.__name__, args[1:], kwargs) if part is None else part[1]
            all_rows = part is None or part[0] == args[0].shape[args[0].axes.rows]
            exchange.before_write(args[0], func.__name__, at, all_rows)
        if part is not None and is_packed(args[0]) and args[0].static:
            return write_rows(args[0], *part, args[2])
        if func is torch.Tensor.__setitem__ and is_packed(args[0]) and not all(map(is_index, parts_of(args[1]))):
            raise unsupported_write(f"x[{args[1]}] = ...")  # aten would write into a temporary and lose it
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def write_rows(packed, rows: int, at: Tensor, x) -> None:
    """packed[:rows, at] = x on the axes of rows and tokens, where positions follow each other."""
    size = list(packed.shape)
    size[packed.axes.rows], size[packed.axes.tokens] = rows, len(at)
    x = torch.as_tensor(x, dtype=packed.dtype, device=packed.device).expand(size)
    part = packed.storage.first_rows(rows)
    ops.append(part.buffers, part.to_stored(x), at, None, None, packed.layout_text)


def first_rows(packed, index) -> tuple[int, Tensor] | None:
    """(rows, positions) of packed[:rows, a:b] = ..., on the axes of rows and tokens; None for another index."""
    parts, axes = parts_of(index), packed.axes
    parts = (*parts, *[slice(None)] * (axes.rank - len(parts)))
    others = [part for i, part in enumerate(parts) if i not in (axes.rows, axes.tokens)]
    if len(parts) != axes.rank or not all(map(exchange.is_all, others)):
        return None
    chosen = parts[axes.rows], parts[axes.tokens]
    if not all(isinstance(part, slice) and part.step in (None, 1) for part in chosen) or exchange.is_all(chosen[1]):
        return None
    rows, tokens = (range(packed.shape[i])[part] for i, part in zip((axes.rows, axes.tokens), chosen, strict=True))
    if rows.start or not len(tokens):
        return None
    return len(rows), torch.arange(tokens.start, tokens.stop, device=packed.device)


def parts_of(index) -> tuple:
    return index if isinstance(index, tuple) else (index,)


def is_index(part) -> bool:
    return isinstance(part, Tensor | list) or part is Ellipsis or exchange.is_all(part)


def positions(packed, how: str, args: tuple, kwargs: dict) -> Tensor | None:
    """[q] positions of the tokens that a call writes in all rows, heads and channels; None where it does not say."""
    tokens, at = packed.axes.tokens, None
    if how == "index_copy_":
        dim, at = (*args, *kwargs.values())[:2]
        at = at if dim % packed.dim() == tokens else None
    elif how == "__setitem__":
        parts = parts_of(args[0])
        whole = len(parts) > tokens and all(map(exchange.is_all, (*parts[:tokens], *parts[tokens + 1 :])))
        at = (
            parts[tokens] if whole and isinstance(parts[tokens], Tensor) and parts[tokens].dtype != torch.bool else None
        )
    elif how == "scatter_" and len(args) > 1 and args[0] % packed.dim() == tokens:
        index = args[1]
        same = not any(index.shape[i] > 1 and index.stride(i) for i in range(index.dim()) if i != tokens)
        at = index[tuple(slice(None) if i == tokens else 0 for i in range(index.dim()))] if same else None
    return at if at is not None and at.dim() == 1 and len(at) else None
