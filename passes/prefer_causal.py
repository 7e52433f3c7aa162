"""Let a prompt's attention run as causal attention where its mask turns out to be just that.

Before   sdpa(q, k, v, mask)     After   causal = is_causal(mask)
                                         sdpa(q, k, v, unless(causal, mask), is_causal=causal)
Needs    sites                   Gives    none
Follows  attend_packed           Leaves  what is packed, and a mask's other readers

A traced model cannot ask whether a batch is padded, so it makes a mask for every prompt. Attention under a mask reads
it, does twice the work, and PyTorch's fastest kernels take none. Python's own code can ask, once for all layers that
share the mask, so this is for prompts that run as the passes leave them: for those, an uncompiled model asks as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx.passes.patterns.attention import Attention, named_arguments
from akvq_fx.passes.patterns.nodes import op, same_size, shape, value
from akvq_fx.passes.state import GraphState
from akvq_fx.report import PassReport

ROWS = 1024  # of a mask that are compared at a time: beside a long prompt's mask there is no room for another


def prefer_causal(state: GraphState) -> PassReport:
    report = PassReport("prefer_causal")
    if not state.begins_caches or (state.config.compile_prompts and state.config.inner != "eager"):
        return report
    for site in state.sites:
        call, mask = site.attention.node, site.attention.mask
        if op(call) != "scaled_dot_product_attention":
            report.miss(site, "it is as the model wrote it out, no call", call)
            continue
        if not may_be_causal(site.attention):
            report.miss(site, "its mask is not [..., tokens, tokens]", call)
            continue
        with state.before(call):
            causal = state.share(("causal", mask), lambda mask=mask: state.call(is_causal, mask))
            given = state.share(("unless causal", mask), lambda mask=mask, c=causal: state.call(unless, c, mask))
        call.kwargs = {**named_arguments(call), "attn_mask": given, "is_causal": causal}
        call.args = ()
        report.match(site)
    return report


def may_be_causal(attention: Attention) -> bool:
    """There is a mask, with a row for each query and as many queries as tokens."""
    if attention.mask is None or attention.is_causal or not isinstance(value(attention.mask), Tensor):
        return False
    rows, columns = shape(attention.query)[2], shape(attention.key)[2]
    given = shape(attention.mask)
    return len(given) >= 2 and all(map(same_size, given[-2:], (rows, columns))) and same_size(rows, columns)


def is_causal(mask: Tensor) -> bool:
    """Whether a mask [..., T, T], bool or additive, has every query see its own token and all before it, and no more.

    Waits for the device.
    """
    place = torch.arange(mask.shape[-1], device=mask.device)
    same = []
    for start in range(0, len(place), ROWS):
        rows, seen = mask[..., start : start + ROWS, :], place <= place[start : start + ROWS, None]
        if mask.dtype == torch.bool:
            same.append((rows == seen).all())
        else:
            same.append(torch.where(seen, rows == 0, rows <= torch.finfo(mask.dtype).min / 2).all())
    return bool(torch.stack(same).all())


def unless(flag: bool, mask: Tensor) -> Tensor | None:
    """The mask, or None where the flag says what it would."""
    return None if flag else mask


prefer_causal.needs = ("sites",)
prefer_causal.gives = ()
prefer_causal.follows = ("attend_packed",)
