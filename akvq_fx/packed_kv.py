"""PackedKV: a key or value cache tensor whose tokens are packed codes.

A traceable wrapper subclass: a cache object (DynamicCache, StaticCache, a tuple, a buffer) holds it like any tensor,
dynamo traces it as an input, and the akvq backend swaps it for its buffers before the compiled code runs. Only those of
`Layout.traced` are inner tensors for tracing (the token axis of `codes` brings the capacity symbol); the other buffers
lie in `storage`, which tracing never sees.

Its shape is what the model's own code expects: [B, H, T, D], or what its `axes` say (kernels/cache_axes.py). Buffers,
and the graph after passes, have one order whatever it is.

What happens to a cache outside the graph happens to the codes: rows are gathered, lengths change, nothing is quantized
again. Any other op reads the cache through `dequantize()` and says so once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref

import torch
from torch import Tensor

from akvq_fx import packed_ops, packed_writes, torch_internals  # noqa: F401 - writes are handlers too
from akvq_fx.kernels import cache as ops
from akvq_fx.kernels.cache_axes import STANDARD, CacheAxes
from akvq_fx.kernels.layout import CLASS_NAMES, PADDING, STATE_END, STATE_TEXT, Layout
from akvq_fx.storage import FIRST, TOKENS, Storage, marks_of
from akvq_fx.torch_internals import LEAST_SYMBOL

DROPPED = torch.empty(1)  # memory of the tensors whose size tells dynamo a sliding window's first slot


@contextlib.contextmanager
def _quiet(*names: str):
    """Silence loggers: when imported, torchao reports kernels of other platforms that it cannot load."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


with _quiet("torchao", "torch.utils._pytree"):
    TensorBase = torch_internals.tensor_base()


class PackedKV(TensorBase):
    """A packed cache tensor of logical shape [B, H, T, D] (or of the model's own axes) and 16- or 32-bit dtype.

    Made by the backend; `dequantize()` gives the plain tensor, `layout_of` says how it is packed, `axes` which axis is
    which, `nbytes_packed` what it costs.
    """

    tensor_data_names = ["codes"]
    tensor_attribute_names = ["layout_text"]
    was = None  # attributes of the caller's plain tensor that this object was (akvq_fx/exchange.py)

    def __new__(cls, codes: Tensor, layout_text: str, size=None, stride=None):
        layout = Layout.parse(layout_text)
        size = torch.Size((*codes.shape[:3], layout.head_dim)) if size is None else size
        return torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=layout.dtype, device=codes.device, requires_grad=False
        )

    def __init__(self, codes: Tensor, layout_text: str, size=None, stride=None):
        """A tensor for tracing, with no buffers but `codes`, which gives the shapes. `view_of` makes real ones."""
        self.codes, self.layout_text, self.storage, self.axes = codes, layout_text, None, STANDARD
        self.traced, self.means, self.text_codes, self.static, self.length = ["codes"], None, None, False, None
        self.dropped, self.first = None, 0

    @classmethod
    def view_of(cls, storage: Storage, length: int, first: int = 0) -> PackedKV:
        """`length` tokens of a storage, from slot `first` on, which is 0 unless the storage slides.

        On the path of every decode step, so it does no more than it must.
        """
        layout = storage.layout
        size = storage.shape(length)
        self = torch.Tensor._make_wrapper_subclass(cls, size, dtype=layout.dtype, device=storage.device)
        if storage.attributes is None:
            storage.attributes = attributes_of(storage)
        vars(self).update(storage.attributes, storage=storage, length=length, first=first)
        if storage.slides:
            self.traced = [*self.traced, "dropped"]
            self.begin_at(first)
        if len(storage.views) > 8:
            storage.views = [ref for ref in storage.views if ref() is not None]
        storage.views.append(weakref.ref(self))
        return self

    @property
    def end(self) -> int:
        """The slot behind its last token."""
        return self.first + self.length

    def begin_at(self, first: int) -> None:
        """Name the slot of its first token, and say so to dynamo in a tensor's size: one that it takes for a symbol."""
        self.first, self.dropped = first, DROPPED.expand(first + LEAST_SYMBOL)
        for name, marks in FIRST.items():
            setattr(self.dropped, name, set(marks) if isinstance(marks, set) else marks)

    # found here only while they are borrowed (Storage.expanded): to read them, as tracing does, copies them
    codes = functools.cached_property(lambda self: self.storage["codes"])
    means = functools.cached_property(lambda self: self.storage["means"])
    text_codes = functools.cached_property(lambda self: self.storage["text_codes"])

    def __tensor_flatten__(self):
        return self.traced, (self.layout_text, self.static, self.axes.text, self.dropped is not None)

    @classmethod
    def __tensor_unflatten__(cls, inner, context, outer_size, outer_stride):
        out = cls(inner["codes"], context[0], outer_size, outer_stride)
        out.traced, out.static, out.axes = list(inner), context[1], CacheAxes.parse(context[2])
        out.means, out.text_codes, out.dropped = (inner.get(name) for name in ("means", "text_codes", "dropped"))
        return out

    def traced_as(self, codes: Tensor, axis: int, size) -> PackedKV:
        """While tracing: the cache with another size of one axis, the tokens' or the batch's."""
        shape = list(self.shape)
        shape[axis] = size
        out = type(self)(codes, self.layout_text, torch.Size(shape))
        out.axes = self.axes
        return out

    def in_standard_axes(self, rows=None) -> PackedKV:
        """While tracing: the same cache as [B, H, T, D], or its first rows."""
        sizes = dict(zip(self.axes.groups, self.shape, strict=True))
        heads, channels = sizes.get("h", self.codes.shape[1]), self.layout_of.head_dim
        rows = sizes["b"] if rows is None else rows
        out = type(self)(self.codes, self.layout_text, torch.Size((rows, heads, sizes["t"], channels)))
        out.traced, out.static, out.means, out.text_codes = self.traced, self.static, self.means, self.text_codes
        out.dropped = self.dropped
        return out

    @property
    def count(self) -> int:
        """Tokens, by the shape."""
        return self.shape[self.axes.tokens]

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
        """[B, H, T, D], or the model's axes, as the model made it: rotation undone, quantization error included."""
        storage = self._storage()
        tokens = ops.dequantize(storage.held, self.first + self.count, self.layout_text)
        return storage.as_model(tokens[:, :, self.first :])

    def unpack(self) -> Tensor:
        """Turn this cache back to 16 bits for good, and return its plain tensor of the same shape, which later writes
        go to.

        For graphs that move tokens inside a static cache. The object stays a PackedKV, in the lossless layout. Raises
        NotImplementedError for [B, T, H * D] and the like, which are no view of the buffers.
        """
        if self.axes.rank < 4:
            raise NotImplementedError(
                f"akvq: a packed cache {self.axes.shown} is written into in a way codes cannot take; pass "
                "cache.dequantize() to go on with its tokens as plain numbers"
            )
        plain_layout = Layout(self.layout_of.head_dim, self.dtype, shares_classes=self.layout_of.shares_classes)
        if self.layout_of != plain_layout or self.first:
            tokens = ops.dequantize(self._storage().held, self.end, self.layout_text)[:, :, self.first :]
            plain, old = tokens.contiguous(), packed_ops.at_front(self).storage
            kept = [] if plain_layout.shares_classes else [old["classes"][:, : self.length].clone()]
            buffers = [old["state"][: STATE_TEXT + 1].clone(), plain, *kept]
            self.hold(Storage(plain_layout, buffers, old.end, old.prompt, old.owner, old.axes))
        return self.storage.as_model(self.storage.codes[:, :, : self.count])

    def hold(self, storage: Storage) -> None:
        """Be the view of another storage, which holds the same tokens from slot 0 on."""
        self.storage, self.layout_text, self.traced = storage, storage.text, list(storage.layout.traced)
        self.means = self.text_codes = self.dropped = None
        self.first = 0
        for name in self.traced:
            setattr(self, name, storage[name])
        storage.views.append(weakref.ref(self))

    def classes(self) -> Tensor:
        """[B, T] uint8, indices into kernels.layout.CLASS_NAMES. Raises ValueError for values, which have none."""
        if self.layout_of.shares_classes:
            raise ValueError(
                "PackedKV: values share their keys' token classes and hold none; ask the keys of their layer"
            )
        return self._storage()["classes"][:, self.first : self.first + self.count]

    def writable(self, extra: int, step: int) -> Storage:
        """The storage, ready for `extra` tokens after this view's last: a copy if a longer view is still alive."""
        storage, capacity = self.to_be_written(extra, step)
        if capacity > storage.capacity:
            storage.grow(capacity)
        return storage

    def to_be_written(self, extra: int, step: int) -> tuple[Storage, int]:
        """The storage, as `writable`, and the capacity that it needs, which it may not have yet."""
        storage, length = self._storage(), self.end
        if storage.end is None:
            return storage, storage.capacity
        if length < storage.end:
            others = (ref() for ref in storage.views)
            if any(view is not None and view is not self and view.end > length for view in others):
                storage = storage.clone()
            if length < storage.prompt:
                storage.begin_anew(length)
            storage.end = length
        if storage.borrowers:
            storage.release_borrowers()
        needed, capacity = length + extra, storage.capacity
        return storage, -(-needed // step) * step if needed > capacity else capacity

    def append(self, x: Tensor, step: int = 128) -> PackedKV:
        """A view that is q tokens longer: x, which has q tokens, is rotated and quantized, earlier tokens stay."""
        length, extra = self.end, x.shape[self.axes.tokens]
        storage = self.writable(extra, step)
        at = torch.arange(length, length + extra, device=x.device)
        ops.append(storage.buffers, storage.to_stored(x), at, None, None, self.layout_text)
        storage.end = length + extra
        return PackedKV.view_of(storage, storage.end - self.first, self.first)

    def __repr__(self, *, tensor_contents=None) -> str:
        axes = "" if self.axes == STANDARD else f", {self.axes}"
        return f"PackedKV(shape={list(self.shape)}{axes}, {self.layout_text}, device={self.device})"

    def __copy__(self) -> PackedKV:
        return packed_ops.resized(self, self.count)

    def __deepcopy__(self, memo) -> PackedKV:
        """A clone. torch's own deepcopy would copy `storage` with its list of views, which are the original's."""
        return self.clone()

    def __reduce_ex__(self, protocol):
        self._storage()
        s = packed_ops.at_front(self).storage
        return _rebuild, (s.buffers, s.text, s.end, s.prompt, s.owner, self.count, str(self.axes))

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        kwargs = kwargs or {}
        handler = cls._ATEN_OP_TABLE.get(cls, {}).get(func)
        if handler is not None:
            result = handler(func, types, args, kwargs)
            if result is not NotImplemented:
                return result
        result = func.decompose(*args, **kwargs)  # composite ops come whole in inference mode
        return packed_ops.through_dequantize(func, args, kwargs) if result is NotImplemented else result

    @staticmethod
    def save(caches: dict[str, PackedKV], path) -> None:
        """Write packed tensors to a safetensors file; see akvq_fx.cache_file."""
        from akvq_fx import cache_file  # here, since it imports safetensors

        cache_file.save(caches, path, PackedKV)

    @staticmethod
    def load(path, device="cpu") -> dict[str, PackedKV]:
        """Read what `save` wrote, validated; see akvq_fx.cache_file."""
        from akvq_fx import cache_file

        return cache_file.load(path, device, PackedKV)


packed_ops.register(PackedKV)


def attributes_of(storage: Storage) -> dict:
    """Attributes that all views of a storage have in common, as long as it has these buffers."""
    traced, static = list(storage.layout.traced), storage.end is None
    found = {"layout_text": storage.text, "axes": storage.axes, "traced": traced, "static": static}
    found |= {"means": None, "text_codes": None, "dropped": None}
    for name in traced:
        if storage.borrowed:  # the class has what finds them
            found.pop(name, None)
        else:
            found[name] = storage[name]
    return found | {n: set(x) if isinstance(x, set) else x for n, x in marks_of(storage.axes, static).items()}


def _rebuild(buffers, layout_text, end, prompt, owner, length, axes=str(STANDARD)) -> PackedKV:
    storage = Storage(Layout.parse(layout_text), list(buffers), end, prompt, owner, CacheAxes.parse(axes))
    storage.loaded = True
    storage.mark_dynamic()
    return PackedKV.view_of(storage, length)


def token_counts(packed: PackedKV) -> dict[str, int]:
    """Tokens by class over the batch; recent tokens count as a class of their own (they are at 16 bits anyway)."""
    layout, classes = packed.layout_of, packed.classes()
    end = packed.count if packed.storage.end is not None else int(packed.storage["state"][STATE_END])
    classes = classes[:, :end].long()
    recent = torch.arange(classes.shape[1], device=classes.device) >= end - layout.window
    counts = {name: int((classes[:, ~recent] == i).sum()) for i, name in enumerate(CLASS_NAMES)}
    counts["recent"] = int((classes[:, recent] != PADDING).sum())
    counts["padding"] += int((classes[:, recent] == PADDING).sum())
    return counts


__all__ = ["TOKENS", "PackedKV", "Storage", "token_counts"]
