"""attend(q, key, value): scaled dot-product attention over a packed cache; no 16-bit copy outlives the call.

q            [B, Hq, q, D]   floating, rotated as the keys are, or with rotate=True as the model made it; Hq is a
                             multiple of the cache's H (GQA, MQA)
key, value   buffers of one packed tensor each (kernels/layout.py); layouts may differ
length       int or None     T, tokens that attention sees; None: as many as the key cache holds, read on the device
fresh_key, fresh_value  [B, H, q, D] and at [q]: this step's tokens and the consecutive positions that they take. They
             are read at full precision. Of the cache only positions before at[0] are read, and nothing after at[-1]: so
             append may have written the tokens already or not, and what a crop left at later positions is ignored
mask         None, or bool / float broadcastable to [B, Hq, q, T], as torch's scaled_dot_product_attention takes it;
             where length is None it may have more columns. Under a mask, positions that nothing was written to are not
             seen
scale        None for 1/sqrt(D);  is_causal  as torch's (aligned to the top left)
rotate       queries come as the model made them, so the op rotates them where the keys' layout is rotated or affine
restore      the output leaves as the model made the values, so the op rotates it back where their layout is rotated
softcap      0.0 for none, else c: scores s become c * tanh(s / c) after their scale and before the mask (Gemma 2)
sinks        None, or [Hq]: a score of each query head that takes its share of softmax and has no value (gpt-oss)
->           [B, Hq, q, Dv]  q's dtype, in the values' stored space, or with restore=True as the model made them

The meaning is torch's own SDPA on the dequantized cache (`extended_attention` with softcap or sinks, which SDPA has
not) and, with restore=True, akvq::rotate after it: p (vH) H = p v.
A kernel may apply H to its float32 sums, before they are rounded to q's dtype. A kernel's `fused` names which of rotate
and restore it does in its own launch; this op does the others around it.
"""

from __future__ import annotations

import typing

import torch
import torch.nn.functional as F
from torch import Tensor

from akvq_fx.kernels.cache import named, read
from akvq_fx.kernels.choose import dispatch
from akvq_fx.kernels.layout import STATE_END, Layout
from akvq_fx.kernels.rotate import rotate_directly, rotate_queries_directly
from akvq_fx.kernels.simulate import squeezed

FASTER = {"cuda": ("attend_cuda", "attend_triton"), "cpu": ("attend_cpu",)}  # before the reference, by device


class AttendCall(typing.NamedTuple):
    """The op's arguments, as every implementation takes them: `attend(call)` and `refusal(call)`. Meaning: above.

    The op's schema is made of these names, types and defaults. In the op, layouts are text.
    """

    q: Tensor
    key: list[Tensor]
    value: list[Tensor]
    length: int | None
    mask: Tensor | None
    scale: float | None
    is_causal: bool
    fresh_key: Tensor | None
    fresh_value: Tensor | None
    at: Tensor | None
    key_layout: Layout
    value_layout: Layout
    rotate: bool = False
    restore: bool = False
    softcap: float = 0.0
    sinks: Tensor | None = None

    @property
    def fresh(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and positions of this step's tokens; None where there are none."""
        return None if self.at is None or not self.at.shape[0] else (self.fresh_key, self.fresh_value, self.at)

    @classmethod
    def of_op(cls, *arguments) -> AttendCall:
        """What the op was called with. Raises ValueError where q does not fit the cache, or the keys are no keys."""
        key_layout, value_layout = map(Layout.parse, arguments[10:12])
        call = cls(*arguments[:10], key_layout, value_layout, *arguments[12:])
        check(call)
        return call


SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    int | None: "SymInt?",
    float | None: "float?",
    float: "float",
    bool: "bool",
    Layout: "str",
}


def schema() -> str:
    """The op's schema, in PyTorch's notation."""
    defaults = {name: f"={default}" for name, default in AttendCall._field_defaults.items()}
    hints = typing.get_type_hints(AttendCall)
    arguments = [f"{SCHEMA_TYPES[hints[name]]} {name}{defaults.get(name, '')}" for name in AttendCall._fields]
    return f"({', '.join(arguments)}) -> Tensor"


def reference(call: AttendCall) -> Tensor:
    """The op but for rotate and restore, which it does around this."""
    q, key, value, length, mask, scale, is_causal, *_, key_layout, value_layout = call[:12]
    fresh, b = call.fresh, named(key, key_layout)
    end = b["state"][STATE_END] if fresh is None else fresh[2][-1] + 1
    if length is None and key_layout.lossless and value_layout.lossless:
        # nothing is dequantized, so all of the capacity may be read, and its length stays on the device
        length = b["codes"].shape[2] if mask is None else min(b["codes"].shape[2], mask.shape[-1])
        mask = torch.ones(1, length, dtype=torch.bool, device=q.device) if mask is None else mask
    length = int(end) if length is None else length
    if mask is None and fresh is not None and not is_causal:
        mask = torch.ones(1, length, dtype=torch.bool, device=q.device)
    if mask is not None:
        mask = mask[..., :length]
        written = torch.arange(mask.shape[-1], device=mask.device) < end
        mask = mask & written if mask.dtype == torch.bool else mask.masked_fill(~written, -torch.inf)
    past = past_of(q, b["state"][STATE_END], fresh) if key_layout.simulate or value_layout.simulate else None
    k, v = read(key, length, key_layout, past), read(value, length, value_layout, past)
    if fresh is not None:
        fresh_key, fresh_value, at = fresh
        k, v = k.index_copy(2, at, fresh_key.to(k.dtype)), v.index_copy(2, at, fresh_value.to(v.dtype))
    if key_layout.simulate:
        mask, is_causal = squeezed(q, k, b, key_layout, past, mask, scale, is_causal, call.softcap)
    k, v = k.to(q.dtype), v.to(q.dtype)
    if call.softcap or call.sinks is not None:
        if is_causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        return extended_attention(q, k, v, mask, scale, softcap=call.softcap, sinks=call.sinks)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=is_causal, enable_gqa=gqa)


def extended_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention with two arguments that it has not.

    softcap  0.0 for none, else softcap * tanh(scores / softcap) takes the place of scores, before the mask. Source:
             Gemma 2, arXiv 2408.00118
    sinks    None, or [Hq]: one more score of each query head in its softmax, dropped after it. Source: gpt-oss,
             arXiv 2508.10925; StreamingLLM, arXiv 2309.17453, has the name

    query [B, Hq, q, D], key and value [B, H, T, D], Hq a multiple of H -> [B, Hq, q, Dv] in the query's dtype. As
    there, a row that sees nothing is 0.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    share = query.shape[1] // key.shape[1]
    keys, values = (x.to(wide).repeat_interleave(share, 1) for x in (key, value))
    scores = query.to(wide) @ keys.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None:
        shown = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if shown else scores + attn_mask
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        beside = sinks.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, beside], -1).softmax(-1)[..., :-1]
    return (weights.masked_fill(unseen, 0.0) @ values).to(query.dtype)


def past_of(q: Tensor, end: Tensor, fresh) -> int:
    """Tokens cached before this call: a simulation quantizes no token in the step that brings it.

    A prompt that attends to its own packed tokens (prefill="quantized") has no fresh ones and reads all quantized.
    """
    if fresh is not None:
        return min(int(end), int(fresh[2][0]))
    return int(end) - 1 if q.shape[2] == 1 else int(end)


@torch.library.custom_op("akvq::attend", mutates_args=(), schema=schema())
def attend(*arguments):
    call = AttendCall.of_op(*arguments)
    if call.restore and not call.value_layout.rotated:
        call = call._replace(restore=False)

    def run(kernel) -> Tensor:
        fused = () if kernel is None else kernel.fused
        asked = call
        if call.rotate and "rotate" not in fused:
            asked = asked._replace(q=rotate_query(call.q, call.key, call.key_layout), rotate=False)
        after = call.restore and "restore" not in fused
        if after:
            asked = asked._replace(restore=False)
        out = reference(asked) if kernel is None else kernel(asked)
        if after:
            return rotate_directly(out)
        return out if kernel is not None else out.clone(memory_format=torch.contiguous_format)

    return dispatch(run, "attend", FASTER.get(call.q.device.type, ()), call)


@attend.register_fake
def _(*arguments):
    call = AttendCall.of_op(*arguments)
    return call.q.new_empty((*call.q.shape[:3], call.value_layout.head_dim))


def rotate_query(q: Tensor, key: list[Tensor], layout: Layout) -> Tensor:
    """Queries as the model made them -> as the stored keys are asked."""
    if layout.affine:
        return rotate_queries_directly(q, named(key, layout)["affine"])
    return rotate_directly(q) if layout.rotated else q


def check(call: AttendCall) -> None:
    """Raises ValueError where q does not fit the cache, or the keys are no keys."""
    q, key_layout = call.q, call.key_layout
    if key_layout.shares_classes:
        raise ValueError(
            f"akvq::attend: the keys' layout is {key_layout}, accepted: keys that hold their tokens' classes"
        )
    heads = named(call.key, key_layout)["codes"].shape[1]
    named(call.value, call.value_layout)
    if q.dim() != 4 or q.shape[3] != key_layout.head_dim or q.shape[1] % heads:
        raise ValueError(
            f"akvq::attend: q is {list(q.shape)}, accepted: [B, Hq, q, {key_layout.head_dim}] "
            f"with Hq a multiple of {heads}"
        )
    if call.sinks is not None and call.sinks.shape != q.shape[1:2]:
        raise ValueError(f"akvq::attend: sinks are {list(call.sinks.shape)}, accepted: [{q.shape[1]}]")
