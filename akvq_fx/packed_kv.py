"""PackedKV: a key or value cache tensor [B, H, T, D] whose tokens are packed codes.

A traceable wrapper subclass: a cache object (DynamicCache, StaticCache, a tuple, a buffer) holds it like any tensor, dynamo
traces it as an input, and the akvq backend swaps it for its buffers before the compiled code runs. Only `codes` is an inner
tensor for tracing (its token axis brings the capacity symbol); the other buffers lie in `storage`, which tracing never sees.

What happens to a cache outside the graph happens to the codes: rows are gathered, lengths change, nothing is quantized again.
Any other op reads the cache through `dequantize()` and says so once.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref

import torch
from torch import Tensor

from akvq_fx.kernels import cache as ops
from akvq_fx.kernels.layout import CLASS_NAMES, PADDING, STATE_END, STATE_TEXT, Layout
from akvq_fx.kernels.rotate import hadamard, rotate_keys


@contextlib.contextmanager
def _quiet(*names: str):
    """torchao reports kernels of other platforms that it cannot load, which nobody asked about here."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


with _quiet("torchao", "torch.utils._pytree"):
    from torchao.utils import TorchAOBaseTensor

aten = torch.ops.aten
TOKENS = 2  # the token axis of [B, H, T, D]
CODES = 2  # codes stand third in every layout's fields


def _dynamic_tokens() -> dict:
    """What torch._dynamo.maybe_mark_dynamic leaves on a tensor; copying it is 50 times quicker than calling it for every view."""
    probe = torch.empty(1, 1, 1)
    torch._dynamo.maybe_mark_dynamic(probe, TOKENS)
    return dict(vars(probe))


DYNAMIC_TOKENS = _dynamic_tokens()


class Storage:
    """The buffers behind one or more PackedKV views of the same tokens.

    end     tokens written, where the host knows it (a growing cache); None for a static one, whose end is on the device
    prompt  tokens of the prompt: text overlay slots before it are compacted, later ones follow the position
    owner   fingerprint of the projections that made the tokens, None if unknown
    """

    __slots__ = ("layout", "text", "buffers", "rows", "device", "end", "prompt", "owner", "views")

    def __init__(self, layout: Layout, buffers: list[Tensor], end: int | None, prompt: int, owner: int | None):
        self.layout, self.buffers, self.end, self.prompt, self.owner = layout, buffers, end, prompt, owner
        self.text, self.rows, self.device = str(layout), tuple(self.codes.shape[:2]), self.codes.device
        self.views: list[weakref.ref] = []

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[self.layout.fields.index(name)]

    def __setitem__(self, name: str, buffer: Tensor):
        self.buffers[self.layout.fields.index(name)] = buffer

    @property
    def capacity(self) -> int:
        return self.codes.shape[2]

    @property
    def codes(self) -> Tensor:
        return self.buffers[CODES]

    def map(self, fn, end: int | None = -1) -> Storage:
        """A new storage with fn(name, buffer) in place of every buffer."""
        buffers = [fn(name, buffer) for name, buffer in zip(self.layout.fields, self.buffers, strict=True)]
        made = Storage(self.layout, buffers, self.end if end == -1 else end, self.prompt, self.owner)
        made.mark_dynamic()
        return made

    def clone(self) -> Storage:
        return self.map(lambda name, buffer: buffer.clone())

    def gather(self, index: Tensor) -> Storage:
        """Storage of the batch rows `index` [B'], gathered."""
        return self.map(lambda name, b: b.clone() if name == "state" else b.index_select(0, index.to(b.device)))

    def compact_text(self, length: int) -> None:
        """Keep only the text slots of positions below `length`; later tokens then take slot position + state[2].

        Codes move, none is made. Asks the device how many slots are used: called after a prompt or a crop, never in a decode step.
        """
        at = self["text_at"]
        used = (at >= 0) & (at < length)
        width = int(used.sum(1).max()) if at.numel() else 0
        order = torch.argsort(~used, dim=1, stable=True)[:, :width]
        tail = self.capacity - length
        for name in ("text_codes", "text_range"):
            b = self[name]
            kept = b.gather(2, order[:, None, :, None].expand(-1, b.shape[1], -1, b.shape[3]))
            self[name] = torch.nn.functional.pad(kept, (0, 0, 0, tail))
        kept = torch.where(used.gather(1, order), at.gather(1, order), -1)
        self["text_at"] = torch.nn.functional.pad(kept, (0, tail), value=-1)
        self["state"][STATE_TEXT] = width - length
        self.prompt = length
        self.mark_dynamic()

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens; new slots are empty."""
        extra = capacity - self.capacity
        for name in self.layout.fields:
            b = self[name]
            if name in ("codes", "range", "text_codes", "text_range"):
                self[name] = torch.nn.functional.pad(b, (0, 0, 0, extra))
            elif name in ("classes", "text_at"):
                self[name] = torch.nn.functional.pad(b, (0, extra), value=PADDING if name == "classes" else -1)
        self.mark_dynamic()

    def mark_dynamic(self) -> None:
        """Let dynamo treat capacities that change as symbols: growth must not recompile."""
        if self.end is not None:
            torch._dynamo.maybe_mark_dynamic(self["codes"], 2)
        if self.layout.text_bits:
            torch._dynamo.maybe_mark_dynamic(self["text_codes"], 2)

    def clear(self) -> None:
        """Forget every token, in place."""
        B, H, C = self["codes"].shape[:3]
        empty = self.layout.allocate(B, H, C, C if self.layout.text_bits else 0, self["codes"].device)
        for name, fresh in zip(self.layout.fields, empty, strict=True):
            if name.startswith("text") and self[name].shape != fresh.shape:  # compacted for a prompt that is gone
                self[name] = fresh
            else:
                self[name].copy_(fresh)
        if self.layout.affine:
            self["affine"][:, 1:] = 1.0  # the identity: tokens written outside a graph must not be multiplied by 0
        self.prompt, self.end = 0, None if self.end is None else 0

    def to_stored(self, x: Tensor) -> Tensor:
        """x as the model made it -> the space of the buffers."""
        if self.layout.affine:
            return rotate_keys(x, self["affine"])
        return hadamard(x) if self.layout.rotated else x

    @property
    def nbytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers)


class PackedKV(TorchAOBaseTensor):
    """A packed cache tensor of logical shape [B, H, T, D] and 16- or 32-bit dtype.

    Made by the backend; `dequantize()` gives the plain tensor, `layout` says how it is packed, `nbytes_packed` what it costs.
    """

    tensor_data_names = ["codes"]
    tensor_attribute_names = ["layout_text"]

    def __new__(cls, codes: Tensor, layout_text: str, size=None, stride=None):
        layout = Layout.parse(layout_text)
        size = torch.Size((*codes.shape[:3], layout.head_dim)) if size is None else size
        return torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=layout.dtype, device=codes.device, requires_grad=False
        )

    def __init__(self, codes: Tensor, layout_text: str, size=None, stride=None):
        """A tensor for tracing: codes bring the shapes, there are no other buffers behind it. `view_of` makes the real ones."""
        self.codes, self.layout_text, self.storage = codes, layout_text, None
        self.traced, self.text_codes, self.static, self.length = ["codes"], None, False, None

    @classmethod
    def view_of(cls, storage: Storage, length: int) -> PackedKV:
        """The first `length` tokens of a storage. On the path of every decode step, so it does no more than it must."""
        layout = storage.layout
        size = (*storage.rows, length, layout.head_dim)
        self = torch.Tensor._make_wrapper_subclass(cls, size, dtype=layout.dtype, device=storage.device)
        self.codes, self.layout_text, self.storage, self.length = storage.codes, storage.text, storage, length
        self.traced, self.text_codes, self.static = ["codes"], None, storage.end is None
        if layout.text_bits:
            self.traced, self.text_codes = ["codes", "text_codes"], storage["text_codes"]
        if len(storage.views) > 8:
            storage.views = [ref for ref in storage.views if ref() is not None]
        storage.views.append(weakref.ref(self))
        if not self.static:  # a growing cache: its length is a symbol from the first decode step on
            for name, marks in DYNAMIC_TOKENS.items():
                setattr(self, name, set(marks) if isinstance(marks, set) else marks)
        return self

    def __tensor_flatten__(self):
        return self.traced, (self.layout_text, self.static)

    @classmethod
    def __tensor_unflatten__(cls, inner, context, outer_size, outer_stride):
        out = cls(inner["codes"], context[0], outer_size, outer_stride)
        out.traced, out.static = list(inner), context[1]
        out.text_codes = inner.get("text_codes")
        return out

    @property
    def layout_of(self) -> Layout:
        """How the tokens are packed."""
        return Layout.parse(self.layout_text)

    @property
    def nbytes_packed(self) -> int:
        """Bytes of every buffer, capacity included."""
        return self._storage().nbytes

    def _storage(self) -> Storage:
        if self.storage is None:
            raise RuntimeError(
                "PackedKV: this tensor has no buffers. It went through a graph that another backend compiled; "
                'compile that function with backend="akvq" or call cache.dequantize() before it.'
            )
        return self.storage

    def dequantize(self) -> Tensor:
        """[B, H, T, D] as the model made it, rotation undone, quantization error in."""
        storage = self._storage()
        return ops.dequantize(storage.buffers, self.shape[TOKENS], self.layout_text)

    def unpack(self) -> Tensor:
        """Turn this cache back to 16 bits for good, and return its plain tensor [B, H, T, D], which later writes go to.

        For graphs that move tokens inside a static cache. The object stays a PackedKV, in the lossless layout.
        """
        plain_layout = Layout(self.shape[-1], self.dtype)
        if self.layout_of != plain_layout:
            plain, old = self.dequantize().contiguous(), self.storage
            buffers = [old["state"].clone(), old["classes"][:, : self.length].clone(), plain]
            self.storage = Storage(plain_layout, buffers, old.end, old.prompt, old.owner)
            self.storage.views.append(weakref.ref(self))
            self.codes, self.layout_text, self.traced, self.text_codes = plain, str(plain_layout), ["codes"], None
        return self.storage.codes[:, :, : self.shape[TOKENS]]

    def classes(self) -> Tensor:
        """[B, T] uint8, indices into akvq_fx.kernels.layout.CLASS_NAMES."""
        return self._storage()["classes"][:, : self.shape[TOKENS]]

    def writable(self, extra: int, step: int) -> Storage:
        """The storage, fit to take `extra` tokens after this view's last: a copy if a longer view is still alive elsewhere."""
        storage, length = self._storage(), self.length
        if storage.end is None:
            return storage
        if length < storage.end:
            others = (ref() for ref in storage.views)
            if any(view is not None and view is not self and view.shape[TOKENS] > length for view in others):
                storage = storage.clone()
            if storage.layout.text_bits and length < storage.prompt:
                storage.compact_text(length)
            storage.end = length
        if length + extra > storage.capacity:
            storage.grow(-(-(length + extra) // step) * step)
        return storage

    def append(self, x: Tensor, step: int = 128) -> PackedKV:
        """One view, q tokens longer: x [B, H, q, D] is rotated and quantized, nothing that is here already is touched."""
        length = self.shape[TOKENS]
        storage = self.writable(x.shape[TOKENS], step)
        at = torch.arange(length, length + x.shape[TOKENS], device=x.device)
        ops.append(storage.buffers, storage.to_stored(x), at, None, None, self.layout_text)
        storage.end = length + x.shape[TOKENS]
        return PackedKV.view_of(storage, storage.end)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"PackedKV(shape={list(self.shape)}, {self.layout_text}, device={self.device})"

    def __copy__(self) -> PackedKV:
        return _resized(self, self.shape[TOKENS])

    def __deepcopy__(self, memo) -> PackedKV:
        """A clone: torch's own would copy `storage` with the list of the original's views, not knowing the copy."""
        return self.clone()

    def __reduce_ex__(self, protocol):
        s = self._storage()
        return _rebuild, (s.buffers, self.layout_text, s.end, s.prompt, s.owner, self.shape[TOKENS])

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        kwargs = kwargs or {}
        handler = cls._ATEN_OP_TABLE.get(cls, {}).get(func)
        if handler is not None:
            result = handler(func, types, args, kwargs)
            if result is not NotImplemented:
                return result
        result = func.decompose(*args, **kwargs)  # composite ops come whole in inference mode
        return _through_dequantize(func, args, kwargs) if result is NotImplemented else result

    @staticmethod
    def save(caches: dict[str, PackedKV], path) -> None:
        """Write packed tensors to a safetensors file; see akvq_fx.cache_file."""
        from akvq_fx import cache_file

        cache_file.save(caches, path)

    @staticmethod
    def load(path, device="cpu") -> dict[str, PackedKV]:
        """Read what `save` wrote, validated; see akvq_fx.cache_file."""
        from akvq_fx import cache_file

        return cache_file.load(path, device)


def _rebuild(buffers, layout_text, end, prompt, owner, length) -> PackedKV:
    storage = Storage(Layout.parse(layout_text), list(buffers), end, prompt, owner)
    storage.mark_dynamic()
    return PackedKV.view_of(storage, length)


_said: set[str] = set()


def _plain(packed: PackedKV, op: str) -> Tensor:
    if packed.storage is None:  # tracing: only the shape matters
        return torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    if op not in _said:
        _said.add(op)
        warnings.warn(
            f"akvq: {op} is not defined on packed codes, the cache is read through dequantize() for it "
            f"(a temporary {packed.dtype} copy of {list(packed.shape)})",
            UserWarning,
            stacklevel=4,
        )
    return packed.dequantize()


def _unsupported_write(func) -> NotImplementedError:
    return NotImplementedError(
        f"akvq: {func} would write into a packed cache, which keeps codes, not elements; accepted writes are cat on "
        "the token axis, index_copy_ on the token axis of a static cache, zero_, and copy_ from a PackedKV of the same "
        "layout. Use cache.dequantize() for a plain copy."
    )


def _through_dequantize(func, args, kwargs):
    given = zip(func._schema.arguments, args, strict=False)
    given = {**{arg.name: x for arg, x in given}, **kwargs}
    for arg in func._schema.arguments:
        if arg.alias_info is not None and arg.alias_info.is_write and isinstance(given.get(arg.name), PackedKV):
            raise _unsupported_write(func)
    unwrap = lambda x: _plain(x, str(func)) if isinstance(x, PackedKV) else x
    args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs))
    return func(*args, **kwargs)


def _resized(packed: PackedKV, length) -> PackedKV:
    """The same tokens, another length: a shape-only tensor while tracing, a view of the storage otherwise."""
    if packed.storage is None:
        size = torch.Size((packed.shape[0], packed.shape[1], length, packed.shape[3]))
        return PackedKV(packed.codes, packed.layout_text, size)
    return PackedKV.view_of(packed.storage, length)


def _rowwise(packed: PackedKV, index: Tensor) -> PackedKV:
    if packed.storage is None:
        size = torch.Size((index.shape[0], *packed.shape[1:]))
        return PackedKV(packed.codes.index_select(0, index), packed.layout_text, size)
    storage = packed.storage.gather(index)
    storage.mark_dynamic()
    return PackedKV.view_of(storage, packed.shape[TOKENS])


implements = PackedKV.implements


@implements([aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.contiguous.default])
def _(func, types, args, kwargs):
    return _resized(args[0], args[0].shape[TOKENS])


@implements([aten.clone.default])
def _(func, types, args, kwargs):
    packed = args[0]
    if packed.storage is None:
        return _resized(packed, packed.shape[TOKENS])
    return PackedKV.view_of(packed.storage.clone(), packed.shape[TOKENS])


@implements([aten._to_copy.default])
def _(func, types, args, kwargs):
    packed, device, dtype = args[0], kwargs.get("device"), kwargs.get("dtype")
    if packed.storage is None:
        return NotImplemented
    if dtype is not None and dtype != packed.dtype:
        return packed.dequantize().to(dtype=dtype, device=device)
    moved = packed.storage.map(lambda name, b: b.to(device, non_blocking=kwargs.get("non_blocking", False), copy=True))
    moved.mark_dynamic()
    return PackedKV.view_of(moved, packed.shape[TOKENS])


@implements([aten.to.dtype_layout])
def _(func, types, args, kwargs):
    return NotImplemented  # composite, met in inference mode only; torchao's would drop the storage


@implements([aten.cat.default])
def _(func, types, args, kwargs):
    tensors = [t for t in args[0] if t.numel() or isinstance(t, PackedKV)]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % 4
    first, rest = tensors[0], tensors[1:]
    if dim == 0 and all(isinstance(t, PackedKV) and t.storage is not None for t in tensors):
        return _stack_rows(tensors)
    if dim != TOKENS or not isinstance(first, PackedKV) or any(isinstance(t, PackedKV) for t in rest):
        return NotImplemented
    if first.storage is None:  # tracing; outside a graph the op itself checks
        for t in rest:
            require_same_rows(first, t)
        return _resized(first, first.shape[TOKENS] + sum(t.shape[TOKENS] for t in rest))
    for t in rest:
        first = first.append(t)
    return first


def require_same_rows(packed: PackedKV, new: Tensor) -> None:
    if new.dim() != 4 or (*new.shape[:2], new.shape[3]) != (*packed.shape[:2], packed.shape[3]):
        raise ValueError(
            f"akvq: Sizes of tensors must match except in dimension 2: the packed cache is {list(packed.shape)}, the new tokens are "
            f"{list(new.shape)}; a cache from another model or batch cannot be continued"
        )


def _stack_rows(tensors: list[PackedKV]) -> PackedKV:
    """Batch concatenation of caches of one layout and length."""
    layouts = {(t.layout_text, t.static, t.storage.owner) for t in tensors}
    lengths = {t.shape[TOKENS] for t in tensors}
    ends = {tuple(t.storage["state"].tolist()) for t in tensors}
    if len(layouts) > 1 or len(lengths) > 1 or len(ends) > 1 or len({t.storage.capacity for t in tensors}) > 1:
        return NotImplemented
    stores = [t.storage for t in tensors]
    width = {name: max(s[name].shape[-1 if name == "text_at" else 2] for s in stores) for name in
             ("text_at", "text_codes", "text_range") if name in stores[0].layout.fields}  # fmt: skip
    if any(s[name].shape[-1 if name == "text_at" else 2] != width[name] for s in stores for name in width):
        return NotImplemented
    joined = stores[0].map(
        lambda name, b: b.clone() if name == "state" else torch.cat([s[name] for s in stores], 0)
    )
    joined.prompt = max(s.prompt for s in stores)  # text slots before it may be compacted in some row
    return PackedKV.view_of(joined, lengths.pop())


@implements([aten.slice.Tensor])
def _(func, types, args, kwargs):
    packed, dim, start, end, step = (*args, *(None,) * (5 - len(args)))
    dim, size = (dim or 0) % 4, packed.shape[(dim or 0) % 4]
    if step not in (None, 1):
        return NotImplemented
    if dim == 0 and packed.storage is not None:
        return _rowwise(packed, torch.arange(size, device=packed.device)[start:end])
    begin = 0 if start is None else start
    if not isinstance(begin, int) or begin != 0:
        return NotImplemented
    stop = size if end is None else end
    if isinstance(stop, int) and stop >= 2**62:
        stop = size
    if not isinstance(stop, torch.SymInt) and stop < 0:
        stop = stop + size
    if dim == TOKENS:
        if isinstance(size, int) and isinstance(stop, int):
            stop = max(0, min(stop, size))
        if packed.storage is not None and packed.storage.end is None and stop != size:
            return NotImplemented  # the end of a static cache is on the device
        return _resized(packed, stop)
    if isinstance(stop, int) and isinstance(size, int) and stop >= size:
        return _resized(packed, packed.shape[TOKENS])
    return NotImplemented


@implements([aten.index_select.default])
def _(func, types, args, kwargs):
    packed, dim, index = args
    return _rowwise(packed, index) if dim % 4 == 0 else NotImplemented


@implements([aten.index.Tensor])
def _(func, types, args, kwargs):
    packed, indices = args
    rest = [i for i in indices[1:] if i is not None]
    if rest or indices[0] is None or indices[0].dim() != 1 or indices[0].dtype == torch.uint8:
        return NotImplemented
    if indices[0].dtype == torch.bool and len(indices[0]) != packed.shape[0]:
        return NotImplemented
    index = indices[0].nonzero().flatten() if indices[0].dtype == torch.bool else indices[0]
    return _rowwise(packed, torch.where(index < 0, index + packed.shape[0], index))


@implements([aten.repeat.default])
def _(func, types, args, kwargs):
    packed, repeats = args
    if len(repeats) != 4 or any(r != 1 for r in repeats[1:]) or packed.storage is None:
        return NotImplemented
    return _rowwise(packed, torch.arange(packed.shape[0], device=packed.device).repeat(repeats[0]))


@PackedKV.implements_torch_function([torch.Tensor.repeat_interleave, torch.repeat_interleave])
def _(func, types, args, kwargs):
    def rows(packed, repeats, dim=None, **_):
        if dim not in (0, -4) or not isinstance(packed, PackedKV):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return packed.index_select(0, torch.arange(packed.shape[0], device=packed.device).repeat_interleave(repeats))

    return rows(*args, **kwargs)


@PackedKV.implements_torch_function([torch.Tensor.contiguous])
def _(func, types, args, kwargs):
    return args[0]  # torchao's would drop the storage, and the length for the capacity


@PackedKV.implements_torch_function([
    torch.Tensor.__getitem__, torch.Tensor.detach, torch.detach, torch.Tensor.narrow, torch.narrow,
    torch.Tensor.split, torch.split, torch.Tensor.chunk, torch.chunk,
])  # fmt: skip
def _(func, types, args, kwargs):
    """Not as autograd's view, whose `_base` would keep the longer view alive: a crop would be copied, rows would stay."""
    with torch._C.DisableTorchFunctionSubclass():
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)):
            return func(*args, **kwargs)


@PackedKV.implements_torch_function([torch.Tensor.__setitem__])
def _(func, types, args, kwargs):
    packed, index, _ = args
    if isinstance(packed, PackedKV) and not torch.compiler.is_compiling():
        parts = index if isinstance(index, tuple) else (index,)
        if any(not isinstance(i, Tensor | list) and i is not Ellipsis and i != slice(None) for i in parts):
            raise _unsupported_write(f"x[{index}] = ...")  # aten would write into a temporary and lose it
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func, types, args, kwargs):
    packed, size, dim = (*args, 0)[:3]
    if dim % 4 or packed.storage is None:
        return NotImplemented
    index = torch.arange(packed.shape[0], device=packed.device)
    return [_rowwise(packed, part) for part in index.split(size)]


@implements([aten.index_copy_.default])
def _(func, types, args, kwargs):
    packed, dim, at, x = args
    if dim % 4 != TOKENS or packed.storage is not None and packed.storage.end is not None:
        return NotImplemented  # a growing cache takes cat; a write before its end would break ring and text slots
    if packed.storage is not None:
        ops.append(packed.storage.buffers, packed.storage.to_stored(x), at, None, None, packed.layout_text)
    return packed


@implements([aten.index_put_.default])
def _(func, types, args, kwargs):
    packed, indices, x = args[:3]
    if len(indices) != 3 or indices[0] is not None or indices[1] is not None:
        return NotImplemented
    if packed.storage is not None and packed.storage.end is not None:
        return NotImplemented
    if packed.storage is not None:
        ops.append(packed.storage.buffers, packed.storage.to_stored(x), indices[2], None, None, packed.layout_text)
    return packed


@implements([aten.copy_.default])
def _(func, types, args, kwargs):
    target, source = args[:2]
    if not isinstance(target, PackedKV):
        return NotImplemented
    if target.storage is None:
        return target
    same = isinstance(source, PackedKV) and source.layout_text == target.layout_text and source.shape == target.shape
    same = same and source.static == target.static
    if not same or [b.shape for b in source.storage.buffers] != [b.shape for b in target.storage.buffers]:
        return NotImplemented
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


def token_counts(packed: PackedKV) -> dict[str, int]:
    """Tokens by class over the batch, the recent ones apart (they are at 16 bits whatever their class)."""
    layout, classes = packed.layout_of, packed.classes()
    end = packed.shape[TOKENS] if packed.storage.end is not None else int(packed.storage["state"][STATE_END])
    classes = classes[:, :end].long()
    recent = torch.arange(classes.shape[1], device=classes.device) >= end - layout.window
    counts = {name: int((classes[:, ~recent] == i).sum()) for i, name in enumerate(CLASS_NAMES)}
    counts["recent"] = int((classes[:, recent] != PADDING).sum())
    counts["padding"] += int((classes[:, recent] == PADDING).sum())
    return counts


__all__ = ["PackedKV", "Storage", "token_counts"]
