"""SKVQ (Duanmu et al., arXiv 2405.06219): channels reordered, clipped groups, recent and first tokens at 16 bits.

Simulated. Per token, groups of channels of the heads laid side by side, so a group may span heads: minimum and maximum
times `clip`, both stored as e4m3. The `sink` first tokens and the last `window` stay at 16 bits. 2 bits for both
halves. Reordering: k-means over every channel's (minimum, maximum) makes as many clusters as there are groups of
`group` channels, and the clusters, of any size, are the groups. The original calibrates once per model, on 256 samples
of WikiText. Here a row's own first `calibrate` tokens are the sample, and nothing is quantized before they are cached.
They never change, so a row has one order for good; with `calibrate` up to `sink + window + 1` no token waits for it. 0
is no reordering: neighbours make a group. An order costs nothing in the bits: in the original it is the model's. Keys
are after RoPE, where the cache has them, not before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from akvq_fx.recipes.arithmetic import e4m3, round_trip, round_trip_channels, wide
from akvq_fx.recipes.recipe import SIMULATORS, Context, Recipe, Simulator

BETWEEN, ROUNDS = 3, 20  # iterations of Lloyd's algorithm after each new centre, and at the end


def read(
    x: Tensor, context: Context, bits: int, group: int, window: int, sink: int, clip: float, calibrate: int
) -> Tensor:
    heads, head_dim = x.shape[-3], x.shape[-1]
    size, end, out = members(head_dim, heads, group), settled(context.past, window, sink, calibrate), x.clone()
    if end == sink:
        return out
    rows = x.transpose(-3, -2).flatten(-2)
    if calibrate:
        orders = [clusters(ranges(row[:calibrate]), heads * head_dim // size) for row in rows]
        each = zip(rows, orders, strict=True)
        quantized = torch.stack([round_trip_clusters(row[sink:end], order, bits, clip) for row, order in each])
    else:
        quantized = round_trip_channels(rows[:, sink:end], bits, size, clip, e4m3)
    out[..., sink:end, :] = quantized.unflatten(-1, (heads, head_dim)).transpose(-3, -2).to(x.dtype)
    return out


def members(head_dim: int, heads: int, group: int) -> int:
    """Channels in a group (a cluster: on average): `group` where it divides all heads' channels, else head_dim."""
    return group if heads * head_dim % group == 0 else head_dim


def settled(past: int, window: int, sink: int, calibrate: int) -> int:
    """End of the quantized tokens, which begin at `sink`."""
    return max(sink, past - window) if past >= calibrate else sink


def round_trip_clusters(x: Tensor, labels: Tensor, bits: int, clip: float) -> Tensor:
    """round_trip of x [T, C] in groups of channels with one label, per token."""
    out = wide(x).clone()
    for label in labels.unique():
        out[:, labels == label] = round_trip(x[:, labels == label], bits, -1, clip, e4m3)
    return out


def ranges(x: Tensor) -> Tensor:
    """[C, 2] minimum and maximum of the channels of x [T, C]; what is not finite counts as 0."""
    return torch.stack(x.nan_to_num(0.0, 0.0, 0.0).aminmax(dim=0), -1)


def clusters(points: Tensor, count: int) -> Tensor:
    """[C] labels below `count` of points [C, 2], by fast global k-means (Likas et al. 2003); not random.

    Centres are added one by one, each at the point that leaves the least squared distance. In float64, so that the
    order of points has no influence. Where fewer than `count` points differ, some labels go unused.
    """
    points = points.double()
    pairwise, centres = distances(points, points), points.mean(0, keepdim=True)
    while len(centres) < count:
        left = distances(points, centres).amin(1, keepdim=True).minimum(pairwise).sum(0)
        centres = lloyd(points, torch.cat([centres, points[left.argmin()][None]]), BETWEEN)
    return distances(points, lloyd(points, centres, ROUNDS)).argmin(1)


def lloyd(points: Tensor, centres: Tensor, rounds: int) -> Tensor:
    """The centres [K, 2] after so many rounds; one that no point is nearest to stays where it is."""
    for _ in range(rounds):
        member = F.one_hot(distances(points, centres).argmin(1), len(centres)).to(points.dtype)
        sizes = member.sum(0)[:, None]
        centres = (member.T @ points / sizes).where(sizes > 0, centres)
    return centres


def distances(points: Tensor, centres: Tensor) -> Tensor:
    """[C, K] squared."""
    return sum((points[:, i, None] - centres[:, i]).square() for i in (0, 1))


def bits_of(
    head_dim: int, heads: int, tokens: int, vision: float,
    bits: int, group: int, window: int, sink: int, clip: float, calibrate: int,
) -> float:  # fmt: skip
    middle = settled(tokens, window, sink, calibrate) - sink
    return (16 * (tokens - middle) + middle * (bits + 16 / members(head_dim, heads, group))) / tokens


SIMULATORS["skvq"] = Simulator(read, bits_of)
NUMBERS = "skvq(bits=2,group=128,window=128,sink=5,clip=0.92,calibrate=128)"
SKVQ = Recipe(
    "skvq", "arXiv 2405.06219, reordered by a row's own first tokens, after RoPE", keys=NUMBERS, values=NUMBERS
)
