"""akvq::attend for one decode token beside torch's best scaled_dot_product_attention, in one run.

    python benchmarks/speed/attend.py [--shapes 1/32/32/32768 16/32/32/4096/64/padded] [--markdown FILE] [--kernels]
    python benchmarks/speed/attend.py --recipe akvq akvq-even    # a row for each, instead of the default one's
    python benchmarks/speed/attend.py --images 4 --shapes 8/32/32/4096    # a prompt with images, the rest text
    python benchmarks/speed/attend.py --device cpu            # T=8192, float32 and bfloat16, one thread and all

A shape is B/Hq/Hkv/T[/D][/padded]. The bf16 peer is the fastest of cuDNN, flash and memory-efficient attention, each
asked in every form that it accepts: enable_gqa, a group's query heads as query tokens (what transformers does),
repeated keys. The packed cache has the layout of a PSA layer, of a prompt without images where none are asked for. Both
are CUDA graph replays that cycle through caches larger than the L2. "akvq" takes queries and leaves its output in the
space in which the cache is stored; "with rotations" is the call of a decode step, which takes queries as the model
makes them and also rotates its output back, as the default value_rotation="online" has it.

Two limits stand behind every row. Bytes: what must be read at least (both halves; the ring instead of the body where it
holds a token; q and out), over the bandwidth of a large copy in the same run. Operations: lane operations to unpack one
cached number (LANE_OPS), over what all fp32 lanes do in a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import warnings

import torch
from timing import (
    Budget,
    Table,
    Timing,
    attempt,
    clones,
    copy_bandwidth,
    finish,
    kernel_names,
    lane_rate,
    measure,
    measure_in_turns,
    sets_needed,
    standard_arguments,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from akvq_fx import AKVQConfig
from akvq_fx.kernels.attend import AttendCall, reference
from akvq_fx.kernels.layout import BLOCK, PADDING, TEXT, VISION, Layout
from akvq_fx.passes.plan_layers import layout_of
from akvq_fx.recipes import RECIPES
from akvq_fx.storage import Storage

# Counted by ncu in the loop of attend_cuda.cu (D = 128, one query row a head): 397 instructions of a warp for 32 tokens
# of 256 numbers. Unpacking alone is 0.66 of it; products run on tensor cores.
LANE_OPS = 1.55
# relative; probabilities, products and the result are each rounded to bfloat16, at 2**-8; a larger error is wrong
ERROR_LIMIT = 2e-2
STEP = AKVQConfig().capacity_step  # a growing cache is allocated in steps of so many tokens
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    query_heads: int
    heads: int
    tokens: int
    head_dim: int = 128
    padded: bool = False

    @staticmethod
    def parse(text: str) -> Shape:
        parts = text.split("/")
        padded = parts[-1] == "padded"
        return Shape(*map(int, parts[: len(parts) - padded]), padded=padded)

    def __str__(self) -> str:
        text = f"B{self.batch} H{self.query_heads}/{self.heads} T{self.tokens}"
        return text + (f" D{self.head_dim}" if self.head_dim != 128 else "") + (" padded" if self.padded else "")

    @property
    def groups(self) -> int:
        return self.query_heads // self.heads


TARGETS = [
    Shape(*s)
    for s in ((1, 32, 32, 32768), (16, 32, 32, 4096), (130, 32, 32, 640), (1, 28, 4, 32768), (64, 32, 8, 4096))
]
OTHERS = [Shape(16, 32, 32, 4096, 64), Shape(16, 32, 32, 4096, padded=True)]
IMAGE, BEFORE = 576, 32  # tokens of an image (LLaVA-1.5), and of text before each one; what is left is text
SMALL = [Shape(2, 4, 4, 384), Shape(1, 8, 2, 384), Shape(2, 4, 4, 384, 64), Shape(2, 4, 4, 384, padded=True)]
CPU_SHAPES = [Shape(1, 32, 32, 8192), Shape(1, 32, 8, 8192)]


def rotating_recipes() -> list[str]:
    """Recipes whose attention this script measures: packed at 2 bits, and rotated."""
    chosen = {name: AKVQConfig(recipe=name) for name, recipe in RECIPES.items() if not recipe.simulated}
    return [name for name, config in chosen.items() if config.body_bits == 2 and config.rotate]


def layouts(recipe: str, head_dim: int, dtype: torch.dtype, images: bool) -> tuple[Layout, Layout]:
    """Of keys and values in a PSA layer; the values that are packed count as rotated already."""
    chosen = AKVQConfig(recipe=recipe)
    return tuple(layout_of(chosen, half, head_dim, dtype, tsa=False, has_vision=images) for half in ("keys", "values"))


def is_vision(tokens: int, images: int, device: torch.device) -> Tensor:
    """[T] bool"""
    at = torch.arange(tokens, device=device)
    return (at % (BEFORE + IMAGE) >= BEFORE) & (at < images * (BEFORE + IMAGE))


@dataclasses.dataclass
class Problem:
    """One prompt, plain and packed."""

    shape: Shape
    q: Tensor  # [B, Hq, 1, D], as the model makes it
    k: Tensor  # [B, H, T, D]
    v: Tensor
    mask: Tensor | None  # [B, 1, 1, T] bool
    stored_q: Tensor  # q in the keys' stored space
    key: list[Tensor]
    value: list[Tensor]
    layouts: tuple[Layout, Layout]
    vision: float = 0.0  # share of vision tokens


def problem_of(
    shape: Shape, recipe: str, device: torch.device, dtype: torch.dtype, seed: int, images: int = 0
) -> Problem:
    """Random tokens; every 37th channel of the keys has a bias and eight times the spread, as of biased projections."""
    draw = torch.Generator(device).manual_seed(seed)
    randn = lambda *size: torch.randn(*size, generator=draw, device=device, dtype=dtype)
    B, H, T, D = shape.batch, shape.heads, shape.tokens, shape.head_dim
    k, v, q = randn(B, H, T, D), randn(B, H, T, D), randn(B, shape.query_heads, 1, D)
    k[..., ::37] = 8 * k[..., ::37] + 3
    start = torch.arange(B, device=device) * T // (2 * B) if shape.padded else torch.zeros(B, device=device, dtype=int)
    at = torch.arange(T, device=device)
    valid = at >= start[:, None]  # [B, T]
    vision = is_vision(T, images, device)
    classes = torch.where(valid, torch.where(vision, VISION, TEXT), PADDING).to(torch.uint8)
    count = min(15, T // 2)
    pivots = (T - 1 - torch.arange(count, device=device) * (T // 2 // count)).expand(B, -1).clone()
    pivots[:, 0] = start
    queries = randn(B, shape.query_heads, min(T, 64), D)
    key_layout, value_layout = layouts(recipe, D, dtype, images > 0)
    how = (True, True, None, key_layout.uneven, key_layout.blocks)
    affine = torch.ops.akvq.key_affine(k, queries, valid, *how) if key_layout.affine else None
    capacity = -(-T // STEP) * STEP
    args = (at, classes, pivots.to(torch.int32))
    key = torch.ops.akvq.pack(k, *args, affine, capacity, str(key_layout), True)
    value = torch.ops.akvq.pack(v, *args, None, capacity, str(value_layout), False)
    if key_layout.text_bits:  # as it is after a prompt
        key, value = (compacted(*half, T) for half in ((key_layout, key), (value_layout, value)))
    mask = valid[:, None, None] if shape.padded else None
    stored_q = torch.ops.akvq.rotate_queries(q, affine)
    return Problem(shape, q, k, v, mask, stored_q, key, value, (key_layout, value_layout), vision.float().mean().item())


def compacted(layout: Layout, cache: list[Tensor], tokens: int) -> list[Tensor]:
    storage = Storage(layout, cache, tokens, tokens, None)
    if layout.text_bits:
        storage.compact_text(tokens)
    return storage.buffers


def attend_call(p: Problem, key: list[Tensor], value: list[Tensor], length: int | None, rotations: bool = False):
    given = (length, p.mask, None, False, None, None, None, *map(str, p.layouts), rotations, rotations)
    q = p.q if rotations else p.stored_q
    return lambda: torch.ops.akvq.attend(q, key, value, *given)


def error_of(p: Problem, length: int | None, rotations: bool = False) -> float:
    """|out - reference| / |reference| over the first and the last row, the reference in float32 on the same codes."""
    rows = sorted({0, p.shape.batch - 1})
    pick = lambda cache: [b if n == 0 else b[rows] for n, b in enumerate(cache)]  # state, first, has no batch
    out = attend_call(p, p.key, p.value, length, rotations)()[rows].float()
    mask = None if p.mask is None else p.mask[rows]
    q = p.stored_q[rows].float()
    call = AttendCall(q, pick(p.key), pick(p.value), p.shape.tokens, mask, None, False, None, None, None, *p.layouts)
    expected = reference(call)
    expected = torch.ops.akvq.rotate(expected) if rotations else expected
    return ((out - expected).norm() / expected.norm()).item()


def sdpa_forms(p: Problem):
    """(name, q, k, v, keyword arguments): every way to ask for one decode token."""
    plain = {"attn_mask": p.mask}
    if p.shape.groups == 1:
        yield "", p.q, p.k, p.v, plain
        return
    packed = p.q.reshape(p.shape.batch, p.shape.heads, p.shape.groups, p.shape.head_dim)
    yield " heads as tokens", packed, p.k, p.v, plain
    yield " enable_gqa", p.q, p.k, p.v, {**plain, "enable_gqa": True}
    repeated = (t.repeat_interleave(p.shape.groups, 1) for t in (p.k, p.v))
    yield " repeated keys", p.q, *repeated, plain


def best_sdpa(p: Problem, device: torch.device) -> tuple[Timing, str, str]:
    """(timing, name of the fastest, timings of the others)."""
    taken: list[tuple[float, Timing, str]] = []
    refused = []
    for form, q, k, v, kwargs in sdpa_forms(p):
        count = sets_needed(2 * k.nbytes, device)
        for name, backend in BACKENDS.items():

            def call(k, v, q=q, kwargs=kwargs, backend=backend):
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(q, k, v, **kwargs)

            try:
                calls = [functools.partial(call, *pair) for pair in clones([k, v], count)]
                timing = measure(calls, device, 0.1)
                taken.append((timing.seconds, timing, name + form))
            except RuntimeError as error:
                refused.append(f"{name}{form}: {str(error).splitlines()[0][:60]}")
    if not taken:
        raise RuntimeError("no SDPA backend took it: " + "; ".join(refused))
    taken.sort(key=lambda t: t[0])
    return taken[0][1], taken[0][2], ", ".join(f"{name} {timing}" for _, timing, name in taken[1:])


def least_bytes(shape: Shape, key: Layout, value: Layout, vision: float = 0.0) -> tuple[int, int]:
    """Bytes that attention over the 16-bit and over the packed cache must move at least.

    vision: share of the tokens that are vision.
    """
    B, H, T, D = shape.batch, shape.heads, shape.tokens, shape.head_dim
    ends = 2 * B * shape.query_heads * D * 2  # q and out
    exact = min(key.window, T) + key.pivots  # tokens read from a 16-bit overlay
    # codes, numbers of 2 bytes for scales and minima, and a token's part of the mean of its block
    text = sum(D * x.low_width / 8 * (1 - vision) for x in (key, value))  # what text has below the body's bits
    body = text + sum(D * x.body_bits / 8 + 2 * x.range_size + x.blocks * D * 2 / BLOCK for x in (key, value))
    packed = int(B * H * (max(T - exact, 0) * body + 2 * exact * D * 2)) + B * T  # and one class a token
    return 2 * B * H * T * D * 2 + ends, packed + ends


COLUMNS = ["shape", "recipe", "SDPA bf16 us", "backend", "akvq us", "with rotations us", "SDPA / akvq",
           "SDPA MB", "SDPA of copy", "akvq MB", "akvq GB/s", "akvq of copy", "byte limit us", "operation limit us",
           "relative error"]  # fmt: skip


def cuda_row(
    args, table: Table, shape: Shape, recipe: str, device: torch.device, bandwidth: float, rate: float
) -> float | None:
    """One row; returns SDPA's time over ours where both ran and ours was right."""
    p = problem_of(shape, recipe, device, torch.bfloat16, args.seed, args.images)
    length = None if args.length == "device" else shape.tokens
    plain_bytes, packed_bytes = least_bytes(shape, *p.layouts, p.vision)
    sdpa, why_not = attempt(args.budget, best_sdpa, p, device)
    if sdpa is not None and sdpa[2]:
        print(f"  {shape}: slower: {sdpa[2]}", flush=True)

    def ours():
        halves = clones(p.key + p.value, sets_needed(packed_bytes, device))
        n = len(p.key)
        forms = (False, True)
        timings = [measure([attend_call(p, h[:n], h[n:], length, form) for h in halves], device) for form in forms]
        return *timings, max(error_of(p, length, form) for form in forms)

    measured, why = attempt(args.budget, ours)
    timing, restored, error = measured or (None, None, None)
    wrong = error is not None and not error <= ERROR_LIMIT
    ratio = sdpa[0].seconds / timing.seconds if sdpa is not None and timing is not None else None
    share = lambda count, t: f"{count / t.seconds / bandwidth:.2f}" if t is not None else ""
    elements = 2 * shape.batch * shape.heads * shape.tokens * shape.head_dim
    table.add(
        shape,
        recipe,
        sdpa[0] if sdpa is not None else why_not,
        sdpa[1] if sdpa is not None else "",
        timing if timing is not None else why,
        restored if restored is not None else "",
        f"{ratio:.2f}" if ratio is not None else "",
        f"{plain_bytes / 1e6:.1f}",
        share(plain_bytes, sdpa[0] if sdpa is not None else None),
        f"{packed_bytes / 1e6:.1f}",
        f"{packed_bytes / timing.seconds / 1e9:.0f}" if timing is not None else "",
        share(packed_bytes, timing),
        f"{1e6 * packed_bytes / bandwidth:.1f}",
        f"{1e6 * elements * args.lane_ops / rate:.1f}",
        "" if error is None else f"{error:.1e}" + (" WRONG" if wrong else ""),
    )
    if args.kernels and timing is not None:
        names, reason = attempt(args.budget, kernel_names, attend_call(p, p.key, p.value, length))
        print(f"  kernels: {', '.join(names) if names else reason}", flush=True)
    return None if wrong else ratio


def on_cuda(args, device: torch.device) -> list[Table]:
    bandwidth, rate = copy_bandwidth(device, (64 if args.small else 2048) << 20), lane_rate(device)
    note = (
        f"Copy bandwidth {bandwidth / 1e9:.0f} GB/s (read + written). Operation limit: {args.lane_ops} lane operations "
        f"a cached number, {rate / 1e12:.1f} T a second. Length read on the {args.length}. Seed {args.seed}."
    )
    table = Table("Decode attention, one token, bf16", COLUMNS, note)
    ratios = {}
    for shape, recipe in itertools.product(args.shapes or (SMALL if args.small else TARGETS + OTHERS), args.recipe):
        ratio, reason = attempt(args.budget, cuda_row, args, table, shape, recipe, device, bandwidth, rate)
        if reason:
            table.add(shape, recipe, reason, *[""] * (len(COLUMNS) - 3))
        if ratio is not None:
            ratios[recipe, shape] = ratio
        torch.cuda.empty_cache()
    for recipe in args.recipe:
        found = {shape: ratio for (of, shape), ratio in ratios.items() if of == recipe}
        counted = [found[s] for s in TARGETS if s in found] or list(found.values())
        if counted:
            mean = math.exp(sum(map(math.log, counted)) / len(counted))
            which = f"{sum(s in found for s in TARGETS)} of {len(TARGETS)} target shapes"
            table.notes += f" Geometric mean of SDPA / {recipe}: **{mean:.2f}** over {len(counted)} rows ({which})."
    return [table]


def on_cpu(args, device: torch.device) -> list[Table]:
    columns = [
        "shape",
        "recipe",
        "dtype",
        "threads",
        "SDPA us",
        "SDPA heads as tokens us",
        "akvq us",
        "with rotations us",
        "best SDPA / akvq",
        "relative error",
    ]
    table = Table("Decode attention on the CPU, one token", columns)
    every = torch.get_num_threads()
    shapes = args.shapes or (SMALL if args.small else CPU_SHAPES)
    dtypes = (torch.float32, torch.bfloat16)
    for shape, recipe, dtype, threads in itertools.product(shapes, args.recipe, dtypes, sorted({1, every})):
        row, reason = attempt(args.budget, cpu_row, args, shape, recipe, dtype, device, threads)
        name = str(dtype).removeprefix("torch.")
        table.add(shape, recipe, name, threads, *(row or [reason, "", "", "", "", ""]))
    torch.set_num_threads(every)
    return [table]


def cpu_row(args, shape: Shape, recipe: str, dtype: torch.dtype, device: torch.device, threads: int) -> list[str]:
    torch.set_num_threads(threads)
    p = problem_of(shape, recipe, device, dtype, args.seed, args.images)
    forms = {"akvq": False, "rotations": True}
    named = {name: [attend_call(p, p.key, p.value, shape.tokens, form)] for name, form in forms.items()}
    for form, q, k, v, kwargs in sdpa_forms(p):
        if "repeated" not in form:
            named["tokens" if "tokens" in form else "sdpa"] = [
                functools.partial(scaled_dot_product_attention, q, k, v, **kwargs)
            ]
    times = measure_in_turns(named, 0.3 if args.small else 4.0)
    best = min(t.seconds for name, t in times.items() if name not in forms)
    cells = [str(times[name]) if name in times else "" for name in ("sdpa", "tokens", *forms)]
    error = max(error_of(p, shape.tokens, form) for form in forms.values())
    return [*cells, f"{best / times['akvq'].seconds:.2f}", f"{error:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    standard_arguments(parser)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, metavar="B/Hq/Hkv/T[/D][/padded]")
    parser.add_argument("--recipe", nargs="+", default=[AKVQConfig().recipe], choices=rotating_recipes())
    parser.add_argument("--images", type=int, default=0, help="in the prompt")
    parser.add_argument("--length", default="device", choices=("device", "host"), help="who knows the cache's length")
    parser.add_argument("--lane-ops", type=float, default=LANE_OPS, help="lane operations to unpack one cached number")
    parser.add_argument("--kernels", action="store_true", help="name the kernels of one call")
    parser.add_argument("--seed", type=int, default=torch.seed() % 2**31)
    args = parser.parse_args()
    args.budget = Budget(args.seconds)
    device = torch.device(args.device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # SDPA warns why a backend does not take a shape; the table says that
        tables = on_cuda(args, device) if device.type == "cuda" else on_cpu(args, device)
        finish(tables, device, args.markdown)


if __name__ == "__main__":
    main()
