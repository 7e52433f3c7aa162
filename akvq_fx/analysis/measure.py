"""Statistics of one attention call over a prompt: where its attention goes, massive activations, large channels.

Everything is computed in float32, summed in float64 and kept on the CPU.

Attention mass. Queries are the text tokens after the last image, at most `queries` of them, or the last `queries` real
tokens of a prompt without images: these are most like the tokens that will follow the prompt. A share is the softmax
probability, averaged over the queries, that falls on a kind of token:
    text + vision = 1, by modality
    recent + far_pivots + far_text + far_vision = 1, by what the method can do for a token: the last `window` tokens
        before a query are at 16 bits in every layer; of the others, pivots are at 16 bits in PSA layers, text at 4 bits
        in TSA layers, vision tokens at 2 bits
    sink, the first real token, is a part of several of these
The number of tokens in each far share is counted too, so that a share can be given per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx.analysis.watch import AttentionCall
from akvq_fx.config import AKVQConfig
from akvq_fx.kernels.rotate import keys_reference, rotate_wide
from akvq_fx.kernels.salience import key_affine_reference, massive_tokens, select_pivots, valid_tokens

MODALITIES = ("text", "vision")
PARTS = ("recent", "far_pivots", "far_text", "far_vision")
SHARES = (*MODALITIES, *PARTS, "sink")
FAR = ("far_pivots", "far_text", "far_vision")
BLOCK = 256  # query tokens whose probabilities [Hq, BLOCK, C] are held at once
FORMS = ("keys", "keys WHT", "keys centred WHT", "values", "values WHT")


def valid_of(call: AttentionCall) -> Tensor:
    """[B, q] bool: tokens that some query sees; all of them without a mask."""
    B, _, q, _ = call.new_key.shape
    if call.mask is None:
        return torch.ones(B, q, dtype=torch.bool, device=call.new_key.device)
    return valid_tokens(whole_mask(call.mask), B).index_select(1, call.at)


def whole_mask(mask: Tensor) -> Tensor:
    """A mask that broadcasts, with all four dimensions."""
    return mask[(None,) * (4 - mask.dim())]


def peaks_of(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor] | None:
    """Per token, [B, q] each: largest |h| of the residual stream at the layer's input, its channel, the median."""
    if call.residual is None:
        return None
    magnitude = call.residual.abs().float()
    peak, channel = magnitude.max(-1)
    return peak.nan_to_num(0.0), channel, magnitude.median(-1).values


def pivots_of(peaks: tuple | None, valid: Tensor, config: AKVQConfig) -> Tensor:
    """[B, P] positions that a PSA layer keeps, -1 for a free slot; without a residual stream the first real token."""
    if peaks is None:
        nothing = torch.zeros(valid.shape, device=valid.device)
        return select_pivots(nothing, nothing, valid, config.pivots, torch.inf, 0.0)
    peak, _, median = peaks
    median = median if config.pivot_mode == "massive" else None
    return select_pivots(peak, median, valid, config.pivots, config.massive_floor, config.massive_ratio)


def massive_of(peaks: tuple, valid: Tensor, config: AKVQConfig) -> tuple[Tensor, Tensor]:
    """([B, q] bool: tokens above the floor and the ratio; [B] median |h| of the real tokens)."""
    peak, _, median = peaks
    return massive_tokens(peak, median, valid, config.massive_floor, config.massive_ratio)


def queries_of(valid: Tensor, vision: Tensor, count: int) -> Tensor:
    """Positions of one prompt's [q] query tokens: real text after the last image, at most the last `count`."""
    text = valid & ~vision
    last = vision.nonzero().max().item() if vision.any() else -1
    after = text & (torch.arange(len(valid), device=valid.device) > last)
    return (after if after.any() else text).nonzero()[:, 0][-count:]


def attention_mass(
    call: AttentionCall, row: int, queries: Tensor, valid: Tensor, vision: Tensor, pivots: Tensor, window: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Probability summed over the queries [n], per share and query head: float64 [Hq] each; and per far share its
    tokens, summed over the queries. valid, vision [q]; pivots [P]."""
    slots = call.key.shape[2]
    spread = lambda chosen: torch.zeros(slots, dtype=torch.float64, device=chosen.device).index_put(
        (call.at,), chosen.double()
    )
    pivot = torch.zeros_like(valid)
    pivot[pivots[pivots >= 0].long()] = True
    total, far = probabilities(call, row, queries, window)
    first = torch.zeros_like(valid)
    first[valid.to(torch.uint8).argmax()] = True
    # [q]: for how many queries each token is outside the window
    outside = (call.at[queries][:, None] - call.at >= window).sum(0)
    kinds = {"far_pivots": pivot, "far_text": valid & ~vision & ~pivot, "far_vision": valid & vision & ~pivot}
    found = {
        "text": total @ spread(valid & ~vision),
        "vision": total @ spread(valid & vision),
        "recent": (total - far).sum(-1),
        **{name: far @ spread(chosen) for name, chosen in kinds.items()},
        "sink": total @ spread(first),
    }
    tokens = {name: int(outside[chosen].sum()) for name, chosen in kinds.items()}
    return {name: mass.cpu() for name, mass in found.items()}, tokens


def probabilities(call: AttentionCall, row: int, queries: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Softmax summed over one prompt's queries: [Hq, C] float64, of all keys and of those outside the window."""
    query, key = call.query[row], call.key[row].float()
    heads, slots = len(query), len(key[0])
    key = key.repeat_interleave(heads // len(key), 0)
    scale = call.scale if call.scale is not None else query.shape[-1] ** -0.5
    slot = torch.arange(slots, device=query.device)
    total = torch.zeros(heads, slots, dtype=torch.float64, device=query.device)
    far = torch.zeros_like(total)
    for at in queries.split(BLOCK):
        scores = query[:, at].float() @ key.transpose(1, 2) * scale
        if call.mask is not None:
            whole = whole_mask(call.mask)
            mask = whole.expand(len(call.query), -1, call.query.shape[2], -1)[row][:, at]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if call.is_causal:
            scores = scores.masked_fill(slot > at[:, None], -torch.inf)
        p = scores.softmax(-1).double()
        total += p.sum(1)
        far += (p * (call.at[at][:, None] - slot >= window)).sum(1)
    return total, far


def channel_magnitudes(call: AttentionCall, valid: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Per form of FORMS: largest and mean |x| by KV head and channel over a prompt's real tokens, float64 [H, D].

    "centred" keys are centred and balanced before the rotation, as the backend stores them.
    """
    key, value = call.new_key.float(), call.new_value.float()
    affine = key_affine_reference(key, call.query.float(), valid, True, True)
    forms = (
        key,
        rotate_wide(key),
        keys_reference(key, affine),
        value,
        rotate_wide(value),
    )
    real = valid[:, None, :, None]
    found = {}
    for name, x in zip(FORMS, forms, strict=True):
        size = torch.where(real, x.abs().double(), 0.0)
        found[name] = size.amax((0, 2)).cpu(), (size.sum((0, 2)) / valid.sum()).cpu()
    return found
