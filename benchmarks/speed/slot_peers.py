"""Who takes part in slots.py: rows of a 2-bit cache (`akvq_fx.Slots`), and of a 16-bit static one.

Both run a prompt whole and uncompiled when it is admitted, decode all rows in one compiled step that CUDA graphs
replay, choose the largest logit and ask the device once a step for all rows' tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import akvq_fx
from akvq_fx import torch_internals
from akvq_fx.transformers_names import cache_argument


class Akvq:
    """akvq_fx.Slots over a model that akvq compiled."""

    title = "akvq_fx.Slots"

    def __init__(self, model, rows: int, longest: int, inner: str | None, options: dict):
        self.model, self.rows, self.longest = model, rows, longest
        if torch_internals.own_call(model) is None:  # once a process
            model.compile(backend="akvq", options={**options, **({"inner": inner} if inner else {})})
        self.slots, self.freed = akvq_fx.Slots(model, rows), 0

    def insert(self, inputs: dict, out: int):
        return self.twice(lambda: self.slots.insert(inputs, max_new_tokens=out))

    def step(self) -> None:
        self.twice(self.slots.step)

    def twice(self, work):
        """Where memory runs out nothing has changed: once more without what CUDA graphs keep of finished caches."""
        try:
            return work()
        except torch.OutOfMemoryError:
            self.freed += 1
        akvq_fx.free_kept_buffers()
        torch.cuda.empty_cache()
        return work()

    def tensors(self) -> list[Tensor]:
        return [x for rows in self.slots._pools.values() for layer in rows.cache.layers
                for x in (layer.keys, layer.values)]  # fmt: skip

    def row_bytes(self) -> float:
        """Of a row with as many tokens as the longest request has, spare capacity and what Slots lets stand in front of
        all rows before it drops it: up to a quarter."""
        step = akvq_fx.AKVQConfig().capacity_step
        held = self.tensors()
        whole = (4 / 3 * self.longest + step) / held[0].storage.capacity
        return whole * sum(x.nbytes_packed for x in held) / self.rows

    def facts(self) -> dict:
        held = self.tensors()
        packed = [x for x in held if isinstance(x, akvq_fx.PackedKV)]
        if len(packed) < len(held):
            raise RuntimeError(f"only {len(packed)} of {len(held)} cache tensors are packed when the time ends")
        if not held:
            return {"note": "no request was under way at the end"}
        report = akvq_fx.report(self.model)
        of = [graph.capture for graph in report.graphs if graph.capture is not None]
        total = lambda name: sum(getattr(capture, name) for capture in of)
        size, numbers = sum(x.nbytes_packed for x in packed), sum(x.numel() for x in packed)
        note = [f"{8 * size / numbers:.2f} bits a number at the end, {packed[0].count} tokens a row"]
        if of:
            note += [f"{total('captured')} captures, {total('replayed')} steps replayed, {total('ran')} not"]
        note += [f"kept buffers freed {self.freed} times for want of memory"] if self.freed else []
        note += sorted({capture.reason for capture in of if capture.reason})
        return {"note": "; ".join(note), "cache_gb": size / 1e9}

    def close(self) -> None:
        self.slots = None
        akvq_fx.free_kept_buffers()


@dataclasses.dataclass(eq=False)
class Handle:
    left: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    state: str = "running"
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.state != "running"

    def take(self, token: int) -> None:
        self.tokens.append(token)
        self.left -= 1
        if not self.left:
            self.state = "ended"


class StaticRow(DynamicLayer):
    """A layer of one row while its prompt runs: tokens go to the row, attention sees them alone. It counts none."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.into = keys, values  # [1, H, C, D]

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for into, x in zip(self.into, (keys, values), strict=True):
            into[:, :, : x.shape[2]] = x
        return keys, values


class StaticRows(DynamicLayer):
    """A layer of all rows in a decode step: each row's token goes to its own place at [B, 1, 1, 1] int64."""

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor):
        super().__init__()
        self.held_keys, self.held_values, self.at = keys, values, at  # [B, H, C, D]

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        at = self.at.expand(-1, keys.shape[1], 1, keys.shape[3])
        self.held_keys.scatter_(2, at, keys)
        self.held_values.scatter_(2, at, values)
        return self.held_keys, self.held_values


class Static:
    """Rows of `longest` tokens, allocated once, each with a length of its own. Nothing moves when a row is taken."""

    title = "16-bit static rows"

    def __init__(self, model, rows: int, longest: int, inner: str | None, options: dict):
        self.model, self.rows = model, rows
        text = model.config.get_text_config()
        heads = text.num_key_value_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.capacity = -(-longest // 64) * 64
        self.device = model.device
        empty = lambda: torch.zeros(rows, heads, self.capacity, dim, dtype=model.dtype, device=self.device)
        self.buffers = [(empty(), empty()) for _ in range(text.num_hidden_layers)]
        self.at = torch.zeros(rows, 1, 1, 1, dtype=torch.int64, device=self.device)  # of the token to come
        for x in (self.at, *(x for pair in self.buffers for x in pair)):
            torch._dynamo.mark_static_address(x)
        self.cache, self.name = DynamicCache(), cache_argument(model)
        self.cache.layers = [StaticRows(*pair, self.at) for pair in self.buffers]
        self.live = torch.zeros_like(self.at)
        self.slots = torch.arange(self.capacity, device=self.device)
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        self.held: dict[int, Handle] = {}
        how = {"mode": "reduce-overhead"} if not inner or inner == "inductor" else {"backend": inner}
        self.forward = torch.compile(model.forward, dynamic=False, **how)

    @torch.no_grad()
    def insert(self, inputs: dict, out: int) -> Handle:
        row = next(i for i in range(self.rows) if i not in self.held)
        cache = DynamicCache()
        cache.layers = [StaticRow(*(x[row : row + 1] for x in pair)) for pair in self.buffers]
        logits = self.model(**inputs, **{self.name: cache}, use_cache=True, logits_to_keep=1).logits[0, -1]
        token, handle = logits.argmax(), Handle(out)
        self.at[row], self.live[row], self.tokens[row] = inputs["input_ids"].shape[1], 1, token
        handle.take(int(token))
        self.held[row] = handle
        self.leave(row)
        return handle

    @torch.no_grad()
    def step(self) -> None:
        if not self.held:
            return
        torch.compiler.cudagraph_mark_step_begin()
        at = self.at[:, 0, 0]
        mask = (self.slots <= at)[:, None, None]
        logits = self.forward(
            input_ids=self.tokens,
            attention_mask=mask,
            position_ids=at.clone(),
            **{self.name: self.cache},
            use_cache=True,
        ).logits
        self.tokens = logits[:, -1].argmax(-1, keepdim=True)
        self.at += self.live
        for row, token in enumerate(self.tokens[:, 0].tolist()):
            if row in self.held:
                self.held[row].take(token)
                self.leave(row)

    def leave(self, row: int) -> None:
        """Free the row of a request that has ended; an idle row goes on at its first place, where nobody reads."""
        if self.held[row].done:
            del self.held[row]
            self.live[row], self.at[row] = 0, 0

    def row_bytes(self) -> float:
        return sum(x.nbytes for pair in self.buffers for x in pair) / self.rows

    def facts(self) -> dict:
        return {"note": f"{self.capacity} tokens a row", "cache_gb": self.rows * self.row_bytes() / 1e9}

    def close(self) -> None:
        self.buffers = self.cache = self.forward = None
        torch._dynamo.reset()


PEERS = {"static": Static, "akvq": Akvq}
