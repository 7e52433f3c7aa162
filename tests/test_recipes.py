"""Recipes: each method's arithmetic against loops over single numbers, its bits against the literature's, its
options."""

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from akvq_fx.config import PACKED_ONLY, AKVQConfig
from akvq_fx.cost import bits_at, recipe_bits, recipe_table
from akvq_fx.kernels.layout import DTYPES, Layout
from akvq_fx.kernels.quantizer import dequantize, quantize
from akvq_fx.kernels.rotate import reference as rotate_reference
from akvq_fx.kernels.salience import key_affine
from akvq_fx.recipes import RECIPES, SIMULATORS, Context, Simulation
from akvq_fx.recipes.arithmetic import rotate, round_trip_channels
from akvq_fx.recipes.skvq import clusters, distances, lloyd
from akvq_fx.recipes.turboquant import centroids
from tests.kernel_cases import assert_same, few, randn, seeds

f16, f64, e4m3 = torch.float16, torch.float64, torch.float8_e4m3fn
SIMULATED = [name for name, recipe in RECIPES.items() if recipe.simulated]
PACKED = [name for name in RECIPES if name not in SIMULATED]


def loop(numbers, bits, clip=1.0, kind=f16, among=None):
    """Asymmetric rounding of a list of floats that share a range."""
    kept = lambda v: float(torch.tensor(v, dtype=f64).to(kind))
    inside = [v for i, v in enumerate(numbers) if among is None or among[i]]
    lo, hi, top = min(inside) * clip, max(inside) * clip, 2**bits - 1
    scale, lo = kept(max((hi - lo) / top, 1e-5)), kept(lo)
    return [round(min(max((v - lo) / scale, 0.0), top)) * scale + lo for v in numbers]


def channels_loop(x, bits, group, clip=1.0, kind=f16):
    """loop over groups of channels of every token of x [..., D]."""
    out = x.clone()
    rows = out.view(-1, x.shape[-1])
    for row in rows:
        for start in range(0, x.shape[-1], group):
            row[start : start + group] = torch.tensor(loop(row[start : start + group].tolist(), bits, clip, kind))
    return out


def kivi_keys_loop(x, context, gains):
    out = x.clone()
    for start in range(0, context.past // 4 * 4, 2):
        for head in out[0]:
            for d in range(x.shape[-1]):
                head[start : start + 2, d] = torch.tensor(loop(head[start : start + 2, d].tolist(), 2))
    return out


def kivi_values_loop(x, context, gains):
    out = x.clone()
    settled = max(0, context.past - 4)
    out[:, :, :settled] = channels_loop(x[:, :, :settled].contiguous(), 2, 8)
    return out


def skvq_loop(group, calibrate, x, context, gains):
    out = x.clone()
    first = x[0].transpose(0, 1).flatten(1)[:calibrate].T.tolist()
    labels = [j // group for j in range(32)]  # a group of 32 spans two heads of 16
    if calibrate:
        labels = clusters(torch.tensor([(min(channel), max(channel)) for channel in first]), 32 // group).tolist()
    for t in range(2, context.past - 3 if context.past >= calibrate else 0):
        token = [x[0, j // 16, t, j % 16].item() for j in range(32)]
        for label in set(labels):
            at = [j for j in range(32) if labels[j] == label]
            for j, v in zip(at, loop([token[j] for j in at], 2, 0.92, e4m3), strict=True):
                out[0, j // 16, t, j % 16] = v
    return out


def turboquant_loop(x, context, gains):
    D, out = x.shape[-1], x.clone()
    H = torch.tensor([[(-1.0) ** (i & j).bit_count() / D**0.5 for j in range(D)] for i in range(D)], dtype=f64)
    levels = torch.tensor([-1.5104176, -0.4527800, 0.4527800, 1.5104176], dtype=f64) / D**0.5
    for head in out[0]:
        for t in range(context.past):
            length = head[t].norm()
            code = torch.stack([levels[(levels - y).abs().argmin()] for y in H @ head[t] / length])
            stored = (length / (code.norm() * D**0.5)).to(f16).to(f64)  # the length over that of the levels, in fp16
            head[t] = H @ code * stored * D**0.5
    return out


def calibquant_loop(x, context, shrink):
    out = x.clone()
    among = context.vision[0, : context.past].tolist()
    for head in out[0]:
        for d in range(x.shape[-1]):
            column = head[: context.past, d]
            read = loop(column.tolist(), 1, shrink, f16, among) if any(among) else column.tolist()
            column.copy_(torch.tensor([r if a else v for v, r, a in zip(column.tolist(), read, among, strict=True)]))
    return out


def smoothquant_loop(x, context, gains):
    out = x.clone()
    for h, head in enumerate(out[0]):
        head[: context.past] = channels_loop(head[: context.past] / gains[0, h], 2, 8) * gains[0, h]
    return out


def rtn_loop(x, context, gains):
    out = x.clone()
    out[:, :, : context.past] = channels_loop(x[:, :, : context.past].contiguous(), 3, 8)
    return out


def fp8_loop(x, context, gains):
    out = x.clone()
    for head in out[0]:
        for t in range(context.past):
            head[t] = torch.tensor([float(torch.tensor(min(max(v, -448.0), 448.0)).to(e4m3)) for v in head[t].tolist()])
    return out


LOOPS = {
    "kivi_keys(bits=2,group=2,residual=4)": kivi_keys_loop,
    "kivi_values(bits=2,group=8,residual=4)": kivi_values_loop,
    "skvq(bits=2,group=32,window=3,sink=2,clip=0.92,calibrate=0)": partial(skvq_loop, 32, 0),
    "skvq(bits=2,group=8,window=3,sink=2,clip=0.92,calibrate=7)": partial(skvq_loop, 8, 7),
    "turboquant(bits=2)": turboquant_loop,
    "calibquant_keys(bits=1,shrink=0.5,shift=3)": lambda x, context, gains: calibquant_loop(x, context, 0.5),
    "calibquant_values(bits=1,shrink=0.3)": lambda x, context, gains: calibquant_loop(x, context, 0.3),
    "smoothquant_keys(bits=2,group=8,alpha=0.5)": smoothquant_loop,
    "rtn(bits=3,group=8)": rtn_loop,
    "fp8()": fp8_loop,
}


def case(T, past, seed=0, dtype=f64, heads=2, rows=1):
    """Tokens [rows, heads, T, 16], a third of them vision tokens, and gains."""
    x = randn(rows, heads, T, 16, seed=seed, dtype=dtype) * 3
    vision = (torch.arange(T) % 3 == 1).expand(rows, -1)
    return x, Context(past, vision, randn(rows, heads, 16, seed=seed + 1).abs() + 0.1)


def test_every_simulator_has_a_loop():
    assert {text.split("(")[0] for text in LOOPS} == set(SIMULATORS)


@pytest.mark.parametrize("text", LOOPS)
@pytest.mark.parametrize("T, past", [(11, 10), (11, 11), (9, 8), (13, 5), (3, 0)])
def test_reads_what_the_loop_reads(text, T, past):
    x, context = case(T, past)
    read = Simulation.parse(text).read(x, context)
    torch.testing.assert_close(read, LOOPS[text](x, context, context.gains.double()), rtol=2e-6, atol=1e-6)
    if past > 8:
        assert not torch.equal(read, x), "nothing was quantized"


@pytest.mark.parametrize("text", LOOPS)
@given(T=st.integers(1, 20), back=st.integers(0, 20), seed=seeds, dtype=st.sampled_from(tuple(DTYPES.values())))
@few
def test_keeps_shape_dtype_and_the_tokens_of_the_call(text, T, back, seed, dtype):
    x, context = case(T, max(0, T - back), seed, dtype, rows=2)
    kept = x.clone()
    read = Simulation.parse(text).read(x, context)
    assert_same("x itself", kept, x)
    assert (read.shape, read.dtype) == (x.shape, x.dtype) and read.isfinite().all()
    assert_same("the call's tokens", x[:, :, context.past :], read[:, :, context.past :])
    alone = Simulation.parse(text).read(x[1:], Context(context.past, context.vision[1:], context.gains[1:]))
    assert_same("the second row alone", alone, read[1:])


@pytest.mark.parametrize("text", [text for text in LOOPS if "calibquant" not in text])
@given(T=st.integers(2, 24), seed=seeds)
@few
def test_a_settled_token_never_changes(text, T, seed):
    """What is quantized at T - 1 cached tokens reads the same at T: writing and reading time give one result."""
    simulation = Simulation.parse(text)
    x, later = case(T, T, seed)
    earlier = dataclasses.replace(later, past=T - 1, vision=later.vision[:, : T - 1])
    before, after = simulation.read(x[:, :, :-1], earlier), simulation.read(x, later)
    settled = before != x[:, :, :-1]
    assert_same("settled tokens", before[settled], after[:, :, :-1][settled])


@pytest.mark.parametrize(
    "text",
    ["kivi_values(bits=2,group=8,residual=4)", "skvq(bits=2,group=32,window=4,sink=2,clip=0.92,calibrate=0)",
     "skvq(bits=2,group=8,window=4,sink=2,clip=0.92,calibrate=4)"],
)  # fmt: skip
def test_recent_and_first_tokens_are_exact(text):
    x, context = case(20, 19)
    read = Simulation.parse(text).read(x, context)
    assert_same("recent", x[:, :, 15:], read[:, :, 15:])
    assert (read[:, :, 14] != x[:, :, 14]).any()
    if text.startswith("skvq"):
        assert_same("sinks", x[:, :, :2], read[:, :, :2])
        assert (read[:, :, 2] != x[:, :, 2]).any()


def test_kivi_flushes_a_block_after_it_was_used():
    simulation = Simulation.parse("kivi_keys(bits=2,group=2,residual=4)")
    for past, settled in ((3, 0), (4, 4), (7, 4), (8, 8)):
        x, context = case(past + 1, past)
        changed = (simulation.read(x, context) != x).any(-1).any(1)[0]
        assert changed.tolist() == [t < settled for t in range(past + 1)]


def interleaved(T):
    """Tokens [1, 2, T, 16] of either sign in turn; every other channel is 100 times as large."""
    sign = (-1.0) ** torch.arange(T)[:, None]
    return (sign + randn(1, 2, T, 16) / 8) * torch.tensor([1.0, 100.0]).repeat(8)


def skvq(x, past=None, group=8, window=3, calibrate=6):
    text = f"skvq(bits=2,group={group},window={window},sink=2,clip=0.92,calibrate={calibrate})"
    past = x.shape[2] if past is None else past
    return Simulation.parse(text).read(x, Context(past, torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool)))


def channels(x, at):
    """x [R, H, T, D] with the channels `at` of the heads laid side by side."""
    return x.transpose(1, 2).flatten(2)[..., at].unflatten(2, (x.shape[1], -1)).transpose(1, 2)


@given(seed=seeds, group=st.sampled_from((16, 32, 128)), dtype=st.sampled_from(tuple(DTYPES.values())))
@few
def test_skvq_without_calibration_has_groups_of_neighbours(seed, group, dtype):
    x = randn(2, 2, 12, 16, seed=seed, dtype=dtype)
    side_by_side = x[:, :, 2:8].transpose(1, 2).flatten(2)
    due = round_trip_channels(side_by_side, 2, group if group < 128 else 16, 0.92, lambda v: v.to(e4m3).to(v.dtype))
    due = torch.cat([x[:, :, :2], due.unflatten(2, (2, 16)).transpose(1, 2).to(dtype), x[:, :, 8:]], 2)
    assert_same("as without reordering", due, skvq(x, 11, group, calibrate=0))
    if group == 32:
        assert_same("one group", due, skvq(x, 11, group))


@given(seed=seeds, group=st.sampled_from((4, 8, 16, 32)), dtype=st.sampled_from(tuple(DTYPES.values())))
@few
def test_skvq_reads_the_same_in_any_order_of_channels(seed, group, dtype):
    x = randn(2, 2, 14, 16, seed=seed, dtype=f64) * randn(1, 2, 1, 16, seed=seed + 1).exp()
    x, order = x.to(dtype), torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    assert_same("permuted", channels(skvq(x, group=group), order), skvq(channels(x, order), group=group))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_skvq_puts_channels_of_one_size_in_one_group(dtype):
    """In a group of neighbours the small ones would be lost."""
    x = interleaved(40).to(dtype)
    error = lambda calibrate: (skvq(x, group=16, calibrate=calibrate) - x)[..., 0::2].float().square().mean()
    assert error(6) < error(0) / 100
    small, large = torch.arange(0, 32, 2), torch.arange(1, 32, 2)
    for at in (small, large):
        alone = skvq(channels(x, at), group=16, calibrate=0)
        assert_same("a group of its own", alone, channels(skvq(x, group=16), at))


@given(seed=seeds, more=st.integers(1, 12), group=st.sampled_from((4, 8, 16)))
@few
def test_skvq_groups_by_first_tokens_and_for_good(seed, more, group):
    """Later tokens, however large, and in several calls, leave what was read; before that nothing is quantized."""
    x = randn(1, 2, 12 + more, 16, seed=seed)
    x[:, :, 12:, seed % 16] *= 1000
    assert_same("earlier tokens", skvq(x[:, :, :12], group=group)[:, :, :9], skvq(x, group=group)[:, :, :9])
    assert_same("the past alone", skvq(x[:, :, :12], group=group)[:, :, :9], skvq(x, 12, group)[:, :, :9])
    other = x.clone()
    other[:, :, 6:8] = randn(1, 2, 2, 16, seed=seed + 1) * 10
    assert_same("beside others", skvq(x, group=group)[:, :, 8:], skvq(other, group=group)[:, :, 8:])
    assert_same("no order yet", x, skvq(x, 9, group, window=0, calibrate=10))
    changed = (skvq(x, 10, group, window=0, calibrate=10) != x).any(-1).any(1)[0]
    assert changed.tolist() == [2 <= t < 10 for t in range(12 + more)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("t", [3, 9])
def test_skvq_what_is_not_finite_stays_in_its_group(value, t):
    x = interleaved(14)
    spoilt = x.clone()
    spoilt[0, 1, t, 4] = value  # a small channel; token 3 is one that groups are made by, token 9 is not
    read, due = skvq(spoilt, group=16), skvq(x, group=16)
    assert_same("large channels", due[..., 1::2], read[..., 1::2])
    others = torch.arange(14) != t
    assert_same("other tokens", due[:, :, others], read[:, :, others])
    assert not torch.equal(due[:, :, t], read[:, :, t])


@pytest.mark.parametrize("size", [0.0, 1.0, 1e-30, 3e38])
@pytest.mark.parametrize("different", [1, 2, 32])
@pytest.mark.parametrize("group", [1, 4, 32, 128])
def test_skvq_of_few_different_channels_and_extreme_sizes(size, different, group):
    x = (torch.arange(32) % different / 32 * size).view(1, 2, 1, 16).expand(2, 2, 12, 16)
    for dtype in (torch.float32, torch.bfloat16):
        read = skvq(x.to(dtype), group=group)
        assert read.shape == x.shape and (read.isfinite().all() or size == 3e38)
        if size < 3e38 and different <= 32 // group:  # only clip and e4m3 err
            torch.testing.assert_close(read, x.to(dtype), rtol=0.15, atol=2e-3)


@given(seed=seeds, count=st.integers(1, 6))
@few
def test_clusters_are_those_of_k_means(seed, count):
    """Found where they are plain to see; else every point is nearest to the mean of its cluster, and none is empty."""
    true = torch.arange(30).remainder(count)[torch.randperm(30, generator=torch.Generator().manual_seed(seed))]
    centres = torch.stack([torch.arange(count) * 10.0, torch.arange(count) ** 2 * 7.0], 1)
    labels = clusters(centres[true] + randn(30, 2, seed=seed) * 0.1, count)
    assert ((labels[:, None] == labels) == (true[:, None] == true)).all()
    points = randn(30, 2, seed=seed)
    labels = clusters(points, count)
    assert labels.unique().tolist() == list(range(count))
    means = torch.stack([points[labels == label].mean(0) for label in range(count)])
    assert_same("nearest", distances(points, means).argmin(1), labels)
    assert_same("again", clusters(points, count), labels)
    assert_same("scaled", clusters(points * 2.0**20, count), labels)
    far = torch.tensor([[0.0, 0.0], [100.0, 100.0]])
    assert_same("a centre of none", far[1], lloyd(points, far, 3)[1])


@pytest.mark.parametrize("text", [text for text in LOOPS if "bits=" in text])
@given(seed=seeds)
@few
def test_more_bits_less_error(text, seed):
    x, context = case(64, 64, seed)
    error = {}
    for bits in (2, 4):
        head, _, tail = text.replace("group=2,residual=4", "group=16,residual=16").partition("bits=")
        read = Simulation.parse(f"{head}bits={bits}{tail[1:]}").read(x, context)
        error[bits] = (read - x).square().sum()
    shrunk = "shrink" in text  # a shrunken range cuts the same share off at any bits
    assert error[4] < error[2] * (1.05 if shrunk else 0.5)


def test_turboquant_levels_are_the_published_ones():
    assert centroids(1)[1] == pytest.approx((2 / torch.pi) ** 0.5)
    assert centroids(2)[2:] == pytest.approx((0.4527800, 1.5104176), abs=1e-6)
    assert centroids(3)[4:] == pytest.approx((0.2450942, 0.7560052, 1.3439093, 2.1519456), abs=1e-6)


def test_turboquant_keeps_lengths():
    x, context = case(12, 12)
    read = Simulation.parse("turboquant(bits=2)").read(x, context)
    torch.testing.assert_close(read.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)
    assert_same(
        "a zero",
        torch.zeros(1, 1, 1, 16),
        Simulation.parse("turboquant(bits=2)").read(torch.zeros(1, 1, 1, 16), context),
    )


@pytest.mark.parametrize("text", LOOPS)
def test_constant_tokens_read_as_they_are_or_near(text):
    x, context = case(16, 16)
    read = Simulation.parse(text).read(torch.full_like(x, 0.75), context)
    assert read.isfinite().all()
    if text.startswith(("kivi", "rtn", "fp8")):
        assert_same("constant", torch.full_like(x, 0.75), read)


@given(seed=seeds, D=st.sampled_from((16, 24, 80)))
@few
def test_rtn_is_the_packed_path(seed, D):
    """The simulated arithmetic and the packed buffers' agree to the bit, where both run."""
    x = randn(1, 2, 9, D, seed=seed, dtype=torch.float32)
    simulated = Simulation.parse("rtn(bits=2,group=8)").read(x, Context(9, torch.zeros(1, 9, dtype=torch.bool)))
    packed = dequantize(*quantize(x, 2, 1.0, D // 8), 2, torch.float32)
    torch.testing.assert_close(simulated, packed, rtol=0, atol=2e-3)  # a scale one fp16 step apart at most
    assert (simulated == packed).float().mean() > 0.9


@pytest.mark.parametrize("D", (16, 24, 80, 128))
def test_hadamard_is_the_kernels(D):
    x = randn(3, D, dtype=f64)
    torch.testing.assert_close(rotate(x), rotate_reference(x))


def test_smoothquant_gains():
    k, q = randn(1, 2, 5, 8), randn(1, 4, 5, 8, seed=1)
    valid = torch.tensor([[False, True, True, True, True]])
    centre, s = key_affine(k, q, valid, False, False, 0.5)[0]
    for h in range(2):
        for d in range(8):
            peak = max(abs(float(k[0, h, t, d])) for t in range(1, 5))
            query_peak = max(abs(float(q[0, g, t, d])) for g in (2 * h, 2 * h + 1) for t in range(1, 5))
            assert float(s[h, d]) == pytest.approx((peak / query_peak) ** 0.5, rel=2**-11)
    assert not centre.any()
    torch.library.opcheck(key_affine, (k, q, valid, False, False, 0.5))


def test_calibquant_squeezes_vision_scores():
    simulation = Simulation.parse("calibquant_keys(bits=1,shrink=0.5,shift=3)")
    a, seen = randn(2, 3, 2, 7, dtype=f64) * 5, torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0] * 7], dtype=torch.bool)
    read = simulation.scores(a, seen)
    assert_same("no vision", a[1], read[1])
    for h in range(3):
        chosen = a[0, h][:, seen[0]]
        low, high = chosen.min(), chosen.max()
        expected = (chosen - low) / (high - low + 1e-8) * (high - 3 - low) + low
        torch.testing.assert_close(read[0, h][:, seen[0]], expected)
        assert_same("text", a[0, h][:, ~seen[0]], read[0, h][:, ~seen[0]])


# what a number costs: section 3.12's table, T so long that windows vanish
@pytest.mark.parametrize(
    "name, bits",
    [("kivi", 3.0), ("kivi-g128", 2.25), ("skvq", 2.125), ("turboquant", 2.125), ("calibquant", 1.0), ("rtn2", 2.25),
     ("rtn4", 4.25), ("quarot", 2.25), ("smoothquant", 2.25), ("fp8", 8.0), ("akvq-vl", 2.25)],
)  # fmt: skip
def test_bits_of_a_long_cache(name, bits):
    vision = 1.0 if name == "calibquant" else 0.0
    assert recipe_bits(name, 128, 32, 2**22, vision, 32) == pytest.approx(bits, abs=4e-3)


def test_bits_count_windows_and_ranges():
    """By hand, 1,000 tokens, heads of 64: KIVI's 104 or 128, SKVQ's 133 at 16 bits; CalibQuant's text and ranges."""
    at = lambda text, vision=0.0: Simulation.parse(text).bits(64, 4, 1000, vision)
    assert at("kivi_keys(bits=2,group=32,residual=128)") == pytest.approx((104 * 16 + 896 * 3) / 1000)
    assert at("kivi_values(bits=2,group=128,residual=128)") == pytest.approx((128 * 16 + 872 * 2.5) / 1000)
    numbers = "skvq(bits=2,group=128,window=128,sink=5,clip=0.92,calibrate="
    for calibrate, middle in ((0, 867), (128, 867), (1000, 867), (1001, 0)):  # the last: nothing is quantized yet
        assert at(f"{numbers}{calibrate})") == pytest.approx(((1000 - middle) * 16 + middle * 2.125) / 1000)
    long = Simulation.parse(f"{numbers}128)").bits(64, 3, 2**24)
    assert long == pytest.approx(2.25, abs=1e-3)  # as many clusters as heads, where 128 does not divide
    assert at("calibquant_values(bits=1,shrink=0.3)", 0.6) == pytest.approx(0.4 * 16 + 0.6 + 0.032 + 8 / 256)
    assert at("smoothquant_keys(bits=2,group=128,alpha=0.5)") == pytest.approx(2.5 + 0.032)
    assert at("turboquant(bits=2)") == 2.25


@pytest.mark.parametrize("name", SIMULATED)
def test_a_short_cache_of_a_windowed_method_has_16_bits(name):
    for text in (RECIPES[name].keys, RECIPES[name].values):
        if "window" in text or "residual" in text:
            assert Simulation.parse(text).bits(128, 8, 100) == 16


def test_table_has_every_recipe_and_says_which_is_simulated():
    table = recipe_table(64, 8, vision=0.5, layers=4, tokens=(512, 4096))
    assert [row.name for row in table.rows] == list(RECIPES)
    assert [row.name for row in table.rows if row.how == "simulated"] == SIMULATED
    assert all(len(row.bits) == 2 and row.source for row in table.rows)
    assert "| `kivi` | simulated |" in str(table) and "50% vision" in str(table)
    layers = [{"text_bits": 4}, {"pivots": 15}]  # TSA and PSA, two each
    both = [
        Layout(64, f16, body_bits=2, rotated=True, window=128, shares_classes=s, **x) for x in layers for s in (0, 1)
    ]
    assert table.rows[0].bits[0] == pytest.approx(sum(bits_at(layout, 8, 512, 0.5) for layout in both) / 4)


@pytest.mark.parametrize("name", SIMULATED)
def test_layout_text_round_trips(name):
    for text in (RECIPES[name].keys, RECIPES[name].values):
        layout = Layout(64, torch.bfloat16, simulate=text)
        assert Layout.parse(str(layout)) == layout and str(layout).endswith("/" + text)
        assert not layout.lossless and layout.plain
        assert ("affine" in layout.fields) == text.startswith("smoothquant")


@pytest.mark.parametrize(
    "text",
    ["kivi", "kivi()", "kivi_keys()", "kivi_keys(bits=2)", "kivi_keys(group=32,bits=2,residual=128)", "fp8",
     "fp8(bits=8)", "rtn(bits=02,group=8)", "rtn(bits=2,group=8)/", "rtn(bits=2,group=8))", "rtn(bits=2.0,group=8)",
     "rtn(bits=-2,group=8)", "rtn(bits=2,,group=8)", "rtn(bits=1.2.3,group=8)", "nothing(bits=2)", "()",
     "rtn(bits=2,group=8)\n"],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="."):
        Layout.parse(f"f32/d64/b16/c1/g128/{text}")


@pytest.mark.parametrize("change", [{"body_bits": 2}, {"rotated": True}, {"affine": True}, {"window": 4}], ids=str)
def test_a_simulation_goes_with_originals_only(change):
    with pytest.raises(ValueError, match="accepted: none"):
        Layout(**{"head_dim": 64, "dtype": f16, "simulate": "fp8()", **change})


@given(st.sampled_from(list(RECIPES)), st.sampled_from((2, 4, 8, 16)))
@few
def test_the_users_option_wins(name, bits):
    assume(name in PACKED)
    config = AKVQConfig(recipe=name, body_bits=bits, window=7, tsa_layers=(5,))
    assert (config.body_bits, config.window, config.tsa_layers) == (bits, 7, (5,))
    rotates = bits < 16 and not name.startswith("rtn")
    assert config.rotate == rotates and AKVQConfig(recipe=name, body_bits=bits, rotate=True).rotate


def test_choices_of_packed_recipes():
    chosen = {name: AKVQConfig(recipe=name) for name in PACKED}
    of = lambda name: dataclasses.astuple(chosen[name])[1:8]
    assert of("akvq-vl") == (2, 4, 0.8, 1.0, 128, 128, 15) and of("akvq") == (2, 4, 0.8, 1.0, 128, 64, 15)
    assert of("rtn2") == (2, 4, 1.0, 1.0, 128, 0, 0) and of("rtn4") == (4, 4, 1.0, 1.0, 128, 0, 0)
    assert of("quarot") == (2, 4, 0.95, 1.0, 128, 0, 0)
    assert [name for name in PACKED if chosen[name].center_keys or chosen[name].balance_keys] == ["akvq", "akvq-even"]
    assert [name for name in PACKED if not chosen[name].rotate] == ["rtn2", "rtn4"]
    assert [name for name in PACKED if chosen[name].tsa_layers] == ["akvq-vl", "akvq", "akvq-even"]
    assert [name for name in PACKED if chosen[name].uneven_keys or chosen[name].symmetric_values] == ["akvq"]
    for without in ({"body_bits": 4}, {"body_bits": 16}, {"rotate": False}):
        assert not AKVQConfig(recipe="akvq", **without).uneven_keys
        with pytest.raises(ValueError, match="uneven_keys=True is not accepted; accepted: False where body_bits is"):
            AKVQConfig(uneven_keys=True, **without)


@pytest.mark.parametrize("name", SIMULATED)
def test_a_simulated_recipe_refuses_what_it_could_not_obey(name):
    config = AKVQConfig(recipe=name, inner="eager", value_rotation="online", prefill="quantized")
    assert config.simulated and not config.lossless
    for option in PACKED_ONLY:
        with pytest.raises(ValueError, match=f"option {option}=.* no value with recipe='{name}'"):
            AKVQConfig(recipe=name, **{option: 0.9 if "clip" in option else True if "_keys" in option else 8})
    with pytest.raises(ValueError, match="mode='reduce-overhead' .* cannot be read in a CUDA graph"):
        AKVQConfig(recipe=name, mode="reduce-overhead")
