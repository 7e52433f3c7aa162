"""InPlace: a compiled graph that returns sliding windows, called by a model that overwrites static ones in place.

Before   past.copy_(rolled)                 the model's graph has no result for it
After    results = run(..., past); past becomes results[-1]

The caller holds the tensor object, so its inside is exchanged (akvq_fx/exchange.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor

from akvq_fx import exchange
from akvq_fx.packed_kv import PackedKV
from akvq_fx.passes.apart.unroll import Windows

NOT_FULL = "it is rolled before all of its slots were written"


class InPlace:
    """What dynamo gets where a model overwrites windows as a whole. Host work only, but for a window's first call.

    plain    the graph as dynamo gave it, for buffers that cannot be exchanged: they stay at 16 bits
    on_left  the report's callback: gets the reason of those
    """

    def __init__(self, run: Callable, windows: Windows, plain: Callable, on_left: Callable[[str], None]):
        self.run, self.inner, self.plain, self.on_left = run, getattr(run, "inner", run), plain, on_left
        self.positions, self.made = windows.positions, windows.made

    def __call__(self, *args):
        windows = [args[i] for i in self.positions]
        if why := next(filter(None, map(why_not, windows)), ""):
            self.on_left(why)
            for window in windows:
                to_plain(window, why)
            return self.plain(*args)
        for window in windows:
            if isinstance(window, PackedKV) and window.static:
                begin_to_slide(window)
        results = list(self.run(*args))
        new = results[len(results) - len(windows) :]
        del results[len(results) - len(windows) :]
        for window, packed in zip(windows, new, strict=True):
            put_in_place(window, packed)
        for i in self.made:
            results[i].was = {}  # code outside of graphs may start it anew, as a static buffer
        return tuple(results)


def why_not(window: Tensor) -> str:
    """Why a window must not become another tensor, "" where it may."""
    if not isinstance(window, PackedKV):
        return exchange.refusal(window)
    return NOT_FULL if window.static and window.storage.written() < window.count else ""


def to_plain(window: Tensor, why: str) -> None:
    """Have it be a plain tensor from now on: no token is quantized twice."""
    if isinstance(window, PackedKV):
        window.was = {} if window.was is None else window.was
        exchange.turn_back(window)
    exchange.leave(window, why)


def begin_to_slide(window: PackedKV) -> None:
    """A full window that was packed as a static cache grows from now on; no token moves."""
    storage = window.storage
    storage.end, storage.slides, storage.prompt, storage.attributes = window.count, True, 0, None
    storage.mark_dynamic()


def put_in_place(window: Tensor, packed: PackedKV) -> None:
    """Have the object `window` be the cache `packed`, of the same shape."""
    if not isinstance(window, PackedKV):
        exchange.exchange(window, packed)
        return
    was = {} if window.was is None else window.was
    vars(window).clear()
    vars(window).update(vars(packed), was=was)
    views = window.storage.views
    if all(ref() is not window for ref in views):  # else it was a view of this storage before
        views.append(weakref.ref(window))
