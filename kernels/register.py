"""in_place and without_gradient: register ops whose calls cost the host little.

torch.library.custom_op registers such ops too, but every call then goes through Python twice more, for autograd and for
the buffers' version counters: 30 to 40 us of the host, several times a layer. Nothing that these ops return needs a
gradient: codes are no numbers that a backward pass would save, and statistics only say how to store them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("akvq", "FRAGMENT")


def in_place(function: Callable[..., None]) -> torch._ops.OpOverloadPacket:
    """akvq::<the function's name>, for every device; `cache` is what it writes. Its fake is registered beside it."""
    return _define(function, ("cache",))


def without_gradient(function: Callable) -> torch._ops.OpOverloadPacket:
    """akvq::<the function's name>, for every device, which makes new tensors. Its fake is registered beside it."""
    return _define(function, ())


def _define(function: Callable, written: tuple[str, ...]) -> torch._ops.OpOverloadPacket:
    name = function.__name__
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=written))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.akvq, name)
