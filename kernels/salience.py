"""find_pivots, key_affine, token_classes, mark_vision: which tokens and channels matter, read from the prompt itself.

find_pivots(h [B, T, E], valid [B, T] bool or None) -> [B, P] int32
    Indices of the tokens that keep 16 bits. A *massive* token has max |h| above `floor` and above `ratio` times the
    row's median |h| (Sun et al., arXiv 2402.17762). The first real token always holds slot 0 (attention sink). mode
    "topk" fills the other slots with the largest max |h|, massive tokens first by construction; mode "massive" only
    with massive tokens. -1 marks a free slot. Padding is left out of everything.

key_affine(k [B, H, T, D], q [B, Hq, Tq, D], valid [B, T], centre, balance) -> [B, 2, H, D] float16: c, s
    With order=True [B, 3, H, D]: the third row is the order of channels that uneven layouts store (kernels/uneven.py).
    c = mean of the prompt's keys, s = sqrt(std K / rms Q) per head and channel: exact identities that take a key's
    constant part and the mismatch of its channels away before two bits have to hold them. With alpha, SmoothQuant's
    gains instead (arXiv 2211.10438): s = max|K|^alpha / max|Q|^(1 - alpha), c = 0. With blocks=True, std K is about the
    mean of each block (kernels/blocks.py), which is what codes have to hold there.
    distance, rotary: a rotary embedding turns the first `rotary` channels in pairs `distance` apart (rotary / 2 or 1).
    Later in the text the two will have changed places, which a short prompt cannot show: of n tokens, the squares of
    both go PAIR_TOKENS / (n + PAIR_TOKENS) of the way to their mean. 0, 0: every channel by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from akvq_fx.kernels import blocks as means_of_blocks
from akvq_fx.kernels import uneven
from akvq_fx.kernels.choose import choose
from akvq_fx.kernels.layout import CENTRE, PADDING, TEXT, VISION
from akvq_fx.kernels.quantizer import FP16_MAX
from akvq_fx.kernels.register import without_gradient

FASTER = {"cuda": ("salience_triton",)}  # before the reference, by device
STD_FLOOR = 1e-4  # a channel that never varies must not get an infinite gain
PAIR_TOKENS = 64  # docs/recipes.md has what was measured; of 1,024 tokens 6 % remain
GAIN_RANGE = 64.0  # s stays within 64 times of its geometric mean, so that rotated keys fit 16-bit floats


def find_pivots_reference(h: Tensor, valid: Tensor | None, count: int, mode: str, floor: float, ratio: float) -> Tensor:
    B, T, _ = h.shape
    if mode not in ("topk", "massive"):
        raise ValueError(f"akvq::find_pivots: mode is {mode!r}, accepted: 'topk', 'massive'")
    magnitude = h.detach().abs()
    peak = magnitude.amax(-1).float()  # [B, T]
    if valid is None:
        valid = torch.ones(B, T, dtype=torch.bool, device=h.device)
    peak = peak.nan_to_num(0.0, posinf=torch.finfo(torch.float32).max)
    # the row's median through its tokens' medians: one pass, no sort of T*E
    median = magnitude.float().median(-1).values if mode == "massive" else None
    return select_pivots(peak, median, valid, count, floor, ratio)


def massive_tokens(peak: Tensor, median: Tensor, valid: Tensor, floor: float, ratio: float) -> tuple[Tensor, Tensor]:
    """([B, T] bool: tokens above the floor and the ratio; [B] median of the real tokens' medians)."""
    usual = torch.where(valid, median, torch.nan).nanmedian(-1).values
    return valid & (peak > floor) & (peak > ratio * usual[:, None]), usual


def select_pivots(peak: Tensor, median: Tensor | None, valid: Tensor, count: int, floor: float, ratio: float) -> Tensor:
    """Pivots from each token's largest |h| [B, T] and, where only massive ones count, its median [B, T]."""
    eligible = valid.clone() if median is None else massive_tokens(peak, median, valid, floor, ratio)[0]
    first = valid.to(torch.uint8).argmax(-1, keepdim=True)
    eligible.scatter_(1, first, valid.gather(1, first))
    rank = torch.where(eligible, peak, -1.0).scatter(1, first, torch.inf)
    take = min(count, peak.shape[1])
    index = rank.topk(take, -1).indices
    index = torch.where(eligible.gather(1, index), index, -1).to(torch.int32)
    return torch.nn.functional.pad(index, (0, count - take), value=-1)


@without_gradient
def find_pivots(h: Tensor, valid: Tensor | None, count: int, mode: str, floor: float, ratio: float) -> Tensor:
    kernel = choose("find_pivots", FASTER.get(h.device.type, ()), h)
    return (kernel or find_pivots_reference)(h, valid, count, mode, floor, ratio)


@torch.library.register_fake("akvq::find_pivots")
def _(h, valid, count, mode, floor, ratio):
    return h.new_empty((h.shape[0], count), dtype=torch.int32)


def key_affine_reference(
    k: Tensor,
    q: Tensor,
    valid: Tensor | None,
    centre: bool,
    balance: bool,
    order: bool = False,
    distance: int = 0,
    rotary: int = 0,
) -> Tensor:
    B, H, T, D = k.shape
    k, q = k.detach().float(), q.detach().float()
    weight = torch.ones(B, T, device=k.device) if valid is None else valid.float()
    count = weight.sum(-1, keepdim=True).clamp_min(1)
    weight = (weight / count)[:, None, :, None]
    finite = lambda x: torch.nan_to_num(x, 0.0, 0.0, 0.0)  # one broken token must not spoil the prompt's statistics
    mean = (finite(k) * weight).sum(2)  # [B, H, D]
    c = mean if centre else torch.zeros_like(mean)
    if not balance and not order:
        return as_stored(c, torch.ones_like(mean))
    variance = (finite(k - mean[:, :, None]).square() * weight).sum(2)
    squares = finite(q).square()  # [B, Hq, Tq, D]
    squares = (squares * weight).sum(2) if q.shape[2] == T else squares.mean(2)
    squares = squares.unflatten(1, (H, -1)).mean(2)
    if distance:
        variance, squares = (shared_in_pairs(x, count, distance, rotary) for x in (variance, squares))
    deviation, rms = variance.sqrt(), squares.sqrt()
    rows = as_stored(c, gains(deviation, rms) if balance else torch.ones_like(mean))
    if not order:
        return rows
    return torch.cat([rows, uneven.channel_order(deviation * rms)[:, None].half()], 1)


def shared_in_pairs(squares: Tensor, count: Tensor, distance: int, rotary: int) -> Tensor:
    """Squares [B, H, D] of n = count [B, 1] tokens, nearer to the mean of a pair's two the fewer they are."""
    channel = torch.arange(squares.shape[-1], device=squares.device)
    other = torch.where(channel // distance % 2 == 0, channel + distance, channel - distance)
    other = squares[..., torch.where(channel < rotary, other, channel)]
    weight = PAIR_TOKENS / (count[:, None] + PAIR_TOKENS)
    return squares + weight * 0.5 * (other - squares)


def smooth_affine(k: Tensor, q: Tensor, valid: Tensor | None, alpha: float) -> Tensor:
    """[B, 2, H, D]: centre 0 and the gains that share the largest keys and queries of a channel."""
    k, q = k.detach().float().abs(), q.detach().float().abs()
    if valid is not None:
        k = k.where(valid[:, None, :, None], 0.0)
        q = q.where(valid[:, None, :, None], 0.0) if q.shape[2] == k.shape[2] else q
    key_peak, query_peak = k.amax(2), q.unflatten(1, (k.shape[1], -1)).amax((2, 3))
    s = key_peak.clamp_min(STD_FLOOR) ** alpha / query_peak.clamp_min(STD_FLOOR) ** (1 - alpha)
    return as_stored(torch.zeros_like(s), s.clamp_min(STD_FLOOR))


def as_stored(c: Tensor, s: Tensor) -> Tensor:
    """c and s [B, H, D] -> [B, 2, H, D] float16; what is too large for it saturates."""
    return torch.stack([c, s], 1).clamp(-FP16_MAX, FP16_MAX).half()


def gains(deviation: Tensor, rms: Tensor) -> Tensor:
    """s [B, H, D] from the keys' standard deviations and the root mean squares of their queries, [B, H, D] both."""
    log = 0.5 * (deviation.clamp_min(STD_FLOOR).log() - rms.clamp_min(STD_FLOOR).log())
    log = log - log.mean(-1, keepdim=True)
    return log.clamp(-math.log(GAIN_RANGE), math.log(GAIN_RANGE)).exp()


@without_gradient
def key_affine(
    k: Tensor,
    q: Tensor,
    valid: Tensor | None,
    centre: bool,
    balance: bool,
    alpha: float | None = None,
    order: bool = False,
    blocks: bool = False,
    distance: int = 0,
    rotary: int = 0,
) -> Tensor:
    if distance and (rotary % (2 * distance) or not 0 < rotary <= k.shape[3]):
        raise ValueError(
            f"akvq::key_affine: pairs are {distance} apart in {rotary} channels of {k.shape[3]}, accepted: channels "
            "that are a multiple of twice the distance, and no more than a head has"
        )
    if alpha is not None:
        return smooth_affine(k, q, valid, alpha)
    kernel = choose("key_affine", FASTER.get(k.device.type, ()), k, q) or key_affine_reference
    if not blocks or not (balance or order):
        return kernel(k, q, valid, centre, balance, order, distance, rotary)
    rows = kernel(means_of_blocks.differences(k, valid), q, valid, False, balance, order, distance, rotary)
    if centre:
        rows[:, CENTRE] = kernel(k, q, valid, True, False, False)[:, CENTRE]
    return rows


@torch.library.register_fake("akvq::key_affine")
def _(k, q, valid, centre, balance, alpha=None, order=False, blocks=False, distance=0, rotary=0):
    B, H, _, D = k.shape
    return k.new_empty((B, 3 if order else 2, H, D), dtype=torch.float16)


@torch.library.custom_op("akvq::mark_vision", mutates_args=())
def mark_vision(hidden: Tensor, mask: Tensor) -> Tensor:
    """Identity on hidden [B, T, E]; tells the passes that mask [B, T] bool is True at vision tokens."""
    if mask.dtype != torch.bool or mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"akvq::mark_vision: mask is {mask.dtype} {list(mask.shape)}, accepted: bool {list(hidden.shape[:2])}, "
            "True where a token came from an image"
        )
    return hidden.clone()


@mark_vision.register_fake
def _(hidden, mask):
    return torch.empty_like(hidden)


@mark_vision.register_autograd
def _(ctx, grad):
    return grad, None


@without_gradient
def valid_tokens(mask: Tensor, batch: int, tokens: int | None = None) -> Tensor:
    """Attention mask, bool or additive float, as SDPA broadcasts it to [batch, heads, queries, T] -> [batch, T] bool.

    True at tokens that some query sees. tokens: T, where the mask's last axis may be 1 for all of them.
    Raises ValueError for a mask of more than four axes or of another batch.
    """
    if mask.dim() > 4 or mask.dim() == 4 and mask.shape[0] not in (1, batch):
        raise ValueError(
            f"akvq::valid_tokens: mask is {list(mask.shape)}, "
            f"accepted: what broadcasts to [{batch}, heads, queries, tokens]"
        )
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen[(None,) * (4 - mask.dim())].flatten(1, 2).any(1)
    return seen.expand(batch, seen.shape[1] if tokens is None else tokens).contiguous()


@torch.library.register_fake("akvq::valid_tokens")
def _(mask, batch, tokens=None):
    last = mask.shape[-1] if mask.dim() else 1
    return mask.new_empty((batch, last if tokens is None else tokens), dtype=torch.bool)


@without_gradient
def token_classes(x: Tensor, valid: Tensor | None, vision: Tensor | None) -> Tensor:
    """Classes [B, q] uint8 of x [B, H, q, D]: VISION where vision [B, q], PADDING where not valid, else TEXT."""
    classes = torch.full((x.shape[0], x.shape[2]), TEXT, dtype=torch.uint8, device=x.device)
    if vision is not None:
        classes[vision.to(torch.bool)] = VISION
    if valid is not None:
        classes[~valid] = PADDING
    return classes


@torch.library.register_fake("akvq::token_classes")
def _(x, valid, vision):
    return x.new_empty((x.shape[0], x.shape[2]), dtype=torch.uint8)
