"""What happens to a PackedBundle outside a graph: it happens to its parts.

Handlers return NotImplemented for a case that parts do not cover; the op then reads the bundle through `dequantize()`
and says so once. akvq_fx/packed_bundle.py imports this module; here the class is that of the tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from akvq_fx import exchange, packed_ops

aten = torch.ops.aten
SAME = (aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.contiguous.default)
_handlers: dict[object, Callable] = {}


def is_bundle(x) -> bool:
    """A PackedBundle, or one that stands for it while tracing."""
    return isinstance(x, Tensor) and hasattr(x, "leaves")


def is_traced(args) -> bool:
    """Some argument stands for a bundle in a graph that is traced: only shapes matter."""
    flat = itertools.chain.from_iterable(x if isinstance(x, (list, tuple)) else (x,) for x in args)
    return any(is_bundle(x) and x.leaves[0].storage is None for x in flat)


def plain_of(bundle: Tensor, op: str) -> Tensor:
    if bundle.leaves[0].storage is None:
        exchange.require_own_tracing(bundle.leaves[0])
        return torch.empty(bundle.shape, dtype=bundle.dtype, device=bundle.device)
    packed_ops.warn_once(bundle, op, "packed caches in one tensor, which is")
    return bundle.dequantize()


def through_dequantize(func, args, kwargs):
    if any(map(is_bundle, packed_ops.written_by(func, args, kwargs))) and not is_traced(args):
        raise packed_ops.unsupported_write(func)
    unwrap = lambda x: plain_of(x, str(func)) if is_bundle(x) else x
    args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs))
    return func(*args, **kwargs)


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
    return bundle.with_parts(made, bundle.axis - gone)


@implements(aten.index.Tensor)
def index(func, args, kwargs):
    """One index, of rows or of tokens."""
    bundle, indices = args
    given = [(dim, at) for dim, at in enumerate(indices) if at is not None]
    if len(given) != 1 or bundle.inner(given[0][0]) is None or given[0][1].dim() != 1:
        return NotImplemented
    inner = [None] * bundle.inner(given[0][0]) + [given[0][1]]
    return bundle.with_parts([func(part, inner) for part in bundle.parts])


@implements(aten.constant_pad_nd.default)
def pad(func, args, kwargs):
    """Zeros before the first token, of each part."""
    bundle, given = args[:2]
    pairs = [tuple(given[i : i + 2]) for i in range(0, len(given), 2)]  # from the last axis on
    place = bundle.dim() - 1 - bundle.axis
    if place < len(pairs) and any(pairs[place]):
        return NotImplemented
    inner = [n for i, pair in enumerate(pairs) if bundle.how == "cat" or i != place for n in pair]
    return bundle.with_parts([func(part, inner, *args[2:], **kwargs) for part in bundle.parts])


@implements(aten.expand.default)
def expand(func, args, kwargs):
    """One row as several."""
    bundle, size = args[0], list(args[1])
    if len(size) != bundle.dim() or size[bundle.axis] not in (-1, bundle.shape[bundle.axis]):
        return NotImplemented
    inner = [-1 if i == bundle.axis else n for i, n in enumerate(size) if bundle.how == "cat" or i != bundle.axis]
    return bundle.with_parts([func(part, inner) for part in bundle.parts])


@implements(aten.cat.default)
def cat(func, args, kwargs):
    """Rows of several bundles, or tokens behind one."""
    tensors = [t for t in args[0] if t.numel() or is_bundle(t)]
    first = tensors[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not is_bundle(first) or dim % first.dim() not in (first.rows, first.tokens):
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


FUNCTIONS = {  # functions of torch as Python calls them -> what answers, before autograd
    **dict.fromkeys(packed_ops.VIEWS, without_views),
    torch.Tensor.contiguous: contiguous,
    torch.Tensor.repeat_interleave: repeat_interleave,
    torch.repeat_interleave: repeat_interleave,
}


def dispatch(func, args, kwargs):
    """What an aten op with a bundle among its arguments gives."""
    handler, traced = _handlers.get(func), is_traced(args)
    if traced and func in SAME:
        return args[0].again()
    if handler is not None and not traced:
        result = handler(func, args, kwargs)
        if result is not NotImplemented:
            return result
    result = func.decompose(*args, **kwargs)  # composite ops come whole in inference mode
    return through_dequantize(func, args, kwargs) if result is NotImplemented else result
