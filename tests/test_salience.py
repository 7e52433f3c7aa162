"""find_pivots, key_affine and token maps: salient tokens found, padding and broken ones left out, identities exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from akvq_fx.kernels.layout import PADDING, TEXT, VISION
from akvq_fx.kernels.rotate import keys_reference, queries_reference
from akvq_fx.kernels.salience import GAIN_RANGE, find_pivots, key_affine, mark_vision, token_classes, valid_tokens
from tests.kernel_cases import assert_close, assert_same, bf16, f16, f32, few, randn, seeds

FLOOR, RATIO = 100.0, 1000.0  # thresholds of a massive activation, arXiv 2402.17762
MASSIVE = 5000.0
every_dtype = pytest.mark.parametrize("dtype", (f32, f16, bf16), ids=str)


def pivots(h, valid=None, count=4, mode="massive"):
    return find_pivots(h, valid, count, mode, FLOOR, RATIO)


def left_padding(T, *real):
    """[B, T] bool: row b has real[b] tokens at its right end."""
    return torch.arange(T) >= T - torch.tensor(real)[:, None]


@every_dtype
@pytest.mark.parametrize("mode", ("massive", "topk"))
@pytest.mark.parametrize("valid", (None, left_padding(7, 7, 3)), ids=("all", "padded"))
def test_find_pivots_registration(mode, valid, dtype):
    for count in (3, 9):
        torch.library.opcheck(find_pivots, (randn(2, 7, 9, dtype=dtype), valid, count, mode, FLOOR, RATIO))


@every_dtype
@pytest.mark.parametrize("valid", (None, left_padding(7, 7, 3)), ids=("all", "padded"))
def test_key_affine_registration(valid, dtype):
    k = randn(2, 2, 7, 16, dtype=dtype)
    for q, centre, balance in (
        (randn(2, 6, 7, 16, dtype=dtype), True, True),
        (k[:, :, :3], False, True),
        (k, True, False),
    ):
        torch.library.opcheck(key_affine, (k, q, valid, centre, balance))


@pytest.mark.parametrize("distance, rotary", [(8, 16), (1, 16), (4, 8)])
def test_pairs_share_their_statistics_the_more_the_fewer_the_tokens(distance, rotary):
    """A channel and the one it is turned into: alike after a short prompt, each by itself after a long one."""
    scale = 2 ** randn(16, seed=3)
    k, q = randn(1, 1, 8192, 16) * scale, randn(1, 2, 8192, 16, seed=1) / scale
    pairs = torch.arange(rotary).unflatten(0, (-1, 2, distance)).transpose(1, 2).flatten(0, 1)  # [n, 2]
    shared = (None, False, False, distance, rotary)

    def apart(tokens, *args):
        gain = key_affine(k[:, :, :tokens], q[:, :, :tokens], None, True, True, *args)[0, 1, 0][pairs]
        return (gain[:, 0] / gain[:, 1]).float().log().abs()

    alone = apart(64)
    assert (apart(64, *shared) < 0.8 * alone)[alone > 0.1].all()
    torch.testing.assert_close(apart(8192, *shared), apart(8192), rtol=0.1, atol=0.02)


def test_pairs_by_hand():
    """Two tokens: variances and squares go 64 / 66 of the way to their mean; the last two channels stay."""
    k = torch.tensor([[3.0, 0.5, 1.0, 2.0], [-3.0, -0.5, -1.0, -2.0]])[None, None]
    q = torch.tensor([[1.0, 4.0, 1.0, 1.0]]).expand(2, 4)[None, None]
    mean = lambda a, b: a + 64 / 66 * 0.5 * (b - a)
    variance = torch.tensor([mean(9.0, 0.25), mean(0.25, 9.0), 1.0, 4.0])
    squares = torch.tensor([mean(1.0, 16.0), mean(16.0, 1.0), 1.0, 1.0])
    gain = (variance / squares) ** 0.25
    due = gain / gain.log().mean().exp()
    found = key_affine(k, q, None, True, True, None, False, False, 1, 2)
    torch.testing.assert_close(found[0, 1, 0].float(), due, rtol=2e-3, atol=1e-4)
    for distance, rotary in ((1, 6), (2, 2), (4, 4)):
        with pytest.raises(ValueError, match="akvq::key_affine: pairs are .* apart in .* accepted: channels that are"):
            key_affine(k, q, None, True, True, None, False, False, distance, rotary)


def test_pairs_of_padded_rows_are_those_of_the_row_alone():
    k, q, valid = randn(2, 2, 30, 16), randn(2, 4, 30, 16, seed=1), left_padding(30, 30, 12)
    how = (True, True, None, True, True, 8, 16)
    torch.library.opcheck(key_affine, (k, q, valid, *how))
    k[1, :, :18] = torch.nan
    assert_same("row", key_affine(k[:1], q[:1], None, *how), key_affine(k, q, valid, *how)[:1])
    alone = k[1:, :, 18:], q[1:, :, 18:]
    one_centre = (True, True, None, True, False, 8, 16)  # blocks lie elsewhere in the row alone
    assert_close("row", key_affine(*alone, None, *one_centre), key_affine(k, q, valid, *one_centre)[1:])


@every_dtype
@pytest.mark.parametrize("requires_grad", (False, True), ids=("inference", "training"))
def test_mark_vision_registration(dtype, requires_grad):
    hidden = randn(2, 3, 5, dtype=dtype).requires_grad_(requires_grad)
    torch.library.opcheck(mark_vision, (hidden, torch.ones(2, 3, dtype=torch.bool)))


@st.composite
def prompts(draw):
    """Hidden states with planted massive tokens of distinct size, and a validity map."""
    B, T, E = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.sampled_from((3, 16, 33)))
    valid = torch.tensor(draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))).view(B, T)
    h = randn(B, T, E, seed=draw(seeds)).clamp(-3, 3)
    massive = [draw(st.lists(st.integers(0, T - 1), max_size=5, unique=True)) for _ in range(B)]
    for row, positions in enumerate(massive):
        for rank, t in enumerate(positions):
            h[row, t, draw(st.integers(0, E - 1))] = draw(st.sampled_from((-1, 1))) * MASSIVE * (rank + 1)
    return h, valid, massive


@given(prompts(), st.integers(0, 8))
@few
def test_massive_mode_takes_the_first_real_token_and_the_largest_massive_ones(prompt, count):
    h, valid, massive = prompt
    found = pivots(h, valid, count)
    assert (found.shape, found.dtype) == ((len(h), count), torch.int32)
    for row in range(len(h)):
        real = valid[row].nonzero()[:, 0].tolist()
        due = [t for t in reversed(massive[row]) if t in real and t != real[0]]
        due = (real[:1] + due)[:count]
        assert found[row].tolist() == due + [-1] * (count - len(due))


@given(prompts(), st.integers(0, 8))
@few
def test_topk_mode_fills_the_slots_by_rank(prompt, count):
    h, valid, _ = prompt
    found = pivots(h, valid, count, "topk")
    for row in range(len(h)):
        real = valid[row].nonzero()[:, 0].tolist()
        others = [t for t in real[1:] if h[row, t].abs().max() < 3 or h[row, t].abs().max() >= MASSIVE]
        row_found = [t for t in found[row].tolist() if t >= 0]
        assert row_found[:1] == real[: min(1, count)]
        assert len(row_found) == len(set(row_found)) == min(count, len(real))
        assert set(row_found) <= set(real)
        peaks = [h[row, t].abs().max().item() for t in row_found[1:]]
        assert peaks == sorted(peaks, reverse=True)
        left_out = [h[row, t].abs().max().item() for t in others if t not in row_found]
        assert not left_out or not peaks or max(left_out) <= peaks[-1]


@pytest.mark.parametrize("count", (1, 5, 12))
def test_fewer_tokens_than_slots_leave_slots_free(count):
    h = randn(2, 3, 8)
    assert (pivots(h, count=count)[:, 1:] == -1).all()
    found = pivots(h, count=count, mode="topk")
    assert ((found >= 0).sum(1) == min(count, 3)).all()
    assert (found[:, 3:] == -1).all()


@pytest.mark.parametrize("mode", ("massive", "topk"))
def test_a_row_of_padding_has_no_pivot(mode):
    h = randn(2, 5, 8) * MASSIVE
    valid = left_padding(5, 0, 5)
    found = pivots(h, valid, 3, mode)
    assert found[0].tolist() == [-1, -1, -1]
    assert found[1, 0] == 0


def test_padding_neither_wins_nor_moves_the_median():
    h, valid = randn(1, 9, 8).clamp(-3, 3), left_padding(9, 4)
    h[0, :5] = MASSIVE
    h[0, 7, 2] = MASSIVE
    assert pivots(h, valid).tolist() == [[5, 7, -1, -1]]
    h[0, :5] = torch.nan
    assert pivots(h, valid).tolist() == [[5, 7, -1, -1]]


@pytest.mark.parametrize("peak, massive", [(99.0, False), (101.0, True)])
def test_floor_decides_where_the_median_is_small(peak, massive):
    h = torch.full((1, 5, 9), 0.01)
    h[0, 3, 1] = peak
    assert (3 in pivots(h)[0].tolist()) == massive


@pytest.mark.parametrize("peak, massive", [(1990.0, False), (2010.0, True)])
def test_ratio_decides_where_the_median_is_large(peak, massive):
    h = torch.full((1, 5, 9), -2.0)
    h[0, 3, 1] = peak
    assert (3 in pivots(h)[0].tolist()) == massive


@pytest.mark.parametrize("mode", ("massive", "topk"))
def test_a_broken_token_is_the_last_to_be_chosen(mode):
    h = randn(2, 6, 8).clamp(-3, 3)
    h[:, 4, 2] = MASSIVE
    h[0, 2, 5] = torch.nan
    found = pivots(h, count=5, mode=mode)
    assert found[:, :2].tolist() == [[0, 4], [0, 4]]
    assert 2 not in found[0].tolist()


def test_an_infinite_token_is_massive():
    h = randn(1, 6, 8).clamp(-3, 3)
    h[0, 3, 1] = -torch.inf
    assert pivots(h).tolist() == [[0, 3, -1, -1]]


@every_dtype
def test_rows_do_not_see_each_other(dtype):
    h = randn(3, 6, 8, dtype=dtype)
    h[1, 3, 0] = MASSIVE
    together = pivots(h)
    for row in range(3):
        assert_same("row", pivots(h[row : row + 1])[0], together[row])


def weights(q, k):
    return (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


switches = pytest.mark.parametrize("centre, balance", [(True, True), (True, False), (False, True), (False, False)])


@switches
@given(st.sampled_from((8, 24, 64)), st.sampled_from((1, 3)), st.integers(2, 20), st.floats(-3, 3), seeds)
@few
def test_the_map_is_an_identity_of_attention(centre, balance, head_dim, groups, tokens, offset, seed):
    k = randn(2, 2, tokens, head_dim, seed=seed) * 2 ** randn(head_dim, seed=seed + 1) + 10**offset
    q = randn(2, 2 * groups, tokens, head_dim, seed=seed + 2) * 2 ** randn(head_dim, seed=seed + 3)
    affine = key_affine(k, q, None, centre, balance)
    k, q = k.double(), q.double()
    rotated = queries_reference(q, affine), keys_reference(k, affine)
    score_size = (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    difference = (weights(q, k) - weights(*rotated)).abs().max().item()
    assert difference <= 1e-12 * max(1.0, score_size)


@switches
def test_equals_its_formula(centre, balance):
    k, q = randn(2, 2, 9, 16) * torch.arange(1, 17) + 3, randn(2, 6, 9, 16)
    affine = key_affine(k, q, None, centre, balance)
    mean, deviation = k.double().mean(2), k.double().std(2, unbiased=False)
    query_rms = q.double().view(2, 2, 3, 9, 16).square().mean((2, 3)).sqrt()
    gain = (deviation / query_rms).sqrt()
    gain = gain / gain.log().mean(-1, keepdim=True).exp()
    assert_close("centre", mean if centre else torch.zeros_like(mean), affine[:, 0])
    assert_close("gain", gain if balance else torch.ones_like(gain), affine[:, 1])


def test_balance_makes_what_is_stored_and_what_is_asked_alike():
    k, q = randn(1, 1, 200, 16) * torch.arange(1, 17), randn(1, 1, 200, 16)
    gain = key_affine(k, q, None, True, True)[:, 1, :, None].float()
    ratio = (k / gain).std(2) / (q * gain).square().mean(2).sqrt()
    assert ratio.max() / ratio.min() < 1 + 2**-9
    before = k.std(2) / q.square().mean(2).sqrt()
    assert before.max() / before.min() > 10


@given(st.integers(1, 6), st.sampled_from((torch.nan, torch.inf, 1e4)), seeds)
@few
def test_padding_is_left_out(real, junk, seed):
    valid = left_padding(7, 7, real)
    k, q = randn(2, 2, 7, 16, seed=seed), randn(2, 4, 7, 16, seed=seed + 1)
    dirty_k, dirty_q = k.clone(), q.clone()
    dirty_k[1, :, : 7 - real], dirty_q[1, :, : 7 - real] = junk, junk
    affine = key_affine(dirty_k, dirty_q, valid, True, True)
    alone = key_affine(k[1:, :, 7 - real :], q[1:, :, 7 - real :], None, True, True)
    assert_close("padded row", alone, affine[1:])
    assert_close("full row", key_affine(k[:1], q[:1], None, True, True), affine[:1])


def test_a_row_of_padding_gets_the_neutral_map():
    k = randn(2, 2, 5, 8)
    neutral = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 2, 8).half()
    assert_same("map", neutral, key_affine(k, k, left_padding(5, 5, 0), True, True)[1])


def test_constant_and_silent_channels_get_finite_gains():
    k, q = randn(1, 2, 9, 16), randn(1, 2, 9, 16)
    k[..., 3], k[..., 4], q[..., 5] = 7.0, 0.0, 0.0
    affine = key_affine(k, q, None, True, True)
    assert affine.isfinite().all()
    assert_close("centre", torch.tensor([[7.0, 0.0]] * 2), affine[0, 0, :, 3:5])
    assert affine[:, 1:].max() <= GAIN_RANGE * 1.001
    assert affine[:, 1:].min() >= 1 / (GAIN_RANGE * 1.001)


def test_gains_stay_in_range():
    k = randn(1, 1, 50, 16) * 10.0 ** torch.linspace(-3, 8, 16)
    gain = key_affine(k, torch.ones(1, 1, 50, 16), None, False, True)[:, 1]
    assert (gain.max() - GAIN_RANGE).abs() < 1e-3
    assert gain.min() >= 1 / GAIN_RANGE * 0.999


@pytest.mark.parametrize("broken", (torch.nan, torch.inf), ids=str)
def test_a_broken_token_moves_the_map_by_its_share_at_most(broken):
    T = 50
    k, q = randn(2, 2, T, 16) + 2, randn(2, 2, T, 16)
    clean = key_affine(k, q, None, True, True)
    lost_mean = k[1, :, 7].abs().max() / T
    lost_variance = ((k[1, :, 7] - k[1].mean(1)).square() / (T * k[1].var(1, unbiased=False))).max()
    lost_energy = (q[1, :, 7].square() / (T * q[1].square().mean(1))).max()
    k[1, :, 7], q[1, :, 7] = broken, broken
    affine = key_affine(k, q, None, True, True)
    assert_same("other row", clean[0], affine[0])
    assert (affine[1, 0] - clean[1, 0]).abs().max() <= lost_mean + 2**-10 * clean[1, 0].abs().max()
    assert (
        affine[1, 1:].float() / clean[1, 1:].float()
    ).log().abs().max() <= lost_variance + lost_energy + lost_mean**2


@every_dtype
def test_affine_is_float16_of_any_prompt(dtype):
    k = randn(2, 3, 5, 8, dtype=dtype)
    affine = key_affine(k, k, None, True, True)
    assert (affine.shape, affine.dtype) == ((2, 2, 3, 8), torch.float16)
    assert_close("map", key_affine(k.float(), k.float(), None, True, True), affine)


def test_a_map_too_large_for_float16_saturates():
    """What is left of it in the keys stays there: the identity is of the map as it is stored."""
    k, q = randn(1, 1, 9, 16) + 1e6 * torch.eye(16)[3], randn(1, 1, 9, 16)
    affine = key_affine(k, q, None, True, True)
    assert affine.isfinite().all() and affine[0, 0, 0, 3] == torch.finfo(torch.float16).max
    k, q = k.double(), q.double()
    rotated = weights(queries_reference(q, affine), keys_reference(k, affine))
    assert (weights(q, k) - rotated).abs().max() <= 1e-12 * (q.norm(dim=-1).max() * k.norm(dim=-1).max())


def test_queries_of_another_length_are_averaged():
    k, q = randn(1, 2, 7, 8), randn(1, 4, 3, 8)
    repeated = q.repeat(1, 1, 7, 1)
    k_repeated = k.repeat(1, 1, 3, 1)
    assert_close("map", key_affine(k_repeated, repeated, None, True, True), key_affine(k, q, None, True, True))


def test_mark_vision_is_the_identity_with_its_gradient():
    hidden, mask = randn(2, 3, 5).requires_grad_(), torch.ones(2, 3, dtype=torch.bool)
    out = mark_vision(hidden, mask)
    assert_same("hidden", hidden.detach(), out.detach())
    assert out.data_ptr() != hidden.data_ptr()
    weight = randn(2, 3, 5, seed=1)
    (out * weight).sum().backward()
    assert_same("gradient", weight, hidden.grad)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3), torch.ones(3, 2) > 0, torch.ones(2, 3, 5) > 0], ids=("float", "transposed", "wide")
)
def test_mark_vision_refuses_other_masks(mask):
    with pytest.raises(
        ValueError, match=r"akvq::mark_vision: mask is torch.* \[.*\], accepted: bool \[2, 3\], True where"
    ):
        mark_vision(torch.ones(2, 3, 5), mask)


MASKS = {
    "bool": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])[:, None, None].bool(),
    "float": torch.tensor([[0, -torch.inf, 1.0, -2.0], [torch.finfo(f32).min, 0, 0, 0]])[:, None, None],
    "causal": torch.ones(3, 3).tril().bool()[None, None],
    "causal-f16": torch.full((1, 1, 3, 3), torch.finfo(f16).min, dtype=f16).triu(1),
    "per-head": left_padding(4, 4, 1, 2)[None, :, None] & torch.tensor([True, True, True, False]),
    "heads": left_padding(4, 4, 1, 2)[:, None] & torch.tensor([True, True, True, False]),
    "queries": torch.ones(3, 3).tril().bool(),
    "queries-float": torch.full((2, 4), -torch.inf).triu(3),
    "tokens": torch.tensor([True, False, True]),
    "tokens-float": torch.tensor([[[0.0, -torch.inf, -3.0]]]),
}
SEEN = {
    "bool": [[False, False, True, True], [False, True, True, False]],
    "float": [[True, False, True, True], [False, True, True, True]],
    "causal": [[True] * 3] * 2,
    "causal-f16": [[True] * 3] * 2,
    "per-head": [[True, True, True, False]] * 2,
    "heads": [[True, True, True, False]] * 2,
    "queries": [[True] * 3] * 2,
    "queries-float": [[True] * 4] * 2,
    "tokens": [[True, False, True]] * 2,
    "tokens-float": [[True, False, True]] * 2,
}


@pytest.mark.parametrize("kind", MASKS)
def test_valid_tokens_are_those_that_some_query_sees(kind):
    torch.library.opcheck(valid_tokens, (MASKS[kind], 2))
    assert valid_tokens(MASKS[kind], 2).tolist() == SEEN[kind]


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 1, 1, 1)], ids=str)
def test_a_mask_may_be_one_for_all_tokens(shape):
    """attention broadcasts the last axis too: the number of tokens says how wide."""
    torch.library.opcheck(valid_tokens, (torch.ones(shape) > 0, 2, 5))
    assert valid_tokens(torch.ones(shape) > 0, 2, 5).tolist() == [[True] * 5] * 2


def test_masks_that_do_not_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"mask is \[3, 1, 1, 4\], accepted: what broadcasts to \[2, heads"):
        valid_tokens(torch.ones(3, 1, 1, 4) > 0, 2)


@pytest.mark.parametrize("kind", MASKS)
def test_valid_tokens_of_any_batch(kind):
    """The batch may be a symbol while a graph is traced."""
    count = lambda x, mask: valid_tokens(
        mask.expand(x.shape[0], *mask.shape[1:]) if mask.dim() == 4 else mask, x.shape[0]
    )
    run = torch.compile(count, backend="aot_eager", dynamic=True, fullgraph=True)
    for batch in (2, 3):
        mask = MASKS[kind][:1] if MASKS[kind].dim() == 4 else MASKS[kind]
        assert_same("valid", valid_tokens(mask, batch), run(torch.ones(batch, 2), mask))


@pytest.mark.parametrize("vision", (None, torch.tensor([[1, 1, 0], [0, 1, 0]]) > 0), ids=("text-only", "vision"))
@pytest.mark.parametrize("valid", (None, left_padding(3, 3, 2)), ids=("all", "padded"))
def test_token_classes(valid, vision):
    x = randn(2, 1, 3, 8)
    torch.library.opcheck(token_classes, (x, valid, vision))
    classes = token_classes(x, valid, vision)
    for row in range(2):
        for t in range(3):
            due = VISION if vision is not None and vision[row, t] else TEXT
            due = PADDING if valid is not None and not valid[row, t] else due
            assert classes[row, t] == due
