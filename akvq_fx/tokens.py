"""mark_vision: mark for the passes which tokens of a custom model came from an image."""

from __future__ import annotations

from torch import Tensor

from akvq_fx.kernels.salience import mark_vision as _mark_vision


def mark_vision(hidden: Tensor, mask: Tensor) -> Tensor:
    """Identity on the decoder's input embeddings hidden [B, T, E]; mask [B, T] bool is True at vision tokens.

    Put it where text and image embeddings have been merged; compiled or not, the model computes what it did before.
    Not needed where image features are placed by masked_scatter, index_put or x[mask] = ..., which the backend
    recognises. Raises ValueError for a mask of another shape or dtype.
    """
    return _mark_vision(hidden, mask)
