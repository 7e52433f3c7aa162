"""PackedBundle: one tensor of several packed caches, as a model has it that keeps keys and values, or layers, together.

    stack    [2, B, H, T, D] of keys and values, [L, B, H, T, D] of layers, and so on
    cat      [B, H, T, 2 * D] of keys and values

A cache object holds it like any tensor. Its parts are PackedKV, or bundles again ([L, 2, B, H, T, D]). The graph takes
and returns the parts (passes/take_apart.py), so no pass and no op knows of bundles. What happens to one outside of a
graph happens to its parts; what parts cannot do reads them through `dequantize()`, and says so once.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from akvq_fx import exchange, packed_ops, torch_internals
from akvq_fx.packed_kv import PackedKV

aten = torch.ops.aten
SAME = (aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.contiguous.default)
_warned: set[str] = set()
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

    def with_parts(self, parts: list[Tensor]) -> Tensor:
        """The same of other parts: plain where they are no packed caches that are alike."""
        return bundled(self.how, self.axis, parts)

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
        kwargs = kwargs or {}
        handler = _handlers.get(func)
        traced = is_traced(args)
        if traced and func in SAME:
            return cls(args[0].how, args[0].axis, args[0].parts, args[0].shape)
        if handler is not None and not traced:
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        result = func.decompose(*args, **kwargs)  # composite ops come whole in inference mode
        return through_dequantize(func, args, kwargs) if result is NotImplemented else result


def is_bundle(x) -> bool:
    return isinstance(x, PackedBundle)


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


def is_traced(args) -> bool:
    """Some argument stands for a bundle in a graph that is traced: only shapes matter."""
    flat = itertools.chain.from_iterable(x if isinstance(x, (list, tuple)) else (x,) for x in args)
    return any(is_bundle(x) and x.leaves[0].storage is None for x in flat)


def plain_of(bundle: PackedBundle, op: str) -> Tensor:
    if bundle.leaves[0].storage is None:
        exchange.require_own_tracing(bundle.leaves[0])
        return torch.empty(bundle.shape, dtype=bundle.dtype, device=bundle.device)
    if op not in _warned:
        _warned.add(op)
        warnings.warn(
            f"akvq: {op} is not defined on packed caches in one tensor, which is read through dequantize() for it (a "
            f"{bundle.dtype} copy of {list(bundle.shape)}); what it gives is plain, and its tokens are quantized anew "
            "if a compiled step packs them",
            UserWarning,
            stacklevel=4,
        )
    return bundle.dequantize()


def through_dequantize(func, args, kwargs):
    given = dict(zip((arg.name for arg in func._schema.arguments), args, strict=False)) | kwargs
    for arg in func._schema.arguments:
        written = arg.alias_info is not None and arg.alias_info.is_write
        if written and is_bundle(given.get(arg.name)) and not is_traced(args):
            raise packed_ops.unsupported_write(func)
    unwrap = lambda x: plain_of(x, str(func)) if is_bundle(x) else x
    args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs))
    return func(*args, **kwargs)


# ---- what happens to a bundle outside of a graph ---------------------------------------------------------------------

_handlers: dict[object, Callable] = {}


def implements(*targets) -> Callable:
    """Decorator: a handler(func, args, kwargs) for these aten ops, which may return NotImplemented."""
    return lambda handler: _handlers.update(dict.fromkeys(targets, handler)) or handler


@implements(*SAME, aten.clone.default, aten._to_copy.default)
def of_each(func, args, kwargs):
    return args[0].with_parts([func(part, *args[1:], **kwargs) for part in args[0].parts])


@implements(aten.select.int)
def select(func, args, kwargs):
    bundle, dim, index = args
    inner = bundle.inner(dim)
    if inner is not None:
        return along(func, args, kwargs)
    return part_view(bundle.parts[index]) if bundle.how == "stack" else NotImplemented


def part_view(part):
    """A part as an object of its own."""
    return part.__copy__()


@implements(aten.unbind.int)
def unbind(func, args, kwargs):
    bundle, dim = (*args, kwargs.get("dim", 0))[:2]
    if bundle.inner(dim) is None and bundle.how == "stack":
        return [part_view(part) for part in bundle.parts]
    return NotImplemented


@implements(aten.split.Tensor, aten.split_with_sizes.default)
def split(func, args, kwargs):
    bundle, sizes, dim = (*args, kwargs.get("dim", 0))[:3]
    inner = bundle.inner(dim)
    if inner is not None:
        return [
            bundle.with_parts(list(some)) for some in zip(*(func(p, sizes, inner) for p in bundle.parts), strict=True)
        ]
    total = sum(bundle.sizes)
    given = (
        tuple(sizes) if isinstance(sizes, (list, tuple)) else tuple(len(x) for x in torch.arange(total).split(sizes))
    )
    if given != bundle.sizes:
        return NotImplemented
    pick = lambda part: part_view(part) if bundle.how == "cat" else bundle.with_parts([part_view(part)])
    return [pick(part) for part in bundle.parts]


@implements(aten.slice.Tensor)
def slice_(func, args, kwargs):
    bundle, dim, start, end, step = (*args, *(None,) * (5 - len(args)))
    if bundle.inner(dim or 0) is not None:
        return along(func, (bundle, dim or 0, *args[2:]), kwargs)
    if bundle.how == "stack":
        chosen = bundle.parts[start:end:step]
        return bundle.with_parts(list(map(part_view, chosen))) if chosen else NotImplemented
    ends = list(itertools.accumulate(bundle.sizes, initial=0))
    bounds = (start or 0, min(ends[-1] if end is None else end, ends[-1]))
    whole = zip(bundle.parts, zip(ends, ends[1:], strict=False), strict=False)
    return next((part_view(part) for part, place in whole if place == bounds and step in (None, 1)), NotImplemented)


@implements(aten.index_select.default)
def along(func, args, kwargs):
    """An op along one axis that all parts have."""
    bundle, dim = args[:2]
    inner = bundle.inner(dim)
    if inner is None:
        return NotImplemented
    made = [func(part, inner, *args[2:], **kwargs) for part in bundle.parts]
    gone = made[0].dim() < bundle.parts[0].dim() and inner < bundle.axis
    return bundled(bundle.how, bundle.axis - gone, made)


@implements(aten.index.Tensor)
def index(func, args, kwargs):
    """One index, of rows or of tokens."""
    bundle, indices = args
    given = [(dim, at) for dim, at in enumerate(indices) if at is not None]
    if len(given) != 1 or bundle.inner(given[0][0]) is None or given[0][1].dim() != 1:
        return NotImplemented
    inner = [None] * bundle.inner(given[0][0]) + [given[0][1]]
    return bundle.with_parts([func(part, inner) for part in bundle.parts])


@implements(aten.cat.default)
def cat(func, args, kwargs):
    """Rows of several bundles, or tokens behind one."""
    tensors = [t for t in args[0] if t.numel() or is_bundle(t)]
    first = tensors[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not is_bundle(first) or first.inner(dim) not in (rows_of(first.parts[0]), tokens_of(first.parts[0])):
        return NotImplemented
    if any(t.dtype != first.dtype or is_bundle(t) and t.structure != first.structure for t in tensors):
        return NotImplemented
    same = lambda size: [n for i, n in enumerate(size) if i != dim % first.dim()]
    if any(t.dim() != first.dim() or same(t.shape) != same(first.shape) for t in tensors):
        raise ValueError(
            f"akvq: Sizes of tensors must match except in dimension {dim}: {[list(t.shape) for t in tensors]}"
        )
    columns = zip(*(first.apart(t) for t in tensors), strict=True)
    return first.with_parts([func(list(column), first.inner(dim)) for column in columns])


@implements(aten.index_copy_.default)
def index_copy(func, args, kwargs):
    """Rows of another bundle, or tokens of a static one."""
    bundle, dim, at, x = args
    if not is_bundle(bundle) or bundle.inner(dim) is None:
        return NotImplemented
    for part, new in zip(bundle.parts, bundle.apart(x), strict=True):
        func(part, bundle.inner(dim), at, new)
    return bundle


@implements(aten.zero_.default)
def zero(func, args, kwargs):
    for part in args[0].parts:
        func(part)
    return args[0]


@implements(aten.copy_.default)
def copy(func, args, kwargs):
    target, source = args[:2]
    if not is_bundle(target) or not is_bundle(source) or source.structure != target.structure:
        return NotImplemented
    for part, new in zip(target.parts, source.parts, strict=True):
        func(part, new)
    return target


def without_views(func, types, args, kwargs):
    """As packed_ops has it: no view of a bundle is one of autograd's."""
    with torch._C.DisableTorchFunctionSubclass():
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)):
            return func(*args, **kwargs)


def contiguous(func, types, args, kwargs):
    return args[0]


def repeat_interleave(func, types, args, kwargs):
    def rows(x, repeats, dim=None, **_):
        if not is_bundle(x) or dim is None or x.inner(dim) is None or torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return x.with_parts([part.repeat_interleave(repeats, dim=x.inner(dim)) for part in x.parts])

    return rows(*args, **kwargs)


PackedBundle.implements_torch_function(packed_ops.VIEWS)(without_views)
PackedBundle.implements_torch_function([torch.Tensor.contiguous])(contiguous)
PackedBundle.implements_torch_function([torch.Tensor.repeat_interleave, torch.repeat_interleave])(repeat_interleave)


__all__ = ["PackedBundle", "bundled", "is_bundle", "joined"]
