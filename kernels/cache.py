"""pack, append, restart, dequantize: write and read the packed buffers of one key or value tensor (kernels/layout.py).

cache    list of buffers in the order of Layout.parse(layout).fields
x        [B, H, q, D] floating, in the stored space (rotated where the layout says so); with rotate=True as the model
         made it, and the op rotates it: one launch rotates, clips, quantizes, packs and writes
at       [q] int64    positions that the q tokens take in the cache, ascending
classes  [B, q] uint8 their token classes (TEXT where omitted)
layout   str          Layout's text form

Every token goes to the body, and to the ring too if it is among the last W: so no token is ever quantized twice, and
one that leaves the ring is in the body already. Where text has more bits, a text token's code is cut in two: its upper
bits and its range are in the body, its lower bits in the text overlay. Raises ValueError for buffers that do not fit
the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from akvq_fx.kernels import blocks, quantizer, uneven
from akvq_fx.kernels.choose import dispatch
from akvq_fx.kernels.layout import (
    PADDING,
    PIVOT,
    STATE_END,
    STATE_RING,
    STATE_TEXT,
    TEXT,
    Layout,
    pack_bits,
    unpack_bits,
)
from akvq_fx.kernels.register import in_place, without_gradient
from akvq_fx.kernels.rotate import restore, rotate_as_stored
from akvq_fx.kernels.simulate import simulated

FASTER = {"cuda": ("append_cuda", "cache_triton")}  # before the reference, by device
FASTER_APPEND = FASTER | {"cpu": ("append_cpu",)}


def named(cache: list[Tensor], layout: Layout) -> dict[str, Tensor]:
    """The buffers by name."""
    if len(cache) != len(layout.fields):
        raise ValueError(
            f"akvq cache: got {len(cache)} buffers, layout {layout} has {len(layout.fields)}: {layout.fields}"
        )
    return dict(zip(layout.fields, cache, strict=True))


def check_tokens(b: dict[str, Tensor], x: Tensor, layout: Layout) -> None:
    """Raises ValueError where x is not a cache's next tokens."""
    if x.dim() != 4 or x.shape[3] != layout.head_dim or x.shape[:2] != b["codes"].shape[:2]:
        raise ValueError(
            f"akvq::append: x is {list(x.shape)}, accepted: [B, H, q, D] of a cache with codes "
            f"{list(b['codes'].shape)} and head dim {layout.head_dim}; "
            "a cache from another model or batch cannot be continued"
        )


def check_call(b: dict[str, Tensor], x: Tensor, at: Tensor, classes: Tensor | None, layout: Layout) -> None:
    """Raises ValueError where x, at and classes do not fit each other and the cache."""
    check_tokens(b, x, layout)
    if at.shape != x.shape[2:3] or not len(at):
        raise ValueError(
            f"akvq::append: at is {list(at.shape)}, accepted: [{x.shape[2]}], one position a token or more"
        )
    if classes is not None and classes.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"akvq::append: classes is {list(classes.shape)}, accepted: {[x.shape[0], x.shape[2]]}")


def check_fits(b: dict[str, Tensor], x: Tensor, at: Tensor, classes: Tensor | None, layout: Layout) -> None:
    """Raises ValueError where a kernel, which relies on sizes, cannot take the call."""
    check_call(b, x, at, classes, layout)
    scattered = [name for name, buffer in b.items() if not buffer.is_contiguous()]
    if scattered:
        raise ValueError(
            f"akvq::append: {', '.join(scattered)} not contiguous, accepted: buffers as Layout.allocate makes them"
        )


def write(
    cache: list[Tensor], x: Tensor, at: Tensor, classes: Tensor | None, pivots: Tensor | None, layout: Layout
) -> None:
    """Reference of append: write q tokens at their positions."""
    b = named(cache, layout)
    check_tokens(b, x, layout)
    start, end = at[:1].to(torch.int32), at[-1:].to(torch.int32) + 1
    kinds = kinds_of(x, classes)
    if "classes" in b:
        b["classes"].index_copy_(1, at, kinds.to(torch.uint8).contiguous())
    if layout.plain:
        b["codes"].index_copy_(2, at, x.to(b["codes"].dtype))
    else:
        body = x
        if layout.blocks:
            blocks.begin_blocks(b, x, at, kinds, layout)
            body = x.float() - blocks.means_at(b, at).float()
        codes, range_ = encode(body, layout)
        if layout.text_bits:
            text, text_range = quantizer.encode(body, layout.text_bits, layout.text_clip, layout.groups)
            is_text = (kinds == TEXT)[:, None, :, None]
            codes = torch.where(is_text, text >> layout.low_bits, codes)
            range_ = torch.where(is_text, text_range, range_)
            slot = at + b["state"][STATE_TEXT]
            lower = torch.where(is_text, text & (1 << layout.low_bits) - 1, 0)
            b["text_codes"].index_copy_(2, slot, pack_bits(lower, layout.low_width))
            b["text_at"].index_copy_(1, slot, torch.where(kinds == TEXT, at, -1).to(torch.int32))
        b["codes"].index_copy_(2, at, pack_bits(codes, layout.body_bits))
        b["range"].index_copy_(2, at, range_)
    if layout.window:
        newest = x[:, :, -layout.window :]
        b["ring"].index_copy_(2, at[-layout.window :] % layout.window, newest.to(b["ring"].dtype))
    # after a crop the tokens may start before the end: later pivots are gone, and what the ring lost stays lost
    if layout.pivots:
        b["pivot_at"].masked_fill_(b["pivot_at"] >= start, -1)
    if layout.pivots and pivots is not None:
        keep_pivots(b, x, at, classes, pivots, None, layout, rotate=False)
    ring, last = b["state"][STATE_RING : STATE_RING + 1], b["state"][STATE_END : STATE_END + 1]
    # a write past the end leaves a gap that the ring never held
    held = torch.where(start > last, start, torch.minimum(ring, start))
    b["state"][STATE_RING : STATE_RING + 1] = torch.maximum(held, end - layout.window)
    b["state"][STATE_END : STATE_END + 1] = end


def encode(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """x [..., D] in the stored space -> codes of the body [..., D] int32, range [..., Layout.range_size] fp16."""
    if layout.uneven:
        return uneven.encode(x)
    if layout.symmetric:
        return quantizer.encode_symmetric(x, layout.body_bits, layout.groups)
    return quantizer.encode(x, layout.body_bits, layout.body_clip, layout.groups)


def decode(words: Tensor, range_: Tensor, layout: Layout) -> Tensor:
    """The inverse, of packed codes: words [..., D*b/16] int16 -> [..., D] in the layout's code_dtype."""
    codes = unpack_bits(words, layout.body_bits)
    if layout.uneven:
        return uneven.decode(codes, range_, layout.code_dtype)
    if layout.symmetric:
        return quantizer.decode_symmetric(codes, range_, layout.body_bits, layout.code_dtype)
    return quantizer.decode(codes, range_, layout.code_dtype)


def with_means(held: Tensor, b: dict[str, Tensor], at: Tensor, layout: Layout) -> Tensor:
    """Tokens at positions `at` from what their codes hold, [B, H, n, D] in code_dtype -> the layout's dtype."""
    limit = blocks.largest(layout)
    return (held + blocks.means_at(b, at).float()).clamp(-limit, limit).to(layout.dtype)


def kinds_of(x: Tensor, classes: Tensor | None) -> Tensor:
    """[B, q] uint8: classes, or TEXT for every token of x."""
    given = torch.full((1, 1), TEXT, dtype=torch.uint8, device=x.device) if classes is None else classes
    return given.expand(x.shape[0], x.shape[2])


def keep_pivots(
    b: dict[str, Tensor],
    x: Tensor,
    at: Tensor,
    classes: Tensor | None,
    pivots: Tensor,
    affine: Tensor | None,
    layout: Layout,
    rotate: bool,
) -> None:
    """Fill the pivot slots from tokens pivots [B, P] of x, where x starts a cache (its first position is 0).

    A pivot on padding is dropped, since no query sees it. With rotate=True only the chosen tokens are rotated.
    """
    B, H, _, D = x.shape
    begins = at[0] == 0
    # where there are more pivots than slots, this pads by a negative number, which cuts them off
    row = torch.nn.functional.pad(pivots.long(), (0, layout.pivots - pivots.shape[1]), value=-1)
    given, row = row >= 0, row.clamp_min(0)
    position = at[row].long()
    given &= kinds_of(x, classes).gather(1, row) != PADDING
    chosen = x.gather(2, row[:, None, :, None].expand(B, H, -1, D))
    chosen = rotate_as_stored(chosen, affine, layout.rotated) if rotate else chosen
    kept = torch.where(given, position, -1).to(torch.int32)
    b["pivots"].copy_(torch.where(begins, chosen.to(b["pivots"].dtype), b["pivots"]))
    b["pivot_at"].copy_(torch.where(begins, kept, b["pivot_at"]))
    if "classes" in b:
        # unused slots point at a position too, so take the maximum: PIVOT is above the classes of vision and text
        mark = torch.where(given & begins, PIVOT, 0).to(torch.uint8)
        b["classes"].scatter_reduce_(1, position, mark, "amax")


def create(
    x: Tensor,
    at: Tensor,
    classes: Tensor | None,
    pivots: Tensor | None,
    affine: Tensor | None,
    capacity: int,
    layout: Layout,
) -> list[Tensor]:
    """Reference of pack: fresh buffers that hold the prompt."""
    cache = layout.allocate(x.shape[0], x.shape[1], capacity, capacity if layout.text_bits else 0, x.device)
    write(cache, x, at, classes, pivots, layout)
    if "affine" in layout.fields:
        named(cache, layout)["affine"].copy_(affine)
    return cache


def scatter_tokens(target: Tensor, at: Tensor, source: Tensor) -> None:
    """target[b, :, at[b, i]] = source[b, :, i] wherever 0 <= at[b, i] < target's length."""
    row, slot = torch.nonzero((at >= 0) & (at < target.shape[2]), as_tuple=True)
    target[row, :, at[row, slot].long()] = source[row, :, slot]


def read(cache: list[Tensor], length: int, layout: Layout, past: int | None = None) -> Tensor:
    """The first `length` tokens in the stored space, [B, H, length, D]: body, then overlays on top of it.

    past    a simulated cache's tokens from this position on, which the call itself brought, are read as they are
    """
    b = named(cache, layout)
    if layout.simulate:
        return simulated(b, length, layout, past)
    if layout.lossless:
        return b["codes"][:, :, :length]
    out = decode(b["codes"][:, :, :length], b["range"][:, :, :length], layout)
    if layout.blocks:
        out = with_means(out, b, torch.arange(length, device=out.device), layout)
    if layout.text_bits:
        scatter_tokens(out, b["text_at"], read_text(b, layout))
    if layout.pivots:
        scatter_tokens(out, b["pivot_at"], b["pivots"])
    if layout.window:
        slots = torch.arange(layout.window, device=out.device)
        last = b["state"][STATE_END] - 1
        position = last - (last - slots) % layout.window
        position = torch.where(position >= b["state"][STATE_RING], position, -1)
        scatter_tokens(out, position.expand(out.shape[0], -1), b["ring"])
    return out


def read_text(b: dict[str, Tensor], layout: Layout) -> Tensor:
    """The tokens of the text slots [B, H, Ct, D]: upper bits and ranges stand at their positions in the body."""
    at = b["text_at"].clamp_min(0).long()
    of_body = lambda t: t.gather(2, at[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))
    upper = unpack_bits(of_body(b["codes"]), layout.body_bits)
    lower = unpack_bits(b["text_codes"], layout.low_width)
    out = quantizer.decode((upper << layout.low_bits) | lower, of_body(b["range"]), layout.code_dtype)
    return with_means(out, b, at, layout) if layout.blocks else out


@without_gradient
def pack(
    x: Tensor,
    at: Tensor,
    classes: Tensor | None,
    pivots: Tensor | None,
    affine: Tensor | None,
    capacity: int,
    layout: str,
    rotate: bool = False,
) -> list[Tensor]:
    """x [B, H, q, D] -> new buffers of `capacity` tokens; pivots [B, P] int32 index the q tokens, -1 for none."""
    parsed = Layout.parse(layout)

    def run(kernel) -> list[Tensor]:
        if kernel is not None:
            return kernel(x, at, classes, pivots, affine, capacity, parsed, rotate)
        stored = rotate_as_stored(x, affine, parsed.rotated) if rotate else x
        return create(stored, at, classes, pivots, affine, capacity, parsed)

    return dispatch(run, "pack", FASTER.get(x.device.type, ()), x, parsed)


@torch.library.register_fake("akvq::pack")
def _(x, at, classes, pivots, affine, capacity, layout, rotate=False):
    parsed = Layout.parse(layout)
    B, H = x.shape[:2]
    text = capacity if parsed.text_bits else 0
    specs = [parsed.buffer(name, B, H, capacity, text) for name in parsed.fields]
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in specs]


@in_place
def append(
    cache: list[Tensor],
    x: Tensor,
    at: Tensor,
    classes: Tensor | None,
    pivots: Tensor | None,
    layout: str,
    rotate: bool = False,
) -> None:
    """Write q tokens in place: one in a decode step, more when a filled cache takes another prompt.

    pivots [B, P] int32 index the q tokens; they count only where the tokens start the cache.
    """
    parsed = Layout.parse(layout)

    def run(kernel) -> None:
        if kernel is not None:
            kernel(cache, x, at, classes, pivots, parsed, rotate)
            return
        stored = rotate_as_stored(x, named(cache, parsed).get("affine"), parsed.rotated) if rotate else x
        write(cache, stored, at, classes, pivots, parsed)

    dispatch(run, "append", FASTER_APPEND.get(x.device.type, ()), x, parsed)


@torch.library.register_fake("akvq::append")
def _(cache, x, at, classes, pivots, layout, rotate=False):
    named(cache, Layout.parse(layout))


@in_place
def restart(cache: list[Tensor], at: Tensor, affine: Tensor | None, layout: str) -> None:
    """Where the tokens to come start the cache (position 0), forget the last prompt's overlays and take its affine map.

    A static cache that was reset is written by the same graph that continues one; the device tells them apart.
    """
    parsed = Layout.parse(layout)
    b, begins = named(cache, parsed), at[0] == 0
    b["state"][:STATE_TEXT] *= ~begins
    if parsed.text_bits:
        b["text_at"].masked_fill_(begins, -1)
    if parsed.pivots:
        b["pivot_at"].copy_(torch.where(begins, -1, b["pivot_at"]))
    if "affine" in b:
        b["affine"].copy_(torch.where(begins, affine, b["affine"]))


@torch.library.register_fake("akvq::restart")
def _(cache, at, affine, layout):
    named(cache, Layout.parse(layout))


@torch.library.custom_op("akvq::dequantize", mutates_args=())
def dequantize(cache: list[Tensor], length: int, layout: str) -> Tensor:
    """The first `length` tokens as the model made them (rotation and affine map undone), [B, H, length, D]."""
    parsed = Layout.parse(layout)
    stored = read(cache, length, parsed)
    if not parsed.rotated and not parsed.affine:
        return stored.clone()
    return restore(stored, named(cache, parsed).get("affine"), parsed.rotated)


@dequantize.register_fake
def _(cache, length, layout):
    parsed = Layout.parse(layout)
    B, H = named(cache, parsed)["codes"].shape[:2]
    return cache[0].new_empty((B, H, length, parsed.head_dim), dtype=parsed.dtype)
