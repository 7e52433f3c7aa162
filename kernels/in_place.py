"""in_place: registers an op that writes its buffers and returns nothing.

torch.library.custom_op with mutates_args does so too, but every call then goes through Python twice more, for autograd
and for the buffers' version counters: 30 to 40 us of the host, twice a layer of a decode step. Nothing that such an op
returns needs a gradient, and codes are no numbers that a backward pass would save.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("akvq", "FRAGMENT")


def in_place(function: Callable[..., None]) -> torch._ops.OpOverloadPacket:
    """akvq::<the function's name>, for every device; `cache` is what it writes. Its fake is registered beside it."""
    name = function.__name__
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=("cache",)))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.akvq, name)
