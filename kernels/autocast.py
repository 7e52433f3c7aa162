"""What autocast means for the ops: attention takes tensors in its dtype, as torch's does; others take them as is.

An op's body would otherwise run under the caller's autocast, which rounds the rotation's matrix products to 16 bits and
refuses to join fp16 ranges under bf16. The kernels are registered for the autocast keys, so a call outside autocast
does not pass through here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard

from akvq_fx.kernels import attend, cache, rotate, salience  # noqa: F401 - the ops are defined
from akvq_fx.kernels.register import LIBRARY

KEYS = {"cpu": DispatchKey.AutocastCPU, "cuda": DispatchKey.AutocastCUDA}
AS_IS = ("pack", "append", "restart", "dequantize", "rotate", "rotate_keys", "rotate_queries")
AS_IS += ("find_pivots", "key_affine", "mark_vision", "valid_tokens", "token_classes")
CAST = {"attend": ("q", "mask")}  # arguments in autocast's dtype; keys and values follow the query's


def below(op: torch._ops.OpOverload, device: str, names: tuple[str, ...]) -> Callable:
    """The op without autocast, the named floating arguments in its dtype."""
    places = [i for i, argument in enumerate(op._schema.arguments) if argument.name in names]
    keys = DispatchKeySet(KEYS[device])

    def call(*args, **kwargs):
        dtype = torch.get_autocast_dtype(device)
        args = [cast(x, dtype) if i in places else x for i, x in enumerate(args)]
        kwargs = {name: cast(x, dtype) if name in names else x for name, x in kwargs.items()}
        with _ExcludeDispatchKeyGuard(keys):
            return op(*args, **kwargs)

    return call


def cast(x, dtype: torch.dtype):
    """As autocast casts: floating tensors, float64 left alone."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


for _name in (*AS_IS, *CAST):
    for _device in KEYS:
        _op = getattr(torch.ops.akvq, _name).default
        LIBRARY.impl(_name, below(_op, _device, CAST.get(_name, ())), str(KEYS[_device]).partition(".")[2])
