"""Spellings of each step of attention that a model writes out, for tests that draw mixtures of them."""

import torch
import torch.nn.functional as F

KV, REPEATS, DIM = 2, 2, 8
HEADS = KV * REPEATS

INTERLEAVED = lambda x: x.repeat_interleave(REPEATS, dim=1)
EXPANDED = lambda x: x[:, :, None].expand(-1, -1, REPEATS, -1, -1).reshape(x.shape[0], HEADS, x.shape[2], DIM)
STACKED = lambda x: x.unsqueeze(2).expand(-1, -1, REPEATS, -1, -1).flatten(1, 2)
GROUPS = {"interleave": INTERLEAVED, "expand": EXPANDED, "flatten": STACKED}

fold = lambda x: x.reshape(-1, *x.shape[2:])
split = lambda x: x.view(-1, KV, REPEATS, *x.shape[2:])
PRODUCTS = {  # scores [B, H, q, T] of q and grouped k, and their product with grouped v
    "matmul": (lambda q, k: torch.matmul(q, k.transpose(2, 3)), lambda w, v: torch.matmul(w, v)),
    "@": (lambda q, k: q @ k.mT, lambda w, v: w @ v),
    "permuted": (lambda q, k: q @ k.permute(0, 1, 3, 2), lambda w, v: (w @ v).contiguous()),
    "einsum": (
        lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
        lambda w, v: torch.einsum("bhqk,bhkd->bhqd", w, v),
    ),
    "einsum reversed": (
        lambda q, k: torch.einsum("b n j d, b n i d -> b n i j", k, q),
        lambda w, v: torch.einsum("bhkd,bhqk->bqhd", v, w).transpose(1, 2),
    ),
    "einsum in another order": (
        lambda q, k: torch.einsum("bhqd,bkhd->bqkh", q, k.transpose(1, 2)).permute(0, 3, 1, 2),
        lambda w, v: torch.einsum("...qk,...kd->...qd", w, v),
    ),
    "keys first": (lambda q, k: (k @ q.mT).mT, lambda w, v: (v.mT @ w.mT).mT),
    "bmm": (
        lambda q, k: torch.bmm(fold(q), fold(k).transpose(1, 2)).view(-1, HEADS, q.shape[2], k.shape[2]),
        lambda w, v: torch.bmm(fold(w), fold(v)).view(-1, HEADS, w.shape[2], DIM),
    ),
    "baddbmm": (
        lambda q, k: torch.baddbmm(
            torch.zeros(1, dtype=q.dtype), fold(q), fold(k.transpose(2, 3)), beta=0, alpha=0.5
        ).unflatten(0, (-1, HEADS)),
        lambda w, v: torch.bmm(fold(w), fold(v)).unflatten(0, (-1, HEADS)),
    ),
}  # fmt: skip
GROUPED = {  # the same with k and v as the cache has them
    "einsum": (
        lambda q, k: torch.einsum("bgrqd,bgkd->bgrqk", split(q), k).flatten(1, 2),
        lambda w, v: torch.einsum("bgrqk,bgkd->bgrqd", split(w), v).flatten(1, 2),
    ),
    "einsum over tokens": (
        lambda q, k: torch.einsum("bqgrd,bkgd->bgrqk", split(q).permute(0, 3, 1, 2, 4), k.transpose(1, 2)).flatten(
            1, 2
        ),
        lambda w, v: torch.einsum("bgrqk,bkgd->bqgrd", split(w), v.transpose(1, 2)).flatten(2, 3).transpose(1, 2),
    ),
    "matmul": (
        lambda q, k: (split(q) @ k[:, :, None].mT).flatten(1, 2),
        lambda w, v: (split(w) @ v.unsqueeze(2)).reshape(-1, HEADS, w.shape[2], DIM),
    ),
}
SCALES = {
    "none": (lambda q: q, lambda s: s),
    "number after": (lambda q: q, lambda s: s * 0.3),
    "divided after": (lambda q: q, lambda s: s / 3),
    "tensor after": (lambda q: q, lambda s: s * torch.tensor(0.3)),
    "root after": (lambda q: q, lambda s: s / torch.tensor(3.0).sqrt()),
    "in place": (lambda q: q, lambda s: s.mul_(0.3)),
    "inside": (lambda q: q * 0.3, lambda s: s),
    "both": (lambda q: q / 2, lambda s: 0.5 * s),
}
SOFTCAPS = {  # name -> softcap of scores that are a few in size, and its spelling
    "none around": (1.0, lambda s: s.tanh()),
    "divided and multiplied": (2.0, lambda s: torch.tanh(s / 2) * 2),
    "multiplied and divided": (2.0, lambda s: (s * 0.5).tanh() / 0.5),
    "number first": (0.7, lambda s: 0.7 * torch.tanh(s.div(0.7))),
    "constant tensors": (2.0, lambda s: torch.tanh(s / torch.tensor(2.0)) * torch.tensor(2.0)),
    "in place": (2.0, lambda s: s.div_(2).tanh_().mul_(2)),
    "another slope": (2.0, lambda s: torch.tanh(s * 1.5) * 2),
    "upside down": (2.0, lambda s: torch.tanh(s / 2) * -2),
}
ONE_OF_EACH_HEAD = torch.arange(HEADS) / 2.0
SINKS = {  # of scores s [B, H, q, T]
    "expanded": lambda s: ONE_OF_EACH_HEAD.reshape(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], -1),
    "indexed": lambda s: ONE_OF_EACH_HEAD[None, :, None, None].expand(*s.shape[:3], 1).to(s.dtype),
    "repeated": lambda s: ONE_OF_EACH_HEAD.view(1, -1, 1, 1).repeat_interleave(s.shape[2], 2).expand(len(s), -1, -1, 1),
}
lowest = lambda s: torch.finfo(s.dtype).min
additive = lambda s, counts: torch.zeros((), dtype=s.dtype).masked_fill(~counts, lowest(s))
MASKS = {
    "none": lambda s, counts: s,
    "masked_fill -inf": lambda s, counts: s.masked_fill(~counts, -torch.inf),
    "masked_fill lowest": lambda s, counts: s.masked_fill(~counts, lowest(s)),
    "masked_fill -1e9": lambda s, counts: s.masked_fill(counts == 0, -1e9),
    "masked_fill_": lambda s, counts: s.masked_fill_(~counts, -1e9),
    "where": lambda s, counts: torch.where(counts, s, -torch.inf),
    "where reversed": lambda s, counts: torch.where(~counts, lowest(s), s),
    "where of a tensor": lambda s, counts: torch.where(counts, s, torch.full([], -1e9, dtype=s.dtype)),
    "add": lambda s, counts: s + additive(s, counts),
    "add reversed": lambda s, counts: additive(s, counts) + s,
    "sub": lambda s, counts: s - 1e9 * (~counts).to(s.dtype),
    "iadd": lambda s, counts: s.add_(additive(s, counts)),
    "bias and fill": lambda s, counts: (s + torch.arange(s.shape[-1])).masked_fill(~counts, -torch.inf),
    "heads' biases": lambda s, counts: s + torch.arange(HEADS)[:, None, None] * torch.arange(s.shape[-1])
    + additive(s, counts),
    "folded": lambda s, counts: (fold(s) + fold(additive(s, counts).expand(-1, HEADS, -1, -1))).view(s.shape),
    "grouped": lambda s, counts: split(s).masked_fill(~counts[:, None], -torch.inf).flatten(1, 2),
    "heads apart": lambda s, counts: (split(s) + torch.arange(KV)[:, None, None, None] * torch.arange(s.shape[-1]))
    .flatten(1, 2).masked_fill(~counts, -1e9),
}  # fmt: skip
SHAPES = {  # of what says which scores count
    "[B, 1, q, T]": lambda counts: counts,
    "[B, H, q, T]": lambda counts: counts.expand(-1, HEADS, -1, -1),
    "[1, 1, q, T]": lambda counts: counts[1:],
    "[1, H, q, T]": lambda counts: counts[1:].expand(-1, HEADS, -1, -1),
    "[q, T]": lambda counts: counts[1, 0],
    "[B, 1, 1, T]": lambda counts: counts[:, :, -1:],
    "[T]": lambda counts: counts[1, 0, -1],
}
LIMITED = {"folded": ("[B, 1, q, T]", "[B, 1, 1, T]"), "grouped": ("[B, 1, q, T]", "[B, 1, 1, T]")}
SOFTMAX = {
    "method": lambda s: s.softmax(-1),
    "function": lambda s: F.softmax(s, dim=3),
    "single precision": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "cast": lambda s: torch.softmax(s.float(), -1).type_as(s),
    "maximum off": lambda s: torch.softmax(s - s.amax(-1, keepdim=True), -1),
}
DROPOUT = {
    "none": lambda w: w,
    "p=0": lambda w: F.dropout(w, 0.0),
    "not training": lambda w: F.dropout(w, 0.3, training=False),
}
