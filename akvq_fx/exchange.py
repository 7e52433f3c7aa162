"""One tensor object in the place of another, for everybody who holds it: a static buffer of the caller's becomes a
PackedKV, and a plain tensor again.

A module, a cache object and dynamo's guards hold the Python object, so its inside is exchanged: what it is a handle of,
its class, its attributes. `refusal` says where others than Python hold the inside, or share its memory.

    exchange(buffer, packed)    the buffer is packed; its 16-bit memory is freed
    turn_back(buffer)           it is plain, as before
    before_write, before_view   the same, where code outside of a graph is about to do what codes should not take

An uncompiled prompt that starts the cache anew finds a plain buffer: it attends to 16-bit tokens, and is packed with
statistics of its own. Tokens that follow the end go to the codes. What codes cannot take, or what might write through a
view, finds a buffer that stays plain from then on: no token is quantized twice.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor

from akvq_fx import torch_internals

OVERWRITE = ("zero_", "fill_", "copy_")
STAYS = "akvq_stays_plain"  # attribute of a buffer: why it is not packed again


def refusal(buffer: Tensor) -> str:
    """Why a buffer must not be exchanged, "" where it may be."""
    if (why := getattr(buffer, STAYS, "")) or type(buffer) is not Tensor:
        return why or f"it is a {type(buffer).__name__}, no plain tensor"
    if buffer.requires_grad or not buffer.is_leaf or torch_internals.is_view(buffer):
        return "it has a gradient" if buffer.requires_grad else "it is a view of another tensor"
    if not buffer.is_contiguous():
        return "it is not contiguous"
    if torch_internals.users_of_memory(buffer) > 1:
        return "other tensors share its memory"
    return torch_internals.held_elsewhere(buffer)


def exchange(buffer: Tensor, packed: Tensor) -> None:
    """Have the object `buffer` be the packed tensor. Raises RuntimeError where PyTorch refuses, and changes nothing."""
    before = dict(vars(buffer))
    torch_internals.exchange_inside(buffer, packed)
    buffer.was = before
    # the storage knew the object that is now the plain tensor as its view
    buffer.storage.views = [weakref.ref(buffer)]


def leave(buffer: Tensor, why: str) -> None:
    """Have a buffer stay plain, which `refusal` gives as the reason."""
    setattr(buffer, STAYS, why)


def turn_back(buffer: Tensor, plain: Tensor | None = None) -> None:
    """Have an exchanged buffer be a plain tensor again: this one, by default its tokens as codes have them."""
    if plain is None:
        plain = buffer.dequantize().clone(memory_format=torch.contiguous_format)  # in memory of its own, no view
        if buffer.static:  # a window that slides is full
            written = buffer.storage.written()
            plain.narrow(buffer.axes.tokens, written, buffer.count - written).zero_()
    attributes = buffer.was
    torch_internals.exchange_inside(buffer, plain)
    vars(buffer).clear()
    vars(buffer).update(attributes)


def before_write(buffer: Tensor, how: str, at: Tensor | None = None, all_rows: bool = True) -> None:
    """To be called before code outside of a graph writes to a packed tensor. It comes back plain where codes should not
    take the write.

    how         name of the method
    at          [q] positions of the tokens that are written, None for another kind of write
    all_rows    they are written in every row
    """
    if buffer.was is None:
        return
    empty = lambda: torch.zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device)
    if how in OVERWRITE:
        turn_back(buffer, empty())
    elif at is None:
        stay_plain(buffer, f"{how} writes to it outside of a graph that akvq_fx compiled")
    elif int(at[0]) == 0:
        turn_back(buffer, empty() if all_rows and len(at) >= buffer.storage.written() else None)


def before_view(args: tuple, function) -> None:
    """The same before function(*args) makes a view, which a packed tensor cannot give: a write to it would be lost.

    What detach gives is a view of the codes; where only axes are added, as for heads to be repeated, it is to be read.
    """
    buffer = args[0]
    reads = function is Tensor.__getitem__ and only_adds_axes(args[1]) or function in (Tensor.detach, torch.detach)
    if getattr(buffer, "was", None) is not None and not reads:
        stay_plain(buffer, f"{function.__name__} asks for a view of it outside of a graph that akvq_fx compiled")


def stay_plain(buffer: Tensor, why: str) -> None:
    turn_back(buffer)
    leave(buffer, why)
    warnings.warn(f"akvq: a static buffer of shape {list(buffer.shape)} goes back to 16 bits: {why}", stacklevel=5)


def only_adds_axes(index) -> bool:
    """x[index] has all elements of x, as where heads are repeated: it is read, and nobody writes to it."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or is_all(part) for part in parts)


def is_all(part) -> bool:
    return isinstance(part, slice) and part == slice(None)


def require_own_tracing(packed: Tensor) -> None:
    """Raises RuntimeError where another backend's AOTAutograd traces a cache, whose codes it does not see."""
    if torch_internals.is_functional(packed.codes):
        raise RuntimeError(
            "akvq: a packed cache goes through a graph that another backend compiles, which would read and write "
            'something else; compile that function with backend="akvq" too, leave it uncompiled, or call '
            "cache.dequantize() before it"
        )
