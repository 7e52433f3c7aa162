"""The rows of akvq_fx.Slots: one growing cache in which requests of unequal length stand side by side.

All rows have as many tokens: shorter ones are padded in front, and a 2-D mask hides that. A request takes a row by
`keys.index_copy_(0, row, its keys)`, which replaces it in place, on codes where caches are packed. An idle row sees
only its own newest token; nobody reads what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from akvq_fx.packed_ops import is_packed, kind_of
from akvq_fx.slot_requests import Request

LEAST_CUT = 64  # fewer tokens of padding in front of all rows are not worth a copy of the cache


def filled(cache) -> list:
    """Layers of a cache that hold tokens; layers that read another one's are empty."""
    return [layer for layer in cache.layers if layer.keys is not None]


def of_layer(layer) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def kind(request: Request) -> Hashable:
    """What rows of one cache must have in common."""
    tensors = [x for layer in filled(request.cache) for x in of_layer(layer)]
    caches = tuple(kind_of(x) if is_packed(x) else (x.dtype, x.device, x.shape[1], x.shape[3]) for x in tensors)
    inputs = tuple(
        (name, (x.dtype, x.shape[:-2]) if isinstance(x, Tensor) else x) for name, x in sorted(request.inputs.items())
    )
    return caches, request.cache_name, inputs


class Rows:
    """`count` rows, made for a first request, which does not yet stand in one.

    length   tokens of each row, padding included
    held     row -> whose it is
    begins   row -> the first column of its request
    """

    def __init__(self, request: Request, count: int):
        device = request.logits.device
        self.cache, self.cache_name, self.length = request.cache, request.cache_name, request.length
        self.held: dict[int, Any] = {}
        self.begins: dict[int, int] = {}
        first = torch.zeros(count, dtype=torch.int64, device=device)
        self.inputs = {
            name: x.index_select(-2, first) if isinstance(x, Tensor) else x for name, x in request.inputs.items()
        }
        self.mask = torch.zeros(count, self.length, dtype=torch.int64, device=device)
        self.live = torch.zeros(count, 1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(count, 1, dtype=torch.int64, device=device)
        self.free = list(range(count))
        for layer in filled(self.cache):  # one by one: the request's own memory goes as rows come
            at = first.to(layer.keys.device)
            layer.keys, layer.values = (x.index_select(0, at) for x in of_layer(layer))

    def put(self, request: Request, token: int, holder: Any) -> int:
        """Give the request a free row and its first token; the row's number. Where it fails no other row changed."""
        row = self.free[0]
        if request.cache is not self.cache:
            self.put_cache(request, row)
        self.free.pop(0)
        self.held[row], self.begins[row] = holder, self.length - request.length
        self.mask[row] = pad(request.seen, (self.begins[row], 0))
        self.live[row], self.tokens[row] = 1, token
        for name, x in request.inputs.items():
            if isinstance(x, Tensor):
                self.inputs[name][..., row, :] = x[..., 0, :]
        request.cache = request.logits = None
        return row

    def put_cache(self, request: Request, row: int) -> None:
        more = request.length - self.length
        if more > 0:
            self.change(lambda x: pad(x, (0, 0, more, 0)), lambda x: x[:, :, more:])
            self.mask, self.length = pad(self.mask, (more, 0)), request.length
            self.begins = {row: begin + more for row, begin in self.begins.items()}
        new = [tuple(pad(x, (0, 0, max(0, -more), 0)) for x in of_layer(layer)) for layer in filled(request.cache)]
        for layer, given in zip(filled(self.cache), new, strict=True):
            for mine, x in zip(of_layer(layer), given, strict=True):
                mine.index_copy_(0, torch.tensor([row], device=mine.device), x)

    def change(self, work: Callable[[Tensor], Tensor], undo: Callable[[Tensor], Tensor]) -> None:
        """Put other tensors in place of all layers', one layer after another, so that memory for one layer more is
        enough. Where it fails, those that were changed are changed back."""
        done = []
        try:
            for layer in filled(self.cache):
                layer.keys, layer.values = map(work, of_layer(layer))
                done.append(layer)
        except BaseException:
            for layer in done:
                layer.keys, layer.values = map(undo, of_layer(layer))
            raise

    def become(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for layer, (keys, values) in zip(filled(self.cache), pairs, strict=True):
            layer.keys, layer.values = keys, values

    def release(self, row: int) -> None:
        """The row is idle from now on."""
        del self.held[row], self.begins[row]
        self.mask[row], self.live[row] = 0, 0
        self.free.append(row)

    def step(self, forward) -> Tensor:
        """Logits [rows, vocabulary] of each row's next token. Where the model raises, the cache is as it was."""
        self.cut()
        before = [of_layer(layer) for layer in filled(self.cache)]
        mask = pad(self.mask, (0, 1), value=1)
        given = {"input_ids": self.tokens, "attention_mask": mask, self.cache_name: self.cache, **self.inputs}
        try:
            output = forward(**given, return_dict=True)
        except BaseException:
            self.become(before)
            raise
        self.mask, self.length = mask * self.live, self.length + 1
        if "position_ids" in self.inputs:
            self.inputs["position_ids"] = self.inputs["position_ids"] + self.live
        return output.logits[:, -1]

    def cut(self) -> None:
        """Drop what is padding in all rows, where it is much."""
        first = min(self.begins.values())
        if first < LEAST_CUT or 4 * first < self.length:
            return
        self.change(lambda x: x[:, :, first:], lambda x: pad(x, (0, 0, first, 0)))
        self.mask, self.length = self.mask[:, first:], self.length - first
        self.begins = {row: begin - first for row, begin in self.begins.items()}
