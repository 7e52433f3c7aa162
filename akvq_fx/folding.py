"""Fold value rotations into weights, in place, once; and take them out again.

W_V' = H W_V and W_O' = W_O H per head, in float64, biases included. A weight's history is kept by identity, so a recompiled graph
or another batch shape does not fold twice, and a second model that shares compiled code is folded when it first runs.
"""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from akvq_fx.kernels.rotate import matrix

SAMPLES = 64  # elements of a weight that its fingerprint reads


@dataclass
class Folded:
    """What was done to one value projection, enough to undo it."""

    bias: Tensor | None
    output: Tensor
    rows: Tensor  # [H, D] rows of the value weight by head and channel
    columns: Tensor  # [Hq, D] columns of the output weight


class History:
    """Which value weights are folded, and which must stay online because a graph that rotates them is out there.

    caches    plain caches that hold values of folded weights
    """

    def __init__(self):
        self.folded, self.outputs, self.online, self.prints, self.caches = (WeakTensorKeyDictionary() for _ in range(5))
        self.lock = threading.Lock()

    def is_folded(self, weight: Tensor) -> bool:
        return weight in self.folded

    def is_folded_output(self, weight: Tensor) -> bool:
        return weight in self.outputs

    def is_online(self, weight: Tensor) -> bool:
        return weight in self.online

    def keep_online(self, weight: Tensor) -> None:
        self.online[weight] = True

    def fold(self, weight: Tensor, record: Folded) -> bool:
        """Fold once; False where it was folded already or must stay online."""
        with self.lock:
            if weight in self.folded or weight in self.online:
                return False
            turn(weight, record)
            self.folded[weight] = record
            self.outputs[record.output] = True
            return True

    def unfold(self, weight: Tensor) -> bool:
        with self.lock:
            record = self.folded.pop(weight, None)
            if record is None:
                return False
            self.outputs.pop(record.output, None)
            turn(weight, record)
            return True

    def fingerprint(self, weight: Tensor) -> int:
        """A number that changes with the weight's elements; read from the device once per version."""
        version = version_of(weight)
        known = self.prints.get(weight)
        if known is None or known[0] != version:
            flat = dense(weight).detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float().cpu().contiguous()
            known = version, zlib.crc32(sample.numpy().tobytes(), flat.numel())
            self.prints[weight] = known
        return known[1]


def dense(weight: Tensor) -> Tensor:
    """The weight, or the first inner tensor of a wrapper (a quantized weight has no view of its own)."""
    while hasattr(weight, "__tensor_flatten__"):
        weight = getattr(weight, weight.__tensor_flatten__()[0][0])
    return weight


def version_of(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def turn(weight: Tensor, record: Folded) -> None:
    """Multiply by H on both sides; H is its own inverse, so the same call folds and unfolds."""
    h = matrix(record.rows.shape[1], device=weight.device)
    rows, columns = record.rows.to(weight.device), record.columns.to(weight.device)
    with torch.no_grad():
        weight[rows] = torch.einsum("ij,hjf->hif", h, weight[rows].double()).to(weight.dtype)
        if record.bias is not None:
            record.bias[rows] = (record.bias[rows].double() @ h).to(record.bias.dtype)
        out = record.output
        out[:, columns] = (out[:, columns].double() @ h).to(out.dtype)


HISTORY = History()  # by weight identity; weak, so a model that goes away takes its entries along


def unfold(model: nn.Module) -> int:
    """Take the value rotations out of a model's weights again; returns how many layers were unfolded.

    Weights come back to within one rounding of what they were. Caches made while folded are refused afterwards, and compiled
    graphs of the model fold again when they next run a prompt: recompile with value_rotation="online" to keep the
    weights as they are.
    """
    return sum(HISTORY.unfold(parameter) for parameter in model.parameters())
