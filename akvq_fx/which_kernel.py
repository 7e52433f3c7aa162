"""Which implementation answers an op of a compiled graph, and why a faster one does not: asked with fake tensors.

Calls are noted while a graph is compiled, and asked about later, when nothing is traced. Sizes are the ones that dynamo
saw; a call of another size, or with buffers that are not contiguous, may get another kernel.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensorMode

from akvq_fx import torch_internals
from akvq_fx.kernels import attend, cache, choose, rotate, salience
from akvq_fx.kernels.layout import Layout
from akvq_fx.passes.patterns.nodes import shape, value
from akvq_fx.passes.state import GraphState
from akvq_fx.report import KernelAnswer

FASTER = {
    "pack": cache.FASTER,
    "append": cache.FASTER_APPEND,
    "attend": attend.FASTER,
    **dict.fromkeys(("rotate", "rotate_keys", "rotate_queries"), rotate.FASTER),
    **dict.fromkeys(("find_pivots", "key_affine"), salience.FASTER),
}


@dataclass(frozen=True)
class Call:
    """One op as a site of a graph calls it: sizes [B, Hq, H, q, D] and the capacity of its cache, all plain numbers."""

    op: str
    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, int, int, int, int]
    width: int  # of the residual stream, for pivots
    capacity: int
    masked: torch.dtype | None
    is_causal: bool
    softcap: float
    sinks: bool
    layouts: tuple[str, str]  # of keys and of values


def calls_of(state: GraphState) -> list[Call]:
    """What the ops of a rewritten graph are called with, each once."""
    used = {str(node.target).split(".")[1] for node in state.graph.nodes if str(node.target).startswith("akvq.")}
    step, found = state.config.capacity_step, {}
    for site in state.sites:
        query, new = site.attention.query, site.key.new if site.key.new is not None else site.key.whole
        B, Hq, q, D = map(torch_internals.hint, shape(query))
        H, length = (torch_internals.hint(shape(site.key.whole)[i]) for i in (1, 2))
        capacity = length if site.key.static else (length + step) // step * step
        mask = site.attention.mask
        for op in sorted(used & FASTER.keys()):
            sizes = (B, Hq, H, torch_internals.hint(shape(new)[2]) if op in ("pack", "append") else q, D)
            call = Call(op, value(query).device, value(query).dtype, sizes, Hq * D, capacity,
                        None if mask is None else value(mask).dtype, site.attention.is_causal, site.attention.softcap,
                        site.attention.sinks is not None,
                        (str(site.key_layout), str(site.value_layout)))  # fmt: skip
            found[call] = None
    return list(found)


def answers(calls: list[Call]) -> list[KernelAnswer]:
    """Answers to all calls, each once; of writes, keys and values separately. May compile a kernel to try it."""
    found = dict.fromkeys(answer for call in calls for answer in answers_to(call))
    return list(found)


def answers_to(call: Call) -> list[KernelAnswer]:
    return [found for found, _ in answers_with(call)]


def answers_with(call: Call) -> list[tuple[KernelAnswer, dict | list]]:
    """Each answer with what was asked about: fake tensors and layouts, by the names that `refusal` has or in order."""
    B, Hq, H, q, D = call.sizes
    keys, values = map(Layout.parse, call.layouts)
    with FakeTensorMode():
        empty = lambda *size: torch.empty(size, dtype=call.dtype, device=call.device)
        query, new = empty(B, Hq, q, D), empty(B, H, q, D)
        if call.op in ("pack", "append"):
            asked = [{"x": new, "layout": layout} for layout in (keys, values)]
        elif call.op == "attend":
            asked = [[attend_call(call, query, new, keys, values)]]
        else:
            tensors = {"rotate_queries": [query], "find_pivots": [empty(B, q, call.width)], "key_affine": [new, query]}
            asked = [tensors.get(call.op, [new])]
        return [(answer(call, given), given) for given in asked]


def attend_call(call: Call, query, new, keys: Layout, values: Layout) -> attend.AttendCall:
    B, _, H, q, _ = call.sizes
    buffers = []
    for layout in (keys, values):
        text = call.capacity if layout.text_bits else 0
        buffers.append(layout.allocate(B, H, call.capacity, text, call.device))
    mask = None
    if call.masked is not None:
        mask = torch.empty(B, 1, q, call.capacity, dtype=call.masked, device=call.device)
    at = torch.empty(q, dtype=torch.int64, device=call.device) if q > 1 else None
    fresh = new if q > 1 else None
    return attend.AttendCall(
        q=query,
        key=buffers[0],
        value=buffers[1],
        length=call.capacity,
        mask=mask,
        scale=None,
        is_causal=call.is_causal,
        fresh_key=fresh,
        fresh_value=fresh,
        at=at,
        key_layout=keys,
        value_layout=values,
        softcap=call.softcap,
        sinks=query.new_empty(query.shape[1]) if call.sinks else None,
    )


def answer(call: Call, given: dict | list) -> KernelAnswer:
    """given: arguments of the implementations' `refusal` by name, or in order."""
    passed_over = []
    for name in FASTER[call.op].get(call.device.type, ()):
        module = choose.module_of(name)
        if isinstance(module, str):
            reason = module
        elif isinstance(given, list):
            reason = module.refusal(*given)
        else:
            reason = module.refusal(*(given.get(n) for n in inspect.signature(module.refusal).parameters))
        if not reason:
            return KernelAnswer(call.op, str(call.device), name, tuple(passed_over))
        passed_over.append((name, reason))
    return KernelAnswer(call.op, str(call.device), "", tuple(passed_over))
