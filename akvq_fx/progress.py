"""progress: one line on a terminal while something long runs, taken away afterwards. Elsewhere nothing is written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

CLEAR = "\r\x1b[K"  # to the start of the line, and erase it


@contextlib.contextmanager
def shown(text: str) -> Iterator[None]:
    """Show the text on stderr while the block runs, where that is a terminal."""
    stream = sys.stderr
    if stream is None or not stream.isatty():
        yield
        return
    stream.write(f"{CLEAR}{text}")
    stream.flush()
    try:
        yield
    finally:
        stream.write(CLEAR)
        stream.flush()
