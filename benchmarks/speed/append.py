"""Writing the cache: one decode token, and a whole prompt, beside the same writes at 16 bits.

    python benchmarks/speed/append.py [--markdown FILE]
    python benchmarks/speed/append.py --device cpu --small

Decode: akvq::append of one token's keys (centred, balanced, rotated, quantized and packed in the op) and values (their
rotation is folded into the weights), beside index_copy_ of the same token into 16-bit buffers. Launches cycle through
layers and positions, so that what is written is not in the L2 cache already; each is a CUDA graph replay. Keys and
values are laid out as models make them: [B, 1, H, D] seen as [B, H, 1, D].

Prompt: akvq::pack of K and of V, key_affine over K and its queries, find_pivots over the residual stream. The limit is
the time of a bf16 copy of the same tensor; a pack reads as much and writes a seventh, so it can be quicker than that.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools

import torch
from attend import layouts
from timing import (
    Budget,
    Table,
    attempt,
    copy_bandwidth,
    finish,
    kernel_names,
    l2_bytes,
    measure,
    standard_arguments,
)
from torch import Tensor

import akvq_fx  # noqa: F401 - registers the ops

akvq = torch.ops.akvq
MODE, FLOOR, RATIO = "topk", 100.0, 1000.0  # find_pivots as AKVQConfig asks for it by default
MAX_LAYERS, MAX_PLACES = 8, 100  # so that writes between two of one place exceed the L2, except for one row


@dataclasses.dataclass(frozen=True)
class Size:
    batch: int
    heads: int
    tokens: int  # capacity of the caches that one token is written to, or length of the prompt
    query_heads: int = 32
    head_dim: int = 128

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} T{self.tokens} D{self.head_dim}"


DECODE = [Size(64, 32, 640), Size(64, 8, 640), Size(1, 32, 640)]
PROMPT = [Size(8, 32, 4096), Size(8, 8, 4096)]
SMALL_DECODE = [Size(2, 4, 256, 4), Size(2, 2, 256, 4)]
SMALL_PROMPT = [Size(2, 2, 256, 4)]


class Draw:
    """Random bf16 tokens of a size, as a model's projections give them: heads and tokens transposed."""

    def __init__(self, size: Size, device: torch.device, seed: int):
        self.size, self.device = size, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, tokens: int, heads: int | None = None) -> Tensor:
        shape = self.size.batch, tokens, heads or self.size.heads, self.size.head_dim
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.bfloat16)
        return x.transpose(1, 2)


def decode_calls(size: Size, device: torch.device, seed: int):
    """(packed calls, plain calls): each writes K and V of one token at a position and layer of its own."""
    draw = Draw(size, device, seed)
    key_layout, value_layout = layouts(size.head_dim, torch.bfloat16)
    prompt = size.tokens // 2
    at = torch.arange(prompt, device=device)
    token_bytes = 2 * size.batch * size.heads * size.head_dim * 2
    layers = MAX_LAYERS if device.type == "cuda" else 2
    count = min(max(4, 4 * l2_bytes(device) // (layers * token_bytes)), MAX_PLACES)
    places = [torch.tensor([prompt + i], device=device) for i in range(min(count, size.tokens - prompt))]
    packed, plain = [], []
    for _ in range(layers):
        k, v = draw(prompt), draw(prompt)
        affine = akvq.key_affine(k, draw(8, size.query_heads), None, True, True)
        pivots = torch.arange(15, device=device, dtype=torch.int32).expand(size.batch, -1).contiguous()
        classes = torch.ones(size.batch, prompt, dtype=torch.uint8, device=device)
        key = akvq.pack(k, at, classes, pivots, affine, size.tokens, str(key_layout), True)
        value = akvq.pack(v, at, classes, pivots, None, size.tokens, str(value_layout), False)
        buffers = torch.zeros(
            2, size.batch, size.heads, size.tokens, size.head_dim, dtype=torch.bfloat16, device=device
        )
        new_k, new_v = draw(1), draw(1)

        def write_packed(place, key=key, value=value, new_k=new_k, new_v=new_v):
            akvq.append(key, new_k, place, None, None, str(key_layout), True)
            akvq.append(value, new_v, place, None, None, str(value_layout), False)

        def write_plain(place, k=buffers[0], v=buffers[1], new_k=new_k, new_v=new_v):
            k.index_copy_(2, place, new_k)
            v.index_copy_(2, place, new_v)

        packed.append(write_packed)
        plain.append(write_plain)
    every = list(itertools.product(places, range(layers)))  # a layer comes again only after all others
    bound = lambda writers: [lambda p=p, w=writers[n]: w(p) for p, n in every]
    return bound(packed), bound(plain)


def decode_table(args, device: torch.device) -> Table:
    columns = ["cache", "index_copy_ K and V us", "akvq::append K and V us", "append / index_copy_"]
    table = Table("One decode token into a layer's cache, bf16", columns, "Target: within 1.5 times of index_copy_.")
    for size in SMALL_DECODE if args.small else DECODE:
        calls, reason = attempt(args.budget, decode_calls, size, device, args.seed)
        if calls is None:
            table.add(size, "", reason, "")
            continue
        plain, why_not = attempt(args.budget, measure, calls[1], device)
        packed, why = attempt(args.budget, measure, calls[0], device)
        ratio = f"{packed.seconds / plain.seconds:.2f}" if plain and packed else ""
        table.add(size, plain or why_not, packed or why, ratio)
        if args.kernels and packed is not None:
            names, reason = attempt(args.budget, kernel_names, calls[0][0])
            print(f"  kernels: {', '.join(names) if names else reason}", flush=True)
    return table


def prompt_calls(size: Size, device: torch.device, seed: int) -> dict[str, tuple]:
    """name -> (call, bytes that it must move, the tensor that a copy is timed of)."""
    draw = Draw(size, device, seed)
    B, T, D = size.batch, size.tokens, size.head_dim
    k, v, q = draw(T), draw(T), draw(T, size.query_heads)
    hidden = draw(T, size.query_heads).transpose(1, 2).flatten(2)  # [B, T, E], contiguous
    key_layout, value_layout = layouts(D, torch.bfloat16)
    at = torch.arange(T, device=device)
    classes = torch.ones(B, T, dtype=torch.uint8, device=device)
    pivots = akvq.find_pivots(hidden, None, 15, MODE, FLOOR, RATIO)
    affine = akvq.key_affine(k, q, None, True, True)
    packed = sum(b.nbytes for b in akvq.pack(v, at, classes, pivots, None, T, str(value_layout), False))
    return {
        "akvq::pack K": (
            lambda: akvq.pack(k, at, classes, pivots, affine, T, str(key_layout), True),
            k.nbytes + packed,
            k,
        ),
        "akvq::pack V": (
            lambda: akvq.pack(v, at, classes, pivots, None, T, str(value_layout), False),
            v.nbytes + packed,
            v,
        ),
        "key_affine": (lambda: akvq.key_affine(k, q, None, True, True), k.nbytes + q.nbytes, k),
        "find_pivots": (lambda: akvq.find_pivots(hidden, None, 15, MODE, FLOOR, RATIO), hidden.nbytes, hidden),
    }


def prompt_table(args, device: torch.device) -> Table:
    bandwidth = copy_bandwidth(device, (16 if args.small else 2048) << 20)
    columns = [
        "prompt",
        "op",
        "us",
        "copy of its input us",
        "op / copy",
        "MB it must move",
        "GB/s",
        "of copy bandwidth",
    ]
    table = Table("A layer's prompt, bf16", columns, f"Copy bandwidth {bandwidth / 1e9:.0f} GB/s (read + written).")
    for size in SMALL_PROMPT if args.small else PROMPT:
        ops, reason = attempt(args.budget, prompt_calls, size, device, args.seed)
        if ops is None:
            table.add(size, reason, *[""] * 6)
            continue
        for name, (call, moved, source) in ops.items():
            target = torch.empty_like(source)
            copy, why_not = attempt(args.budget, measure, [lambda t=target, s=source: t.copy_(s)], device)
            timing, why = attempt(args.budget, measure, [call], device)
            speed = moved / timing.seconds if timing else 0.0
            table.add(
                size,
                name,
                timing or why,
                copy or why_not,
                f"{timing.seconds / copy.seconds:.2f}" if timing and copy else "",
                f"{moved / 1e6:.0f}",
                f"{speed / 1e9:.0f}" if timing else "",
                f"{speed / bandwidth:.2f}" if timing else "",
            )
        ops = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    standard_arguments(parser)
    parser.add_argument("--kernels", action="store_true", help="name the kernels of one append")
    parser.add_argument("--seed", type=int, default=torch.seed() % 2**31)
    args = parser.parse_args()
    args.budget = Budget(args.seconds)
    device = torch.device(args.device)
    with torch.no_grad():
        tables = [decode_table(args, device), prompt_table(args, device)]
        finish(tables, device, args.markdown)


if __name__ == "__main__":
    main()
