"""Compiled CUDA kernels on disk, beside what Inductor keeps there: a later process need not compile them again.

A file is named by a digest of all that its contents depend on, and begins with a digest of its contents. It is moved
into place whole, as cpp.py's libraries are, so processes may write it at once and none that is killed leaves a half.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from akvq_fx import torch_internals

FOLDER = "akvq"  # in Inductor's folder: TORCHINDUCTOR_CACHE_DIR, else one of the user's among temporary files
DIGEST = hashlib.sha256().digest_size  # bytes


def kept(compile_one: Callable[[], bytes], *depends_on: object) -> bytes:
    """What `compile_one` returns, or returned in this or another process for the same `depends_on`.

    A folder that cannot be read or written is no error: then every process compiles for itself.
    """
    folder = torch_internals.compile_cache_folder()
    if folder is None:
        return compile_one()
    path = Path(folder, FOLDER, hashlib.sha256(repr(depends_on).encode()).hexdigest())
    found = read(path)
    if found is None:
        found = compile_one()
        write(path, found)
    return found


def read(path: Path) -> bytes | None:
    """The contents of a file that is there and whole, else None."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    digest, contents = whole[:DIGEST], whole[DIGEST:]
    return contents if hashlib.sha256(contents).digest() == digest else None


def write(path: Path, contents: bytes) -> None:
    """The file as a whole, or nothing."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            made.write_bytes(hashlib.sha256(contents).digest() + contents)
            os.replace(made, path)
