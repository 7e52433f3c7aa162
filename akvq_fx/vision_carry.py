"""Carry the vision mask of a call from the graph that places image features to the graphs that hold the decoder layers.

A graph break may separate them. The mask is kept per thread until the call's decode steps or the next call begin.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_local = threading.local()


def put(mask: Tensor | None) -> None:
    _local.mask = mask


def peek() -> Tensor | None:
    return getattr(_local, "mask", None)


def take(batch: int, tokens: int, device: torch.device) -> Tensor:
    """The carried mask as [batch, tokens] bool; all False where none fits."""
    mask = peek()
    if mask is None or tuple(mask.shape) != (batch, tokens):
        return torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    return mask
