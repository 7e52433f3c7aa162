"""Carry the vision mask of a call from the graph that places image features to the graphs that hold the decoder layers.

A graph break may separate them. The mask is kept per thread until the call's decode steps or the next call begin.

Where features are placed by code that dynamo leaves uncompiled (a loop with a graph break in it is skipped as a whole),
no graph says where. Then vision tokens are those whose input embedding is not the one that their token id has: the
graph that begins the call tells ids and weight, the graph that holds the layers tells the embeddings.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

LOOKUPS = 4  # remembered of a call: the token ids', and positions' of vision towers
_local = threading.local()


def put(mask: Tensor | None) -> None:
    _local.mask, _local.lookups = mask, []


def begin(ids: Tensor | None = None, weight: Tensor | None = None) -> None:
    """A call begins, no mask is known yet: ids [B, T] are looked up in weight [V, E], where the graph says so.

    A vision tower may begin after the text was looked up, since it looks up positions.
    """
    earlier = getattr(_local, "lookups", [])
    put(None)
    if ids is not None and weight is not None:
        earlier = [*earlier, (ids.detach(), weakref.ref(weight))]  # no model is kept alive
    _local.lookups = earlier[-LOOKUPS:]


def peek() -> Tensor | None:
    return getattr(_local, "mask", None)


def take(batch: int, tokens: int, device: torch.device, embeddings: Tensor | None = None) -> Tensor:
    """The carried mask as [batch, tokens] bool; all False where none fits.

    embeddings: [batch, tokens, E], what the decoder's first layer gets.
    """
    mask = peek()
    if mask is None and embeddings is not None:
        mask = replaced(embeddings)
        put(mask)  # later graphs of this call get hidden states, which are no embeddings
    if mask is None or tuple(mask.shape) != (batch, tokens):
        return torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    return mask


def replaced(embeddings: Tensor) -> Tensor | None:
    """[B, T] bool: tokens whose embeddings [B, T, E] are not those of the call's ids; None where that tells nothing."""
    for ids, ref in reversed(getattr(_local, "lookups", [])):
        weight = ref()
        if weight is None or {ids.device, weight.device} != {embeddings.device}:
            continue
        if (*ids.shape, weight.shape[1]) != tuple(embeddings.shape):
            continue
        known = torch.nn.functional.embedding(ids, weight.detach()).to(embeddings.dtype)
        found = (known != embeddings).any(-1)
        return None if bool(found.all()) else found  # all differ where embeddings are scaled, or have positions added
    return None
