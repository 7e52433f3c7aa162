"""find_pivots and key_affine with Triton kernels: peaks and medians to the bit, maps as the reference's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from akvq_fx.kernels import salience_triton
from akvq_fx.kernels.salience import GAIN_RANGE, find_pivots_reference, key_affine_reference, shared_in_pairs
from tests.kernel_cases import FEWER, assert_close, assert_same, bf16, f16, f32, randn, seeds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
every_dtype = pytest.mark.parametrize("dtype", (f16, bf16, f32), ids=str)
few = settings(max_examples=15 // FEWER, deadline=None)
ORDINARY, MASSIVE = 3.0, 3000.0
BROKEN = (torch.nan, torch.inf, -torch.inf)


def to_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def left_padding(B, T, real):
    """The last row has `real` real tokens, the others are full."""
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[-1, : T - real] = False
    return valid


@every_dtype
@pytest.mark.parametrize("width", (1, 2, 7, 64, 100, 1031))
def test_peaks_and_medians_are_torch_s(width, dtype):
    h = randn(2, 5, width, dtype=dtype) * 100
    h[0, 1], h[0, 2, width // 2 :] = 7.0, -h[0, 2, : width - width // 2]
    h[1, 0, -1], h[1, 1, 0], h[1, 2, 0] = BROKEN[0], BROKEN[1], BROKEN[2]
    h[1, 3], h[1, 4] = 0.0, randn(width, seed=1) * torch.finfo(dtype).tiny
    peaks, medians = (t.cpu() for t in salience_triton.peaks_and_medians(h.to(DEVICE), True))
    due = h.abs().amax(-1).float().nan_to_num(0.0, posinf=torch.finfo(f32).max)
    assert_same("peaks", due, peaks)
    assert_same("medians", h.abs().float().median(-1).values, medians)
    assert_same("peaks alone", due, salience_triton.peaks_and_medians(h.to(DEVICE), False)[0].cpu())


def check_pivots(h, valid, count, mode):
    """The reference's first token, then tokens as large as its; which of the equally large ones is open."""
    args = (count, mode, 100.0, 1000.0)
    found = salience_triton.find_pivots(*to_device(h, valid), *args).cpu()
    due = find_pivots_reference(h, valid, *args)
    assert (found.shape, found.dtype) == (due.shape, torch.int32)
    peak = h.abs().amax(-1).float().nan_to_num(0.0)
    size = lambda pivots: torch.where(pivots < 0, -1.0, peak.gather(1, pivots.long().clamp_min(0)))
    assert_same("first", due[:, :1], found[:, :1])
    assert_same("sizes", size(due), size(found))
    for row, pivots in enumerate(found.tolist()):
        real = [token for token in pivots if token >= 0]
        assert len(set(real)) == len(real)
        assert valid is None or valid[row, real].all()


@every_dtype
@pytest.mark.parametrize("mode", ("massive", "topk"))
@given(st.data(), st.integers(1, 3), st.integers(1, 12), st.integers(1, 40), st.integers(1, 15), seeds)
@few
def test_pivots_are_the_reference_s(mode, dtype, data, B, T, width, count, seed):
    h = randn(B, T, width, seed=seed, dtype=dtype).clamp(-ORDINARY, ORDINARY)
    for value in (MASSIVE, -2 * MASSIVE, *BROKEN):
        row, token, place = (data.draw(st.integers(0, size - 1)) for size in (B, T, width))
        h[row, token, place] = value
    holes = randn(B, T, seed=seed + 2) > 0
    valid = data.draw(st.sampled_from((None, holes, left_padding(B, T, data.draw(st.integers(0, T))))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(salience_triton, "MAX_RANKED", data.draw(st.sampled_from((4, 16384))))
        check_pivots(h, valid, count, mode)


def test_pivots_of_strided_activations():
    wide = randn(7, 3, 2, 40)
    wide[4, 1, 1, 8] = MASSIVE
    h = wide.to(DEVICE).permute(2, 0, 1, 3)[:, :, 1, ::2]
    for mode in ("massive", "topk"):
        found = salience_triton.find_pivots(h, None, 3, mode, 100.0, 1000.0).cpu()
        assert_same(mode, find_pivots_reference(h.cpu(), None, 3, mode, 100.0, 1000.0), found)
    valid = left_padding(7, 2, 1).to(DEVICE).T
    found = salience_triton.find_pivots(h, valid, 3, "topk", 0.0, 0.0).cpu()
    assert_same("masked", find_pivots_reference(h.cpu(), valid.cpu(), 3, "topk", 0.0, 0.0), found)


@every_dtype
def test_of_equal_peaks_the_first_token_leads(dtype):
    h = torch.tensor([[2, 5, 5, torch.nan, 7, torch.inf, 0, 7], [0] * 8, [1] * 8], dtype=dtype)[..., None]
    valid = torch.ones(3, 8, dtype=torch.bool)
    valid[1], valid[2, [0, 1, 4]] = False, False
    found = salience_triton.find_pivots(*to_device(h, valid), 10, "topk", 0.0, 0.0).cpu()
    assert found.tolist() == [[0, 5, 4, 7, 1, 2, 3, 6, -1, -1], [-1] * 10, [2, 3, 5, 6, 7] + [-1] * 5]


@pytest.mark.parametrize("tokens", (1, 1000, salience_triton.MAX_RANKED))
def test_a_row_as_long_as_is_ranked(tokens):
    peaks = randn(2, tokens).abs()
    peaks[1, -1] = MASSIVE
    found = salience_triton.largest_peaks(*to_device(peaks, None), 9).cpu()
    peaks[:, 0] = torch.inf
    due = peaks.sort(dim=-1, descending=True, stable=True).indices[:, :9].int()
    assert_same("pivots", torch.nn.functional.pad(due, (0, 9 - due.shape[1]), value=-1), found)


def check_affine(k, q, valid, centre=True, balance=True):
    affine = salience_triton.key_affine(*to_device(k, q, valid), centre, balance).cpu()
    due = key_affine_reference(k, q, valid, centre, balance)
    assert (affine.shape, affine.dtype) == (due.shape, f16)
    assert_close("map", due, affine)


@every_dtype
@pytest.mark.parametrize("centre, balance", [(True, True), (True, False), (False, True), (False, False)])
def test_map_is_the_reference_s(centre, balance, dtype):
    k = (randn(2, 2, 9, 24) * torch.arange(1, 25) / 8 + 3).to(dtype)
    check_affine(k, randn(2, 6, 9, 24, dtype=dtype), None, centre, balance)


def check_order(k, q, valid, centre=True, balance=True, distance=0, rotary=0):
    """Channels may change places with those whose lambda is as large but for a rounding."""
    affine = salience_triton.key_affine(*to_device(k, q, valid), centre, balance, True, distance, rotary).cpu()
    due = key_affine_reference(k, q, valid, centre, balance, True, distance, rotary)
    assert (affine.shape, affine.dtype) == (due.shape, f16)
    assert_close("map", due[:, :2], affine[:, :2])
    weight = lambda_of(k, q, valid, distance, rotary)
    order, due = affine[:, 2].long(), due[:, 2].long()
    assert_same("channels", torch.arange(k.shape[3]).expand(order.shape), order.sort(-1).values)
    torch.testing.assert_close(weight.gather(-1, order), weight.gather(-1, due), rtol=1e-4, atol=1e-6)


def lambda_of(k, q, valid, distance=0, rotary=0):
    """[B, H, D] in float64, of finite numbers: std(key) * rms(query)."""
    weight = torch.ones(k.shape[0], k.shape[2]) if valid is None else valid.double()
    count = weight.sum(-1, keepdim=True)
    weight = (weight / count)[:, None, :, None]
    k, q = k.double(), q.double()
    variance = ((k - (k * weight).sum(2, keepdim=True)).square() * weight).sum(2)
    squares = (q.square() * weight).sum(2) if q.shape[2] == k.shape[2] else q.square().mean(2)
    squares = squares.unflatten(1, (k.shape[1], -1)).mean(2)
    if distance:
        variance, squares = (shared_in_pairs(x, count, distance, rotary) for x in (variance, squares))
    return variance.sqrt() * squares.sqrt()


@every_dtype
@pytest.mark.parametrize("asked, centre, balance", [(90, True, True), (7, False, False)])
def test_order_of_channels_is_the_reference_s(centre, balance, asked, dtype):
    for head_dim in (24, 64):
        k = (randn(2, 2, 90, head_dim) * 2 ** randn(head_dim, seed=1) + 3).to(dtype)
        q = (randn(2, 6, asked, head_dim, seed=2) * 2 ** randn(head_dim, seed=3)).to(dtype)
        for pairs in ((0, 0), (head_dim // 2, head_dim), (1, head_dim), (4, 8)):
            check_order(k, q, None, centre, balance, *pairs)
            check_order(k, q, left_padding(2, 90, 30), centre, balance, *pairs)


def test_channels_that_never_vary_come_last():
    k, q = randn(1, 2, 40, 16), randn(1, 2, 40, 16)
    k[..., :4] = 5.0
    k[0, 0, 3, 9] = torch.nan
    affine = salience_triton.key_affine(*to_device(k, q, None), True, True, True).cpu()
    assert affine[0, 2, :, 12:].sort(-1).values.tolist() == [[0, 1, 2, 3]] * 2


@given(st.data(), st.sampled_from((8, 24, 64, 80)), st.integers(1, 3), st.integers(1, 40), seeds)
@few
def test_map_of_any_prompt(data, head_dim, groups, tokens, seed):
    asked = data.draw(st.sampled_from((tokens, 1, 5)), label="query tokens")
    real = data.draw(st.sampled_from((None, 0, 1, tokens)), label="real tokens")
    valid = None if real is None else left_padding(2, tokens, real)
    k = randn(2, 2, tokens, head_dim, seed=seed) * 2 ** randn(head_dim, seed=seed + 1) + 3
    q = randn(2, 2 * groups, asked, head_dim, seed=seed + 2)
    with pytest.MonkeyPatch.context() as patch:  # small enough for a prompt of many chunks, and of many tiles of them
        patch.setattr(salience_triton, "CHUNK", data.draw(st.sampled_from((4, 256)), label="chunk"))
        patch.setattr(salience_triton, "JOIN_NUMBERS", data.draw(st.sampled_from((256, 4096)), label="tile"))
        patch.setattr(salience_triton, "COUNT_TILE", data.draw(st.sampled_from((8, 4096)), label="counted"))
        check_affine(k, q, valid, data.draw(st.booleans(), label="centre"), data.draw(st.booleans(), label="balance"))


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_broken_tokens_count_as_in_the_reference(broken):
    k, q = randn(2, 2, 50, 16) + 2, randn(2, 4, 50, 16)
    k[1, :, 7], k[0, 1, 3, 5], q[1, :, 7], q[0, 1, 3, 5] = broken, broken, broken, broken
    check_affine(k, q, None)
    check_affine(k, q, left_padding(2, 50, 30))
    k[:, :, :, 3] = broken
    check_affine(k, q, None)


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_broken_tokens_beside_queries_of_another_length(broken):
    k, q = randn(2, 2, 30, 24) + 2, randn(2, 4, 7, 24)
    k[1, :, 25], q[1, :, 3], q[0, 1, 2, 5] = broken, broken, broken
    check_affine(k, q, left_padding(2, 30, 12))
    q[:, :, :, 1] = broken
    check_affine(k, q, left_padding(2, 30, 12))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # by the interpreter's numpy
def test_numbers_whose_squares_overflow():
    """Finite, and too large for the deviation: only that channel's gain is NaN, as in the reference."""
    k, q = randn(1, 3, 600, 8), randn(1, 3, 600, 8)
    k[0, 0, 550, 2], k[0, 1, 3, 5], q[0, 2, 9, 3] = 1e25, 1e25, 1e25
    affine = salience_triton.key_affine(*to_device(k, q, None), True, True).cpu()
    due = key_affine_reference(k, q, None, True, True)
    assert_same("NaN", due.isnan(), affine.isnan())
    assert 0 < due.isnan().sum() < due[:, 1:].numel()
    assert_close("gain", due[:, 1].nan_to_num(0.0), affine[:, 1].nan_to_num(0.0))
    k[0, 0, :2, 2] = 3e38  # their sum overflows too: the floor must not make that a gain
    assert salience_triton.key_affine(*to_device(k, q, None), True, True)[0, 1, 0, 2].isnan()


@pytest.mark.parametrize("same", (True, False))
def test_gains_at_the_floor_and_at_the_range(same):
    """Channels that never vary, queries that are silent, and deviations further apart than the map allows."""
    k = randn(1, 2, 20, 12) * 10.0 ** torch.arange(-6, 6)
    q = randn(1, 4, 20 if same else 3, 12)
    k[:, 0, :, :3], q[:, :2, :, 7] = 5.0, 0.0
    check_affine(k, q, None)
    assert key_affine_reference(k, q, None, True, True)[:, 1].max() == pytest.approx(GAIN_RANGE)


@pytest.mark.parametrize("head_dim, numbers", [(16, 256), (128, 4096)], ids=str)
def test_many_chunks_and_tiles(monkeypatch, head_dim, numbers):
    """Keys that drift, so that every part has another mean, and queries whose channels grow apart from part to part."""
    monkeypatch.setattr(salience_triton, "JOIN_NUMBERS", numbers)
    monkeypatch.setattr(salience_triton, "CHUNK", 32 if head_dim == 16 else 256)
    tokens = 2 * 256 + 77
    drift = torch.arange(tokens)[:, None] * torch.linspace(0, 0.1, head_dim)
    k, q = randn(1, 2, tokens, head_dim) + drift, randn(1, 4, tokens, head_dim) * (1 + drift)
    check_affine(k, q, None)
    check_affine(k, q, left_padding(1, tokens, 60))


def test_a_mean_far_above_the_deviation_costs_no_digits():
    """In numbers that float32 holds exactly: keys of 4096 +- 1, whose squares would leave nothing of the deviation."""
    sign = torch.where(randn(1, 2, 600, 16) > 0, 1.0, -1.0)
    k, q = 4096 + sign * torch.arange(1, 17) / 16, torch.ones(1, 2, 600, 16)
    affine = salience_triton.key_affine(*to_device(k, q), None, True, True).cpu()
    gain = k.double().std(2, unbiased=False).sqrt()
    assert_close("centre", k.double().mean(2), affine[:, 0])
    assert_close("gain", gain / gain.log().mean(-1, keepdim=True).exp(), affine[:, 1])


def test_map_of_strided_keys():
    k, q = randn(2, 9, 3, 16).to(DEVICE).transpose(1, 2), randn(2, 16, 6, 9).to(DEVICE).permute(0, 2, 3, 1)
    valid = left_padding(9, 2, 1).to(DEVICE).T
    affine = salience_triton.key_affine(k, q, valid, True, True).cpu()
    assert_close("map", key_affine_reference(k.cpu(), q.cpu(), valid.cpu(), True, True), affine)


class Launches(TorchDispatchMode):
    """Names of the torch ops and of the module's kernels, in order; kernels do not run."""

    FREE = ("empty", "empty_like", "detach", "view")  # memory and views: nothing for a device to do

    def __init__(self, patch):
        super().__init__()
        self.names = []
        for name in [name for name in vars(salience_triton) if name.endswith("_kernel")]:
            patch.setattr(salience_triton, name, self.kernel(name))

    def kernel(self, name):
        note = lambda *args, **kwargs: self.names.append(name)
        return type("Kernel", (), {"__getitem__": lambda self, grid: note})()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in self.FREE:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("asked", (9, 1))
@pytest.mark.parametrize("masked", (True, False))
def test_few_launches(monkeypatch, masked, asked):
    h, k, q, valid = to_device(randn(2, 9, 8), randn(2, 2, 9, 8), randn(2, 4, asked, 8), left_padding(2, 9, 5))
    valid = valid if masked else None
    with Launches(monkeypatch) as launches:
        salience_triton.find_pivots(h, valid, 3, "topk", 0.0, 0.0)
        assert launches.names == ["peak_kernel", "rank_kernel"]
        launches.names.clear()
        salience_triton.key_affine(k, q, valid, True, True)
        assert launches.names == ["moments_kernel", "moments_kernel", "map_kernel"]
        launches.names.clear()
        salience_triton.key_affine(k, q, valid, True, False)
        assert launches.names == ["moments_kernel", "map_kernel"]
        launches.names.clear()
        salience_triton.key_affine(k, q, valid, True, True, True)
        assert [name for name in launches.names if name.endswith("_kernel")] == ["moments_kernel"] * 2 + ["map_kernel"]


def test_nothing_to_do():
    for B, count in ((0, 3), (2, 0)):
        assert salience_triton.find_pivots(randn(B, 4, 8).to(DEVICE), None, count, "topk", 0.0, 0.0).shape == (B, count)
    k = randn(0, 2, 4, 8).to(DEVICE)
    assert salience_triton.key_affine(k, k, None, True, True).shape == (0, 2, 2, 8)


def test_refuses_what_it_cannot_hold():
    k = randn(1, 1, 2, 8)
    long, double = torch.ones(1, 1, 16385), randn(1, 2, 8).double()
    for h, reason in ((double, "h is torch.float64"), (long, "the last dim of h is 16385"), (k[0, :, :0], "one token")):
        assert reason in salience_triton.refusal(h)
        with pytest.raises(ValueError, match=f"akvq::find_pivots: .*{reason}"):
            salience_triton.find_pivots(h, None, 3, "topk", 0.0, 0.0)
    with pytest.raises(ValueError, match="mode is 'some', accepted: 'topk', 'massive'"):
        salience_triton.find_pivots(randn(1, 2, 8), None, 3, "some", 0.0, 0.0)
    wide = torch.ones(1, 1, 2, 1025)
    for pair, reason in (
        ((k, k.double()), "q is torch.float64"),
        ((k[:, :, :0], k), r"k is \[1, 1, 0, 8\], accepted: one token or more"),
        ((wide, wide), "the last dim of k is 1025"),
    ):
        assert salience_triton.refusal(*pair)
        with pytest.raises(ValueError, match=f"akvq::key_affine: .*{reason}"):
            salience_triton.key_affine(*pair, None, True, True)
    k = randn(1, 2, 2, 8)
    for q in (randn(2, 2, 2, 8), randn(1, 2, 2, 16), randn(1, 3, 2, 8)):
        with pytest.raises(
            ValueError, match=r"akvq::key_affine: q is .*accepted .*: \[1, a multiple of 2, tokens, 8\]"
        ):
            salience_triton.key_affine(k, q, None, True, True)
    assert salience_triton.refusal(k, k) == salience_triton.refusal(k[0]) == ""
