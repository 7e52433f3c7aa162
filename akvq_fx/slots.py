"""Slots: requests come and go while a model decodes, each in a row of one cache.

slots = akvq_fx.Slots(model, rows=8)
handle = slots.insert(processor(...), max_new_tokens=64)
while len(slots):
    for handle, tokens in slots.step().items():
        ...
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from akvq_fx.slot_requests import Request, prepared
from akvq_fx.slot_rows import Rows, kind


class Handle:
    """A request that was inserted. `tokens` are those that it got so far, as Python ints.

    state    "prompt", "running", "ended" (by its own stopping criteria), "removed" or "failed"
    error    what a request of its own raised in a step, which did not stop the others; else None
    """

    def __init__(self, slots: Slots):
        self.slots = slots
        self.tokens: list[int] = []
        self.state = "prompt"
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether no token comes any more."""
        return self.state not in ("prompt", "running")

    def __repr__(self) -> str:
        return f"<request, {self.state}, {len(self.tokens)} tokens>"


class Slots:
    """Up to `rows` requests at a time of a model that has transformers' `generate`, compiled by akvq or not.

    chunk    run prompts in pieces of so many tokens, one piece in each step(), so that a long prompt does not hold up
             other requests. What comes before the last image's end is one piece. None: insert() runs all of a prompt

    Each request gets the tokens that it gets alone: exactly where the model's arithmetic does not depend on the batch
    and the cache is not quantized. At 2 bits it gets those of its own packed cache, but for prompts without images
    blocks of 64 keys begin elsewhere (docs/how-it-works.md), and pieces are packed by the first one's statistics.

    Sliding windows keep all tokens, hidden by masks. Prompts that are packed in different ways, as those with and
    without images are, stand in different caches, each of `rows` rows. A cache is given back when its last row ends.
    Any thread may call any method; one lock guards all, so what one thread does the others wait for.
    """

    def __init__(self, model: Any, rows: int, chunk: int | None = None):
        if not callable(getattr(getattr(model, "_orig_mod", model), "generate", None)):
            raise TypeError(f"akvq: Slots needs a model that generates; {type(model).__name__} has no generate")
        for name, number in (("rows", rows), ("chunk", 1 if chunk is None else chunk)):
            if type(number) is not int or number < 1:
                raise ValueError(f"akvq: {name}={number!r}; accepted: a whole number, 1 or more")
        self.model, self.rows, self.chunk = model, rows, chunk
        self._lock = threading.RLock()
        self._requests: dict[Handle, Request] = {}  # all that have not ended
        self._prompts: deque[Handle] = deque()  # those of them whose prompts have not run to their end
        self._places: dict[Handle, tuple[Hashable, int]] = {}  # in which rows, and in which of them
        self._pools: dict[Hashable, Rows] = {}
        self._news: dict[Handle, list[int]] = {}  # what the next step() returns

    def __len__(self) -> int:
        """Requests that have not ended; `rows - len(slots)` more may be inserted."""
        return len(self._requests)

    @torch.no_grad()
    def insert(self, inputs: Mapping[str, Any], *, seed: int | None = None, **options: Any) -> Handle:
        """Add a request: inputs of one prompt as the model's processor makes them, and options of `generate`.

        seed     of its sampling, so that it does not depend on other requests; None: a random one

        Its first token comes with the next step(). Raises RuntimeError where all rows are taken; ValueError and
        NotImplementedError for what a row cannot do (beams, static caches); and whatever the prompt raises. In all
        these cases no other request is touched.
        """
        with self._lock:
            if len(self._requests) >= self.rows:
                raise RuntimeError(
                    f"akvq: all {self.rows} rows are taken; call step() until a request has ended, or remove one"
                )
            request, handle = prepared(self.model, dict(inputs), options, seed), Handle(self)
            if self.chunk is not None:
                request.cut(self.chunk)
                self._prompts.append(handle)
            else:
                request.run_piece(self.model)
            self._requests[handle] = request
            if self.chunk is None:
                self._alone(handle, self._begin)
                if handle.error is not None:
                    del self._news[handle]
                    raise handle.error
            return handle

    @torch.no_grad()
    def step(self) -> dict[Handle, list[int]]:
        """The next token of every running request, and one piece of a prompt where chunks are waiting.

        Returns the new tokens of each request that has any: one, or two after its prompt. Where a request itself
        fails (its prompt, a logits processor of its own), its handle has the error and the others go on; it is in the
        result with no new tokens. Where the model raises in a step of all, the exception comes through; nothing has
        changed then, and step() may be called again.
        """
        with self._lock:
            if self._prompts:
                self._alone(self._prompts[0], self._run_piece)
            for rows in list(self._pools.values()):
                self._take(rows, rows.step(self.model))
            news, self._news = self._news, {}
            return news

    def remove(self, handle: Handle) -> None:
        """End a request now; tokens that step() has not returned are in `handle.tokens`. One that ended by itself may
        be removed too. Raises ValueError for one that was removed before, or that was inserted elsewhere."""
        with self._lock:
            if getattr(handle, "slots", None) is not self or handle.state == "removed":
                why = "was removed before" if getattr(handle, "slots", None) is self else "is not of these slots"
                raise ValueError(f"akvq: {handle!r} {why}; accepted: what insert() of these slots returned")
            if handle in self._requests:
                self._leave(handle, "removed")
                self._news.pop(handle, None)
            handle.state = "removed"

    def _alone(self, handle: Handle, work: Callable[[Handle], Any]) -> None:
        """Do what concerns one request only; its failure ends it and nobody else."""
        try:
            work(handle)
        except BaseException as error:
            self._news.setdefault(handle, [])
            self._leave(handle, "failed")
            if not isinstance(error, Exception):
                raise
            handle.error = error

    def _run_piece(self, handle: Handle) -> None:
        request = self._requests[handle]
        request.run_piece(self.model)
        if not request.pieces:
            self._prompts.popleft()
            self._begin(handle)

    def _begin(self, handle: Handle) -> None:
        """The prompt has run: choose the first token, and take a row if more are to come."""
        request, handle.state = self._requests[handle], "running"
        token = int(request.choose(request.logits))
        if self._give(handle, token):
            return
        key = kind(request)
        rows = self._pools.get(key) or Rows(request, self.rows)
        row = rows.put(request, token, handle)
        self._pools[key], self._places[handle] = rows, (key, row)

    def _take(self, rows: Rows, logits: Tensor) -> None:
        """Choose each row's next token, and ask the device once for all."""
        tokens = logits.argmax(-1)

        def choose(handle):
            row, request = self._places[handle][1], self._requests[handle]
            if not request.plain:
                tokens[row] = request.choose(logits[row])

        for handle in list(rows.held.values()):
            self._alone(handle, choose)
        rows.tokens, numbers = tokens[:, None], tokens.tolist()
        for row, handle in list(rows.held.items()):
            self._alone(handle, lambda handle, token=numbers[row]: self._give(handle, token))

    def _give(self, handle: Handle, token: int) -> bool:
        """Hand out a token; whether it was the last one, after which its row is free."""
        handle.tokens.append(token)
        self._news.setdefault(handle, []).append(token)
        ended = self._requests[handle].take(token)
        if ended:
            self._leave(handle, "ended")
        return ended

    def _leave(self, handle: Handle, state: str) -> None:
        """The request has ended: its row is free, and a cache without requests is given back."""
        handle.state = state
        del self._requests[handle]
        if handle in self._prompts:
            self._prompts.remove(handle)
        if handle in self._places:
            key, row = self._places.pop(handle)
            rows = self._pools[key]
            rows.release(row)
            if not rows.held:
                del self._pools[key]
