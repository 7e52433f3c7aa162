"""PackedBundle: one tensor of several packed caches, as a model has it that keeps keys and values, or layers, together.

    stack    [2, B, H, T, D] of keys and values, [L, B, H, T, D] of layers, and so on
    cat      [B, H, T, 2 * D] of keys and values

A cache object holds it like any tensor. Its parts are PackedKV, or bundles again ([L, 2, B, H, T, D]). The graph takes
and returns the parts (passes/apart/take_apart.py), so no pass and no op knows of bundles. What happens to one outside
of a graph happens to its parts; what parts cannot do reads them through `dequantize()`, and says so once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from akvq_fx import bundle_ops, torch_internals
from akvq_fx.bundle_ops import is_bundle
from akvq_fx.packed_kv import PackedKV

Parts = list  # of PackedKV or PackedBundle


def joined(how: str, axis: int, parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, axis) if how == "stack" else torch.cat(parts, axis)


def apart(how: str, axis: int, sizes: tuple[int, ...], x: Tensor) -> list[Tensor]:
    """The inverse of `joined`."""
    return list(x.unbind(axis) if how == "stack" else x.split(list(sizes), axis))


@functools.cache
def marks_of(axes: tuple[int, ...]) -> dict:
    return torch_internals.dynamic_marks(sorted(axes))


class PackedBundle(torch_internals.tensor_base()):
    """Packed caches that are stacked, or joined along an axis.

    how    "stack" or "cat"
    axis   of this tensor, along which the parts lie
    parts  PackedKV or PackedBundle, alike in all but their numbers and, with "cat", their size along the axis
    """

    def __new__(cls, how: str, axis: int, parts: Parts, size=None):
        first = parts[0]
        size = whole_size(how, axis, [part.shape for part in parts]) if size is None else size
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=first.dtype, device=first.device)

    def __init__(self, how: str, axis: int, parts: Parts, size=None):
        self.how, self.axis, self.parts = how, axis, list(parts)
        self.sizes = tuple(1 if how == "stack" else part.shape[axis] for part in parts)
        self.leaves = [leaf for part in parts for leaf in (part.leaves if is_bundle(part) else [part])]
        if self.leaves[0].storage is not None:
            axes = (self.rows,) if self.leaves[0].static else (self.rows, self.tokens)
            for name, marks in marks_of(axes).items():
                setattr(self, name, set(marks) if isinstance(marks, set) else marks)

    @property
    def rows(self) -> int:
        """The axis of the batch."""
        return self.outer(rows_of(self.parts[0]))

    @property
    def tokens(self) -> int:
        return self.outer(tokens_of(self.parts[0]))

    def outer(self, axis: int) -> int:
        """An axis of a part as this tensor has it."""
        return axis + 1 if self.how == "stack" and axis >= self.axis else axis

    def inner(self, dim: int) -> int | None:
        """An axis of this tensor as a part has it, None for the one along which the parts lie."""
        dim = dim % self.dim()
        if dim == self.axis:
            return None
        return dim - 1 if self.how == "stack" and dim > self.axis else dim

    def with_parts(self, parts: list[Tensor], axis: int | None = None) -> Tensor:
        """The same of other parts: plain where they are no packed caches that are alike."""
        return bundled(self.how, self.axis if axis is None else axis, parts)

    def again(self) -> PackedBundle:
        """While tracing: another object of the same."""
        return type(self)(self.how, self.axis, self.parts, self.shape)

    def apart(self, x: Tensor) -> list[Tensor]:
        """A tensor that is like this one but for its rows or tokens, as its parts."""
        if is_bundle(x) and x.structure == self.structure:
            return x.parts
        return apart(self.how, self.axis, self.sizes, x)

    @property
    def structure(self) -> tuple:
        """How the leaves lie in it; two of one structure have as many of them."""
        return self.how, self.axis, self.sizes, tuple(p.structure if is_bundle(p) else None for p in self.parts)

    def dequantize(self) -> Tensor:
        """A plain tensor of this shape."""
        return joined(self.how, self.axis, [part.dequantize() for part in self.parts])

    @property
    def nbytes_packed(self) -> int:
        return sum(leaf.nbytes_packed for leaf in self.leaves)

    def __getattr__(self, name: str):
        """What the leaves have inner tensors of, for tracing: codes_0, codes_1, ..."""
        field, _, number = name.rpartition("_")
        leaves = vars(self).get("leaves", ())
        if number.isdigit() and int(number) < len(leaves) and field in leaves[int(number)].traced:
            return getattr(leaves[int(number)], field)
        raise AttributeError(f"PackedBundle has no attribute {name!r}")

    def __tensor_flatten__(self):
        flat = [leaf.__tensor_flatten__() for leaf in self.leaves]
        names = [f"{name}_{i}" for i, (names, _) in enumerate(flat) for name in names]
        return names, (self.structure, tuple((tuple(names), context) for names, context in flat))

    @classmethod
    def __tensor_unflatten__(cls, inner, context, outer_size, outer_stride):
        structure, leaves = context
        found = iter(
            ({name: inner[f"{name}_{i}"] for name in names}, context) for i, (names, context) in enumerate(leaves)
        )
        return cls.traced_as(structure, found, outer_size)

    @classmethod
    def traced_as(cls, structure: tuple, leaves, size) -> PackedBundle:
        """While tracing: a bundle of this structure, of leaves that an iterator gives."""
        how, axis, sizes, below = structure
        parts = []
        for number, part in zip(sizes, below, strict=True):
            rest = (*size[:axis], *((number,) if how == "cat" else ()), *size[axis + 1 :])
            if part is not None:
                parts.append(cls.traced_as(part, leaves, rest))
            else:
                parts.append(PackedKV.__tensor_unflatten__(*next(leaves), torch.Size(rest), None))
        return cls(how, axis, parts, size)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"PackedBundle(shape={list(self.shape)}, {self.how} along {self.axis} of {self.parts})"

    def __copy__(self) -> PackedBundle:
        return self.with_parts([part.__copy__() for part in self.parts])

    def __deepcopy__(self, memo) -> PackedBundle:
        return self.clone()

    def __reduce_ex__(self, protocol):
        return PackedBundle, (self.how, self.axis, self.parts)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        return bundle_ops.dispatch(func, args, kwargs or {})


def rows_of(part) -> int:
    return part.rows if is_bundle(part) else part.axes.rows


def tokens_of(part) -> int:
    return part.tokens if is_bundle(part) else part.axes.tokens


def whole_size(how: str, axis: int, sizes: list) -> torch.Size:
    size = list(sizes[0])
    if how == "stack":
        return torch.Size([*size[:axis], len(sizes), *size[axis:]])
    return torch.Size([*size[:axis], sum(other[axis] for other in sizes), *size[axis + 1 :]])


def bundled(how: str, axis: int, parts: list[Tensor]) -> Tensor:
    """A bundle of parts where they are packed caches that are alike, else the plain tensor of them."""
    packed = all(isinstance(part, (PackedKV, PackedBundle)) for part in parts)
    if packed and len({kind_of(part, how, axis) for part in parts}) == 1:
        return PackedBundle(how, axis, parts)
    return joined(how, axis, [part.dequantize() if hasattr(part, "dequantize") else part for part in parts])


def kind_of(part, how: str, axis: int) -> tuple:
    """What parts of a bundle have in common."""
    leaf = part.leaves[0] if is_bundle(part) else part
    size = [n for i, n in enumerate(part.shape) if how == "stack" or i != axis]
    along = how == "cat" and axis in (rows_of(part), tokens_of(part))
    return rows_of(part), tokens_of(part), leaf.static, leaf.dtype, leaf.device, tuple(size), part if along else None


for function, handler in bundle_ops.FUNCTIONS.items():
    PackedBundle.implements_torch_function([function])(handler)


__all__ = ["PackedBundle", "bundled", "is_bundle", "joined"]
