"""append_cuda: what a GPU is not needed for, and its kernel pack on one. test_cache_triton.py runs append there too."""

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch

from akvq_fx.kernels import append_cuda, cache_triton
from akvq_fx.kernels import cache as reference
from akvq_fx.kernels.layout import PADDING, STATE_END, Layout, blocks_of
from akvq_fx.kernels.quantizer import STEPS
from akvq_fx.kernels.rotate import rotate_as_stored
from akvq_fx.storage import Storage
from tests.kernel_cases import (
    assert_caches_alike,
    assert_caches_same,
    assert_close,
    assert_written_in_blocks,
    bf16,
    drifting,
    moved,
    randn,
    random_affine,
)
from tests.test_attend_cuda import gpu, struct_fields

symmetric = functools.partial(Layout, body_bits=2, rotated=True, symmetric=True)
uneven = functools.partial(symmetric, affine=True, uneven=True)


def test_the_structs_here_and_there_have_the_same_members():
    assert struct_fields("Params", "append_cuda.cu") == [name for name, _ in append_cuda.Params._fields_]


@pytest.mark.parametrize(
    "x, layout, reason",
    [
        (torch.zeros(1, 1, 1, 16), Layout(16, bf16, body_bits=2), "x is torch.float32 and the cache torch.bfloat16"),
        (
            torch.zeros(1, 1, 1, 16).double(),
            Layout(16, torch.float64),
            "dtype is torch.float64, accepted: torch.float16, torch.bfloat16 or torch.float32",
        ),
        (torch.zeros(1, 1, 1, 520), Layout(520, torch.float32), "head_dim is 520, accepted: 8 to 512 in steps of 8"),
        (torch.zeros(1, 1, 1, 64), Layout(64, torch.float32, group=8), "groups is 8, accepted: 1 to 4"),
        (torch.zeros(1, 1, 16, 2).mT, Layout(16, torch.float32), "the channels of x are 2 numbers apart"),
    ],
    ids=str,
)
def test_refuses_with_a_reason(x, layout, reason):
    assert reason in append_cuda.refusal(x, layout)


def test_a_layout_is_compiled_with_its_own_numbers():
    macros = dict(append_cuda.macros(Layout(80, bf16, body_bits=2, body_clip=0.8, text_bits=4), 2, False))
    assert (macros["HEAD_DIM"], macros["DTYPE"], macros["ROTATE"], macros["BITS"], macros["TEXT_BITS"]) == (
        80,
        1,
        2,
        2,
        4,
    )
    assert (macros["CLIP"], macros["TEXT_CLIP"], macros["NORM"]) == ("0.8f", "1.0f", "0.25f")


def test_an_uneven_layout_is_compiled_with_the_orders_of_its_parts():
    macros = dict(append_cuda.macros(uneven(80, bf16), 2, False))
    assert (macros["SYMMETRIC"], macros["UNEVEN"], macros["GROUPS"]) == (1, 1, 2)
    assert (macros["NORM"], macros["MIDDLE_NORM"]) == ("0.5f", f"{8**-0.5!r}f")
    macros = dict(append_cuda.macros(symmetric(80, bf16), 1, False))
    assert (macros["SYMMETRIC"], macros["UNEVEN"], macros["GROUPS"], macros["NORM"]) == (1, 0, 1, "0.25f")


def test_the_steps_here_and_there_are_the_same():
    source = Path(append_cuda.__file__).with_name("append_cuda.cu").read_text()
    steps = {int(bits): float(step) for bits, step in re.findall(r"STEP_(\d) = ([.\d]+)f", source)}
    assert steps == STEPS


def test_what_only_the_triton_kernel_refuses_is_written_by_this_one():
    layout, launched = Layout(512, torch.float32, body_bits=2), []
    x, at = torch.zeros(1, 1, 1, 512), torch.tensor([0])
    assert "head_dim is 512" in cache_triton.refusal(x, layout)
    cache_triton.append(layout.allocate(1, 1, 4), x, at, None, None, layout, run=lambda *call: launched.append(call))
    assert len(launched) == 1


def test_which_prompts_are_packed_four_lanes_a_token():
    layout = Layout(64, bf16, body_bits=2)
    x = torch.zeros(1, 2, 64, 64, dtype=bf16)
    assert append_cuda.packs(x, layout) and append_cuda.packs(x, Layout(64, bf16, body_bits=2, text_bits=4))
    assert append_cuda.packs(x, symmetric(64, bf16))
    wide = torch.zeros(1, 2, 64, 68, dtype=bf16)
    others = [
        (x[:, :, 1:], layout),  # too few tokens
        (wide[..., :64], layout),  # rows 8 bytes off
        (wide.flatten()[4 : 4 + x.numel()].view_as(x), layout),
        (x.float(), Layout(64, torch.float32, body_bits=2)),
        (x, Layout(64, bf16, body_bits=4)),
        (x, Layout(64, bf16, body_bits=2, group=32)),
        (x, uneven(64, bf16)),
        (x, symmetric(64, bf16, blocks=True)),
        (torch.zeros(1, 2, 64, 96, dtype=bf16), Layout(96, bf16, body_bits=2)),
    ]
    assert not any(append_cuda.packs(*other) for other in others)


def prompt(layout, tokens, seed=0):
    """x, at, kinds and affine of a prompt on the GPU; constant, huge, tiny, broken, and on edges of codes."""
    x = randn(2, 3, tokens, layout.head_dim, seed=seed).cuda()
    x[0, 1] = x[0, 1] * 1e-6 + 3
    x[1, 0, :9] = torch.arange(layout.head_dim, device="cuda") % 7 * 0.5
    x[1, 1, 3, 5], x[1, 1, 4, 0], x[1, 2, 5, 7], x[0, 2, 6] = torch.nan, torch.inf, -torch.inf, 0
    x[0, 0, 8] *= 30000
    kinds = torch.randint(0, 4, (2, tokens), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    affine = random_affine(2, 3, layout.head_dim, seed, layout.uneven).cuda() if layout.affine else None
    return x.to(layout.dtype), torch.arange(tokens).cuda(), kinds.cuda(), affine


@gpu
@pytest.mark.parametrize("shares", (False, True), ids=("classes", "shares"))
@pytest.mark.parametrize("tokens", (64, 67, 1000))
@pytest.mark.parametrize("dtype", (torch.float16, bf16), ids=str)
@pytest.mark.parametrize("head_dim", (64, 128))
def test_a_prompt_packed_four_lanes_a_token_is_the_reference_s(head_dim, dtype, tokens, shares):
    layout = Layout(head_dim, dtype, body_bits=2, body_clip=0.8, window=70, shares_classes=shares)
    x, at, kinds, _ = prompt(layout, tokens)
    due = layout.allocate(2, 3, tokens + 5)  # on the CPU: PyTorch divides by a number otherwise on a GPU
    cache = [buffer.cuda() for buffer in due]
    reference.write(due, x.cpu(), at.cpu(), kinds.cpu(), None, layout)
    append_cuda.append(cache, x, at, kinds, None, layout)
    assert_caches_same(due, [buffer.cpu() for buffer in cache], layout)


@gpu
@pytest.mark.parametrize("form", ("as it is", "rotated", "affine"))
@pytest.mark.parametrize("tokens", (64, 67, 30000))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_four_lanes_or_a_warp_a_token_give_the_same_bits(head_dim, tokens, form, monkeypatch):
    layout = Layout(
        head_dim, bf16, body_bits=2, body_clip=0.8, window=128, rotated=form != "as it is", affine=form == "affine"
    )
    x, at, kinds, affine = prompt(layout, tokens, seed=1)
    four = append_cuda.pack(x, at, kinds, None, affine, tokens + 3, layout, rotate=True)
    monkeypatch.setattr(append_cuda, "PACKED_TOKENS", 10**9)
    warp = append_cuda.pack(x, at, kinds, None, affine, tokens + 3, layout, rotate=True)
    assert_caches_same([buffer.cpu() for buffer in warp], [buffer.cpu() for buffer in four], layout)


def assert_same_but_for_rounded_pivots(due, cache, layout):
    """PyTorch's rotation adds in another order: pivots may differ by a rounding, nothing else."""
    due, cache = ([buffer.cpu() for buffer in buffers] for buffers in (due, cache))
    assert_caches_same(due, cache, layout, skip=("pivots",))
    at = layout.fields.index("pivots")
    assert_close("pivots", due[at], cache[at])


def poisoned(shape, dtype, device):
    """torch.empty with garbage in it."""
    nothing = torch.zeros(shape, dtype=dtype, device=device)
    nothing.view(torch.uint8).fill_(0xA5)
    return nothing


def chosen_pivots(tokens, count):
    """[2, count] int32 on the GPU, of whole tokens: some free slots, one token twice."""
    rows = torch.randint(10, tokens, (2, count), generator=torch.Generator().manual_seed(count))
    rows[0, 1], rows[1, 0], rows[1, -1] = rows[0, 0], -1, -1
    return rows.int().cuda()


@gpu
@pytest.mark.parametrize("given", (3, 15, 20))
@pytest.mark.parametrize("form", ("as it is", "rotated", "affine"))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_every_byte_of_new_buffers_is_written(head_dim, form, given, monkeypatch):
    rotated, affine = form != "as it is", form == "affine"
    layout = Layout(head_dim, bf16, 2, window=60, pivots=15, body_clip=0.8, rotated=rotated, affine=affine)
    x, at, kinds, affine = prompt(layout, 200, seed=2)
    pivots = chosen_pivots(200, given)
    monkeypatch.setattr(append_cuda, "PACKED_TOKENS", 10**9)
    due = append_cuda.pack(x, at, kinds, pivots, affine, 230, layout, rotate=True)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "empty", poisoned)
    cache = append_cuda.pack(x, at, kinds, pivots, affine, 230, layout, rotate=True)
    monkeypatch.undo()
    assert_same_but_for_rounded_pivots(due, cache, layout)


@gpu
@pytest.mark.parametrize("tokens", (1, 67, 30000))
@pytest.mark.parametrize("dtype", (torch.float16, bf16), ids=str)
@pytest.mark.parametrize("head_dim", (64, 80, 128))
@pytest.mark.parametrize("made", (symmetric, uneven), ids=("symmetric", "uneven"))
def test_symmetric_caches_are_the_reference_s(made, head_dim, dtype, tokens):
    """x in the stored space: the numbers to quantize are the same, so that only sums differ."""
    layout = made(head_dim, dtype, window=70, pivots=15)
    x, at, kinds, affine = prompt(layout, max(tokens, 10), seed=5)
    x, at, kinds = x[:, :, :tokens], at[:tokens], kinds[:, :tokens]
    pivots = chosen_pivots(tokens, 15) if tokens > 10 else None
    due = layout.allocate(2, 3, tokens + 5)
    if affine is not None:
        reference.named(due, layout)["affine"].copy_(affine)
    cache = [buffer.cuda() for buffer in due]
    reference.write(due, x.cpu(), at.cpu(), kinds.cpu(), None if pivots is None else pivots.cpu(), layout)
    append_cuda.append(cache, x, at, kinds, pivots, layout)
    assert_caches_alike(due, [buffer.cpu() for buffer in cache], layout)


@gpu
@pytest.mark.parametrize("given", (3, 20))
@pytest.mark.parametrize("dtype", (torch.float16, bf16), ids=str)
@pytest.mark.parametrize("head_dim", (64, 128))
def test_every_byte_of_new_symmetric_buffers_is_written(head_dim, dtype, given, monkeypatch):
    layout = symmetric(head_dim, dtype, window=60, pivots=15, shares_classes=given == 3)
    x, at, kinds, _ = prompt(layout, 200, seed=2)
    pivots = chosen_pivots(200, given)
    monkeypatch.setattr(append_cuda, "PACKED_TOKENS", 10**9)
    due = append_cuda.pack(x, at, kinds, pivots, None, 230, layout, rotate=True)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "empty", poisoned)
    cache = append_cuda.pack(x, at, kinds, pivots, None, 230, layout, rotate=True)
    monkeypatch.undo()
    due, cache = ([buffer.cpu() for buffer in buffers] for buffers in (due, cache))
    assert_caches_alike(due, cache, layout, skip=("pivots",))
    assert_close("pivots", *(reference.named(buffers, layout)["pivots"].nan_to_num() for buffers in (due, cache)))


def without_other_text(cache, layout):
    """The buffers, with text slots of other tokens cleared: `append` fills these too, but nothing reads them."""
    b = reference.named(cache, layout)
    free = (b["text_at"] < 0)[:, None, :, None]
    return [t.masked_fill(free, 0) if name == "text_codes" else t for name, t in b.items()]


@gpu
@pytest.mark.parametrize("tokens", (64, 67, 12000))
@pytest.mark.parametrize("form", ("as it is", "rotated", "affine"))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_text_is_written_apart_from_the_body(head_dim, form, tokens, monkeypatch):
    rotated, mapped = form != "as it is", form == "affine"
    layout = Layout(head_dim, bf16, 2, text_bits=4, window=60, pivots=15, body_clip=0.8, rotated=rotated, affine=mapped)
    x, at, kinds, affine = prompt(layout, tokens, seed=4)
    pivots = chosen_pivots(tokens, 15)
    both = []
    for least in (64, 10**9):
        monkeypatch.setattr(append_cuda, "PACKED_TOKENS", least)
        cache = append_cuda.pack(x, at, kinds, pivots, affine, tokens + 9, layout, rotate=True)
        both.append([without_other_text(cache, layout)])
        cache = [buffer.clone() for buffer in cache]  # the prompt of a static cache that is used again
        append_cuda.append(cache, x * 0.5, at, kinds.flip(1), pivots, layout, rotate=True)
        both[-1].append(without_other_text(cache, layout))
    for fast, slow in zip(*both, strict=True):
        assert_same_but_for_rounded_pivots(slow, fast, layout)


@gpu
@pytest.mark.parametrize("start", (0, 7))
def test_pivots_of_a_static_cache_count_where_tokens_start_it(start, monkeypatch):
    layout = Layout(128, bf16, 2, window=64, pivots=15, body_clip=0.8, rotated=True, affine=True)
    x, at, kinds, affine = prompt(layout, 100, seed=3)
    cache = append_cuda.pack(x.flip(2), at, kinds, chosen_pivots(100, 15), affine, 128, layout, rotate=True)
    due, pivots = [buffer.clone() for buffer in cache], chosen_pivots(100, 15).flip(1)
    append_cuda.append(cache, x, at + start, kinds, pivots, layout, rotate=True)
    monkeypatch.setattr(append_cuda, "PACKED_TOKENS", 10**9)
    append_cuda.append(due, x, at + start, kinds, pivots, layout, rotate=True)
    assert_same_but_for_rounded_pivots(due, cache, layout)


BLOCKS = {
    "2": Layout(64, torch.float16, 2, body_clip=0.8, blocks=True),
    "4": Layout(40, torch.float32, 4, group=10, blocks=True),
    "8": Layout(24, bf16, 8, blocks=True),
    "symmetric": symmetric(128, bf16, blocks=True),
    "uneven": uneven(64, torch.float16, blocks=True),
    "uneven 80": uneven(80, torch.float32, blocks=True),
    "text": Layout(64, bf16, 2, text_bits=4, body_clip=0.8, blocks=True),
}
every_block = pytest.mark.parametrize("layout", BLOCKS.values(), ids=BLOCKS)


def turning(B, H, T, layout, seed=0):
    """Tokens [B, H, T, D] around a mean that turns once in 500 tokens, with three broken ones."""
    x = drifting(T, B, H, layout.head_dim, seed, turn=500)
    x[0, 0, 30, 3], x[0, 0, 64], x[-1, -1, 70, 1] = torch.nan, torch.inf, -torch.inf
    return x.to(layout.dtype)


def appended(cache, x, at, kinds, layout, rotate=False):
    """The buffers after the kernel wrote to a copy of them; all are on the CPU."""
    cache = [buffer.cuda() for buffer in cache]
    append_cuda.append(cache, x.cuda(), at.cuda(), None if kinds is None else kinds.cuda(), None, layout, rotate)
    return [buffer.cpu() for buffer in cache]


def check_append(cache, x, at, kinds, layout):
    """The buffers after the kernel wrote, which are as assert_written_in_blocks says."""
    made = appended(cache, x, at, kinds, layout)
    assert_written_in_blocks(cache, made, x, at, kinds, None, layout)
    return made


@gpu
@every_block
@pytest.mark.parametrize("window", (0, 5, 64, 100))
def test_blocks_are_begun_as_the_reference_begins_them(layout, window):
    """In prompts, chunks and steps; after a crop, past a gap, and where a row is mostly padding."""
    layout = dataclasses.replace(layout, window=window)
    B, H, T = 2, 5, 330
    x, kinds = turning(B, H, T, layout), torch.tensor([0, 1, 3, 1, 1], dtype=torch.uint8).repeat(B, T)[:, :T]
    kinds[1, :55] = PADDING
    cache = layout.allocate(B, H, T, T)
    reference.named(cache, layout)["means"].fill_(torch.nan)
    writes = [(0, 62), *((t, 1) for t in range(62, 67)), (60, 3), *((t, 1) for t in range(63, 66)), (66, 62)]
    writes += [(128, 1), (128, 1), (120, 8), (128, 1), (192, 1), (193, 127), (320, 1), (321, 1)]
    for start, count in writes:
        part = slice(start, start + count)
        cache = check_append(cache, x[:, :, part], torch.arange(T)[part], kinds[:, part], layout)
    end, _, *others = reference.named(cache, layout)["state"].tolist()
    assert end == 322 and not any(others)


@gpu
@every_block
def test_a_step_that_rotates_begins_a_block_of_rotated_tokens(layout):
    layout = dataclasses.replace(layout, window=64, rotated=True, affine=True)
    x, affine = (
        turning(2, 3, 129, layout, 1).nan_to_num(0, 0, 0),
        random_affine(2, 3, layout.head_dim, 1, layout.uneven),
    )
    cache = layout.allocate(2, 3, 200, 200)
    reference.named(cache, layout)["affine"].copy_(affine)
    stored, at = rotate_as_stored(x, affine, True), torch.arange(129)
    kept = [cache, cache]
    for part in (slice(0, 127), slice(127, 128), slice(128, 129)):
        kept = [
            appended(kept[0], x[:, :, part], at[part], None, layout, rotate=True),
            appended(kept[1], stored[:, :, part], at[part], None, layout),
        ]
    means = [reference.named(cache, layout)["means"][:, :, :3] for cache in kept]
    assert_close("means", *means)
    one, other = (reference.read(cache, 129, layout).double() for cache in kept)
    assert ((one - other).norm() / other.norm()).item() < 0.02


@gpu
def test_many_heads_begin_a_block_before_the_state_moves_on():
    layout = uneven(64, bf16, window=40, blocks=True)
    x, at = turning(12, 48, 130, layout), torch.arange(130)
    cache = layout.allocate(12, 48, 130)
    for part in (slice(0, 128), slice(128, 129), slice(129, 130)):
        cache = check_append(cache, x[:, :, part], at[part], None, layout)


@gpu
@every_block
def test_writes_behind_moved_tokens(layout):
    """Tokens that go on in a block, ones that begin one, and some that begin several."""
    layout = dataclasses.replace(layout, window=20)
    x, affine = drifting(400, 2, 2, layout.head_dim).to(layout.dtype), None
    if layout.affine:
        affine = random_affine(2, 2, layout.head_dim, 1, layout.uneven)
    cache = reference.pack(x[:, :, :160], torch.arange(160), None, None, affine, 200, str(layout))
    cache, layout, start = moved(cache, layout, 160)
    storage = Storage(layout, cache, start, start, None)
    storage.grow(400)
    cache, begins = storage.buffers, (storage["block_of"][0, start:] != storage["block_of"][0, start]).nonzero()[0, 0]
    for size in (1, int(begins) - 1, 1, 1, 90, 40, *[1] * 30):
        cache = check_append(cache, x[:, :, start : start + size], torch.arange(size) + start, None, layout)
        start += size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_begins_blocks():
    layout = uneven(128, bf16, window=64, blocks=True)
    x = turning(2, 4, 200, layout).nan_to_num(0, 0, 0).cuda()
    affine = random_affine(2, 4, 128, 1, True).cuda()

    def packed():
        return append_cuda.pack(x[:, :, :60], torch.arange(60).cuda(), None, None, affine, 256, layout, rotate=True)

    due, captured = packed(), packed()
    token, at = x[:, :, :1].clone(), torch.tensor([60]).cuda()
    append_cuda.append(packed(), token, at, None, None, layout, rotate=True)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_cuda.append(captured, token, at, None, None, layout, rotate=True)
    for t in range(60, 200):
        token.copy_(x[:, :, t : t + 1])
        at.fill_(t)
        graph.replay()
        append_cuda.append(due, x[:, :, t : t + 1], torch.tensor([t]).cuda(), None, None, layout, rotate=True)
    assert_caches_same(due, captured, layout)
    assert reference.named(captured, layout)["state"][STATE_END] == 200 and blocks_of(200) == 4
