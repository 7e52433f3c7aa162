"""Keys whose blocks have means, in the Triton kernels: what append and pack write, and what attention reads of it.

On the CPU the kernels run in Triton's interpreter (tests/conftest.py), on a GPU they are compiled.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is an optional dependency")

from akvq_fx.kernels import attend_triton, cache_triton
from akvq_fx.kernels import cache as reference
from akvq_fx.kernels.attend import AttendCall
from akvq_fx.kernels.cache import named, read
from akvq_fx.kernels.layout import BLOCK, PADDING, TEXT, VISION, Layout, blocks_of
from akvq_fx.kernels.rotate import rotate_as_stored
from akvq_fx.storage import Storage
from tests.kernel_cases import (
    assert_close,
    assert_same,
    assert_written_in_blocks,
    bf16,
    drifting,
    f16,
    f32,
    layouts,
    moved,
    poison,
    randn,
    random_affine,
    seeds,
)
from tests.test_attend import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_FRESH = (None, None, None)
few = settings(max_examples=6, deadline=None)
UNEVEN = dict.fromkeys(("symmetric", "uneven", "rotated", "affine"), True)
LAYOUTS = {
    "2bit": Layout(16, f32, 2, body_clip=0.8, window=BLOCK, pivots=2, blocks=True),
    "4bit-groups": Layout(24, bf16, 4, group=8, window=5, blocks=True),
    "8bit": Layout(8, f16, 8, window=100, rotated=True, blocks=True),
    "text": Layout(16, f32, 2, text_bits=4, window=20, affine=True, rotated=True, blocks=True),
    "symmetric": Layout(16, f16, 2, window=BLOCK, pivots=2, rotated=True, symmetric=True, blocks=True),
    "uneven": Layout(24, f32, 2, window=BLOCK, **UNEVEN, blocks=True),
    "no-window": Layout(16, f32, 2, blocks=True),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def there(t):
    return None if t is None else t.clone().to(DEVICE)


def classes_of(B: int, T: int) -> torch.Tensor:
    """Every kind of token, a long left padding in the last row."""
    classes = torch.tensor([TEXT, VISION, VISION, TEXT, PADDING]).repeat(B, T)[:, :T].to(torch.uint8)
    classes[-1, : T // 3] = PADDING
    return classes


def wrote(cache, x, at, classes, pivots, layout, rotate=False):
    """The buffers after the kernels wrote to a copy of them."""
    cache = [there(buffer) for buffer in cache]
    cache_triton.append(cache, there(x), there(at), there(classes), there(pivots), layout, rotate)
    return [buffer.cpu() for buffer in cache]


def check_write(cache, x, at, classes, pivots, layout) -> list:
    """The buffers after the kernels wrote, which are as assert_written_in_blocks says."""
    done = wrote(cache, x, at, classes, pivots, layout)
    assert_written_in_blocks(cache, done, x, at, classes, pivots, layout)
    return done


def empty(layout: Layout, B: int, H: int, capacity: int) -> list:
    cache = layout.allocate(B, H, capacity, capacity if layout.text_bits else 0)
    if layout.affine:
        named(cache, layout)["affine"].copy_(random_affine(B, H, layout.head_dim, uneven=layout.uneven))
    return cache


def pivots_of(layout: Layout, B: int) -> torch.Tensor | None:
    return torch.tensor([[3, 70]] * B, dtype=torch.int32) if layout.pivots else None


@every_layout
def test_writes_across_blocks(layout):
    """A prompt, chunks, single tokens at and beside the edge of a block, and writes after a crop or a gap."""
    B, H = 2, 2
    cache = poison(empty(layout, B, H, 200), layout, 0)
    steps = [(0, 90), (90, 37), (127, 1), (128, 1), (129, 1), (64, 1), (60, 75), (135, 56), (191, 1), (192, 1), (10, 3)]
    steps.append((128, 1))  # a gap: the ring holds nothing of what is before
    for start, size in steps:
        x = drifting(200, B, H, layout.head_dim, seed=start)[:, :, start : start + size].to(layout.dtype)
        kinds = classes_of(B, 200)[:, start : start + size] if size != 37 else None
        at = torch.arange(start, start + size)
        cache = check_write(cache, x, at, kinds, pivots_of(layout, B) if start == 0 else None, layout)
    assert named(cache, layout)["means"][:, :, 1].abs().amax() > 4


@given(st.data(), layouts(head_dims=(8, 16), shares=(False,), blocks=(True,)), seeds)
@few
def test_any_layout(data, layout, seed):
    if not layout.blocks:
        return
    B, H = data.draw(st.sampled_from(((1, 3), (2, 1))), label="B, H")
    T = data.draw(st.integers(1, 150), label="prompt")
    x = drifting(220, B, H, layout.head_dim, seed=seed).to(layout.dtype)
    pivots = torch.zeros(B, layout.pivots, dtype=torch.int32) if layout.pivots else None
    at, classes = torch.arange(220), classes_of(B, 220)
    cache = poison(empty(layout, B, H, 220), layout, 0)
    cache = check_write(cache, x[:, :, :T], at[:T], classes[:, :T], pivots, layout)
    start = data.draw(st.integers(0, T), label="start")
    chunk = slice(start, start + data.draw(st.sampled_from((1, 1, 66)), label="chunk"))
    check_write(cache, x[:, :, chunk], at[chunk], None, None, layout)


@every_layout
def test_pack_is_append_to_new_buffers(layout):
    x, at, classes = drifting(100, 2, 2, layout.head_dim).to(layout.dtype), torch.arange(100), classes_of(2, 100)
    affine = random_affine(2, 2, layout.head_dim, uneven=layout.uneven) if layout.affine else None
    args = [there(t) for t in (x, at, classes, pivots_of(layout, 2), affine)]
    packed = cache_triton.pack(*args, 130, layout)
    appended = wrote(empty(layout, 2, 2, 130), x, at, classes, pivots_of(layout, 2), layout)
    for name, due, done in zip(layout.fields, appended, packed, strict=True):
        assert_same(name, due, done.cpu())


@pytest.mark.parametrize("name", ("8bit", "text", "uneven"))
@pytest.mark.parametrize("start, size", ((0, 70), (64, 1), (70, 1)), ids=str)
def test_tokens_are_rotated_first(name, start, size):
    """With rotate=True what is written is what it is of tokens that come rotated."""
    layout, at = LAYOUTS[name], torch.arange(start, start + size)
    cache, affine = empty(layout, 1, 2, 80), None
    x = drifting(80, D=layout.head_dim).to(layout.dtype)
    if layout.affine:
        affine = named(cache, layout)["affine"]
    stored = lambda tokens: rotate_as_stored(there(tokens), there(affine), layout.rotated)
    if start:
        cache = wrote(cache, stored(x[:, :, :start]), torch.arange(start), None, None, layout)
    due = wrote(cache, stored(x[:, :, at]), at, None, None, layout)
    done = wrote(cache, x[:, :, at], at, None, None, layout, rotate=True)
    for field, *buffers in zip(layout.fields, due, done, strict=True):
        assert_same(field, *buffers)


def test_tokens_of_any_strides():
    """On a GPU means of strided tokens are sums in another order than those of contiguous ones."""
    layout, at = LAYOUTS["2bit"], torch.arange(130)
    wide, kinds = drifting(260, 2, 2, 32).to(DEVICE), classes_of(2, 260).to(DEVICE)
    x, classes = wide[:, :, ::2, ::2], kinds[:, ::2]
    done = [buffer.cpu() for buffer in cache_triton.pack(x, at.to(DEVICE), classes, None, None, 140, layout)]
    assert_written_in_blocks(empty(layout, 2, 2, 140), done, x.cpu(), at, classes.cpu(), None, layout)


@pytest.mark.parametrize("broken", (torch.nan, torch.inf, -torch.inf), ids=str)
def test_a_broken_token_does_not_reach_its_neighbours(broken):
    """Neither in its block, nor, from the ring, in the next one."""
    layout = dataclasses.replace(LAYOUTS["symmetric"], dtype=f32, rotated=False)
    x, at = drifting(130), torch.arange(130)
    x[:, :, 70], x[:, :, 100, 3] = broken, broken
    cache = wrote(empty(layout, 1, 2, 130), x[:, :, :127], at[:127], None, None, layout)
    for t in (127, 128, 129):
        cache = wrote(cache, x[:, :, t : t + 1], at[t : t + 1], None, None, layout)
    assert named(cache, layout)["means"].isfinite().all()
    tokens = read(cache, 130, layout)
    hit = torch.zeros(130, dtype=torch.bool).index_fill(0, torch.tensor([70, 100]), True)
    assert tokens[:, :, ~hit].isfinite().all() and not tokens[:, :, hit].isfinite().all(-1).any()
    values = dataclasses.replace(layout, blocks=False)
    value = empty(values, 1, 2, 130)
    reference.write(value, randn(1, 2, 130, 16, seed=1), at, None, None, values)
    out, q = (
        attended(randn(1, 2, 1, 16, seed=2), cache, value, layout, values, 130, mask=~hit),
        randn(1, 2, 1, 16, seed=2),
    )
    seen = tokens.nan_to_num(0.0, 0.0, 0.0)
    assert_close("out", oracle(q, seen, read(value, 130, values), ~hit[None]), out)


def attended(q, key, value, layout, value_layout, length=None, mask=None, is_causal=False, fresh=NO_FRESH, splits=None):
    caches = [[there(buffer) for buffer in cache] for cache in (key, value)]
    asked = AttendCall(
        there(q), *caches, length, there(mask), None, is_causal, *map(there, fresh), layout, value_layout
    )
    return attend_triton.attend(asked, splits).cpu()


def filled(layout: Layout, B: int, T: int, capacity: int):
    """Keys and values of one prompt, and tokens after it; key tokens drift. What nothing was written to is poison."""
    values = dataclasses.replace(layout, blocks=False, uneven=False, affine=False)
    caches, at = [], torch.arange(T)
    for x, form in ((drifting(T, B, 2, layout.head_dim, turn=400), layout), (randn(B, 2, T, layout.head_dim), values)):
        cache = empty(form, B, 2, capacity)
        first = T - 3
        args = (at[:first], classes_of(B, T)[:, :first], pivots_of(layout, B), form)
        reference.write(cache, x[:, :, :first].to(form.dtype), *args)
        for t in range(first, T):
            one = slice(t, t + 1)
            reference.write(cache, x[:, :, one].to(form.dtype), at[one], classes_of(B, T)[:, one], None, form)
        caches.append(poison(cache, form, T))
    return *caches, layout, values


@every_layout
@pytest.mark.parametrize("groups, tokens", ((1, 1), (4, 2), (1, 20)), ids=str)
def test_attention_over_what_is_read(layout, groups, tokens):
    """Several blocks, heads that share keys, masks, a length on the device or not, and one token tile or several."""
    T = 160
    key, value, *pair = filled(layout, 2, T, 200)
    k, v = (read(cache, T, form) for cache, form in zip((key, value), pair, strict=True))
    q = randn(2, 2 * groups, tokens, layout.head_dim, seed=3, dtype=layout.dtype)
    seen = (randn(2, 1, tokens, T, seed=4) > 0) & (classes_of(2, T) != PADDING)[:, None, None]
    seen[..., T // 2] = True
    added = randn(1, 2 * groups, tokens, T, seed=5).masked_fill(~seen[:1], -torch.inf).to(layout.dtype)
    assert_close("all", oracle(q, k, v), attended(q, key, value, *pair, T))
    assert_close("mask", oracle(q, k, v, seen), attended(q, key, value, *pair, None, seen, splits=3))
    assert_close("added", oracle(q, k, v, added), attended(q, key, value, *pair, T, added, splits=2))
    causal = attended(q, key, value, *pair, T, is_causal=True)
    assert_close("causal", oracle(q, k, v, is_causal=True), causal)


@every_layout
def test_attention_after_a_crop_and_with_fresh_tokens(layout):
    """The tokens at hand are read as they are, whatever the means of their blocks; those before them as codes again."""
    key, value, *pair = filled(layout, 1, 160, 200)
    start, D = 100, layout.head_dim
    at = torch.arange(start, start + 40)
    fresh = (drifting(40, 1, 2, D, seed=7).to(layout.dtype), randn(1, 2, 40, D, seed=8, dtype=layout.dtype), at)
    q = randn(1, 4, 40, D, seed=3, dtype=layout.dtype)
    mask = (torch.arange(140) <= at[:, None])[None, None]
    tokens = []
    for cache, form, x in zip((key, value), pair, fresh[:2], strict=True):
        cropped = read(cache, 160, form)[:, :, :start]
        tokens.append(torch.cat([cropped, x], 2))
    out = attended(q, key, value, *pair, 140, mask, fresh=fresh)
    assert_close("before they are written", oracle(q, *tokens, mask), out)
    for cache, form, x in zip((key, value), pair, fresh[:2], strict=True):
        reference.write(cache, x, at, None, None, form)
    tokens = [read(cache, 140, form) for cache, form in zip((key, value), pair, strict=True)]
    for length in (140, None):
        out = attended(q[:, :, :1], key, value, *pair, length)
        assert_close("written", oracle(q[:, :, :1], *tokens), out)


MOVED = {name: LAYOUTS[name] for name in ("2bit", "text", "uneven")}
every_moved_layout = pytest.mark.parametrize("layout", MOVED.values(), ids=MOVED)


@every_moved_layout
def test_writes_behind_moved_tokens(layout):
    """Tokens that go on in a block, ones that begin one, and some that begin several."""
    key, _, layout, _ = filled(layout, 2, 160, 200)
    cache, layout, T = moved(key, layout, 160)
    storage = Storage(layout, cache, T, T, None)
    storage.grow(400)
    cache, begins = storage.buffers, (storage["block_of"][0, T:] != storage["block_of"][0, T]).nonzero()[0, 0]
    start = T
    for size in (1, int(begins) - 1, 1, 1, 90):
        x, at = drifting(400, 2, 2, layout.head_dim)[:, :, start : start + size].to(layout.dtype), torch.arange(size)
        cache, start = check_write(cache, x, at + start, None, None, layout), start + size
    assert named(cache, layout)["block_of"][0, start - 1] - named(cache, layout)["block_of"][0, T] == 2


@every_moved_layout
@pytest.mark.parametrize("tokens", (1, 20))
def test_attention_over_moved_tokens(layout, tokens):
    key, value, *pair = filled(layout, 2, 160, 200)
    (key, *keys), (value, *values) = (moved(cache, form, 160) for cache, form in zip((key, value), pair, strict=True))
    (layout, T), (form, _) = keys, values
    assert layout.moved and not torch.equal(*named(key, layout)["block_of"])
    k, v = read(key, T, layout), read(value, T, form)
    q = randn(2, 4, tokens, layout.head_dim, seed=3, dtype=layout.dtype)
    seen = named(key, layout)["classes"][:, None, None, :T] != PADDING
    assert_close("all", oracle(q, k, v), attended(q, key, value, layout, form, T))
    assert_close("mask", oracle(q, k, v, seen), attended(q, key, value, layout, form, None, seen, splits=3))


def test_means_that_no_code_needs_do_not_matter():
    """Of a block all of whose tokens the ring holds, and of blocks that nothing was written to."""
    layout = Layout(16, f32, 2, window=60, pivots=2, blocks=True)
    key, value, *pair = filled(layout, 1, 110, 200)
    q = randn(1, 2, 1, 16, seed=3)
    out = attended(q, key, value, *pair, 110)
    means = named(key, layout)["means"]
    assert out.isfinite().all() and means[:, :, blocks_of(110) :].isnan().all()
    means[:, :, 1] = torch.nan
    assert_same("out", out, attended(q, key, value, *pair, 110))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_captured_steps_begin_blocks():
    """One graph writes every token, also the first of a block, and attends to it: nothing waits for the device."""
    layout = Layout(64, bf16, 2, window=BLOCK, rotated=True, symmetric=True, blocks=True)
    values = dataclasses.replace(layout, blocks=False)
    x, v = drifting(140, 1, 2, 64).to(bf16).to(DEVICE), randn(1, 2, 140, 64, dtype=bf16).to(DEVICE)
    caches = [[there(b) for b in empty(form, 1, 2, 140)] for form in (layout, values)]
    step = [t[:, :, :1].clone() for t in (x, v)]
    at, q = torch.zeros(1, dtype=torch.int64, device=DEVICE), randn(1, 2, 1, 64, dtype=bf16).to(DEVICE)

    def decode():
        for cache, token, form in zip(caches, step, (layout, values), strict=True):
            cache_triton.append(cache, token, at, None, None, form, rotate=True)
        return attend_triton.attend(AttendCall(q, *caches, None, None, None, False, *NO_FRESH, layout, values), 2)

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode()
    plain = [b.cpu() for b in empty(layout, 1, 2, 140)]
    for t in range(140):
        for token, tokens in zip(step, (x, v), strict=True):
            token.copy_(tokens[:, :, t : t + 1])
        at.fill_(t)
        graph.replay()
        plain = wrote(plain, x[:, :, t : t + 1], at, None, None, layout, rotate=True)
    for name, due, done in zip(layout.fields, plain, caches[0], strict=True):
        assert_same(name, due, done.cpu())
    tokens = [read(cache, 140, form).cpu() for cache, form in zip(caches, (layout, values), strict=True)]
    assert_close("out", oracle(q.cpu(), *tokens), out.cpu())
