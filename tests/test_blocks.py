"""Keys whose blocks have a mean of their own: what is read, which tokens a mean is of, and what happens to a cache."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from akvq_fx import PackedKV
from akvq_fx.kernels import cache as ops
from akvq_fx.kernels.layout import BLOCK, PADDING, TEXT, VISION, Layout, blocks_of
from akvq_fx.kernels.salience import key_affine
from akvq_fx.storage import Storage
from akvq_fx.transformers_names import cache_of
from tests.kernel_cases import (
    Case,
    assert_close,
    assert_same,
    block_means,
    drifting,
    layouts,
    poison,
    randn,
    seeds,
    splits,
)
from tests.zoo import ZOO

f32 = torch.float32
few = settings(max_examples=10, deadline=None)
PLAIN = Layout(16, f32, body_bits=2, window=BLOCK, pivots=2, symmetric=True)
LAYOUT = dataclasses.replace(PLAIN, blocks=True)


def written(layout: Layout, x: torch.Tensor, steps: list[int], classes: torch.Tensor | None = None) -> list:
    """A cache that took x in writes of these sizes, by pack and then append."""
    first, *rest = [size for size in steps if size]
    of = lambda begin, end: None if classes is None else classes[:, begin:end]
    pivots = torch.full((len(x), layout.pivots), -1, dtype=torch.int32) if layout.pivots else None
    cache = torch.ops.akvq.pack(
        x[:, :, :first], torch.arange(first), of(0, first), pivots, None, x.shape[2], str(layout)
    )
    for size in rest:
        at = torch.arange(first, first + size)
        torch.ops.akvq.append(cache, x[:, :, first : first + size], at, of(first, first + size), None, str(layout))
        first += size
    return cache


@given(st.data(), st.sampled_from((0, 5, 40, 64, 100)), st.integers(1, 150), seeds)
@few
def test_a_mean_is_of_what_was_known_when_its_block_began(data, window, T, seed):
    layout = dataclasses.replace(LAYOUT, window=window, pivots=0)
    x = drifting(T, B=2, seed=seed)
    classes = torch.tensor([TEXT, VISION, PADDING, TEXT]).repeat(60)[:T].expand(2, -1).to(torch.uint8).clone()
    classes[1, : T // 2] = PADDING
    steps = [size for size in data.draw(splits(T)) if size]
    if steps[-1] > 3:
        steps[-1:] = [steps[-1] - 3, 1, 1, 1]
    cache = ops.named(written(layout, x, steps, classes), layout)
    assert_close("means", block_means(x, classes, layout, steps), cache["means"])


@given(st.data(), layouts(shares=(False,), blocks=(True,)), st.integers(1, 150), seeds)
@few
def test_a_prompt_is_read_as_codes_and_means_say(data, layout, T, seed):
    if not layout.blocks:
        return
    x = drifting(T, D=layout.head_dim, seed=seed).to(layout.dtype)
    classes = torch.tensor([TEXT, VISION, PADDING]).repeat(50)[None, :T].to(torch.uint8)
    pivots = torch.full((1, layout.pivots), -1, dtype=torch.int32) if layout.pivots else None
    affine = torch.ones(1, 3 if layout.uneven else 2, 2, layout.head_dim).half() if layout.affine else None
    case = Case(layout, x, classes, pivots, affine, T + 3)
    cache = case.pack()
    means = ops.named(cache, layout)["means"][:, :, : blocks_of(T)]
    assert_close("means", block_means(x, classes, layout), means)
    assert_close("read", case.expected(means), ops.read(cache, T, layout))
    assert_same("poisoned", ops.read(cache, T, layout), ops.read(poison(cache, layout, T), T, layout))


def test_a_turning_mean_costs_no_bits():
    """Read in steps after a short prompt, against tokens with no mean at all; without means of blocks it is far off."""
    x, T = drifting(800), 800
    still = drifting(800)
    still[..., :2] -= drifting(800)[..., :2] - randn(1, 2, 800, 16)[..., :2]
    error = {}
    for name, layout, tokens in (("blocks", LAYOUT, x), ("prompt", PLAIN, x), ("none", PLAIN, still)):
        cache = written(layout, tokens, [64] + [1] * 70 + [64] * 10 + [26])
        error[name] = (ops.read(cache, T, layout) - tokens)[:, :, :-BLOCK].square().mean().sqrt().item()
    assert error["blocks"] < 1.1 * error["none"] and error["prompt"] > 2 * error["none"], error


def test_a_broken_token_does_not_reach_its_neighbours():
    x = drifting(200)
    x[:, :, 70] = torch.nan
    x[:, :, 75, 3] = torch.inf
    read = ops.read(written(LAYOUT, x, [200]), 200, LAYOUT)
    broken = torch.zeros(200, dtype=torch.bool).index_fill(0, torch.tensor([70, 75]), True)
    assert read[:, :, ~broken].isfinite().all() and not read[:, :, broken].isfinite().all(-1).any()


def test_registration():
    x, at, pivots = drifting(70), torch.arange(70), torch.full((1, 2), -1, dtype=torch.int32)
    torch.library.opcheck(ops.pack, (x, at, None, pivots, None, 90, str(LAYOUT)))
    cache = written(LAYOUT, drifting(130)[:, :, :70], [70])
    cache = Storage(LAYOUT, cache, 70, 70, None)
    cache.grow(130)
    torch.library.opcheck(ops.append, (cache.buffers, x[:, :, :1], torch.tensor([70]), None, None, str(LAYOUT)))


def packed(x: torch.Tensor, layout: Layout = LAYOUT) -> PackedKV:
    T = x.shape[2]
    return PackedKV.view_of(Storage(layout, written(layout, x, [T]), T, T, None), T)


def test_a_cropped_cache_goes_on_in_the_block_it_is_in():
    """The block that a crop ends in keeps its mean, later ones get new ones; earlier tokens read as they did."""
    x, others = drifting(300), drifting(300, seed=1)
    kept = packed(x)[:, :, :100]
    before = kept.dequantize()
    for t in range(100, 230):
        kept = torch.cat([kept, others[:, :, t : t + 1]], 2)
    assert isinstance(kept, PackedKV) and kept.shape[2] == 230
    error = (kept.dequantize() - torch.cat([x[:, :, :100], others[:, :, 100:230]], 2)).square().mean(-1).sqrt()
    assert error[:, :, :166].max() < 2.0 and (error[:, :, 166:] < 1e-5).all(), "the ring is exact"
    # tokens that the ring held are read by their codes now
    assert_same("the body before it", before[:, :, :36], kept.dequantize()[:, :, :36])


@pytest.mark.parametrize(
    "choose",
    [lambda t: t[[1, 0]], lambda t: t.repeat(2, 1, 1, 1), lambda t: torch.cat([t, t]), lambda t: t.clone(),
     lambda t: t[:, :, :150], lambda t: t.repeat_interleave(2, 0)],
    ids=["rows", "repeat", "joined", "clone", "prefix", "interleave"],
)  # fmt: skip
def test_rows_and_prefixes_stay_codes(choose):
    x = drifting(170, B=2)
    cache = packed(x)
    made = choose(cache)
    assert isinstance(made, PackedKV)
    body = slice(0, 80)  # before any ring
    assert_same("body", choose(cache.dequantize())[:, :, body], made.dequantize()[:, :, body])
    longer = torch.cat([made, made.dequantize()[:, :, :1]], 2)
    assert isinstance(longer, PackedKV)
    assert_same("and go on", made.dequantize()[:, :, body], longer.dequantize()[:, :, body])


def test_saved_and_loaded_it_goes_on_as_before(tmp_path):
    x = drifting(200)
    cache = packed(x[:, :, :127])
    PackedKV.save({"keys": cache}, tmp_path / "cache")
    loaded = PackedKV.load(tmp_path / "cache")["keys"]
    assert_same("read", cache.dequantize(), loaded.dequantize())
    for t in range(127, 131):  # a block begins at 128
        cache, loaded = (torch.cat([kept, x[:, :, t : t + 1]], 2) for kept in (cache, loaded))
    assert_same("longer", cache.dequantize(), loaded.dequantize())
    assert cache._storage()["means"][:, :, 2].abs().amax() > 1


def test_a_static_cache_restarts():
    layout, x, others = LAYOUT, drifting(200), drifting(200, seed=2)
    cache = written(layout, x, [200])
    at = torch.arange(130)
    torch.ops.akvq.restart(cache, at, None, str(layout))
    torch.ops.akvq.append(cache, others[:, :, :130], at, None, None, str(layout))
    fresh = written(layout, others[:, :, :130], [130])
    assert_same("as a new one", ops.read(fresh, 130, layout), ops.read(cache, 130, layout))


def test_deviations_are_about_the_means_of_blocks():
    """Gains and order are of what codes hold: a channel that only drifts needs few bits."""
    k, q = drifting(600, turn=600), randn(1, 2, 600, 16, seed=3)
    about_one = key_affine(k, q, None, True, True, None, True)
    about_blocks = key_affine(k, q, None, True, True, None, True, True)
    assert_same("centre", about_one[:, 0], about_blocks[:, 0])
    assert (about_one[:, 1, :, :2] > 1.5 * about_blocks[:, 1, :, :2]).all()
    valid = torch.ones(1, 600, dtype=torch.bool)
    valid[:, :100] = False
    spoilt = k.clone()
    spoilt[:, :, :100] = 1e4
    assert_same("padding", key_affine(spoilt, q, valid, True, True, None, True, True), key_affine(
        torch.where(valid[:, None, :, None], k, 0.0), q, valid, True, True, None, True, True))  # fmt: skip


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["growing", "static"])
def test_generate_across_a_block(one_layer, cache):
    """Growing and static caches begin the same blocks, in prompt and steps, and read alike; a second turn goes on."""
    model, inputs = ZOO["llama"]()
    ids = inputs["input_ids"][:1].repeat(1, 8)[:, :100]
    model.compile(backend="akvq", options={"inner": "eager", "recipe": "akvq"})
    how = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(input_ids=ids, **how, **cache)
    keys = cache_of(out).layers[0].keys
    assert isinstance(keys, PackedKV) and keys.layout_of.blocks and keys.layout_of.uneven
    means = keys._storage()["means"]
    assert means[:, :, :3].abs().amax((1, 3)).gt(0).all() and not means[:, :, 3:].any(), "the third begins at 128"
    expected = torch.stack(out.logits)
    torch._dynamo.reset()
    model.compile(backend="akvq", options={"inner": "eager", "recipe": "akvq"})
    other = {} if cache else {"cache_implementation": "static"}
    torch.testing.assert_close(torch.stack(model.generate(input_ids=ids, **how, **other).logits), expected)
