"""Tiny decoders in plain torch, one class per spelling of a cache; each docstring says what the backend must do.

A spelling overrides one step of `Attention`, so a mix of spellings is a class that inherits several: see `mixed`.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import akvq_fx
from akvq_fx.backend import akvq, rewrite
from akvq_fx.config import AKVQConfig

VOCABULARY, WIDTH = 64, 32


class Attention(nn.Module):
    """cat([past, new], dim=-2) from a 4-d empty start, half RoPE, x[:, :, None].expand().reshape(): packed."""

    heads, kv_heads, dim = 4, 2, 16
    bias = False

    def __init__(self):
        super().__init__()
        q, kv = self.heads * self.dim, self.kv_heads * self.dim
        self.make_projections(q, kv)
        self.o_proj = nn.Linear(q, WIDTH, bias=self.bias)

    def make_projections(self, q: int, kv: int):
        self.q_proj = nn.Linear(WIDTH, q, bias=self.bias)
        self.k_proj = nn.Linear(WIDTH, kv, bias=self.bias)
        self.v_proj = nn.Linear(WIDTH, kv, bias=self.bias)

    def project(self, x):
        return (
            self.split_heads(self.q_proj(x), self.heads),
            self.split_heads(self.k_proj(x), self.kv_heads),
            self.split_heads(self.v_proj(x), self.kv_heads),
        )

    def split_heads(self, x, count):
        return x.view(x.shape[0], x.shape[1], count, self.dim).transpose(1, 2)

    def norm_before(self, x):
        return x

    def norm_after(self, x):
        return x

    def rope(self, x, at):
        cos, sin = angles(at, x.shape[-1], x.dtype)
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        first, second = x.chunk(2, -1)
        return x * cos[None, None] + torch.cat((-second, first), dim=-1) * sin[None, None]

    def start(self, x):
        return torch.empty(x.shape[0], self.kv_heads, 0, self.dim, dtype=x.dtype)

    def write(self, past, k, v, at):
        past = (self.start(k), self.start(v)) if past is None else past
        k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
        return k, v, (k, v)

    def group(self, x):
        if self.heads == self.kv_heads:
            return x
        B, H, T, D = x.shape
        return x[:, :, None].expand(B, H, self.heads // H, T, D).reshape(B, self.heads, T, D)

    def mask(self, at, total, padding, past, dtype):
        """None where torch's is_causal is enough, else bool."""
        if padding is None and (past is None or at.shape[0] == 1):
            return None
        return seen(at, total, padding)

    def attend(self, q, k, v, mask):
        causal = whole_prompt(q, mask)
        return F.scaled_dot_product_attention(q, self.group(k), self.group(v), attn_mask=mask, is_causal=causal)

    def merge_heads(self, y):
        return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)

    def output(self, y, x):
        return self.o_proj(self.merge_heads(y))

    def forward(self, x, past, at, total, padding):
        q, k, v = self.project(x)
        q, k = self.norm_before(q), self.norm_before(k)
        q, k = self.rope(q, at), self.rope(k, at)
        q, k = self.norm_after(q), self.norm_after(k)
        mask = self.mask(at, total, padding, past, x.dtype)
        k, v, kept = self.write(past, k, v, at)
        return self.output(self.attend(q, k, v, mask), x), kept


def whole_prompt(q: Tensor, mask: Tensor | None) -> bool:
    """is_causal of an attention call, as a plain bool: attention does not take a symbolic one."""
    if q.shape[2] == 1:
        return False
    return mask is None


def angles(at: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin [T, dim/2]."""
    frequency = 100.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = at[:, None].double() * frequency[None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def seen(at: Tensor, total, padding: Tensor | None) -> Tensor:
    """[B or 1, 1, q, total] bool: causal, and where padding [B, total] is True; a token always sees itself."""
    columns = torch.arange(total, device=at.device)
    mask = (columns[None] <= at[:, None])[None, None]
    if padding is None:
        return mask
    return mask & padding[:, None, None] | (columns[None] == at[:, None])[None, None]


# how the cache is written


class CatTuple(Attention):
    """cat((past, new), dim=2): packed."""

    def write(self, past, k, v, at):
        past = (self.start(k), self.start(v)) if past is None else past
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        return k, v, (k, v)


class Concat(Attention):
    """torch.concat under its other name: packed."""

    def write(self, past, k, v, at):
        past = (self.start(k), self.start(v)) if past is None else past
        k, v = torch.concat([past[0], k], dim=2), torch.concat([past[1], v], dim=-2)
        return k, v, (k, v)


class FlatStart(Attention):
    """The first prompt is cat([tensor([]), new]), a 1-d empty start: packed."""

    def start(self, x):
        return torch.tensor([], dtype=x.dtype)


class Direct(Attention):
    """The first prompt's keys are returned as they are, no cat: packed."""

    def write(self, past, k, v, at):
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        return k, v, (k, v)


class StaticIndexCopy(Attention):
    """zeros allocated in the prompt's graph, index_copy_ at tensor positions: packed, attention needs a mask."""

    slots = 16

    def write(self, past, k, v, at):
        if past is None:
            shape = (k.shape[0], self.kv_heads, self.slots, self.dim)
            past = torch.zeros(shape, dtype=k.dtype), torch.zeros(shape, dtype=v.dtype)
        self.put(past[0], at, k)
        self.put(past[1], at, v)
        return past[0], past[1], past

    def put(self, cache, at, new):
        cache.index_copy_(2, at, new)

    def mask(self, at, total, padding, past, dtype):
        return seen(at, total, padding)

    def forward(self, x, past, at, total, padding):
        return super().forward(x, past, at, self.slots, padding)


class StaticSetItem(StaticIndexCopy):
    """zeros allocated in the prompt's graph, x[:, :, at] = new: packed."""

    def put(self, cache, at, new):
        cache[:, :, at] = new


class StaticScatter(StaticIndexCopy):
    """zeros allocated in the prompt's graph, scatter_ at positions expanded to the size of the tokens: packed."""

    def put(self, cache, at, new):
        cache.scatter_(2, at[None, None, :, None].expand(new.shape), new)


class StaticScatterApart(StaticIndexCopy):
    """scatter_ at positions that differ between channels: another computation, left alone."""

    def put(self, cache, at, new):
        cache.scatter_(2, at.view(1, 1, -1, 1) + torch.zeros(new.shape, dtype=at.dtype), new)


# grouped queries


class UnsqueezeFlatten(Attention):
    """unsqueeze(2).expand().flatten(1, 2): packed."""

    def group(self, x):
        return x.unsqueeze(2).expand(-1, -1, self.heads // self.kv_heads, -1, -1).flatten(1, 2)


class Interleave(Attention):
    """repeat_interleave(n, dim=1): packed."""

    def group(self, x):
        return x.repeat_interleave(self.heads // self.kv_heads, dim=1)


class EnableGqa(Attention):
    """enable_gqa=True, nothing expanded: packed."""

    def attend(self, q, k, v, mask):
        causal = whole_prompt(q, mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


class Mqa(Attention):
    """One KV head, broadcast by attention itself: packed."""

    kv_heads = 1

    def group(self, x):
        return x


class Mha(Attention):
    """As many KV heads as query heads: packed."""

    kv_heads = 4


# masks


class BoolMask(Attention):
    """A bool mask made in the graph, every step: packed."""

    def mask(self, at, total, padding, past, dtype):
        return seen(at, total, padding)


class FloatMask(Attention):
    """An additive mask: packed."""

    def mask(self, at, total, padding, past, dtype):
        lowest = torch.finfo(dtype).min
        return torch.zeros((), dtype=dtype).masked_fill(~seen(at, total, padding), lowest)


class PerHeadMask(Attention):
    """An additive mask that differs by head (linear biases): packed."""

    def mask(self, at, total, padding, past, dtype):
        distance = (at[:, None] - torch.arange(total)[None]).to(dtype)
        slope = 2.0 ** -torch.arange(1, self.heads + 1).to(dtype)
        bias = -slope[None, :, None, None] * distance[None, None]
        return bias.masked_fill(~seen(at, total, padding), torch.finfo(dtype).min)


class QueryMask(Attention):
    """A bool mask [q, T], as hand-written models have it: packed."""

    def mask(self, at, total, padding, past, dtype):
        return seen(at, total, padding)[0, 0]


class FloatQueryMask(FloatMask):
    """An additive mask [q, T]: packed."""

    def mask(self, at, total, padding, past, dtype):
        return super().mask(at, total, padding, past, dtype)[0, 0]


class HeadQueryMask(PerHeadMask):
    """An additive mask [H, q, T]: packed."""

    def mask(self, at, total, padding, past, dtype):
        return super().mask(at, total, padding, past, dtype)[0]


class TokenMask(Attention):
    """A mask of tokens [1, T] in steps, [1, q, T] in the prompt: packed."""

    def mask(self, at, total, padding, past, dtype):
        mask = seen(at, total, padding)[0]
        return mask if at.shape[0] > 1 else mask[0]


# attention written out


class WrittenOut(Attention):
    """q @ k.mT, a scale, a mask, softmax, @ v: packed. Subclasses spell these steps in other ways."""

    def mask(self, at, total, padding, past, dtype):
        return seen(at, total, padding)

    def attend(self, q, k, v, mask):
        return self.weigh(self.normalize(self.hide(self.score(q, k), mask), q), v)

    def score(self, q, k):
        return q @ self.group(k).transpose(-1, -2) * self.dim**-0.5

    def hide(self, scores, mask):
        if mask is None:
            return scores
        return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask

    def normalize(self, scores, q):
        return scores.softmax(-1)

    def weigh(self, weights, v):
        return weights @ self.group(v)


class EagerSoftmax(WrittenOut):
    """matmul times a number, plus a mask of -1e9 [q, T] in the prompt, none in steps: packed."""

    def mask(self, at, total, padding, past, dtype):
        return None

    def hide(self, scores, mask):
        queries, tokens = scores.shape[-2:]
        if queries == 1:
            return scores
        return scores + torch.full((queries, tokens), -1e9).triu(tokens - queries + 1)


class WrittenSinglePrecision(WrittenOut):
    """q scaled beforehand, an additive finfo.min, softmax(dtype=float32) and back, dropout that is off: packed."""

    def score(self, q, k):
        return torch.matmul(q / self.dim**0.5, self.group(k).mT)

    def hide(self, scores, mask):
        lowest = torch.finfo(scores.dtype).min
        return scores + torch.zeros((), dtype=scores.dtype).masked_fill(~mask, lowest)

    def normalize(self, scores, q):
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return F.dropout(weights, p=0.0, training=self.training)


class WrittenEinsum(WrittenOut):
    """einsum with the keys first, where(mask, scores, finfo.min), the output as [B, q, H, D]: packed."""

    def score(self, q, k):
        return torch.einsum("bhkd,bhqd->bhqk", self.group(k), q) / torch.tensor(self.dim).sqrt()

    def hide(self, scores, mask):
        return torch.where(mask, scores, torch.finfo(scores.dtype).min)

    def weigh(self, weights, v):
        return torch.einsum("bhqk,bhkd->bqhd", weights, self.group(v)).transpose(1, 2)


class WrittenGrouped(WrittenOut):
    """Grouped queries by a 5-d einsum, nothing expanded: packed."""

    def score(self, q, k):
        q = q.view(q.shape[0], self.kv_heads, -1, *q.shape[2:]) * self.dim**-0.5
        return torch.einsum("bgrqd,bgkd->bgrqk", q, k)

    def hide(self, scores, mask):
        return scores.masked_fill(~mask[:, :, None], -1e9)

    def weigh(self, weights, v):
        return torch.einsum("...grqk,...gkd->...grqd", weights, v).flatten(1, 2)


class WrittenBroadcast(WrittenGrouped):
    """Grouped queries by a 5-d matmul that broadcasts the keys: packed."""

    def score(self, q, k):
        q = q.unflatten(1, (self.kv_heads, self.heads // self.kv_heads))
        return torch.matmul(q, k.unsqueeze(2).transpose(3, 4)).mul(self.dim**-0.5)

    def weigh(self, weights, v):
        return (weights @ v[:, :, None]).flatten(1, 2)


class WrittenFolded(WrittenOut):
    """Batch and heads in one axis, bmm, the mask added to a 4-d view: packed."""

    def score(self, q, k):
        k = self.group(k).flatten(0, 1)
        return torch.bmm(q.reshape(-1, *q.shape[2:]), k.transpose(1, 2)).unflatten(0, (-1, self.heads))

    def hide(self, scores, mask):
        return (scores * self.dim**-0.5).masked_fill(~mask, torch.finfo(scores.dtype).min).flatten(0, 1)

    def weigh(self, weights, v):
        return torch.bmm(weights, self.group(v).flatten(0, 1)).unflatten(0, (-1, self.heads))


class WrittenBaddbmm(WrittenOut):
    """Linear biases [B * H, 1, T] and the product in one baddbmm: packed."""

    def attend(self, q, k, v, mask):
        bias = torch.arange(k.shape[2]) * 2.0 ** -torch.arange(1, self.heads + 1)[:, None]
        bias = bias[None, :, None].expand(q.shape[0], -1, -1, -1).flatten(0, 1).to(q.dtype)
        k, v = self.group(k).flatten(0, 1), self.group(v).flatten(0, 1)
        scores = bias.baddbmm(batch1=q.flatten(0, 1), batch2=k.mT, beta=1.0, alpha=self.dim**-0.5)
        scores = scores.view(q.shape[0], self.heads, q.shape[2], -1)
        lowest = torch.finfo(q.dtype).min
        scores = scores + torch.zeros((), dtype=q.dtype).masked_fill(~mask, lowest)
        return torch.bmm(scores.softmax(-1).flatten(0, 1), v).view(q.shape)


class WrittenKeysFirst(WrittenOut):
    """k @ q.mT, so softmax goes over the last axis but one: packed."""

    def score(self, q, k):
        return self.group(k) @ (q * self.dim**-0.5).mT

    def hide(self, scores, mask):
        return scores.masked_fill(~mask.mT, -torch.inf)

    def normalize(self, scores, q):
        return scores.softmax(dim=-2)

    def weigh(self, weights, v):
        return weights.mT @ self.group(v)


class WrittenInPlace(WrittenOut):
    """Scores scaled, biased and masked in place: packed."""

    def score(self, q, k):
        scores = q @ self.group(k).mT
        scores *= self.dim**-0.5
        return scores

    def hide(self, scores, mask):
        scores += 0.01 * torch.arange(scores.shape[-1])
        scores.masked_fill_(~mask, -torch.inf)
        return scores


class WrittenMaximum(WrittenOut):
    """The largest score is taken off before softmax: packed."""

    def normalize(self, scores, q):
        return torch.softmax(scores - scores.max(dim=-1, keepdim=True).values, dim=-1)


class WrittenQueryMask(WrittenOut):
    """masked_fill with a mask [q, T]: packed."""

    def mask(self, at, total, padding, past, dtype):
        return seen(at, total, padding)[0, 0]


class WrittenStatic(WrittenOut, StaticIndexCopy):
    """Written out over a static cache: packed."""


class Softcap(WrittenOut):
    """Scores divided by a number, tanh, times the number, then the mask: packed."""

    def hide(self, scores, mask):
        return super().hide(1.5 * torch.tanh(scores / 1.5), mask)


class SoftcapInPlace(WrittenInPlace):
    """The same in place, and the scale within the cap: packed."""

    def score(self, q, k):
        scores = q @ self.group(k).mT
        scores *= self.dim**-0.5 / 1.5
        scores.tanh_()
        scores *= 1.5
        return scores


class SoftcapGrouped(WrittenGrouped):
    """Grouped queries, whose scores are capped in single precision: packed."""

    def hide(self, scores, mask):
        return super().hide((scores.float() * (1 / 1.5)).tanh().mul(1.5).to(scores.dtype), mask)


class SoftcapStatic(Softcap, StaticIndexCopy):
    """Capped over a static cache: packed."""


class Sink(WrittenOut):
    """A learned logit of each head stands behind the scores in their softmax: packed."""

    def __init__(self):
        super().__init__()
        self.sink = nn.Parameter(torch.randn(self.heads))

    def normalize(self, scores, q):
        sink = self.sink.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


class SinkFirst(Sink):
    """It stands before the scores, whose maximum is taken off, and whose softmax is in single precision: packed."""

    def normalize(self, scores, q):
        sink = self.sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        both = torch.cat((sink, scores), 3)
        both = both - both.max(dim=-1, keepdim=True).values
        weights = F.softmax(both, dim=-1, dtype=torch.float32)[:, :, :, 1:]
        return F.dropout(weights, 0.0, training=self.training).to(q.dtype)


class SinkGrouped(Sink, SoftcapGrouped):
    """Sinks [KV heads, query heads of each] beside grouped scores that are capped: packed."""

    def normalize(self, scores, q):
        sink = self.sink.view(self.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


class SinkStatic(Sink, StaticIndexCopy):
    """Sinks over a static cache: packed."""


# axes of the cache


class TokensFirst(Attention):
    """The cache is [B, T, H, D], transposed for attention: packed, with these axes."""

    tokens = 1

    def write(self, past, k, v, at):
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = (torch.cat([old, new], dim=1) for old, new in zip(past, (k, v), strict=True))
        return k.transpose(1, 2), v.transpose(1, 2), (k, v)


class TokensFirstStart(TokensFirst):
    """[B, T, H, D] from an empty start, heads repeated before they are transposed: packed."""

    def write(self, past, k, v, at):
        empty = torch.empty(k.shape[0], 0, self.kv_heads, self.dim, dtype=k.dtype)
        k, v, kept = super().write((empty, empty) if past is None else past, k, v, at)
        repeat = lambda x: x.repeat_interleave(self.heads // self.kv_heads, dim=2).transpose(1, 2)
        return repeat(kept[0]), repeat(kept[1]), kept

    def group(self, x):
        return x


class TokensFirstEinsum(TokensFirst, WrittenOut):
    """[B, T, H, D], read by einsum as it is: packed."""

    def write(self, past, k, v, at):
        _, _, kept = super().write(past, k, v, at)
        return *(x[:, :, :, None].expand(-1, -1, -1, self.heads // self.kv_heads, -1).flatten(2, 3) for x in kept), kept

    def score(self, q, k):
        return torch.einsum("bthd,bshd->bhts", q.transpose(1, 2), k) * self.dim**-0.5

    def weigh(self, weights, v):
        return torch.einsum("bhts,bshd->bthd", weights, v).transpose(1, 2)


class GrowsTransposed(Attention):
    """The past [B, T, H, D] is transposed, grows, and is transposed back: packed, with these axes."""

    tokens = 1

    def write(self, past, k, v, at):
        if past is not None:
            k, v = (torch.cat([old.transpose(1, 2), new], dim=2) for old, new in zip(past, (k, v), strict=True))
        return k, v, (k.transpose(1, 2), v.transpose(1, 2))


class FlatHeads(Attention):
    """The cache is [B, T, H * D]: packed, with these axes."""

    tokens = 1

    def write(self, past, k, v, at):
        k, v = self.merge_heads(k), self.merge_heads(v)
        if past is not None:
            k, v = (torch.cat([old, new], dim=1) for old, new in zip(past, (k, v), strict=True))
        return self.split_heads(k, self.kv_heads), self.split_heads(v, self.kv_heads), (k, v)


class FlatMqa(FlatHeads):
    """One KV head in a cache [B, T, D]: packed."""

    kv_heads = 1

    def group(self, x):
        return x


class FlatExpanded(FlatMqa):
    """One KV head in a cache [B, T, D], expanded to all query heads: packed."""

    def group(self, x):
        return x.expand(-1, self.heads, -1, -1)


class FlatWritten(FlatHeads, WrittenOut):
    """[B, T, H * D], written out: packed."""


class TimeFirst(WrittenOut):
    """The cache is [T, B, H, D], read by einsum: packed, with these axes."""

    tokens = 0

    def write(self, past, k, v, at):
        k, v = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
        if past is not None:
            k, v = (torch.cat([old, new], dim=0) for old, new in zip(past, (k, v), strict=True))
        return k, v, (k, v)

    def score(self, q, k):
        q = q.unflatten(1, (self.kv_heads, -1))
        return torch.einsum("bgrqd,kbgd->bgrqk", q, k).flatten(1, 2) * self.dim**-0.5

    def weigh(self, weights, v):
        return torch.einsum("bgrqk,kbgd->bgrqd", weights.unflatten(1, (self.kv_heads, -1)), v).flatten(1, 2)


class ChannelsFirst(WrittenOut):
    """Keys are [B, H, D, T] and values [B, H, T, D]: packed, each with its own axes."""

    tokens = 3

    def write(self, past, k, v, at):
        k = k.transpose(2, 3)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=-1), torch.cat([past[1], v], dim=2)
        return k, v, (k, v)

    def score(self, q, k):
        return q @ self.group(k) * self.dim**-0.5


# rotary embeddings


class RopeInterleaved(Attention):
    """Pairs x[..., ::2], x[..., 1::2], stacked and flattened: packed."""

    def rope(self, x, at):
        cos, sin = angles(at, x.shape[-1], x.dtype)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class RopePartial(Attention):
    """Half RoPE on half of the head, cat with the rest: packed."""

    def rope(self, x, at):
        half = self.dim // 2
        return torch.cat([super().rope(x[..., :half], at), x[..., half:]], dim=-1)


class RopeComplex(Attention):
    """view_as_complex times a unit complex number: packed."""

    def rope(self, x, at):
        cos, sin = angles(at, x.shape[-1], x.dtype)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        rotated = pairs * torch.complex(cos, sin)[None, None]
        return torch.view_as_real(rotated).flatten(3).type_as(x)


class DirectComplex(RopeComplex, Direct):
    """The keys that are returned are a cast of attention's to the dtype that these have: packed."""


class NoRope(Attention):
    """Keys as projected: packed."""

    def rope(self, x, at):
        return x


class NormBefore(Attention):
    """Root-mean-square norm of queries and keys before RoPE: packed."""

    def norm_before(self, x):
        return root_mean_square(x)


class NormAfter(Attention):
    """Root-mean-square norm after RoPE: packed, as the rotation stands after both."""

    def norm_after(self, x):
        return root_mean_square(x)


def root_mean_square(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


# keys and values in one tensor


class Stacked(Attention):
    """Keys and values are one tensor [2, B, H, T, D], grown by cat and read as x[0], x[1]: packed, each by itself."""

    tokens = 3

    def join(self, k, v):
        return torch.stack([k, v])

    def part(self, both):
        return both[0], both[1]

    def write(self, past, k, v, at):
        both = self.join(k, v)
        if past is not None:
            both = torch.cat([past[0], both], dim=self.tokens)
        return *self.part(both), (both,)


class StackedFromEmpty(Stacked):
    """[2, B, H, T, D], grown from an empty tensor: packed."""

    def write(self, past, k, v, at):
        empty = torch.empty(2, k.shape[0], self.kv_heads, 0, self.dim)
        return super().write((empty,) if past is None else past, k, v, at)


class StackedBehindRows(Stacked):
    """[B, 2, H, T, D], read by unbind: packed."""

    def join(self, k, v):
        return torch.stack((k, v), dim=1)

    def part(self, both):
        return both.unbind(dim=1)


class StackedBeforeHeads(Stacked):
    """[B, T, 2, H, D], as flash-attn has it: packed."""

    tokens = 1

    def join(self, k, v):
        return torch.stack([k.transpose(1, 2), v.transpose(1, 2)], dim=2)

    def part(self, both):
        return both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2)


class ProjectedTogether(NoRope, StackedBeforeHeads):
    """One linear makes [B, T, 2, H, D], which is the cache: packed."""

    def make_projections(self, q, kv):
        self.q_proj, self.kv_proj = nn.Linear(WIDTH, q, bias=self.bias), nn.Linear(WIDTH, 2 * kv, bias=self.bias)

    def project(self, x):
        both = self.kv_proj(x).view(*x.shape[:2], 2, self.kv_heads, self.dim)
        return self.split_heads(self.q_proj(x), self.heads), both, both

    def join(self, k, v):
        return k

    def part(self, both):
        return (x.transpose(1, 2) for x in both.unbind(2))


class Joined(Stacked):
    """[B, H, T, 2 * D], read by chunk: packed."""

    tokens = 2

    def join(self, k, v):
        return torch.cat([k, v], dim=-1)

    def part(self, both):
        return both.chunk(2, dim=-1)


class JoinedSlices(Joined):
    """[B, H, T, 2 * D], read as x[..., :D] and x[..., D:]: packed."""

    def part(self, both):
        return both[..., : self.dim], both[..., self.dim :]


class JoinedFlat(Stacked):
    """[B, T, 2 * H * D], read by split: packed."""

    tokens = 1

    def join(self, k, v):
        return torch.cat([self.merge_heads(k), self.merge_heads(v)], dim=-1)

    def part(self, both):
        return (self.split_heads(x, self.kv_heads) for x in both.split(self.kv_heads * self.dim, dim=-1))


class StackedWindow(Stacked):
    """[2, B, H, T, D], of which the last tokens are kept: packed."""

    def write(self, past, k, v, at):
        k, v, (both,) = super().write(past, k, v, at)
        return k, v, (both[:, :, :, -5:],)

    def mask(self, at, total, padding, past, dtype):
        if past is None:
            return seen(at, total, padding) & (torch.arange(total) > at[:, None] - 6)
        return torch.ones(at.shape[0], past[0].shape[3] + at.shape[0], dtype=torch.bool)


class StackedStatic(StaticIndexCopy):
    """zeros [2, B, H, T, D] allocated in the prompt's graph, x[0][:, :, at] = new: packed."""

    def write(self, past, k, v, at):
        if past is None:
            past = (torch.zeros(2, k.shape[0], self.kv_heads, self.slots, self.dim),)
        self.fill(past[0], k, v, at)
        return past[0][0], past[0][1], past

    def fill(self, both, k, v, at):
        both[0][:, :, at] = k
        both[1].index_copy_(2, at, v)


class StackedStaticAtOnce(StackedStatic):
    """zeros [2, B, H, T, D], x[:, :, :, at] = stack([k, v]): packed."""

    def fill(self, both, k, v, at):
        both[:, :, :, at] = torch.stack([k, v])


# left alone: keys and values in one tensor


class StackedDim12(Stacked):
    """[2, B, H, T, D] of a head dim that does not pack: left alone."""

    dim = 12


class StackedAnew(StackedStatic):
    """[2, B, H, T, D] that a step makes anew: left alone."""

    def write(self, past, k, v, at):
        if past is None:
            past = (torch.zeros(2, k.shape[0], self.kv_heads, self.slots, self.dim),)
        both = past[0].index_copy(3, at, torch.stack([k, v]))
        return both[0], both[1], (both,)


class StackedThreeWays(Stacked):
    """[3, B, H, T, D], the third of which no attention reads: left alone."""

    def join(self, k, v):
        return torch.stack([k, v, k * v])


# fused projections


class FusedSplit(Attention):
    """One linear, split into q, k, v: packed, values folded by rows."""

    def make_projections(self, q, kv):
        self.sizes = [q, kv, kv]
        self.qkv_proj = nn.Linear(WIDTH, q + 2 * kv, bias=self.bias)

    def project(self, x):
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        return self.split_heads(q, self.heads), self.split_heads(k, self.kv_heads), self.split_heads(v, self.kv_heads)


class FusedSlices(FusedSplit):
    """One linear, sliced with x[..., a:b]: packed, values folded by rows."""

    def project(self, x):
        y, (a, b) = self.qkv_proj(x), (self.sizes[0], self.sizes[0] + self.sizes[1])
        parts = (y[..., :a], self.heads), (y[..., a:b], self.kv_heads), (y[..., b:], self.kv_heads)
        return tuple(self.split_heads(part, count) for part, count in parts)


class FusedChunk(FusedSplit):
    """One linear, chunk(3): packed, values folded by rows."""

    kv_heads = 4

    def project(self, x):
        return tuple(self.split_heads(part, self.heads) for part in self.qkv_proj(x).chunk(3, dim=-1))


class FusedView(FusedSplit):
    """One linear, view per KV head, indexed on the last axis but one: packed, values folded by rows."""

    def project(self, x):
        B, T, _ = x.shape
        y = self.qkv_proj(x).view(B, T, self.kv_heads, self.heads // self.kv_heads + 2, self.dim)
        q = y[..., :-2, :].reshape(B, T, self.heads, self.dim)
        return q.transpose(1, 2), y[..., -2, :].transpose(1, 2), y[..., -1, :].transpose(1, 2)


# layouts of heads


class Unflatten(Attention):
    """unflatten and permute in, permute and flatten out: packed, folded."""

    def split_heads(self, x, count):
        return x.unflatten(-1, (count, self.dim)).permute(0, 2, 1, 3)

    def merge_heads(self, y):
        return y.permute(0, 2, 1, 3).contiguous().flatten(2)


class ChannelMajor(Attention):
    """Weights hold a head's channels apart, in and out: packed, folded through the permutation."""

    def split_heads(self, x, count):
        return x.reshape(x.shape[0], x.shape[1], self.dim, count).permute(0, 3, 1, 2)

    def merge_heads(self, y):
        return y.permute(0, 2, 3, 1).reshape(y.shape[0], y.shape[2], -1)


class Biased(Attention):
    """Every projection has a bias: packed, the value bias is folded too."""

    bias = True


# head dims


class Dim8(Attention):
    """The smallest head: packed."""

    dim = 8


class Dim24(Attention):
    """Not a power of two: packed, rotated in blocks of 8."""

    dim = 24


class Dim80(Attention):
    """Blocks of 16: packed."""

    dim = 80


# packed, but not folded


class Gated(Attention):
    """A gate between attention and the output projection: packed, the values rotate online."""

    def output(self, y, x):
        return self.o_proj(self.merge_heads(y) * torch.sigmoid(x.mean(-1, keepdim=True)))


class NormedOutput(Attention):
    """A norm between attention and the output projection: packed, the values rotate online."""

    def output(self, y, x):
        return self.o_proj(F.layer_norm(self.merge_heads(y), (self.heads * self.dim,)))


class TiedWeight(Attention):
    """The value weight is the key weight too: packed, the values rotate online."""

    def make_projections(self, q, kv):
        super().make_projections(q, kv)
        self.v_proj.weight = self.k_proj.weight


class SharedStorage(Attention):
    """The value weight is a slice of another parameter's memory: packed, the values rotate online."""

    def make_projections(self, q, kv):
        super().make_projections(q, kv)
        memory = torch.randn(2 * kv, WIDTH) * WIDTH**-0.5
        self.k_proj.weight, self.v_proj.weight = nn.Parameter(memory[:kv]), nn.Parameter(memory[kv:])


class UsedElsewhere(Attention):
    """The output weight feeds another linear of the graph: packed, the values rotate online."""

    def output(self, y, x):
        return super().output(y, x) + F.linear(self.q_proj(x).tanh(), self.o_proj.weight)


class OutputUsedTwice(Attention):
    """The attention output goes to the projection and past it: packed, the values rotate online."""

    def output(self, y, x):
        return super().output(y, x) + y.mean(dim=(1, 3))[..., None]


class ValueResidual(Attention):
    """The values' projection has another reader (a residual of values): packed, the values rotate online."""

    def project(self, x):
        q, k, self.values = super().project(x)
        return q, k, self.values

    def output(self, y, x):
        return super().output(y, x) + (self.values * 0.5).sum((1, 3))[..., None]


class FlatTokens(Attention):
    """Projections see [B * T, E]: packed, the values rotate online."""

    def project(self, x):
        B, T, _ = x.shape
        flat = x.reshape(B * T, -1)
        fold = lambda y, count: y.view(B, T, count, self.dim).transpose(1, 2)
        return (
            fold(self.q_proj(flat), self.heads),
            fold(self.k_proj(flat), self.kv_heads),
            fold(self.v_proj(flat), self.kv_heads),
        )


class FlatOutput(Attention):
    """The output projection sees [B * T, E]: packed, the values rotate online."""

    def output(self, y, x):
        return self.o_proj(self.merge_heads(y).reshape(-1, self.heads * self.dim)).view(x.shape)


class ScaledValues(Attention):
    """The values are scaled between their projection and the cache: packed, the values rotate online."""

    def project(self, x):
        q, k, v = super().project(x)
        return q, k, v * 0.5


class TransposedWeight(Attention):
    """x @ weight.T instead of a linear: packed, the values rotate online."""

    def project(self, x):
        q, k, _ = super().project(x)
        return q, k, self.split_heads(x @ self.v_proj.weight.T, self.kv_heads)


# sliding windows: attention sees a token and the reach - 1 before it


class WindowMask(Attention):
    """All tokens are kept, and those outside of the window are masked: packed."""

    reach = 4

    def mask(self, at, total, padding, past, dtype):
        column = torch.arange(total, device=at.device) + at[-1] + 1 - total
        mask = (column[None] <= at[:, None]) & (column[None] > at[:, None] - self.reach)
        return mask[None, None] if padding is None else mask[None, None] & padding[:, None, None, -total:]


class SlidingSlice(WindowMask):
    """x[:, :, -n:] of what attention reads is kept, as DynamicSlidingWindowLayer of transformers does: packed."""

    def mask(self, at, total, padding, past, dtype):
        if at.shape[0] == 1 and padding is None:
            return None
        return super().mask(at, total, padding, past, dtype)

    def write(self, past, k, v, at):
        k, v, _ = super().write(past, k, v, at)
        return k, v, (self.last(k), self.last(v))

    def last(self, x):
        return x[:, :, -self.reach + 1 :, :]


class SlidingDirect(SlidingSlice):
    """The prompt's tokens go into the slice as they are: packed."""

    def write(self, past, k, v, at):
        if past is None:
            return k, v, (self.last(k), self.last(v))
        return super().write(past, k, v, at)


class SlidingNarrow(SlidingSlice):
    """torch.narrow, and a copy of it: packed."""

    def last(self, x):
        count = min(x.shape[2], self.reach - 1)
        return torch.narrow(x, 2, x.shape[2] - count, count).contiguous()


class SlidingStart(SlidingSlice):
    """A slice from a position that is counted from the front: packed."""

    def last(self, x):
        return x[..., max(0, x.shape[2] - self.reach + 1) :, :]


class SlidingReadsLast(SlidingSlice):
    """Attention reads the last tokens, and these are kept: packed."""

    def mask(self, at, total, padding, past, dtype):
        if at.shape[0] == 1:
            return None
        return super().mask(at, total, padding, past, dtype)[..., -self.reach :]

    def write(self, past, k, v, at):
        k, v, _ = Attention.write(self, past, k, v, at)
        k, v = k[:, :, -self.reach :], v[:, :, -self.reach :]
        return k, v, (k, v)


class SlidingOneColumn(SlidingSlice):
    """A step's mask is broadcast along the tokens: packed."""

    def mask(self, at, total, padding, past, dtype):
        if at.shape[0] == 1:
            return torch.zeros(1, 1, 1, 1, dtype=dtype)
        return super().mask(at, total, padding, past, dtype)


# left at 16 bits


class MiddleSlice(Attention):
    """The cache keeps neither all nor the last tokens of what attention reads: left alone."""

    def write(self, past, k, v, at):
        k, v, _ = super().write(past, k, v, at)
        return k, v, (k[:, :, -4:-1], v[:, :, -4:-1])

    def mask(self, at, total, padding, past, dtype):
        return None if past is None else torch.ones(at.shape[0], past[0].shape[2] + at.shape[0], dtype=torch.bool)


class WeightsUsed(WrittenOut):
    """Attention weights have another reader: left alone."""

    def weigh(self, weights, v):
        return super().weigh(weights, v) + weights.mean(-1, keepdim=True)


class WeakMask(WrittenOut):
    """Masked scores are set to -50, which leaves them some weight: left alone."""

    def hide(self, scores, mask):
        return scores.masked_fill(~mask, -50.0)


class WrittenDropout(WrittenOut):
    """Attention weights are dropped: left alone."""

    def normalize(self, scores, q):
        return F.dropout(scores.softmax(-1), 0.5)


class Latent(Attention):
    """Keys and values are made from the cache by a linear: left alone."""

    kv_heads = 1

    def __init__(self):
        super().__init__()
        self.up_k = nn.Linear(self.dim, self.dim, bias=False)
        self.up_v = nn.Linear(self.dim, self.dim, bias=False)

    def group(self, x):
        return x

    def attend(self, q, k, v, mask):
        return super().attend(q, self.up_k(k), self.up_v(v), mask)


class Dropout(Attention):
    """dropout_p > 0: left alone."""

    def attend(self, q, k, v, mask):
        causal = whole_prompt(q, mask)
        return F.scaled_dot_product_attention(q, self.group(k), self.group(v), mask, dropout_p=0.5, is_causal=causal)


class Dim12(Attention):
    """A head dim that is no multiple of 8: left alone."""

    dim = 12


class IntegerCache(Attention):
    """The caller quantizes its cache already: left alone."""

    def write(self, past, k, v, at):
        k, v = ((x * 32).round().clamp(-127, 127).to(torch.int8) for x in (k, v))
        past = (k[:, :, :0], v[:, :, :0]) if past is None else past
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return k.float() / 32, v.float() / 32, (k, v)


class TiledRepeat(Attention):
    """repeat puts heads in tiled order 0 1 0 1, not 0 0 1 1: left alone."""

    def group(self, x):
        return x.repeat(1, self.heads // self.kv_heads, 1, 1)


class Buffers(StaticIndexCopy):
    """16-bit buffers that the module owns: packed in place behind the first step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(2, self.kv_heads, self.slots, self.dim))
        self.register_buffer("v_cache", torch.zeros(2, self.kv_heads, self.slots, self.dim))

    def write(self, past, k, v, at):
        self.k_cache[:, :, at] = k
        self.v_cache[:, :, at] = v
        return self.k_cache, self.v_cache, None


class RowSlices(Attention):
    """cache[:b, s:e] = k, attention reads cache[:b, :e] at numbers, as Llama's first code has it: packed."""

    slots, rows, by_number = 24, 3, True
    size = staticmethod(lambda rows, heads, slots, dim: (rows, slots, heads, dim))

    def __init__(self):
        super().__init__()
        for name in ("k_cache", "v_cache"):
            size = self.size(self.rows, self.kv_heads, self.slots, self.dim)
            self.register_buffer(name, torch.zeros(size), persistent=False)

    def forward(self, x, past, at, total, padding):
        q, k, v = self.project(x)
        q, k = self.rope(q, at), self.rope(k, at)
        first, count = total - x.shape[1], x.shape[1]
        k, v = (self.put(cache, new, first, total, at) for cache, new in ((self.k_cache, k), (self.v_cache, v)))
        mask = seen(at, total, None) if count > 1 else None
        return self.output(self.attend(q, k, v, mask), x), None

    def put(self, cache, new, first, end, at):
        cache[: len(new), first:end] = new.transpose(1, 2)
        return cache[: len(new), :end].transpose(1, 2)


class RowSlicesWritten(RowSlices, WrittenOut):
    """The same read by attention that is written out, heads repeated before they are moved: packed."""

    def put(self, cache, new, first, end, at):
        cache[: len(new), first:end] = new.transpose(1, 2)
        return cache[: len(new), :end]

    def group(self, x):
        B, T, H, D = x.shape
        return x[:, :, :, None].expand(B, T, H, self.heads // H, D).reshape(B, T, self.heads, D).transpose(1, 2)


class RowSlicesReassigned(RowSlices):
    """self.cache = self.cache.to(k) before each write: packed."""

    def put(self, cache, new, first, end, at):
        name = "k_cache" if cache is self.k_cache else "v_cache"
        setattr(self, name, getattr(self, name).to(new))
        return super().put(getattr(self, name), new, first, end, at)


class RowSlicesHeadsFirst(RowSlices):
    """cache[:b, :, s:e] of [B, H, T, D]: packed."""

    size = staticmethod(lambda rows, heads, slots, dim: (rows, heads, slots, dim))

    def put(self, cache, new, first, end, at):
        cache[: len(new), :, first:end] = new
        return cache[: len(new), :, :end]


class RowSlicesFlat(RowSlices):
    """cache[:b, s:e] of [B, T, H * D], written by copy_: packed."""

    size = staticmethod(lambda rows, heads, slots, dim: (rows, slots, heads * dim))

    def put(self, cache, new, first, end, at):
        cache[: len(new), first:end].copy_(new.transpose(1, 2).flatten(2))
        return cache[: len(new), :end].unflatten(2, (self.kv_heads, self.dim)).transpose(1, 2)


class RowViews(RowSlices):
    """The rows are a view, written and read by narrow: packed."""

    def put(self, cache, new, first, end, at):
        part = cache.narrow(0, 0, len(new))
        part.narrow(1, first, new.shape[2]).copy_(new.transpose(1, 2))
        return part[:, :end].transpose(1, 2)


class TokenSlices(RowSlices):
    """cache[:, :, s:e] = k of [B, H, T, D], all rows: packed."""

    rows, size = 2, staticmethod(RowSlicesHeadsFirst.size)

    def put(self, cache, new, first, end, at):
        cache[:, :, first:end] = new
        return cache[:, :, :end]


class PrefixOfPositions(TokenSlices):
    """index_copy_ at positions of a tensor, cache[:, :, :n] is read: packed."""

    def put(self, cache, new, first, end, at):
        cache.index_copy_(2, at, new)
        return cache[:, :, :end]


class PrefixOfRows(RowSlices):
    """cache[:b, at] = k at positions of a tensor, cache[:b, :n] is read: packed."""

    def put(self, cache, new, first, end, at):
        cache[: len(new), at] = new.transpose(1, 2)
        return cache[: len(new), :end].transpose(1, 2)


class SliceFromOne(RowSlices):
    """Attention does not see the first token: left alone."""

    def put(self, cache, new, first, end, at):
        cache[: len(new), first:end] = new.transpose(1, 2)
        return cache[: len(new), 1 : end + 1].transpose(1, 2)


class WrittenTwice(RowSlices):
    """Two writes a step: left alone."""

    def put(self, cache, new, first, end, at):
        cache[: len(new), first:end] = new.transpose(1, 2) * 2
        cache[: len(new), first:end] = new.transpose(1, 2)
        return cache[: len(new), :end].transpose(1, 2)


class ReadBefore(RowSlices):
    """What attention reads is copied before the write: left alone."""

    def put(self, cache, new, first, end, at):
        old = cache[: len(new), :end].clone()
        cache[: len(new), first:end] = new.transpose(1, 2)
        return old.transpose(1, 2)


class LastRows(RowSlices):
    """Not the first rows of the buffer: left alone."""

    def put(self, cache, new, first, end, at):
        cache[1 : len(new) + 1, first:end] = new.transpose(1, 2)
        return cache[1 : len(new) + 1, :end].transpose(1, 2)


class ChunkedValues(Attention):
    """Values reach attention through chunk and cat of the cache: left alone."""

    kv_heads = 4

    def attend(self, q, k, v, mask):
        first, second = v.chunk(2, dim=1)
        return super().attend(q, k, torch.cat((second, first), dim=1), mask)


class SwitchesToSine(WrittenOut):
    """The prompt is read by scaled_dot_product_attention, later tokens by their scores' sine: packed, then
    dequantized."""

    def hide(self, scores, mask):
        return super().hide(scores.sin(), mask)

    def attend(self, q, k, v, mask):
        return (Attention if q.shape[2] > 1 else WrittenOut).attend(self, q, k, v, mask)


class SwitchesToMiddle(Attention):
    """The whole prompt is kept, later steps keep a slice from its middle: packed, then dequantized."""

    def write(self, past, k, v, at):
        k, v, kept = super().write(past, k, v, at)
        return k, v, kept if past is None else (k[:, :, -4:-1], v[:, :, -4:-1])


class SwitchesToSliding(Attention):
    """The whole prompt is kept, later steps keep their last tokens: packed."""

    def write(self, past, k, v, at):
        k, v, kept = super().write(past, k, v, at)
        return k, v, kept if past is None else (k[:, :, -4:], v[:, :, -4:])


class ReferenceWindow(Attention):
    """The prompt stays, of later tokens the last three: the prompt is packed, then dequantized beside a plain cache."""

    def mask(self, at, total, padding, past, dtype):
        return None

    def write(self, past, k, v, at):
        if past is None:
            k, v, kept = super().write(None, k, v, at)
            return k, v, (*kept, self.start(k), self.start(v))
        late = [torch.cat([old, new], dim=2) for old, new in zip(past[2:], (k, v), strict=True)]
        k, v = (torch.cat([old, new], dim=2) for old, new in zip(past[:2], late, strict=True))
        return k, v, (*past[:2], *(x[:, :, -3:] for x in late))


class StaticSwitchesToSine(SwitchesToSine, StaticIndexCopy):
    """The same over a static cache."""


class SwitchesToRoll(StaticIndexCopy):
    """A static cache that a later step would roll: refused with what to do."""

    def write(self, past, k, v, at):
        if past is None:
            return super().write(past, k, v, at)
        for cache, new in zip(past, (k, v), strict=True):
            rolled = cache.roll(-1, dims=2)
            rolled[:, :, -1:] = new
            cache.copy_(rolled)
        return past[0], past[1], past


class Block(nn.Module):
    """Attention and a small MLP on a residual stream."""

    def __init__(self, attention: type[Attention]):
        super().__init__()
        self.attention = attention()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, past, at, total, padding):
        y, kept = self.attention(F.layer_norm(x, (WIDTH,)), past, at, total, padding)
        x = x + y
        return x + self.down(F.gelu(self.up(x))), kept


class Decoder(nn.Module):
    """Token ids in, logits out; the cache is a tuple of (keys, values), one pair a layer."""

    def __init__(self, attention: type[Attention] = Attention, layers: int = 1, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.layers = nn.ModuleList(Block(attention) for _ in range(layers))
            self.tokens = getattr(attention, "tokens", 2)
            self.head = nn.Linear(WIDTH, VOCABULARY)

    def start(self, tokens, cache, at):
        past = 0 if cache is None else cache[0][0].shape[self.tokens]
        count = tokens.shape[1]
        if isinstance(at, int):
            past, at = at, None
        return (torch.arange(past, past + count) if at is None else at), past + count

    def forward(self, tokens, cache=None, padding=None, at=None):
        at, total = self.start(tokens, cache, at)
        return self.run(self.embed(tokens), cache, at, total, padding)

    def run(self, x, cache, at, total, padding=None):
        kept = []
        for i, layer in enumerate(self.layers):
            x, pair = layer(x, None if cache is None else cache[i], at, total, padding)
            kept.append(pair)
        return self.head(x), None if kept[0] is None else tuple(kept)


class SharedDecoder(Decoder):
    """The last layer reads the first layer's cache: both sites packed over one pair, values online."""

    def __init__(self, attention=Attention, seed: int = 0):
        super().__init__(attention, layers=2, seed=seed)

    def run(self, x, cache, at, total, padding=None):
        x, pair = self.layers[0](x, None if cache is None else cache[0], at, total, padding)
        reader = self.layers[1].attention
        q = reader.rope(reader.project(x)[0], at)
        mask = reader.mask(at, total, padding, None if cache is None else cache[0], x.dtype)
        return self.head(x + reader.output(reader.attend(q, *pair, mask), x)), (pair,)


class CrossDecoder(Decoder):
    """A first call makes keys and values of a memory, later calls only read them: packed, read-only afterwards."""

    def forward(self, tokens, cache=None, memory=None):
        x, kept = self.embed(tokens), []
        for i, layer in enumerate(self.layers):
            part = layer.attention
            q = part.split_heads(part.q_proj(x), part.heads)
            if cache is None:
                k, v = (part.split_heads(p(memory), part.kv_heads) for p in (part.k_proj, part.v_proj))
            else:
                k, v = cache[i]
            kept.append((k, v))
            y = F.scaled_dot_product_attention(q, part.group(k), part.group(v))
            x = x + part.output(y, x)
        return self.head(x), tuple(kept)


class VisionDecoder(Decoder):
    """Image features [B, T, E] replace the embeddings of some tokens, placed in one of the ways that models do it."""

    def __init__(self, placement: str, layers: int = 3, broken: bool = False):
        super().__init__(layers=layers)
        self.placement, self.broken = placement, broken

    def forward(self, tokens, cache=None, images=None, at_image=None, mm_token_type_ids=None):
        at, total = self.start(tokens, cache, None)
        x = self.embed(tokens)
        if images is not None:
            x = self.place(x, images, at_image)
        if mm_token_type_ids is not None:
            x = x + 0.1 * mm_token_type_ids[..., None]
        if self.broken:
            torch._dynamo.graph_break()
        return self.run(x, cache, at, total)

    def place(self, x, images, at_image):
        if self.placement == "masked_scatter":
            return x.masked_scatter(at_image[..., None].expand_as(x), images)
        if self.placement == "masked_scatter_":
            return x.clone().masked_scatter_(at_image[..., None].expand_as(x), images)
        if self.placement == "setitem":
            x = x.clone()
            x[at_image] = images
            return x
        if self.placement == "index_put":
            return x.index_put((at_image,), images)
        if self.placement == "uncompiled":
            return placed_uncompiled(x, images, at_image)
        return akvq_fx.mark_vision(torch.where(at_image[..., None], images.mean(0), x), at_image)


@torch.compiler.disable
def placed_uncompiled(x, images, at_image):
    """Features [N, E] written into embeddings [B, T, E] in place, where dynamo does not look."""
    x[at_image] = images
    return x


class VisionTower(nn.Module):
    """Attention with no cache: neither a site nor a refusal."""

    def __init__(self):
        super().__init__()
        self.attention = Mha()

    def forward(self, x):
        q, k, v = self.attention.project(x)
        return self.attention.output(F.scaled_dot_product_attention(q, k, v), x)


def plain_read(q, k, v):
    """Keys and values come in as they are, 16-bit and only read: neither a site nor a refusal."""
    return F.scaled_dot_product_attention(q, k, v) * 2


def mixed(*spellings: type[Attention], **fields) -> type[Attention]:
    """One attention class of several spellings."""
    bases = [c for c in dict.fromkeys(spellings) if c is not Attention]
    return type("And".join(c.__name__ for c in bases) or "Attention", (*bases, Attention), fields)


@dataclasses.dataclass
class Capture:
    """One graph that dynamo made: its text before, the state after the pipeline, and what the backend returned."""

    gm: torch.fx.GraphModule
    inputs: list
    before: str
    state: object
    compiled: object

    def report(self, name: str):
        return next(r for r in self.state.reports if r.name == name)


class Spy:
    """The akvq backend with the inner compiler off, which keeps every graph that it is given."""

    def __init__(self, **options):
        self.options = {"inner": "eager", **options}
        self.captures: list[Capture] = []

    def __call__(self, gm, example_inputs):
        before = str(gm.graph)
        state = rewrite(gm, example_inputs, AKVQConfig.from_options(self.options))
        compiled = akvq(gm, example_inputs, options=self.options)
        self.captures.append(Capture(gm, list(example_inputs), before, state, compiled))
        return compiled


def captured(model, *args, options: dict | None = None, **kwargs) -> list[Capture]:
    """The graphs of one call."""
    spy = Spy(**(options or {}))
    with torch.no_grad():
        torch.compile(model, backend=spy)(*args, **kwargs)
    return spy.captures


def token_ids(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def roll(model, batch: int = 2, prompt: int = 6, steps: int = 3, chunk: int = 0, pad: int = 0, seed: int = 0):
    """(logits of the prompt, of single steps and of a chunk of tokens, the cache at the end).

    pad: that many tokens of the first row are padding.
    """
    ids = token_ids(batch, prompt + steps + chunk, seed)
    visible = torch.ones(batch, ids.shape[1], dtype=torch.bool)
    visible[0, :pad] = False
    static = getattr(model.layers[0].attention, "slots", 0)
    slots = F.pad(visible, (0, max(0, static - len(ids[0]))), value=True)
    cuts = [0, prompt, *range(prompt + 1, prompt + steps + 1), *([ids.shape[1]] if chunk else [])]
    logits, cache = [], None
    with torch.no_grad():
        for a, b in zip(cuts, cuts[1:], strict=False):
            padding = None if not pad else slots if static else visible[:, :b]
            at = torch.arange(a, b) if static else None
            at = a if getattr(model.layers[0].attention, "by_number", False) else at
            out, cache = model(ids[:, a:b], cache, padding, at)
            logits.append(out)
    return logits, cache


@dataclasses.dataclass
class Evidence:
    """What one model did, eager and compiled, on the same tokens."""

    model: nn.Module
    eager: list[Tensor]
    compiled: list[Tensor]
    cache: object
    captures: list[Capture]

    @property
    def error(self) -> float:
        return max((a - b).abs().max().item() for a, b in zip(self.eager, self.compiled, strict=True))


def evidence(model: nn.Module, options: dict | None = None, **schedule) -> Evidence:
    """roll the model before it is compiled, then compiled; attention dropout draws the same numbers in both."""
    torch.manual_seed(0)
    eager, _ = roll(model, **schedule)
    for buffer in model.buffers():
        buffer.zero_()
    torch._dynamo.reset()
    spy = Spy(**(options or {}))
    run = torch.compile(model, backend=spy)
    torch.manual_seed(0)
    logits, cache = roll(run, **schedule)
    return Evidence(model, eager, logits, cache, spy.captures)


LOSSLESS = {"body_bits": 16}


@functools.cache
def lossless(attention: type[Attention]) -> Evidence:
    """One decoder layer of this spelling, carried without rotation or quantization; shared by the tests."""
    return evidence(Decoder(attention), LOSSLESS)
