"""Ways to hold a key-value cache while one decoder generates: akvq's, and transformers' own.

Each runs the same weights. `prefill` takes a prompt, whole or a few rows at a time (the rows' caches are joined on the
batch axis: prompts served in parts), `step` one token a row. Nothing in a step waits for the device.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator

import torch
from decoders import Decoder
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

import akvq_fx
from akvq_fx import PackedKV
from akvq_fx.transformers_names import cache_argument, cache_of


class Contestant:
    """transformers' DynamicCache, uncompiled; the base of the others."""

    title = "DynamicCache, eager"
    whole_rows = False  # a prompt taken in parts needs parts of one size, or it compiles again
    parts = True  # a prompt may be taken in parts at all

    def __init__(self, decoder: Decoder, compiler: str):
        self.decoder, self.compiler = decoder, compiler
        self.prefill_call = self.step_call = decoder.model.forward
        self.cache_name = cache_argument(decoder.model)

    def empty(self, batch: int, capacity: int):
        return DynamicCache(config=self.decoder.model.config)

    def call(self, forward, ids: Tensor, cache) -> tuple[Tensor, object]:
        out = forward(input_ids=ids, **{self.cache_name: cache}, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], cache_of(out)

    def prefill(self, ids: Tensor, capacity: int, rows: int) -> tuple[Tensor, object]:
        """ids [B, T] -> logits [B, V] after the last token, and the cache."""
        if rows >= len(ids):
            return self.call(self.prefill_call, ids, self.empty(len(ids), capacity))
        if not self.parts:
            raise ValueError(f"{self.title}: takes a prompt whole, got {rows} of {len(ids)} rows at a time")
        logits, whole = [], None
        for begin, part in enumerate(ids.split(rows)):
            last, cache = self.call(self.prefill_call, part, self.empty(len(part), capacity))
            logits.append(last)
            whole = put_rows(whole, cache, begin * rows, len(ids))
        return torch.cat(logits), whole

    def step(self, token: Tensor, cache) -> tuple[Tensor, object]:
        """token [B, 1] -> logits [B, V], and the cache one token longer."""
        return self.call(self.step_call, token, cache)

    def probe(self, ids: Tensor, capacity: int, rows: int):
        """Take as much memory as generating would at most, without compiling a decode step; returns the cache."""
        logits, cache = self.prefill(ids, capacity, rows)
        self.call(self.decoder.model.forward, logits.argmax(-1, keepdim=True), cache)
        return cache

    def check(self, cache) -> str:
        """A note on the cache for the table's row; raises where the cache is not what the row claims."""
        return ""

    def close(self) -> None:
        self.prefill_call = self.step_call = None
        torch._dynamo.reset()
        gc.collect()
        if self.decoder.device.type == "cuda":
            torch.cuda.empty_cache()


def put_rows(whole, cache, begin: int, batch: int):
    """A growing cache of `batch` rows with the rows of `cache` from `begin` on; made where `whole` is None.

    All its memory is taken at once: joining parts at the end would need twice their memory, and fragment it.
    """
    made = cache if whole is None else whole
    for mine, theirs in zip(made.layers, cache.layers, strict=True):
        for name in ("keys", "values"):
            x = getattr(theirs, name)
            if whole is None:
                setattr(mine, name, with_rows(x, batch))
            for to, part in zip(buffers_of(getattr(mine, name)), buffers_of(x), strict=True):
                if to.dim() > 1:  # all but a packed cache's state, which is the same for all rows
                    to[begin : begin + len(part)] = part
    return made


def buffers_of(x: Tensor) -> list[Tensor]:
    return x.storage.buffers if isinstance(x, PackedKV) else [x]


def with_rows(x: Tensor, batch: int) -> Tensor:
    """An unwritten tensor like x with another number of rows."""
    if not isinstance(x, PackedKV):
        return x.new_empty(batch, *x.shape[1:])
    wider = lambda name, b: b.clone() if name == "state" else b.new_empty(batch, *b.shape[1:])
    return PackedKV.view_of(x.storage.map(wider), x.shape[2])


class Static(Contestant):
    """transformers' StaticCache as its generate uses it: prompt uncompiled, decode step compiled with CUDA graphs."""

    title = "StaticCache, compiled"

    def __init__(self, decoder: Decoder, compiler: str):
        super().__init__(decoder, compiler)
        how = {"mode": "reduce-overhead"} if compiler == "inductor" else {"backend": compiler}
        self.step_call = torch.compile(decoder.model.forward, fullgraph=True, **how)

    def allocate(self, batch: int, capacity: int) -> StaticCache:
        config = self.decoder.model.config
        cache = StaticCache(config=config, max_cache_len=capacity)
        shape = self.decoder.shape
        cache.early_initialization(batch, shape.kv_heads, shape.head_dim, self.decoder.dtype, self.decoder.device)
        return cache

    def prefill(self, ids: Tensor, capacity: int, rows: int) -> tuple[Tensor, object]:
        cache = self.allocate(len(ids), capacity)
        return self.fill(cache, ids, rows), cache

    def fill(self, cache, ids: Tensor, rows: int) -> Tensor:
        """Logits after the prompts ids [n, T], which go to the first n rows of the cache, `rows` at a time."""
        logits, whole = [], [(layer.keys, layer.values) for layer in cache.layers]
        for begin in range(0, len(ids), rows):
            for layer, (keys, values) in zip(cache.layers, whole, strict=True):
                layer.keys, layer.values = keys[begin : begin + rows], values[begin : begin + rows]
                layer.cumulative_length.zero_()
            logits.append(self.call(self.prefill_call, ids[begin : begin + rows], cache)[0])
        for layer, (keys, values) in zip(cache.layers, whole, strict=True):
            layer.keys, layer.values = keys, values
        return torch.cat(logits)

    def step(self, token: Tensor, cache) -> tuple[Tensor, object]:
        torch.compiler.cudagraph_mark_step_begin()
        return super().step(token, cache)

    def probe(self, ids: Tensor, capacity: int, rows: int):
        """All memory is taken before the second part of a prompt: the first is enough."""
        cache = self.allocate(len(ids), capacity)
        self.fill(cache, ids[:rows], rows)
        self.call(self.decoder.model.forward, ids[:, :1], cache)
        return cache


class Akvq(Contestant):
    """The packed cache in a DynamicCache."""

    title, options = "akvq, cuda_graphs=False", {"cuda_graphs": False}
    whole_rows = True

    def __init__(self, decoder: Decoder, compiler: str):
        super().__init__(decoder, compiler)
        options = {**self.options, "inner": compiler}
        self.prefill_call = self.step_call = torch.compile(decoder.model, backend="akvq", options=options)

    def probe(self, ids: Tensor, capacity: int, rows: int):
        _, cache = self.prefill(ids, capacity, rows)
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):
                tensor.writable(capacity - ids.shape[1], akvq_fx.AKVQConfig().capacity_step)  # grow as decoding will
        return cache

    def check(self, cache) -> str:
        stats, layers = akvq_fx.cache_stats(cache), self.decoder.layers
        if stats.packed_tensors != 2 * layers or stats.plain_tensors:
            why = {row.reason for row in akvq_fx.report(self.decoder.model).refused}
            raise RuntimeError(
                f"only {stats.packed_tensors} of {2 * layers} cache tensors are packed: {'; '.join(why)}"
            )
        decode = [graph for graph in akvq_fx.report(self.decoder.model).graphs if graph.kind == "decode"]
        capture = getattr(decode[-1], "capture", None) if decode else None
        return f"{stats.bits_per_element:.2f} bits a number" + (f"; {capture}" if capture is not None else "")


class AkvqGraphs(Akvq):
    title, options = "akvq", {}


class AkvqPaper(Akvq):
    """The paper's recipe with akvq's window: without centred and balanced keys."""

    title = f"akvq-vl, window {akvq_fx.AKVQConfig().window}"
    options = {"recipe": "akvq-vl", "window": akvq_fx.AKVQConfig().window}


class AkvqStatic(Akvq):
    """The same in a StaticCache, whose prompt is compiled too."""

    title, options = "akvq, StaticCache", {}
    parts = False

    def empty(self, batch: int, capacity: int):
        return StaticCache(config=self.decoder.model.config, max_cache_len=capacity)

    def probe(self, ids: Tensor, capacity: int, rows: int):
        return self.prefill(ids, capacity, rows)[1]


class Quantized(Contestant):
    """transformers' QuantizedCache, uncompiled: dequantizes the whole cache at every step."""

    parts, library, bits, axis = False, "hqq", 2, 1  # hqq groups along the channels (axis 1), as its documentation does

    def __init__(self, decoder: Decoder, compiler: str):
        super().__init__(decoder, compiler)
        if self.library == "quanto":
            unpack_with_torch()

    def empty(self, batch: int, capacity: int):
        how = dict(nbits=self.bits, axis_key=self.axis, axis_value=self.axis)
        return QuantizedCache(backend=self.library, config=self.decoder.model.config, **how)


def quantized(library: str, bits: int, axis: int) -> type[Quantized]:
    title = f"QuantizedCache {library} int{bits}, eager"
    return type(title, (Quantized,), {"title": title, "library": library, "bits": bits, "axis": axis})


def unpack_with_torch() -> None:
    """Have quanto unpack with its PyTorch version: its extensions compile for minutes."""
    from optimum.quanto.library.extensions import get_extension, is_extension_available

    def unpack(packed: Tensor, bits: int) -> Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    for name in filter(is_extension_available, ("quanto_cuda", "quanto_cpp")):
        get_extension(name)._lib = types.SimpleNamespace(unpack=unpack)


CONTESTANTS: dict[str, type[Contestant]] = {
    "static": Static,
    "akvq-graphs": AkvqGraphs,
    "akvq-vl": AkvqPaper,
    "akvq-static": AkvqStatic,
    "akvq": Akvq,
    "dynamic": Contestant,
    "hqq2": quantized("hqq", 2, 1),
    "hqq4": quantized("hqq", 4, 1),
    "quanto2": quantized("quanto", 2, -1),
    "quanto4": quantized("quanto", 4, -1),
}


def tensors_of(thing) -> Iterator[Tensor]:
    """Plain tensors that a cache consists of, in any objects and tensor subclasses."""
    if isinstance(thing, PackedKV):
        yield from thing.storage.buffers
    elif isinstance(thing, Tensor) and hasattr(thing, "__tensor_flatten__"):
        for name in thing.__tensor_flatten__()[0]:
            yield from tensors_of(getattr(thing, name))
    elif isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        yield from tensors_of(list(thing.values()))
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors_of(part)
    elif hasattr(thing, "layers"):
        yield from tensors_of([vars(layer) for layer in thing.layers])


def cache_bytes(cache) -> int:
    """Bytes of every tensor in it, capacity included, shared ones once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors_of(cache) if t.numel()}.values())
