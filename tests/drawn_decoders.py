"""Decoders as people write them, each of them a draw of one spelling of every kind: axes, containers, writes, masks,
attention. `Choice` names the spellings; `Drawn` is the model; `play` runs it beside its compiled self.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import akvq_fx
from akvq_fx.backend import akvq
from akvq_fx.packed_bundle import PackedBundle
from akvq_fx.packed_kv import PackedKV
from tests.written_spellings import (
    DIM,
    DROPOUT,
    GROUPED,
    GROUPS,
    HEADS,
    KV,
    MASKS,
    PRODUCTS,
    SCALES,
    SINKS,
    SOFTCAPS,
    SOFTMAX,
)

VOCABULARY, WIDTH, SLOTS, REACH = 48, 32, 16, 4
PACKED = (PackedKV, PackedBundle)

# how keys and values [B, H, T, D] become what the cache holds, and back

AXES = {
    "bhtd": (lambda x: x, lambda x: x),
    "bthd": (lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)),
    "bt(hd)": (lambda x: x.transpose(1, 2).flatten(2), lambda x: x.unflatten(2, (KV, DIM)).transpose(1, 2)),
    "tbhd": (lambda x: x.permute(2, 0, 1, 3), lambda x: x.permute(1, 2, 0, 3)),
    "bhdt": (lambda x: x.transpose(2, 3), lambda x: x.mT),
}
TOKENS = {"bhtd": 2, "bthd": 1, "bt(hd)": 1, "tbhd": 0, "bhdt": 3}
TOGETHER = {  # name -> (one tensor of keys and values, the two of it); the axis of tokens may move by one
    "apart": None,
    "stacked": (lambda k, v: torch.stack([k, v]), lambda x: (x[0], x[1])),
    "unbound": (lambda k, v: torch.stack((k, v)), lambda x: x.unbind(0)),
    "stacked behind rows": (lambda k, v: torch.stack([k, v], 1), lambda x: (x[:, 0], x[:, 1])),
    "fused": (lambda k, v: torch.cat([k, v], -1), lambda x: x.chunk(2, -1)),
    "split": (lambda k, v: torch.cat((k, v), dim=-1), lambda x: x.split(x.shape[-1] // 2, -1)),
}
GROWTH = ("cat", "cat from empty", "cat of a list", "concat")


def put_index_copy(cache: Tensor, new: Tensor, at: Tensor, start, axis: int) -> Tensor:
    return cache.index_copy_(axis, at, new)


def put_set(cache: Tensor, new: Tensor, at: Tensor, start, axis: int) -> Tensor:
    cache[(*[slice(None)] * axis, at)] = new
    return cache


def put_slice(cache: Tensor, new: Tensor, at: Tensor, start, axis: int) -> Tensor:
    cache[(*[slice(None)] * axis, slice(start, start + new.shape[axis]))] = new
    return cache


def put_narrow(cache: Tensor, new: Tensor, at: Tensor, start, axis: int) -> Tensor:
    cache.narrow(axis, start, new.shape[axis]).copy_(new)
    return cache


def put_view(cache: Tensor, new: Tensor, at: Tensor, start, axis: int) -> Tensor:
    cache[(*[slice(None)] * axis, slice(start, start + new.shape[axis]))].copy_(new)
    return cache


def put_scatter(cache: Tensor, new: Tensor, at: Tensor, start, axis: int) -> Tensor:
    shape = [1] * new.dim()
    shape[axis] = -1
    return cache.scatter_(axis, at.view(shape).expand(new.shape), new)


def put_where(cache: Tensor, new: Tensor, at: Tensor, start, axis: int) -> Tensor:
    """Functional: one token at a time, by a mask of slots."""
    shape = [1] * new.dim()
    shape[axis] = -1
    slots = torch.arange(cache.shape[axis])
    if new.shape[axis] == 1:
        return torch.where((slots == at).view(shape), new, cache)
    pad = torch.zeros_like(cache.narrow(axis, 0, cache.shape[axis] - new.shape[axis]))
    return torch.where((slots < new.shape[axis]).view(shape), torch.cat([new, pad], axis), cache)


def put_index_put(cache: Tensor, new: Tensor, at: Tensor, start, axis: int) -> Tensor:
    if axis == 0:
        return cache.index_put_((at,), new)
    order = (axis, *[i for i in range(cache.dim()) if i != axis])
    cache.permute(order).index_put_((at,), new.permute(order))
    return cache


def put_index_copy_functional(cache: Tensor, new: Tensor, at: Tensor, start, axis: int) -> Tensor:
    return cache.index_copy(axis, at, new)


PUTS = {
    "index_copy_": put_index_copy,
    "x[:, :, at] = new": put_set,
    "x[:, :, a:b] = new": put_slice,
    "narrow().copy_": put_narrow,
    "x[:, :, a:b].copy_": put_view,
    "scatter_": put_scatter,
    "where": put_where,
    "index_put_": put_index_put,
    "index_copy": put_index_copy_functional,
}
IN_PLACE = tuple(name for name in PUTS if name not in ("where", "index_copy"))
BY_NUMBER = ("x[:, :, a:b] = new", "narrow().copy_", "x[:, :, a:b].copy_")
CONTAINERS = ("tuples", "dicts", "dataclasses", "flat list", "layers in one tensor")
OWNERS = ("prompt", "caller", "module")  # of a static cache: who allocates it
WINDOWS = ("none", "mask", "slice", "read slice")


@dataclasses.dataclass
class Pair:
    keys: Tensor
    values: Tensor


@dataclasses.dataclass
class One:
    both: Tensor


# which scores count: [B, 1, q, T] bool to what the call gets

SHAPES = {
    "[B, 1, q, T]": lambda m: m,
    "[B, H, q, T]": lambda m: m.expand(-1, HEADS, -1, -1),
    "[1, 1, q, T]": lambda m: m[:1],
    "[1, H, q, T]": lambda m: m[:1].expand(-1, HEADS, -1, -1),
    "[H, q, T]": lambda m: m[0].expand(HEADS, -1, -1),
    "[1, q, T]": lambda m: m[0],
    "[q, T]": lambda m: m[0, 0],
}
KINDS = {
    "bool": lambda m, dtype: m,
    "-inf": lambda m, dtype: torch.zeros(m.shape, dtype=dtype).masked_fill(~m, -torch.inf),
    "lowest": lambda m, dtype: (~m).to(dtype) * torch.finfo(dtype).min,
    "where": lambda m, dtype: torch.where(m, 0.0, torch.finfo(dtype).min).to(dtype),
    "alibi": lambda m, dtype: (torch.arange(m.shape[-1]) * 2.0 ** -torch.arange(HEADS)[:, None, None]).to(dtype)
    + torch.zeros(m.shape, dtype=dtype).masked_fill(~m, -torch.inf),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Choice:
    axes: str = "bhtd"
    together: str = "apart"
    container: str = "tuples"
    write: str = "cat"  # of GROWTH or PUTS
    owner: str = "prompt"
    window: str = "none"
    rope: str = "half"
    padded: bool = False
    attend: str = "sdpa"  # "sdpa", "sdpa gqa", "sdpa 3-d", "sdpa 5-d", "written", "direct"
    mask: str = "causal"  # of KINDS, or "causal": is_causal in the prompt, none in a step
    shape: str = "[B, 1, q, T]"
    group: str = "expand"
    product: str = "matmul"
    weigh: str = "matmul"
    grouped: bool = False
    scale: str = "number after"
    hide: str = "masked_fill -inf"
    softmax: str = "method"
    dropout: str = "none"
    softcap: str = ""
    sinks: str = ""
    prefix: bool = False  # attention reads a static cache up to its last token
    sizes: tuple = (1, 1)  # tokens of each step after the prompt
    position: str = "tensor"  # "tensor", "int": what the model is told of where it is; "length": of the cache

    def __str__(self):
        """What is not as in the plainest decoder."""
        other = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in other)

    @property
    def static(self) -> bool:
        return self.write in PUTS


LIMITED = {"folded": ("[B, 1, q, T]",), "grouped": ("[B, 1, q, T]",)}


def drawn(pick) -> Choice:
    """A choice that makes sense. pick(name, options): one of the options."""
    c = {"container": pick("container", CONTAINERS), "rope": pick("rope", ("half", "half", "pairs", "none"))}
    c["axes"] = pick("axes", ("bhtd", "bhtd", *AXES))
    joined = [name for name in TOGETHER if c["axes"] != "bhdt" or name not in ("fused", "split")]
    c["together"] = pick("together", ("apart",) * 5 + tuple(joined))
    c["attend"] = pick(
        "attend", ("sdpa", "sdpa", "sdpa gqa", "sdpa 3-d", "sdpa 5-d") + ("written",) * 3 + ("direct",) * 2
    )
    if pick("static", (False, False, True)):
        c["owner"] = pick("owner", ("prompt",) * 6 + OWNERS)
        c["write"] = pick("write", tuple(PUTS) if c["owner"] == "prompt" else IN_PLACE)
        c["position"] = "int" if c["write"] in BY_NUMBER else pick("position", ("tensor", "int"))
        c["prefix"] = c["position"] == "int" and pick("prefix", (False, True))
        c["window"] = pick("window", ("none", "none", "mask"))
        if c["owner"] == "module":
            c["container"] = "tuples"
    else:
        c["write"] = pick("write", GROWTH)
        c["window"] = pick("window", ("none", "none", "none", *WINDOWS))
        c["position"] = pick("position", ("tensor", "int") + ("length",) * ("slice" not in c["window"]))
    if c["window"] != "read slice" and c["write"] != "where":
        c["sizes"] = pick("sizes", ((1, 1), (1, 1), (2, 1), (1, 3)))
    c["padded"] = "slice" not in c["window"] and pick("padded", (False, False, True))
    c["shape"] = pick("shape", tuple(SHAPES) if not c["padded"] else ("[B, 1, q, T]", "[B, H, q, T]"))
    if c["attend"] in ("written", "direct"):
        c["grouped"] = c["attend"] == "written" and pick("grouped", (False, True))
        c["group"] = pick("group", tuple(GROUPS))
        table = tuple(GROUPED if c["grouped"] else PRODUCTS)
        c["product"] = pick("product", ("einsum reversed", "einsum") if c["attend"] == "direct" else table)
        c["weigh"] = pick("weigh", table)
        c["scale"] = pick("scale", tuple(SCALES))
        masks = [name for name in MASKS if name != "none" or not c["padded"] and not c.get("static")]
        c["hide"] = pick("hide", tuple(masks))
        if c["hide"] in LIMITED and c["shape"] not in LIMITED[c["hide"]]:
            c["shape"] = LIMITED[c["hide"]][0]
        c["softmax"], c["dropout"] = pick("softmax", tuple(SOFTMAX)), pick("dropout", tuple(DROPOUT))
        c["softcap"] = pick("softcap", ("",) * 16 + tuple(SOFTCAPS))
        c["sinks"] = pick("sinks", ("",) * 6 + tuple(SINKS))
    else:
        c["mask"] = pick("mask", ("causal", "causal", *KINDS))
        c["group"] = pick("group", tuple(GROUPS))
        if c["mask"] == "alibi" and c["attend"] == "sdpa 3-d":
            c["shape"] = "[B, H, q, T]"
    return Choice(**c)


def rotate(x: Tensor, at: Tensor, how: str) -> Tensor:
    if how == "none":
        return x
    angle = at[:, None] * 50.0 ** (-torch.arange(0, DIM, 2) / DIM)
    cos, sin = angle.cos(), angle.sin()
    if how == "half":
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class Layer(nn.Module):
    def __init__(self, choice: Choice):
        super().__init__()
        self.choice = choice
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * DIM, bias=False) for n in (HEADS, KV, KV))
        self.o = nn.Linear(HEADS * DIM, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def project(self, x, at):
        split = lambda y, n: y.view(*y.shape[:2], n, DIM).transpose(1, 2)
        q, k, v = split(self.q(x), HEADS), split(self.k(x), KV), split(self.v(x), KV)
        return rotate(q, at, self.choice.rope), rotate(k, at, self.choice.rope), v

    def forward(self, x, q, k, v, counts):
        """k, v as the cache has them for `direct`, else [B, H, T, D]."""
        y = self.attend(q, k, v, counts).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        x = x + self.o(y)
        return x + self.down(F.gelu(self.up(x)))

    def attend(self, q, k, v, counts):
        c = self.choice
        if c.attend == "direct":
            return self.direct(q, k, v, counts)
        if c.attend == "written":
            return self.written(q, k, v, counts)
        group = GROUPS[c.group]
        causal, mask = False, None
        if c.mask != "causal" or c.static or c.window != "none" or c.padded:
            mask = KINDS[c.mask if c.mask != "causal" else "bool"](SHAPES[c.shape](counts), q.dtype)
        elif q.shape[2] > 1:
            causal = True
        if c.attend == "sdpa gqa":
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        if c.attend == "sdpa 5-d":
            mask = mask[..., None, :, :] if mask is not None and mask.dim() > 2 else mask
            if mask is not None and mask.dim() > 3 and mask.shape[-4] == HEADS:
                mask = mask.squeeze(-3).unflatten(-3, (KV, -1))
            k, v = (x[:, :, None].expand(-1, -1, HEADS // KV, -1, -1) for x in (k, v))
            return F.scaled_dot_product_attention(q.unflatten(1, (KV, -1)), k, v, mask, is_causal=causal).flatten(1, 2)
        k, v = group(k), group(v)
        if c.attend == "sdpa 3-d":
            if mask is not None:
                mask = mask.expand(q.shape[0], HEADS, -1, -1).flatten(0, 1)
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
            return y.unflatten(0, (-1, HEADS))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    def written(self, q, k, v, counts):
        c = self.choice
        before, after = SCALES[c.scale]
        group = (lambda x: x) if c.grouped else GROUPS[c.group]
        table = GROUPED if c.grouped else PRODUCTS
        s = self.hide(after(table[c.product][0](before(q), group(k))), counts)
        return table[c.weigh][1](self.normalize(s), group(v))

    def hide(self, s, counts):
        c = self.choice
        s = SOFTCAPS[c.softcap][1](s) if c.softcap else s
        return MASKS[c.hide](s, SHAPES[c.shape](counts))

    def normalize(self, s):
        c = self.choice
        s = torch.cat([s, SINKS[c.sinks](s)], -1) if c.sinks else s
        w = SOFTMAX[c.softmax](s)
        return DROPOUT[c.dropout](w[..., :-1] if c.sinks else w)

    def direct(self, q, k, v, counts):
        """einsum over what the cache holds, grouped queries on an axis of their own."""
        c = self.choice
        axes = {"bt(hd)": "bthd"}.get(c.axes, c.axes)
        k, v = (x.unflatten(2, (KV, DIM)) if c.axes == "bt(hd)" else x for x in (k, v))
        letters = axes.replace("h", "g")
        before, after = SCALES[c.scale]
        q = before(q).unflatten(1, (KV, -1))
        s = after(torch.einsum(f"bgrqd,{letters}->bgrqt", q, k).flatten(1, 2))
        w = self.normalize(self.hide(s, counts)).unflatten(1, (KV, -1))
        if c.product == "einsum reversed":
            return torch.einsum(f"{letters},bgrqt->bgrqd", v, w).flatten(1, 2)
        return torch.einsum(f"bgrqt,{letters}->bqgrd", w, v).flatten(2, 3).transpose(1, 2)


class Drawn(nn.Module):
    """(tokens [B, q], cache, at, start, padding [B, slots]) -> (logits, cache)."""

    def __init__(self, choice: Choice, layers: int = 2, seed: int = 0):
        super().__init__()
        self.choice = choice
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
            self.layers = nn.ModuleList(Layer(choice) for _ in range(layers))
        if choice.owner == "module":
            for i, x in enumerate(self.buffers_of(3)):
                self.register_buffer(f"cache_{i}", x, persistent=False)

    @property
    def axis(self) -> int:
        """Of the tokens in a cache tensor of one layer."""
        in_front = 0 if TOKENS[self.choice.axes] == 0 else self.choice.together == "stacked behind rows"
        return TOKENS[self.choice.axes] + (self.choice.together in ("stacked", "unbound")) + in_front

    def pack(self, k, v) -> list[Tensor]:
        to = AXES[self.choice.axes][0]
        join = TOGETHER[self.choice.together]
        return [to(k), to(v)] if join is None else [join[0](to(k), to(v))]

    def unpack(self, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        back = AXES[self.choice.axes][1] if self.choice.attend != "direct" else lambda x: x
        join = TOGETHER[self.choice.together]
        k, v = parts if join is None else join[1](parts[0])
        return back(k), back(v)

    def buffers_of(self, batch: int) -> list[Tensor]:
        """Zeros of a static cache, one layer after the other."""
        new = torch.zeros(batch, KV, SLOTS, DIM)
        return [torch.zeros(x.shape) for _ in range(len(self.layers)) for x in self.pack(new, new)]

    def allocated(self, batch: int) -> list[Tensor]:
        shape = {
            "bhtd": (batch, KV, SLOTS, DIM),
            "bthd": (batch, SLOTS, KV, DIM),
            "bt(hd)": (batch, SLOTS, KV * DIM),
            "tbhd": (SLOTS, batch, KV, DIM),
            "bhdt": (batch, KV, DIM, SLOTS),
        }[self.choice.axes]
        if self.choice.together in ("stacked", "unbound"):
            return [torch.zeros(2, *shape)]
        if self.choice.together == "stacked behind rows":
            return [torch.zeros(shape[0], 2, *shape[1:])]
        if self.choice.together in ("fused", "split"):
            return [torch.zeros(*shape[:-1], 2 * shape[-1])]
        return [torch.zeros(shape), torch.zeros(shape)]

    def per_layer(self, cache) -> list:
        """Cache tensors of each layer, None for none."""
        how = self.choice.container
        if self.choice.owner == "module":
            flat = [x for name, x in self.named_buffers()]
            count = len(flat) // len(self.layers)
            return [flat[i * count : (i + 1) * count] for i in range(len(self.layers))]
        if cache is None:
            return [None] * len(self.layers)
        if how == "tuples":
            return [list(layer) for layer in cache]
        if how == "dicts":
            return [list(layer.values()) for layer in cache]
        if how == "dataclasses":
            return [[x.keys, x.values] if isinstance(x, Pair) else [x.both] for x in cache]
        if how == "flat list":
            count = len(cache) // len(self.layers)
            return [cache[i * count : (i + 1) * count] for i in range(len(self.layers))]
        return [[x[i] for x in cache] for i in range(len(self.layers))]

    def contained(self, layers: list[list[Tensor]]):
        how = self.choice.container
        if self.choice.owner == "module":
            return None
        if how == "tuples":
            return tuple(tuple(layer) for layer in layers)
        if how == "dicts":
            return [dict(zip(("k", "v"), layer, strict=False)) for layer in layers]
        if how == "dataclasses":
            return [Pair(*layer) if len(layer) == 2 else One(*layer) for layer in layers]
        if how == "flat list":
            return [x for layer in layers for x in layer]
        return [torch.stack([layer[j] for layer in layers]) for j in range(len(layers[0]))]

    @property
    def one_buffer(self) -> bool:
        """Static caches of all layers are one tensor, of which layers are views."""
        return self.choice.container == "layers in one tensor" and self.choice.write in IN_PLACE

    def write(self, past, new: list[Tensor], at, start) -> tuple[list[Tensor], list[Tensor]]:
        """(what attention reads, what is kept)"""
        c = self.choice
        if c.static:
            past = self.allocated(at_batch(new[0], c)) if past is None else past
            kept = [PUTS[c.write](x, y, at, start, self.axis) for x, y in zip(past, new, strict=True)]
            if c.prefix:
                return [x[(*[slice(None)] * self.axis, slice(0, start + len(at)))] for x in kept], kept
            return kept, kept
        prompt = past is None
        if prompt and c.write == "cat from empty":
            past = [x.narrow(self.axis, 0, 0) for x in new]
        if past is not None:
            cat = torch.concat if c.write == "concat" else torch.cat
            pair = (lambda a, b: [a, b]) if c.write == "cat of a list" else (lambda a, b: (a, b))
            new = [cat(pair(x, y), dim=self.axis) for x, y in zip(past, new, strict=True)]
        if c.window in ("slice", "read slice"):
            last = lambda x, n: x[(*[slice(None)] * self.axis, slice(-n, None))]
            if c.window == "read slice" and not prompt:
                new = [last(x, REACH) for x in new]
                return new, new
            return new, [last(x, REACH - 1) for x in new]
        return new, new

    def counts(self, at, total, padding, batch: int) -> Tensor:
        """[B, 1, q, total] bool: which scores count."""
        c = self.choice
        columns = torch.arange(total)
        if c.window in ("slice", "read slice"):
            columns = columns + at[-1] + 1 - total
        see = columns[None] <= at[:, None]
        if c.window != "none":
            see = see & (columns[None] > at[:, None] - REACH)
        see = see[None, None].expand(batch, 1, -1, -1)
        if padding is not None:
            see = see & padding[:, None, None, :total] | (columns == at[:, None])
        return see

    def forward(self, tokens, cache=None, at=None, start=None, padding=None):
        c = self.choice
        if cache is None and self.one_buffer and c.owner == "prompt":
            one = self.allocated(tokens.shape[0])
            cache = [torch.zeros(len(self.layers), *x.shape) for x in one]
        x, layers, kept = self.embed(tokens), self.per_layer(cache), []
        past = layers[0][0] if layers[0] is not None else None
        if c.position == "length":
            start = 0 if past is None else past.shape[self.axis]
        if c.position != "tensor":
            at = torch.arange(start, start + tokens.shape[1])
        for layer, past in zip(self.layers, layers, strict=True):
            q, k, v = layer.project(x, at)
            read, keep = self.write(past, self.pack(k, v), at, start)
            k, v = self.unpack(read)
            counts = self.counts(at, read[0].shape[self.axis], padding, tokens.shape[0])
            x = layer(x, q, k, v, counts)
            kept.append(keep)
        return self.head(x), cache if self.one_buffer else self.contained(kept)


def at_batch(x: Tensor, choice: Choice) -> int:
    axis = {"tbhd": 1}.get(choice.axes, 0) + (choice.together in ("stacked", "unbound"))
    if choice.together == "stacked behind rows" and choice.axes == "tbhd":
        axis = 2
    return x.shape[axis]


def tensors(cache) -> list[Tensor]:
    if isinstance(cache, Tensor):
        return [cache]
    if isinstance(cache, (Pair, One)):
        cache = list(vars(cache).values())
    cache = list(cache.values()) if isinstance(cache, dict) else (cache or ())
    return [x for part in cache for x in tensors(part)]


def cache_for(model: Drawn, batch: int):
    """What a caller starts with."""
    c = model.choice
    if c.owner == "module":
        for x in model.buffers():
            x.zero_()
    if c.owner != "caller":
        return None
    flat = model.buffers_of(batch)
    count = len(flat) // len(model.layers)
    return model.contained([flat[i * count : (i + 1) * count] for i in range(len(model.layers))])


@torch.no_grad()
def rolled(model: Drawn, run, batch: int, prompt: int, sizes, pad: int):
    """Logits of the prompt and of later parts of these sizes, and the cache at the end."""
    ids = torch.randint(0, VOCABULARY, (batch, prompt + sum(sizes)), generator=torch.Generator().manual_seed(batch))
    padding = torch.ones(batch, SLOTS, dtype=torch.bool)
    padding[0, :pad] = False
    cache, logits, first = cache_for(model, batch), [], 0
    for count in (prompt, *sizes):
        args = {"at": None, "start": None}
        if model.choice.position == "tensor":
            args["at"] = torch.arange(first, first + count)
        elif model.choice.position == "int":
            args["start"] = first
        if model.choice.padded:
            args["padding"] = padding
        out, cache = run(ids[:, first : first + count], cache, **args)
        logits.append(out)
        first += count
    return logits, tensors(cache)


def play(
    choice: Choice, batches=(1, 3), sizes=None, options=None, prompt: int = 5, compare: bool = True, layers: int = 2
) -> SimpleNamespace:
    """What one drawn decoder did, in lossless mode unless options say otherwise.

    error    the largest difference of logits and of the caches from the uncompiled model's, of all batches; nan where
             shapes differ, 0.0 without `compare`
    packed   of each tensor of the caches at the end
    reasons  of what the report says is not packed
    """
    torch._dynamo.reset()
    model, twin, graphs = Drawn(choice, layers), Drawn(choice, layers), []

    def backend(gm, inputs):
        graphs.append(gm)
        return akvq(gm, inputs, options={"body_bits": 16, "inner": "eager"} | (options or {}))

    run = torch.compile(model, backend=backend)
    sizes = choice.sizes if sizes is None else sizes
    pad, error, packed = 2 * choice.padded, 0.0, []
    for batch in (3,) if choice.owner == "module" else batches:
        got, cache = rolled(model, run, batch, prompt, sizes, pad)
        packed += [isinstance(x, PACKED) for x in (cache if choice.owner != "module" else model.buffers())]
        if compare:
            want, plain = rolled(twin, twin, batch, prompt, sizes, pad)
            error = max([error, *map(difference, (*got, *cache), (*want, *plain))], key=lambda x: (x != x, x))
    report = akvq_fx.report(model)
    reasons = [row.reason for row in report.refused]
    return SimpleNamespace(
        error=error,
        packed=packed,
        report=report,
        reasons=reasons,
        logits=got,
        graphs=len(graphs),
        rows=len(report.packed),
    )


def difference(a: Tensor, b: Tensor) -> float:
    a = a.dequantize() if isinstance(a, PACKED) else a
    return (a - b).abs().max().item() if a.shape == b.shape else float("nan")


__all__ = ["Choice", "Drawn", "drawn", "play"]
