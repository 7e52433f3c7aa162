"""The batch and the length of a prompt are symbols from the first graph on.

Dynamo makes a first graph for the very sizes that it sees, and a second one with symbols when a size changes. For a
cache that is a pair of graphs, prompt and decode, that serve nobody afterwards: a server whose batches are 8, 3 and 1
would compile six. So before dynamo compiles a function for this backend, the sizes that are bound to change are marked
on its arguments, as torch._dynamo.maybe_mark_dynamic marks them: where a model needs a number after all, dynamo takes
the number and says nothing. A size that the user has marked with torch._dynamo.mark_static stays a number.

A batch of one and a prompt of one token stay numbers, since dynamo makes 0 and 1 constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from akvq_fx import torch_internals

DIMS = 4  # of integer tensors are looked at
DEPTH = 3  # arguments, what a call's **kwargs or *args hold, and a batch of inputs among these


def mark(arguments: dict[str, Any]) -> None:
    """Mark the batch B and the length T in every tensor among a function's arguments.

    B and T are sizes in which two 2-D integer tensors agree: token ids [B, T] and their mask or positions. Integer
    tensors are marked wherever they are as large, since positions may have an axis before these two; others as
    [B, T, ...].
    """
    if not torch._dynamo.config.automatic_dynamic_shapes:  # torch.compile(dynamic=False): numbers were asked for
        return
    tensors = list(_tensors(arguments, DEPTH))
    shapes = [x.shape for x in tensors if x.dim() == 2 and not x.is_floating_point()]
    batches, lengths = (_twice([shape[axis] for shape in shapes]) for axis in (0, 1))
    anywhere = (batches | lengths,) * DIMS
    for tensor in tensors:
        moving = (batches, lengths) if tensor.is_floating_point() else anywhere
        numbers = torch_internals.static_dims(tensor)
        for dim, (size, sizes) in enumerate(zip(tensor.shape, moving, strict=False)):
            if size in sizes and dim not in numbers:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _twice(sizes: list[int]) -> set[int]:
    return {size for size in sizes if size > 1 and sizes.count(size) > 1}


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if type(value) is Tensor:
        yield value
    elif depth and isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, depth - 1)
