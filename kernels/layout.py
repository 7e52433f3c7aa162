"""Layout: which buffers hold a packed key or value cache, their shapes, and how a channel finds its bits.

Attention does not depend on the order of its tokens, so a cache is a dense low-bit *body* (slot = position) plus small
*overlays* for the salient tokens: ring and pivots hold them again at 16 bits, the text overlay holds what text tokens
have more than the body's bits. B batch, H KV heads, D head dim, C capacity in tokens.

state       [3]               int32  end of what was written, first position the ring holds, text slot minus position;
                                     of moved ones also 64 times the block of an appended token less its position;
                                     with means and a text overlay also a kernel's counter, at last, 0 between calls
codes       [B, H, C, D*b/16] int16  body, of text tokens the upper body_bits of text_bits; or [B, H, C, D] in the
                                     cache's dtype when body_bits is 16
classes     [B, C]            uint8  VISION, TEXT, PIVOT or PADDING; values have none where they share their keys'
range       [B, H, C, 2*G]    fp16   scale of each of the G channel groups, then their minima, but for symmetric ones
means       [B, H, N, D]      dtype  of each block of 64 positions what its codes are differences from, N = ceil(C/64)
                                     but in moved ones
block_of    [B, C]            int32  of moved ones: the block of the token at each position
ring        [B, H, W, D]      dtype  the last W positions, slot = position mod W
pivots      [B, H, P, D]      dtype  pivot tokens
pivot_at    [B, P]            int32  their positions, -1 for a free slot
text_codes  [B, H, Ct, D*l/16] int16 lower bits of text tokens, l wide; slot = position + state[2] of appended ones
text_at     [B, Ct]           int32  their positions, -1 for a free slot
affine      [B, 2, H, D]      fp16   centre c and gain s: keys are stored as H((k - c)/s), asked by H(q*s); uneven
                                     ones have a third row, which channel each one of the stored space is;
                                     where `simulate` wants gains, keys are stored as they are and read through s

A layout with `simulate` keeps the originals (body_bits 16); akvq_fx.recipes defines what reads make of them.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib

import torch
from torch import Tensor

from akvq_fx.recipes import Simulation

VISION, TEXT, PIVOT, PADDING = range(4)
CLASS_NAMES = ("vision", "text", "pivot", "padding")
WORD_BITS = 16  # codes are packed into int16 words: one GPU lane unpacks two fp16 codes at once
CODE_BITS = (2, 4, 8)
STATE_END, STATE_RING, STATE_TEXT, STATE_BLOCK = range(4)
CODES = 1  # codes stand second in every layout's fields
BLOCK = 64  # positions that share a mean
SLACK = 2 * BLOCK  # tokens that a sliding window has dropped keep their slots until they are more than these
CENTRE, GAIN, ORDER = range(3)  # rows of affine
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one cache tensor is packed. Hashable; travels through graphs as its text, `Layout.parse(str(layout))`."""

    head_dim: int
    dtype: torch.dtype
    body_bits: int = 16
    text_bits: int = 0  # 0: text is stored as the rest
    window: int = 0
    pivots: int = 0
    group: int = 128
    body_clip: float = 1.0
    text_clip: float = 1.0
    rotated: bool = False  # buffers hold H x rather than x
    affine: bool = False
    shares_classes: bool = False  # values whose tokens' classes stand with their keys: a byte a token less
    symmetric: bool = False  # levels lie evenly around zero: ranges are scales alone, and nothing is clipped
    uneven: bool = False  # keys whose channels have 4, 2 and 0 bits, see kernels/uneven.py
    blocks: bool = False  # keys whose codes are differences from the mean of their block, see kernels/blocks.py
    moved: bool = False  # of these: tokens have left the positions of their block, so each has its block's number
    simulate: str = ""  # text of a Simulation of akvq_fx.recipes: originals are kept, and quantized when they are read

    def __post_init__(self):
        def refuse(what, given, accepted):
            raise ValueError(f"akvq layout: {what} is {given}, accepted: {accepted}")

        if self.head_dim <= 0 or self.head_dim % 8:
            refuse("head_dim", self.head_dim, "a positive multiple of 8")
        if self.dtype not in DTYPE_NAMES:
            refuse("dtype", self.dtype, ", ".join(map(str, DTYPE_NAMES)))
        if self.body_bits not in (*CODE_BITS, 16):
            refuse("body_bits", self.body_bits, "2, 4, 8 or 16")
        if self.text_bits not in (0, 4, 8):
            refuse("text_bits", self.text_bits, "0, 4 or 8")
        if self.window < 0 or self.pivots < 0:
            refuse("window, pivots", (self.window, self.pivots), "numbers >= 0")
        if self.group <= 0:
            refuse("group", self.group, "a positive number of channels")
        if not (0 < self.body_clip <= 1 and 0 < self.text_clip <= 1):
            refuse("body_clip, text_clip", (self.body_clip, self.text_clip), "numbers in (0, 1]")
        if self.plain and (self.text_bits or self.window or self.pivots):
            refuse("overlays", "present", "none when body_bits is 16")
        if 0 < self.text_bits <= self.body_bits:
            refuse("text_bits", self.text_bits, f"more than body_bits, which is {self.body_bits}, or 0")
        if self.symmetric and (self.body_bits not in (2, 4) or self.text_bits or self.body_clip != 1):
            given = (self.body_bits, self.text_bits, self.body_clip)
            refuse("symmetric with body_bits, text_bits, body_clip", given, "2 or 4, 0, 1")
        if self.uneven and not (self.body_bits == 2 and self.symmetric and self.rotated and self.affine):
            given = (self.body_bits, self.symmetric, self.rotated, self.affine)
            refuse("uneven with body_bits, symmetric, rotated, affine", given, "2, True, True, True")
        if self.blocks and (self.plain or self.shares_classes):
            refuse("blocks with body_bits, shares_classes", (self.body_bits, self.shares_classes), "2, 4 or 8, False")
        if self.moved and not self.blocks:
            refuse("moved", True, "False without blocks, whose tokens can move as they are")
        if self.simulate:
            Simulation.parse(self.simulate)
            if not self.plain or self.rotated or self.affine:
                refuse("simulate", self.simulate, "none unless body_bits is 16 and nothing is rotated or affine")
            if self.shares_classes:
                refuse("shares_classes", True, "False when simulate is given: what is read depends on the classes")

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Cached, since every op looks things up by layout. The same in every process, since pickles contain it."""
        return zlib.crc32(str(self).encode())

    @property
    def plain(self) -> bool:
        """The body holds numbers, not codes."""
        return self.body_bits == 16

    @property
    def lossless(self) -> bool:
        """What is read is what was written."""
        return self.plain and not self.simulate

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype in which what codes hold is read: a token's own, or that in which a difference meets its mean."""
        return torch.float32 if self.blocks else self.dtype

    @functools.cached_property
    def simulation(self) -> Simulation | None:
        return Simulation.parse(self.simulate) if self.simulate else None

    @functools.cached_property
    def as_written(self) -> Layout:
        """The layout before any token moved; what codes mean is the same."""
        return dataclasses.replace(self, moved=False) if self.moved else self

    @property
    def policy(self) -> str:
        """The policy shown in reports for a layer whose keys have this layout."""
        if self.simulate:
            return f"simulated {self.simulation.name.split('_')[0]}"
        return "lossless" if self.lossless else "TSA" if self.text_bits and not self.pivots else "PSA"

    @property
    def groups(self) -> int:
        """Channel groups of a head: 128 channels each, or the whole head; the two parts with bits of an uneven one."""
        if self.uneven:
            return 2
        return self.head_dim // self.group if self.head_dim % self.group == 0 else 1

    @property
    def range_size(self) -> int:
        """Numbers of a token's range: a scale for each group and, where levels are not symmetric, a minimum."""
        return self.groups if self.symmetric else 2 * self.groups

    @property
    def low_bits(self) -> int:
        """Bits of a text token's code that the text overlay holds, below the body's; 0 without one."""
        return self.text_bits and self.text_bits - self.body_bits

    @property
    def low_width(self) -> int:
        """Bits that these take in a word: `low_bits`, but 8 for 6, which does not divide a word."""
        return 8 if self.low_bits == 6 else self.low_bits

    @functools.cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of the buffers present, in the order in which ops take them."""
        names = ["state", "codes"]
        names += [] if self.shares_classes else ["classes"]
        names += [] if self.plain else ["range"]
        names += ["means"] if self.blocks else []
        names += ["block_of"] if self.moved else []
        names += ["ring"] if self.window else []
        names += ["pivots", "pivot_at"] if self.pivots else []
        names += ["text_codes", "text_at"] if self.text_bits else []
        gains = self.simulation is not None and self.simulation.alpha is not None
        names += ["affine"] if self.affine or gains else []
        return tuple(names)

    @functools.cached_property
    def traced(self) -> tuple[str, ...]:
        """Buffers that dynamo sees: the sizes of all others follow from theirs."""
        names = ["codes"]
        names += ["means"] if self.moved else []
        names += ["text_codes"] if self.text_bits else []
        return tuple(names)

    def buffer(self, name: str, batch, heads, capacity, text_capacity=0, blocks=None) -> tuple[tuple, torch.dtype]:
        """Shape and dtype of one buffer; sizes may be symbolic. blocks: how many have means, where tokens moved."""
        words = lambda bits: self.head_dim * bits // WORD_BITS
        body = (self.head_dim, self.dtype) if self.plain else (words(self.body_bits), torch.int16)
        table = {
            "state": ((3 + self.moved + bool(self.blocks and self.text_bits),), torch.int32),
            "codes": ((batch, heads, capacity, body[0]), body[1]),
            "classes": ((batch, capacity), torch.uint8),
            "range": ((batch, heads, capacity, self.range_size), torch.float16),
            "means": ((batch, heads, blocks_of(capacity) if blocks is None else blocks, self.head_dim), self.dtype),
            "block_of": ((batch, capacity), torch.int32),
            "ring": ((batch, heads, self.window, self.head_dim), self.dtype),
            "pivots": ((batch, heads, self.pivots, self.head_dim), self.dtype),
            "pivot_at": ((batch, self.pivots), torch.int32),
            "text_codes": ((batch, heads, text_capacity, words(self.low_width)), torch.int16),
            "text_at": ((batch, text_capacity), torch.int32),
            "affine": ((batch, 3 if self.uneven else 2, heads, self.head_dim), torch.float16),
        }
        return table[name]

    @functools.cache  # noqa: B019 - layouts are few, and kept by `parse` as well
    def sizes(self, batch: int, heads: int, capacity: int, text_capacity: int) -> tuple[tuple, ...]:
        """Name, shape and dtype of every buffer."""
        return tuple((name, *self.buffer(name, batch, heads, capacity, text_capacity)) for name in self.fields)

    def allocate(self, batch, heads, capacity, text_capacity=0, device=None) -> list[Tensor]:
        """Empty buffers: an unwritten slot reads as zero, a free overlay slot has position -1, the ring is empty, and
        positions are in the blocks that they are in where no token moved."""
        out = []
        for name, shape, dtype in self.sizes(batch, heads, capacity, text_capacity):
            out.append(torch.full(shape, unwritten(name), dtype=dtype, device=device))
            if name == "block_of":
                out[-1].copy_(torch.arange(capacity, device=device) // BLOCK)
        return out

    def __str__(self) -> str:
        exact = lambda x: f"{x:g}" if float(f"{x:g}") == x else repr(float(x))
        parts = [f"{DTYPE_NAMES[self.dtype]}", f"d{self.head_dim}", f"b{self.body_bits}", f"c{exact(self.body_clip)}"]
        parts += [f"g{self.group}"]
        parts += [f"w{self.window}"] if self.window else []
        parts += [f"p{self.pivots}"] if self.pivots else []
        parts += [f"t{self.text_bits}"] if self.text_bits else []
        parts += [f"tc{exact(self.text_clip)}"] if self.text_bits or self.text_clip != 1 else []
        parts += ["rotated"] if self.rotated else []
        parts += ["affine"] if self.affine else []
        parts += ["shares"] if self.shares_classes else []
        parts += ["symmetric"] if self.symmetric else []
        parts += ["uneven"] if self.uneven else []
        parts += ["blocks"] if self.blocks else []
        parts += ["moved"] if self.moved else []
        parts += [self.simulate] if self.simulate else []
        return "/".join(parts)

    @staticmethod
    @functools.cache
    def parse(text: str) -> Layout:
        """The inverse of str(). Raises ValueError for anything str() cannot have written."""
        keys = {"d": "head_dim", "b": "body_bits", "c": "body_clip", "g": "group", "w": "window", "p": "pivots",
                "t": "text_bits", "tc": "text_clip"}  # fmt: skip
        flags = {name: name for name in ("rotated", "affine", "symmetric", "uneven", "blocks", "moved")}
        flags["shares"] = "shares_classes"
        dtype, *parts = text.split("/")
        values: dict = {"dtype": DTYPES.get(dtype)}
        for part in parts:
            if part in flags:
                values[flags[part]] = True
                continue
            if part.endswith(")"):  # a Simulation's text has no "/"
                values["simulate"] = part
                continue
            key = part.rstrip("0123456789.+-e") or part
            if key not in keys:
                raise ValueError(f"akvq layout: unknown part {part!r} in {text!r}")
            number = part[len(key) :]
            values[keys[key]] = float(number) if keys[key].endswith("clip") else int(number)
        if "head_dim" not in values:
            raise ValueError(f"akvq layout: no head dim in {text!r}, accepted: dtype/d64/b2/...")
        layout = Layout(**values)
        if str(layout) != text:
            raise ValueError(f"akvq layout: {text!r} is not how {layout} is written")
        return layout


def unwritten(name: str) -> int:
    """What stands in the slots of a buffer that no token took yet."""
    return -1 if name in ("pivot_at", "text_at") else PADDING if name == "classes" else 0


def blocks_of(tokens):
    """How many blocks of BLOCK positions hold this many tokens, a number or a symbol."""
    return (tokens + BLOCK - 1) // BLOCK


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """[..., D] integer codes below 2**bits -> [..., D*bits/16] int16.

    Code j of word i is channel j * words + i, so a word's codes are strided channels and a kernel's unpack is shifts of
    whole words with no shuffle.
    """
    words = codes.shape[-1] * bits // WORD_BITS
    lanes = codes.to(torch.int32).unflatten(-1, (WORD_BITS // bits, words))
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=codes.device)
    return (lanes << shifts[:, None]).sum(-2, dtype=torch.int32).to(torch.int16)


def unpack_bits(words: Tensor, bits: int) -> Tensor:
    """The inverse of pack_bits: [..., D*bits/16] int16 -> [..., D] int32."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    return ((words.to(torch.int32).unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)).flatten(-2)
