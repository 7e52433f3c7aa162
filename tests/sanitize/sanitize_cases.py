"""The cases of sanitize.py: attention, cache writes and rotations, small but in every form that kernels have."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from akvq_fx.kernels.layout import Layout

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
symmetric = functools.partial(Layout, body_bits=2, rotated=True, symmetric=True)
uneven = functools.partial(symmetric, affine=True, uneven=True)


class Call(NamedTuple):
    """attend: how large the caches are, and what is given besides them."""

    sizes: tuple[int, ...]  # batch, KV heads, query heads a KV head, query tokens, tokens, capacity
    window: int = 0
    pivots: int = 0
    mask: str = ""  # "bool": the same for all queries; "bool each", "own" (the queries' dtype), "f32", ...: one a query
    fresh: str = ""  # "appended": in the cache too; "ahead": not yet; "cropped": over tokens that a crop left there
    length: str = ""  # "": None; "whole" or "cropped"
    splits: int = 1
    rotate: str = ""  # "rotated" or "affine": the kernel rotates the queries
    causal: bool = False
    restore: bool = False  # the kernel rotates its output back

    def __str__(self) -> str:
        given = [f"{self.mask} mask"] * bool(self.mask) + [f"{self.fresh} fresh"] * bool(self.fresh)
        return (
            "+".join(given + ["rotate"] * bool(self.rotate) + ["causal"] * self.causal + ["restore"] * self.restore)
            or "plain"
        )


COMMON = {  # every head dim
    "one head each": Call((1, 2, 1, 1, 700, 768), 128, 15, length="whole", splits=3),
    "grouped": Call((2, 2, 4, 1, 300, 384), 128, 15, mask="bool", fresh="appended"),
    "seven a group": Call((1, 2, 7, 1, 500, 501)),
    "eight a group": Call((1, 1, 8, 1, 400, 401), 64, 2, mask="bool", length="cropped", splits=3),
    "sixteen a group": Call((1, 2, 16, 1, 300, 352), 128, 15),
    "two tokens": Call((2, 1, 8, 2, 300, 320), 64, 32, mask="own", fresh="cropped", splits=3),
    "sixteen tokens": Call((1, 2, 1, 16, 130, 256), 16, mask="bool each", fresh="ahead", rotate="rotated"),
    "forty rows": Call((1, 1, 8, 5, 333, 333), 64, 15, "bool", "appended", "whole", splits=3, rotate="affine"),
    "the default": Call((1, 2, 4, 1, 300, 384), 64, 15, length="whole", rotate="affine", restore=True),
    "the default in parts": Call(
        (2, 1, 8, 1, 700, 768), 64, 15, length="whole", splits=3, rotate="affine", restore=True
    ),
}
RARE = {  # every other head dim
    "less than a tile": Call((1, 2, 1, 1, 20, 64), 5, 15, mask="f32", length="whole"),
    "all in the ring": Call((2, 3, 1, 1, 70, 128), 128, 15, fresh="ahead", splits=3, rotate="affine"),
    "odd sizes": Call((2, 1, 1, 3, 65, 65), 5, 2, mask="bool", length="whole", splits=3),
}
UNEVEN = {  # of uneven keys and symmetric values; the kernel rotates their queries
    "the default": COMMON["the default"],
    "forty rows": COMMON["forty rows"],
    "an odd end": Call((1, 1, 4, 1, 67, 67), rotate="affine"),  # ranges of 2 bytes end in the middle of a word
}
TEXTS = {"no text": (0, 0), "text": (4, 4), "text of keys": (4, 0)}
TRITON = [  # head dim, dtype, body bits, text bits of keys and values, group, call
    (40, f16, 2, (0, 0), 8, Call((2, 2, 3, 1, 300, 333), 5, 2, length="whole", splits=3)),
    (40, bf16, 4, (8, 8), 128, Call((1, 2, 1, 5, 130, 135), 16, 0, mask="bool", fresh="ahead")),
    (40, f32, 8, (0, 0), 8, Call((1, 1, 8, 5, 100, 100), 0, 3, mask="f32", length="cropped", splits=3)),
    (64, f16, 2, (4, 4), 32, Call((1, 2, 4, 1, 400, 401), 64, 15, mask="bool", fresh="appended", splits=3)),
    (64, bf16, 2, (0, 0), 128, Call((2, 1, 1, 40, 40, 64), 16, 2, fresh="appended", causal=True)),
    (64, f32, 2, (4, 4), 128, Call((1, 2, 2, 1, 300, 320), 5, 2, fresh="cropped", splits=3)),
    (64, f16, 8, (0, 0), 32, Call((1, 2, 1, 40, 200, 201), 0, 0, mask="bool each", length="whole")),
    (80, bf16, 2, (4, 4), 128, Call((1, 2, 2, 5, 333, 340), 64, 2, mask="bf16", fresh="appended", length="whole")),
    (80, f16, 4, (0, 0), 128, Call((1, 1, 4, 40, 70, 128), 128, 15, mask="f16", fresh="ahead", splits=3)),
    (80, f32, 4, (8, 8), 16, Call((1, 2, 1, 5, 60, 61), 5, 2, length="whole", causal=True)),
    (80, bf16, 2, (4, 0), 128, Call((2, 2, 1, 1, 300, 300), 16, 5, mask="bool")),
    (128, bf16, 2, (0, 0), 128, Call((1, 2, 4, 1, 600, 640), 128, 15, length="whole", splits=3)),
    (128, f16, 2, (4, 4), 32, Call((1, 2, 1, 40, 300, 320), 64, 2, mask="bool", fresh="appended")),
    (128, bf16, 2, (4, 0), 128, Call((1, 1, 8, 5, 300, 384), 64, 15, fresh="ahead", splits=3)),
    (128, f32, 8, (0, 0), 128, Call((1, 2, 2, 1, 130, 130), 5, 0, mask="f32", length="whole")),
    (128, bf16, 4, (8, 8), 128, Call((1, 2, 1, 40, 40, 41), 0, 2, fresh="appended", causal=True, splits=3)),
    (128, f16, 2, (0, 0), 128, Call((2, 1, 1, 1, 20, 64), 64, 15, fresh="ahead")),
    (256, bf16, 2, (4, 4), 128, Call((1, 1, 4, 1, 300, 301), 64, 15, mask="bool", fresh="appended", splits=3)),
    (256, f16, 4, (0, 0), 64, Call((1, 1, 1, 40, 200, 203), 16, 2, mask="f16", fresh="cropped")),
    (256, f32, 2, (4, 0), 128, Call((1, 1, 2, 5, 100, 110), 5, 2, length="whole", splits=3)),
]


class Write(NamedTuple):
    """append and pack: a layout, and what is written."""

    layout: Layout
    sizes: tuple[int, int, int]  # batch, heads, tokens
    start: int | None = None  # append after so many tokens; None: pack
    rotate: bool = False
    pivots: int = 0  # given
    kinds: bool = True
    x: str = ""  # "heads last" in memory, or parts of "wide" rows: those do not begin at whole 16 bytes
    many: bool = False

    def __str__(self) -> str:
        form = ("affine" if self.layout.affine else "rotated") * self.rotate
        given = [f"{self.pivots} pivots"] * bool(self.pivots) + ["kinds"] * self.kinds + [self.x] + ["many"] * self.many
        place = "pack" if self.start is None else f"append at {self.start}"
        return f"{self.layout}/{place}/{self.sizes[2]} tokens/" + "+".join(filter(None, [form, *given]))


def two(head_dim: int, dtype: torch.dtype, rotated: str = "", **options: Any) -> Layout:
    """Two bits, and at 0.8 of the range; `rotated` as in Call."""
    flags = {"rotated": bool(rotated), "affine": rotated == "affine"}
    return Layout(head_dim, dtype, **{"body_bits": 2, "body_clip": 0.8, **flags, **options})


LANES = [  # what the kernel `pack` of append_cuda takes, four lanes a token
    Write(two(64, f16, shares_classes=True), (2, 3, 64)),
    Write(two(64, bf16, "rotated", window=70), (2, 3, 301), rotate=True, kinds=False, x="heads last"),
    Write(two(64, f16, "affine", window=64, pivots=15), (2, 2, 67), rotate=True, pivots=15),
    Write(two(64, bf16, pivots=3, shares_classes=True), (1, 2, 130), pivots=2, many=True),
    Write(two(128, bf16, "affine", window=128, pivots=15), (2, 3, 200), rotate=True, pivots=20, x="heads last"),
    Write(two(128, f16, window=5, pivots=15), (1, 3, 333), pivots=3, many=True),
    Write(two(128, f16, "rotated", pivots=15), (1, 1, 65), rotate=True, pivots=15, kinds=False),
    Write(two(128, bf16, "affine", window=64), (2, 1, 300), start=0, rotate=True, many=True),
    Write(
        two(128, bf16, "rotated", window=64, pivots=15, shares_classes=True),
        (2, 2, 100),
        start=0,
        rotate=True,
        pivots=15,
    ),
    Write(two(64, f16, window=5, pivots=2), (1, 3, 71), start=7, pivots=2),
    Write(two(128, f16, "affine", window=128, pivots=9), (1, 2, 80), start=90, rotate=True, x="heads last"),
    Write(two(128, bf16, "affine", window=64, pivots=15, text_bits=4), (2, 2, 131), rotate=True, pivots=15),
    Write(two(64, f16, window=5, text_bits=4, text_clip=0.9), (1, 3, 70), start=7, many=True),
]
WARPS = [  # a warp a token
    Write(
        two(128, bf16, "affine", window=128, pivots=15), (2, 3, 1), start=40, rotate=True, kinds=False, x="heads last"
    ),
    Write(two(80, f16, "rotated", window=5, text_bits=4, shares_classes=True), (2, 3, 3), start=9, rotate=True),
    Write(two(16, f32, window=64, pivots=2), (3, 1, 1), start=0, pivots=2),
    Write(two(64, bf16, group=32, window=16, text_bits=4), (1, 2, 67), x="wide"),
    Write(two(128, f16, window=64, pivots=15, shares_classes=True), (2, 2, 70), pivots=15, x="wide"),
    Write(two(96, bf16, "affine", window=5, pivots=3, text_bits=4, text_clip=0.9), (2, 1, 33), rotate=True, pivots=3),
    Write(two(128, f32, "affine", group=32, window=70), (1, 3, 65), rotate=True, x="heads last"),
    Write(two(256, bf16, "rotated", window=5, text_bits=4), (1, 2, 101), rotate=True, many=True),
    Write(two(512, f32, "rotated"), (1, 2, 5), rotate=True),
    Write(two(24, f32, "affine", body_bits=4, text_bits=8), (2, 3, 7), start=5, rotate=True),
    Write(two(40, bf16, group=10, body_bits=2, text_bits=8, window=3, pivots=1), (1, 3, 13), pivots=1, kinds=False),
    Write(Layout(96, bf16, rotated=True, affine=True), (2, 2, 17), rotate=True),
    Write(Layout(8, f16), (3, 5, 1), start=3),
    Write(two(64, f16, "affine", body_bits=4, window=64, pivots=5), (2, 3, 200), start=0, rotate=True, many=True),
]
SYMMETRIC_LANES = [
    Write(symmetric(64, bf16, window=70, pivots=15, shares_classes=True), (2, 3, 301), rotate=True, pivots=15),
    Write(symmetric(128, f16, window=64), (2, 2, 130), start=7, rotate=True, x="heads last", many=True),
]
SYMMETRIC_WARPS = [
    Write(symmetric(128, bf16, window=64, pivots=3, shares_classes=True), (2, 3, 1), start=40, rotate=True),
    Write(symmetric(80, f32, body_bits=4, group=20), (1, 3, 13), rotate=True),
    Write(uneven(64, bf16, window=64, pivots=3), (2, 3, 1), start=40, rotate=True, x="heads last"),
    Write(uneven(128, f16, window=70, pivots=15), (2, 3, 130), rotate=True, pivots=15, many=True),
    Write(uneven(80, bf16, window=5), (1, 2, 67)),
]
ROTATIONS = [  # op, sizes, dtype, heads of the affine map, strides, many
    ("rotate", (2, 9, 1, 128), bf16, 0, "heads last", False),
    ("rotate", (1, 2, 70, 80), f16, 0, "", False),
    ("rotate_keys", (2, 3, 101, 64), f32, 3, "heads last", True),
    ("rotate_keys", (2, 9, 1, 128), bf16, 9, "wide", False),
    ("rotate_queries", (1, 8, 5, 256), f16, 2, "", False),
    ("rotate_queries", (2, 6, 40, 24), f32, 2, "heads last", True),
]
