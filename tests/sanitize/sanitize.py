"""Every GPU kernel over small cases, to be run under NVIDIA's compute-sanitizer; a speed is not measured here.

    export PYTHONPATH=.
    compute-sanitizer --tool memcheck python3 tests/sanitize/sanitize.py [--part 0 --parts 4] [--seconds 500]
    compute-sanitizer --tool racecheck python3 tests/sanitize/sanitize.py --only attend_cuda
    python3 tests/sanitize/sanitize.py --list                                # names of the cases; needs no GPU

The sanitizer makes a kernel 10 to 100 times slower, so inputs, caches and expected results are made on the CPU, and
little but the kernels runs on the GPU. Each tensor has an allocation of its own (no caching allocator), so that
memcheck sees
a byte past its end. A case prints `ok NAME`, `refused NAME: reason` or `failed NAME: error` as it ends; the exit status
is 0 if all were ok. Its result must be finite and close to the CPU reference's, so that a kernel that did nothing
fails; exactness is for the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from sanitize_cases import (
    COMMON,
    LANES,
    RARE,
    ROTATIONS,
    SYMMETRIC_LANES,
    SYMMETRIC_WARPS,
    TEXTS,
    TRITON,
    UNEVEN,
    WARPS,
    Call,
    Write,
    bf16,
    f16,
    f32,
    two,
)
from torch import Tensor

from akvq_fx.kernels import cache as ops
from akvq_fx.kernels import rotate, salience
from akvq_fx.kernels.attend import AttendCall, reference, rotate_query
from akvq_fx.kernels.layout import DTYPE_NAMES, DTYPES, PIVOT, STATE_TEXT, TEXT, VISION, Layout

Cases = Iterator[tuple[str, Callable[[], None]]]
LIMIT = 0.03  # of the norm; kernels at 16 bits differ by a third of it
ROTATED_LIMIT = 0.15  # of what was rotated and then cut to codes: a number at an edge is a whole step off
# rows or programs from which on one takes several tiles; lowered to this where a case is "many"
FEW = {"append_cuda": ("append_cuda.MANY", 64), "cache_triton": ("rotate_triton.PROGRAMS", 1)}
FEW["rotate_triton"] = FEW["cache_triton"]


class Refused(Exception):
    """A kernel's `refusal` says no."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = f32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_affine(B: int, H: int, D: int, seed: int = 7, ordered: bool = False) -> Tensor:
    gain = 2.0 ** randn(B, H, D, seed=seed + 1).round().clamp(-2, 2)
    order = [randn(B, H, D, seed=seed + 2).argsort(-1)] if ordered else []
    return torch.stack([randn(B, H, D, seed=seed), gain, *order], 1).half()


def strided(B: int, H: int, T: int, D: int, how: str, seed: int = 0, dtype: torch.dtype = f32) -> tuple[Tensor, Tensor]:
    """Random tokens [B, H, T, D] on the CPU and on the GPU, strided in either as Write.x says."""
    base = randn(*((B, T, H, D) if how == "heads last" else (B, H, T, D + 4 * (how == "wide"))), seed=seed, dtype=dtype)
    seen = (lambda t: t.transpose(1, 2)) if how == "heads last" else lambda t: t[..., :D]
    return seen(base), seen(base.cuda())


def on_gpu(*given: Any) -> list[Any]:
    return [on_gpu(*x) if isinstance(x, list) else x.cuda() if isinstance(x, Tensor) else x for x in given]


def check(name: str, due: Tensor, got: Tensor, limit: float = LIMIT) -> None:
    due, got = due.double(), got.cpu().double()
    assert due.shape == got.shape, f"{name} is {list(got.shape)}, due {list(due.shape)}"
    assert due.isfinite().all() and got.isfinite().all(), f"{name} is not finite"
    error = ((got - due).norm() / due.norm().clamp_min(1e-30)).item()
    assert error <= limit, f"{name} is off by {error:.2g} of its norm"


def kernels_of(name: str) -> Any:
    """kernels/<name>.py; imported when it is asked for, since --list needs no Triton."""
    return importlib.import_module(f"akvq_fx.kernels.{name}")


def tiles_of(name: str, many: bool) -> contextlib.AbstractContextManager:
    constant, few = FEW[name]
    return mock.patch(f"akvq_fx.kernels.{constant}", few) if many else contextlib.nullcontext()


def accept(refusal: str) -> None:
    if refusal:
        raise Refused(refusal)


def chosen(B: int, T: int, count: int) -> Tensor:
    """[B, count] int32 tokens, all different in a row; the last slot is free where there are several."""
    order = torch.stack([torch.randperm(T, generator=torch.Generator().manual_seed(T + row)) for row in range(B)])
    order = torch.nn.functional.pad(order, (0, count), value=-1)[:, :count].int()
    order[:, max(1, count - 1) :] = -1
    return order


def classes_of(B: int, T: int) -> Tensor:
    kinds = torch.tensor([VISION, TEXT], dtype=torch.uint8)
    return kinds[torch.randint(0, 2, (B, T), generator=torch.Generator().manual_seed(B * T))]


def filled(layout: Layout, B: int, H: int, T: int, capacity: int, seed: int) -> list[Tensor]:
    """A cache of T tokens; slots that none was written to hold NaN or garbage. One row's text slots are gathered."""
    pivots = chosen(B, T, layout.pivots) if layout.pivots else None
    affine = random_affine(B, H, layout.head_dim, uneven=layout.uneven) if layout.affine else None
    x = randn(B, H, T, layout.head_dim, seed=seed, dtype=layout.dtype)
    cache = ops.create(x, torch.arange(T), classes_of(B, T), pivots, affine, capacity, layout)
    b = ops.named(cache, layout)
    b["codes"][:, :, T:], b["range"][:, :, T:] = 0x5A5A, math.nan
    if "classes" in b:
        b["classes"][:, T:] = PIVOT
    if layout.window > T:
        b["ring"][:, :, T:] = math.nan
    if not layout.text_bits:
        return cache
    b["text_codes"][:, :, T:] = 0x5A5A
    if B == 1:
        slots = torch.cat([(b["text_at"][0, :T] >= 0).nonzero()[:, 0], torch.arange(T, capacity)])
        b["state"][STATE_TEXT] = len(slots) - capacity
        for name in ("text_codes", "text_at"):
            b[name] = b[name].index_select(1 if name == "text_at" else 2, slots)
    return list(b.values())


def attend(module: str, key_layout: Layout, value_layout: Layout, call: Call) -> None:
    B, H, share, queries, T, capacity = call.sizes
    D, dtype = key_layout.head_dim, key_layout.dtype
    flags = {"rotated": bool(call.rotate), "affine": call.rotate == "affine"}
    key_layout = dataclasses.replace(key_layout, **flags)
    value_layout = dataclasses.replace(value_layout, rotated=call.restore, shares_classes=True)
    key, value = (filled(layout, *(B, H, T, capacity), seed) for seed, layout in enumerate((key_layout, value_layout)))
    q, length, at, seen = randn(B, queries, H * share, D, seed=2).transpose(1, 2).mul(2).to(dtype), None, None, T
    if call.fresh:
        first = {"appended": T - queries, "ahead": T, "cropped": T - 37}[call.fresh]
        at, seen = torch.arange(first, first + queries), first + queries
    if call.length:
        length = seen = seen if call.length == "whole" else seen - 37
    fresh = [randn(B, queries, H, D, seed=s, dtype=dtype).transpose(1, 2) if call.fresh else None for s in (3, 4)]
    mask = None
    if call.mask:
        mask = randn(B, *((1, 1) if call.mask == "bool" else (H * share, queries)), seen, seed=5) > -0.5
        mask[..., 0] = True
    if call.mask and not call.mask.startswith("bool"):
        mask = torch.where(mask, randn(*mask.shape, seed=6), -math.inf).to(DTYPES.get(call.mask, dtype))
    rotated = rotate_query(q, key, key_layout).double() if call.rotate else q.double()
    read = mask.double() if mask is not None and mask.is_floating_point() else mask
    given = *fresh, at, key_layout, value_layout
    due = reference(AttendCall(rotated, key, value, length, read, None, call.causal, *given))
    kernels, wanted = kernels_of(module), (bool(call.rotate), bool(call.restore))
    args = AttendCall(*on_gpu(q, key, value, length, mask, None, call.causal, *given), *wanted)
    due = rotate.rotate(due) if call.restore else due
    accept(kernels.refusal(args))
    check("out", due, kernels.attend(args, call.splits))


def write(module: str, lanes: bool, call: Write) -> None:
    layout, (B, H, T), begin = call.layout, call.sizes, call.start or 0
    D, capacity = layout.head_dim, begin + T + 5
    x, x_there = strided(B, H, T, D, call.x, dtype=layout.dtype)
    at, kinds = torch.arange(begin, begin + T), classes_of(B, T) if call.kinds else None
    pivots = chosen(B, T, call.pivots) if call.pivots else None
    affine = random_affine(B, H, D, uneven=layout.uneven) if layout.affine else None
    stored = rotate.rotate_as_stored(x, affine, layout.rotated) if call.rotate else x
    kernels = kernels_of(module)
    accept(kernels.refusal(x_there, layout))
    assert module != "append_cuda" or kernels.packs(x_there, layout) == lanes, "this case is the other kernel's"
    if call.start is None:
        due = ops.create(stored, at, kinds, pivots, affine, capacity, layout)
        with tiles_of(module, call.many):
            got = kernels.pack(x_there, *on_gpu(at, kinds, pivots, affine), capacity, layout, call.rotate)
    else:
        due = layout.allocate(B, H, capacity, capacity if layout.text_bits else 0)
        if begin:
            early = randn(B, H, begin, D, seed=1, dtype=layout.dtype)
            slots = chosen(B, begin, layout.pivots) if layout.pivots else None
            ops.write(due, early, torch.arange(begin), classes_of(B, begin), slots, layout)
        if layout.affine:
            ops.named(due, layout)["affine"].copy_(affine)
        (got,) = on_gpu(due)
        ops.write(due, stored, at, kinds, pivots, layout)
        with tiles_of(module, call.many):
            kernels.append(got, x_there, *on_gpu(at, kinds, pivots), layout, call.rotate)
    compare(ops.named(due, layout), ops.named([buffer.cpu() for buffer in got], layout), layout, call.rotate)


def compare(due: dict[str, Tensor], got: dict[str, Tensor], layout: Layout, rotated: bool) -> None:
    """Compare codes by the numbers that they stand for, text slots only where there is text, integers to the bit."""
    limit = ROTATED_LIMIT if rotated else LIMIT
    if layout.text_bits:
        texts = (ops.read_text(b, layout).masked_fill((b["text_at"] < 0)[:, None, :, None], 0) for b in (due, got))
        check("text", *texts, limit)
        due.pop("text_codes"), got.pop("text_codes")
    if "range" in due:
        wide = dataclasses.replace(layout, dtype=f32)
        check("codes", *(ops.decode(b.pop("codes"), b.pop("range"), wide) for b in (due, got)), limit)
    for name, buffer in due.items():
        if buffer.is_floating_point():
            check(name, buffer, got[name])
        else:
            assert torch.equal(buffer, got[name]), f"{name} differs"


def check_rotation(
    op: str, sizes: tuple[int, ...], dtype: torch.dtype, owners: int, how: str, many: bool, ordered: bool = False
) -> None:
    x, x_there = strided(*sizes, how, dtype=dtype)
    maps = [random_affine(sizes[0], owners, sizes[3], uneven=ordered)] if owners else []
    due = getattr(rotate, op)(x.double(), *maps)
    kernels = kernels_of("rotate_triton")
    accept(kernels.refusal(x_there))
    with tiles_of("rotate_triton", many):
        check(op, due, getattr(kernels, op)(x_there, *on_gpu(*maps)))


def find_pivots(mode: str, dtype: torch.dtype) -> None:
    h, valid = randn(2, 131, 300, dtype=dtype), torch.ones(2, 131, dtype=torch.bool)
    h[0, 40, 7], h[1, 90, 299], h[1, 3, 0], valid[1, :20] = 3000, -2000, 2500, False
    due = salience.find_pivots_reference(h, valid, 15, mode, 100.0, 1000.0)
    kernels = kernels_of("salience_triton")
    accept(kernels.refusal(h))
    found = kernels.find_pivots(*on_gpu(h, valid), 15, mode, 100.0, 1000.0).cpu()
    assert torch.equal(due, found), f"pivots are {found.tolist()}, due {due.tolist()}"


def key_affine(dtype: torch.dtype, tokens: int, asked: int, padded: bool, ordered: bool = False) -> None:
    k, q = randn(2, 2, tokens, 80, dtype=dtype) + 1, randn(2, 6, asked, 80, seed=1, dtype=dtype) * 2
    valid = torch.arange(tokens) >= torch.tensor([[0], [9]]) if padded else None
    due = salience.key_affine_reference(k, q, valid, True, True, ordered)[:, :2]  # channels may be near enough to swap
    kernels = kernels_of("salience_triton")
    accept(kernels.refusal(k, q))
    check("affine", due, kernels.key_affine(*on_gpu(k, q, valid), True, True, ordered)[:, :2])


def cases() -> Cases:
    dims = [(16, 128), (64, 32), (80, 128), (96, 128), (128, 128), (256, 128)]
    for number, (name, call) in enumerate({**COMMON, **RARE}.items()):
        more = [(64, 16), (128, 32)] if name in ("one head each", "eight a group", "two tokens") else []
        some = dims + more if name in COMMON else dims[number % 2 :: 2]
        for place, (head_dim, group) in enumerate(some):
            dtype = (f16, bf16)[(number + place) % 2]
            text, bits = list(TEXTS.items())[(number + place) % 3]
            layout = two(head_dim, dtype, group=group, window=call.window, pivots=call.pivots)
            pair = [dataclasses.replace(layout, text_bits=b) for b in bits]
            title = f"attend_cuda/{head_dim}/{DTYPE_NAMES[dtype]}/{layout.groups} groups/{name}/{text}/{call}"
            yield title, functools.partial(attend, "attend_cuda", *pair, call)
    for name, call in UNEVEN.items():
        for head_dim, dtype in ((64, f16), (80, f16), (128, bf16)):
            overlays = {"body_clip": 1.0, "window": call.window, "pivots": call.pivots}
            values = two(head_dim, dtype, symmetric=True, **overlays)
            keys = dataclasses.replace(values, uneven=True, rotated=True, affine=True)
            title = f"{head_dim}/{DTYPE_NAMES[dtype]}/uneven/{name}/{call}"
            yield f"attend_cuda/{title}", functools.partial(attend, "attend_cuda", keys, values, call)
    for head_dim, dtype, body, bits, group, call in TRITON:
        layout = Layout(head_dim, dtype, body, 0, call.window, call.pivots, group)
        pair = [dataclasses.replace(layout, text_bits=b) for b in bits]
        sizes = f"{body} bits/text {bits[0]} {bits[1]}/q {call.sizes[3]}/splits {call.splits}"
        title = f"attend_triton/{head_dim}/{DTYPE_NAMES[dtype]}/{sizes}/{call}"
        yield title, functools.partial(attend, "attend_triton", *pair, call)
    for kernel, calls in (("four lanes", LANES + SYMMETRIC_LANES), ("warp", WARPS + SYMMETRIC_WARPS)):
        for call in calls:
            lanes = kernel == "four lanes"
            yield f"append_cuda/{kernel}/{call}", functools.partial(write, "append_cuda", lanes, call)
    for call in (LANES[2], LANES[5], WARPS[0], WARPS[3], WARPS[5], WARPS[9], *SYMMETRIC_LANES, *SYMMETRIC_WARPS):
        yield f"cache_triton/{call}", functools.partial(write, "cache_triton", False, call)
    for op, sizes, dtype, owners, how, many in ROTATIONS:
        title = f"rotate_triton/{op}/{list(sizes)}/{DTYPE_NAMES[dtype]}/{how or 'dense'}" + "+many" * many
        yield title, functools.partial(check_rotation, op, sizes, dtype, owners, how, many)
        if owners and sizes[3] <= 128:
            yield f"{title}+order", functools.partial(check_rotation, op, sizes, dtype, owners, how, many, True)
    yield "salience_triton/find_pivots/topk/f32", functools.partial(find_pivots, "topk", f32)
    yield "salience_triton/find_pivots/massive/f16", functools.partial(find_pivots, "massive", f16)
    yield "salience_triton/key_affine/bf16/padded", functools.partial(key_affine, bf16, 300, 300, True)
    yield "salience_triton/key_affine/bf16/order", functools.partial(key_affine, bf16, 300, 300, True, True)
    yield "salience_triton/key_affine/f32/other queries", functools.partial(key_affine, f32, 600, 33, False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, default=0, help="of the cases take every --parts'th, from this one on")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no case starts later than this")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their names")
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    args = parser.parse_args()
    began = time.monotonic()
    taken = [case for case in cases() if args.only in case[0]][args.part :: args.parts]
    if args.list:
        print(*(name for name, _ in taken), sep="\n")
        return 0
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    done = 0
    for name, run in taken:
        if time.monotonic() - began > args.seconds:
            break
        try:
            run()
            torch.cuda.synchronize()
        except Refused as reason:
            print(f"refused {name}: {reason}", flush=True)
        except Exception as error:
            print(f"failed {name}: {type(error).__name__}: {error}", flush=True)
            if isinstance(error, RuntimeError) and "CUDA" in str(error):
                break  # after an error of the device nothing runs any more
        else:
            done += 1
            print(f"ok {name}", flush=True)
    print(f"done {done} of {len(taken)} cases")
    return int(done < len(taken))


if __name__ == "__main__":
    sys.exit(main())
