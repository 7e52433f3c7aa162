"""What happens to a PackedKV outside a graph: rows and tokens are chosen, joined and padded as codes.

Handlers return NotImplemented for a case that codes do not cover; the op then reads the cache through `dequantize()`
and says so once, and what it gives is a plain tensor. Handlers of writes are in akvq_fx/packed_writes.py.

akvq_fx/packed_kv.py imports both modules and registers the handlers on its class; here the class is that of the
tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from akvq_fx import exchange
from akvq_fx.packed_tokens import Tokens, concat_rows, concat_tokens

aten = torch.ops.aten
_warned: set[tuple[str, str]] = set()
_handlers: list[tuple[list, Callable]] = []  # aten ops, and what answers them
_function_handlers: list[tuple[list, Callable]] = []  # the same for functions of torch as Python calls them


def implements(targets: list) -> Callable:
    """Decorator: a handler(func, types, args, kwargs) for these aten ops."""
    return lambda handler: _handlers.append((targets, handler))


def implements_function(targets: list) -> Callable:
    """Decorator: the same for functions and methods of torch, which are intercepted before autograd."""
    return lambda handler: _function_handlers.append((targets, handler))


def register(kind: type) -> None:
    """Give a class of packed tensors all handlers."""
    for targets, handler in _handlers:
        kind.implements(targets)(handler)
    for targets, handler in _function_handlers:
        kind.implements_torch_function(targets)(handler)


def is_packed(x) -> bool:
    """A PackedKV, or one that stands for it while tracing."""
    return isinstance(x, Tensor) and hasattr(x, "layout_text")


def plain_of(packed: Tensor, op: str) -> Tensor:
    if packed.storage is None:  # tracing: only the shape matters
        exchange.require_own_tracing(packed)
        return torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    warn_once(packed, op, "packed codes, the cache is")
    return packed.dequantize()


def warn_once(x: Tensor, op: str, what: str) -> None:
    """Say that an op reads packed tokens as plain numbers: once for each op and kind of tensor."""
    if (op, what) not in _warned:
        _warned.add((op, what))
        warnings.warn(
            f"akvq: {op} is not defined on {what} read through dequantize() for it (a {x.dtype} copy of "
            f"{list(x.shape)}); what it gives is plain, and its tokens are quantized anew if a compiled step packs "
            "them",
            UserWarning,
            stacklevel=5,
        )


def unsupported_write(func) -> NotImplementedError:
    return NotImplementedError(
        f"akvq: {func} would write into a packed cache, which keeps codes, not elements; accepted writes are cat on "
        "the token axis, index_copy_ on the token axis of a static cache, index_copy_ of rows from a PackedKV of the "
        "same layout and length to a growing one, zero_, and copy_ from a PackedKV of the same layout. Use "
        "cache.dequantize() for a plain copy."
    )


def written_by(func, args, kwargs) -> list:
    """The arguments that an op writes to."""
    given = dict(zip((arg.name for arg in func._schema.arguments), args, strict=False)) | kwargs
    writes = (arg.name for arg in func._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write)
    return [given.get(name) for name in writes]


def through_dequantize(func, args, kwargs):
    if any(map(is_packed, written_by(func, args, kwargs))):
        raise unsupported_write(func)
    unwrap = lambda x: plain_of(x, str(func)) if is_packed(x) else x
    args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs))
    return func(*args, **kwargs)


def resized(packed: Tensor, length) -> Tensor:
    """The same tokens, another length: a shape-only tensor while tracing, a view of the storage otherwise."""
    if packed.storage is None:
        return packed.traced_as(packed.codes, packed.axes.tokens, length)
    return packed.view_of(packed.storage, length, packed.first)


def at_front(packed: Tensor) -> Tensor:
    """The same tokens from slot 0 on: of a sliding window that dropped some, a copy of those that are left."""
    return wrap(packed, tokens_of(packed)) if packed.first else packed


def copy_of(packed: Tensor, storage) -> Tensor:
    """The same number of tokens of another storage; what is made of a buffer of the caller's is one too."""
    made = packed.view_of(storage, packed.count, packed.first)
    if packed.was is not None:
        made.was = {}
    return made


def rowwise(packed: Tensor, index: Tensor) -> Tensor:
    if packed.storage is None:
        return packed.traced_as(packed.codes.index_select(0, index), packed.axes.rows, index.shape[0])
    storage = packed.storage.gather(index)
    storage.mark_dynamic()
    return copy_of(packed, storage)


def is_growing(packed) -> bool:
    """A growing cache outside of tracing: the host knows its length, so tokens can be chosen and joined."""
    return is_packed(packed) and packed.storage is not None and packed.storage.end is not None


def tokens_of(packed: Tensor) -> Tokens:
    tokens = Tokens.of(packed.storage, packed.end)
    if not packed.first:
        return tokens
    return tokens.take(torch.arange(packed.first, packed.end, device=packed.device), distinct=True)


def wrap(packed: Tensor, tokens: Tokens) -> Tensor:
    return packed.view_of(tokens.stored(), tokens.count)


def take(packed: Tensor, positions: Iterable[int] | Tensor) -> Tensor:
    """The tokens at these positions of a growing cache: an int64 tensor [m] in any order, or ascending numbers."""
    distinct = not isinstance(positions, Tensor)
    index = torch.tensor(list(positions), dtype=torch.int64, device=packed.device) if distinct else positions
    if not len(index):
        return resized(packed, 0)
    return wrap(packed, tokens_of(packed).take(index.to(packed.device, torch.int64), distinct))


def repeated(packed: Tensor, count: int) -> Tensor:
    """`count` times the one row of a growing cache, copied when it is written."""
    return packed.view_of(packed.storage.expanded(count), packed.count, packed.first)


@implements([aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.contiguous.default])
def _(func, types, args, kwargs):
    return resized(args[0], args[0].count)


@implements([aten.clone.default])
def _(func, types, args, kwargs):
    packed = args[0]
    if packed.storage is None:
        return resized(packed, packed.count)
    return copy_of(packed, packed.storage.clone())


@implements([aten._to_copy.default])
def _(func, types, args, kwargs):
    packed, device, dtype = args[0], kwargs.get("device"), kwargs.get("dtype")
    if packed.storage is None:
        return NotImplemented
    if dtype is not None and dtype != packed.dtype:
        return packed.dequantize().to(dtype=dtype, device=device)
    moved = packed.storage.map(lambda name, b: b.to(device, non_blocking=kwargs.get("non_blocking", False), copy=True))
    moved.mark_dynamic()
    return copy_of(packed, moved)


@implements([aten.to.dtype_layout])
def _(func, types, args, kwargs):
    return NotImplemented  # a composite op, seen in inference mode only; torchao's handler would drop the storage


@implements([aten.cat.default])
def _(func, types, args, kwargs):
    tensors = [t for t in args[0] if t.numel() or is_packed(t)]
    axes = next(t.axes for t in args[0] if is_packed(t))
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % axes.rank
    if dim == axes.rows and all(is_packed(t) and t.storage is not None for t in tensors):
        return stack_rows(tensors)
    packed = next((i for i, t in enumerate(tensors) if not is_packed(t)), len(tensors))
    if dim != axes.tokens or not packed or any(is_packed(t) for t in tensors[packed:]):
        return NotImplemented
    first, rest = tensors[0], tensors[packed:]
    if any(t.dtype != first.dtype for t in tensors):
        return NotImplemented  # the result has the wider dtype, as in torch
    if packed > 1:
        if not all(map(is_growing, tensors[:packed])) or not alike(tensors[:packed], "rows"):
            return NotImplemented
        first = wrap(first, concat_tokens([tokens_of(t) for t in tensors[:packed]]))
    if first.storage is None:  # tracing; outside a graph the op itself checks
        for t in rest:
            require_same_rows(first, t)
        return resized(first, first.count + sum(t.shape[axes.tokens] for t in rest))
    for t in rest:
        first = first.append(t)
    return first


def kind_of(packed: Tensor) -> tuple:
    """What caches must have in common for their codes to be joined: layout, weights, heads, axes and device."""
    storage = packed.storage
    return storage.layout.as_written, storage.owner, storage.rows[1], packed.axes, packed.device


def alike(tensors: list[Tensor], same: str) -> bool:
    """Whether the codes can be joined. same: what must agree besides layout, weights, heads, axes and device: "rows"
    (the batch and the affine map) or "length"."""
    first = tensors[0]
    for t in tensors[1:]:
        if kind_of(t) != kind_of(first):
            return False
        dim = first.axes.tokens if same == "length" else first.axes.rows
        if t.shape[dim] != first.shape[dim]:
            return False
        if same == "rows" and "affine" in first.storage.layout.fields:
            mine, other = first.storage["affine"], t.storage["affine"]
            if mine.data_ptr() != other.data_ptr() and not torch.equal(mine, other):
                return False
    return True


def require_same_rows(packed: Tensor, new: Tensor) -> None:
    at = packed.axes.tokens
    others = lambda x: (*x.shape[:at], *x.shape[at + 1 :])
    if new.dim() != packed.dim() or others(new) != others(packed):
        raise ValueError(
            f"akvq: Sizes of tensors must match except in dimension {at}: the packed cache is "
            f"{list(packed.shape)}, the new tokens are "
            f"{list(new.shape)}; a cache from another model or batch cannot be continued"
        )


def stack_rows(tensors: list[Tensor]) -> Tensor:
    """Batch concatenation of caches of one layout and length."""
    if len({t.static for t in tensors}) > 1 or not alike(tensors, "length"):
        return NotImplemented
    if not tensors[0].static:
        return wrap(tensors[0], concat_rows([tokens_of(t) for t in tensors]))
    stores = [t.storage for t in tensors]
    ends = {tuple(s["state"].tolist()) for s in stores}
    if len(ends) > 1 or len({s["text_at"].shape for s in stores if s.layout.text_bits}) > 1:
        return NotImplemented  # all rows share one end, which is on the device
    joined = stores[0].map(lambda name, b: b.clone() if name == "state" else torch.cat([s[name] for s in stores], 0))
    return tensors[0].view_of(joined, tensors[0].count)


@implements([aten.expand.default])
def _(func, types, args, kwargs):
    packed, size = args[0], list(args[1])
    if len(size) != packed.dim() or not is_growing(packed):
        return NotImplemented
    rows, have = size.pop(packed.axes.rows), list(packed.shape)
    batch = have.pop(packed.axes.rows)
    if any(given not in (-1, known) for given, known in zip(size, have, strict=True)):
        return NotImplemented
    if rows in (-1, batch):
        return resized(packed, packed.count)
    return repeated(packed, rows) if batch == 1 and rows > 0 else NotImplemented


@implements([aten.constant_pad_nd.default])
def _(func, types, args, kwargs):
    """Zeros in front become padding tokens, which masks hide; negative padding selects tokens."""
    packed, pad, fill = (*args, 0)[:3]
    first = 2 * (packed.dim() - 1 - packed.axes.tokens)  # pad begins with the last axis
    before, after = (*pad, *[0] * 8)[first : first + 2]
    others = [*pad[:first], *pad[first + 2 :]]
    if not is_growing(packed) or any(others) or after > 0 or before > 0 and kwargs.get("value", fill):
        return NotImplemented
    length = packed.count
    kept = range(length)[max(0, -before) : length + after]
    if kept != range(length):
        packed = packed.narrow(packed.axes.tokens, kept.start, len(kept))
    if before <= 0:
        return packed
    tokens = tokens_of(packed)
    return wrap(packed, concat_tokens([tokens.padding(before), tokens]))


@implements([aten.slice.Tensor])
def _(func, types, args, kwargs):
    packed, dim, start, end, step = (*args, *(None,) * (5 - len(args)))
    dim = (dim or 0) % packed.dim()
    size, tokens = packed.shape[dim], dim == packed.axes.tokens
    begin = 0 if start is None else start
    from_start = isinstance(begin, int) and begin == 0 and step in (None, 1)
    if dim == packed.axes.rows and packed.storage is not None:
        return rowwise(packed, torch.arange(size, device=packed.device)[start:end:step])
    if tokens and packed.storage is None and step in (None, 1) and not from_start:
        return resized(packed, func(plain_of(packed, str(func)), *args[1:]).shape[dim])
    if tokens and is_growing(packed) and not from_start:
        return take(packed, range(size)[start:end:step])
    if not from_start:
        return NotImplemented
    stop = size if end is None else end
    if isinstance(stop, int) and stop >= 2**62:
        stop = size
    if not isinstance(stop, torch.SymInt) and stop < 0:
        stop = stop + size
    if tokens:
        if isinstance(size, int) and isinstance(stop, int):
            stop = max(0, min(stop, size))
        if packed.storage is not None and packed.storage.end is None and stop != size:
            return NotImplemented  # the end of a static cache is on the device
        return resized(packed, stop)
    if isinstance(stop, int) and isinstance(size, int) and stop >= size:
        return resized(packed, packed.count)
    return NotImplemented


@implements([aten.index_select.default])
def _(func, types, args, kwargs):
    packed, dim, index = args
    if dim % packed.dim() == packed.axes.tokens and is_growing(packed):
        return take(packed, index.reshape(-1))
    return rowwise(packed, index) if dim % packed.dim() == packed.axes.rows else NotImplemented


@implements([aten.index.Tensor])
def _(func, types, args, kwargs):
    """One index of rows, or one of tokens for all rows: numbers or a mask."""
    packed, indices = args
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][0] not in (packed.axes.rows, packed.axes.tokens):
        return NotImplemented
    dim, index = given[0]
    rows = dim == packed.axes.rows
    if index.dim() != 1 or index.dtype == torch.uint8 or not rows and not is_growing(packed):
        return NotImplemented
    if index.dtype == torch.bool:
        if len(index) != packed.shape[dim]:
            return NotImplemented
        index = index.nonzero().flatten()
        return rowwise(packed, index) if rows else take(packed, index.tolist())
    index = torch.where(index < 0, index + packed.shape[dim], index)
    return rowwise(packed, index) if rows else take(packed, index)


@implements([aten.repeat.default])
def _(func, types, args, kwargs):
    packed, repeats = args
    row = packed.axes.rows
    others = [times for axis, times in enumerate(repeats) if axis != row]
    if len(repeats) != packed.dim() or any(times != 1 for times in others) or packed.storage is None:
        return NotImplemented
    if is_growing(packed) and packed.shape[row] == 1 and repeats[row] > 0:
        return repeated(packed, repeats[row])
    return rowwise(packed, torch.arange(packed.shape[row], device=packed.device).repeat(repeats[row]))


@implements_function([torch.Tensor.repeat_interleave, torch.repeat_interleave])
def _(func, types, args, kwargs):
    def rows(packed, repeats, dim=None, **_):
        if not is_packed(packed) or dim is None or dim % packed.dim() != packed.axes.rows:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        row = packed.axes.rows
        count = packed.shape[row]
        if isinstance(repeats, int) and count == 1 and repeats > 0 and is_growing(packed):
            return packed.expand([repeats if axis == row else -1 for axis in range(packed.dim())])
        return packed.index_select(row, torch.arange(count, device=packed.device).repeat_interleave(repeats))

    return rows(*args, **kwargs)


@implements_function([torch.Tensor.contiguous])
def _(func, types, args, kwargs):
    return args[0]  # torchao's handler would drop the storage, and take the capacity for the length


VIEWS = [
    torch.Tensor.__getitem__, torch.Tensor.detach, torch.detach, torch.Tensor.narrow, torch.narrow,
    torch.Tensor.split, torch.split, torch.Tensor.chunk, torch.chunk, torch.Tensor.expand,
    torch.Tensor.expand_as, torch.Tensor.broadcast_to, torch.broadcast_to,
    torch.Tensor.select, torch.select, torch.Tensor.unbind, torch.unbind, torch.Tensor.transpose, torch.transpose,
    torch.Tensor.permute, torch.permute, torch.Tensor.movedim, torch.movedim, torch.Tensor.swapaxes, torch.swapaxes,
    torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.flatten, torch.flatten,
    torch.Tensor.unflatten, torch.unflatten, torch.Tensor.unsqueeze, torch.unsqueeze, torch.Tensor.squeeze,
    torch.squeeze, torch.Tensor.unfold, torch.Tensor.mT.__get__, torch.Tensor.tensor_split, torch.tensor_split,
    torch.Tensor.mH.__get__, torch.Tensor.adjoint, torch.adjoint, torch.Tensor.swapdims, torch.swapdims,
    torch.Tensor.moveaxis, torch.moveaxis, torch.Tensor.view_as, torch.Tensor.reshape_as, torch.Tensor.as_strided,
    torch.as_strided, torch.Tensor.diagonal, torch.diagonal, torch.Tensor.hsplit, torch.hsplit, torch.Tensor.vsplit,
    torch.vsplit, torch.Tensor.dsplit, torch.dsplit,
]  # fmt: skip


@implements_function(VIEWS)
def _(func, types, args, kwargs):
    """Without autograd's views: their `_base` would keep the longer view alive, so that the next write copied the
    cache, and dynamo would trace how the view was made."""
    with torch._C.DisableTorchFunctionSubclass():
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        exchange.before_view(args, func)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)):
            return func(*args, **kwargs)


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func, types, args, kwargs):
    packed, size, dim = (*args, kwargs.get("dim", 0))[:3]
    rows, tokens = (dim % packed.dim() == axis for axis in (packed.axes.rows, packed.axes.tokens))
    if not (rows or tokens and is_growing(packed)) or packed.storage is None:
        return NotImplemented
    parts = torch.arange(packed.shape[dim], device="cpu").split(size)
    if rows:
        return [rowwise(packed, part.to(packed.device)) for part in parts]
    return [take(packed, part.tolist()) for part in parts]
