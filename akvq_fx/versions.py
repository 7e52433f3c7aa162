"""Versions of PyTorch and transformers that akvq_fx was tried with. Others are not refused: they get one warning."""

from __future__ import annotations

import functools
import warnings

from akvq_fx import torch_internals, transformers_names


@functools.cache
def warn_of_untried() -> None:
    """One UserWarning in a process for what is older or newer than anything that the tests ran with."""
    for name, found, oldest, newest in (
        ("PyTorch", torch_internals.version(), torch_internals.OLDEST, torch_internals.NEWEST),
        ("transformers", transformers_names.version(), transformers_names.OLDEST, transformers_names.NEWEST),
    ):
        if found is not None and not oldest <= found <= newest:
            warnings.warn(
                f"akvq: {name} {dotted(found)} was never tried; {dotted(oldest)} to {dotted(newest)} were "
                "(docs/versions.md). If something fails, see whether it does with one of these",
                UserWarning,
                stacklevel=2,
            )


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
