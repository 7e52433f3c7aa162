"""progress: one line on a terminal while something long runs, taken away afterwards. Elsewhere nothing is written.

with shown(text):       while a block runs
begin(text), end()      where the beginning and the end are told by others
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

CLEAR = "\r\x1b[K"  # to the start of the line, and erase it
_begun: list[TextIO] = []  # the terminal that `begin` wrote to, until `end`


@contextlib.contextmanager
def shown(text: str) -> Iterator[None]:
    """Show the text on stderr while the block runs, where that is a terminal."""
    begin(text)
    try:
        yield
    finally:
        end()


def begin(text: str) -> None:
    """Show the text on stderr, where that is a terminal, until `end` or until another line is shown."""
    stream = sys.stderr
    if stream is None or not stream.isatty():
        return
    stream.write(f"{CLEAR}{text}")
    stream.flush()
    _begun[:] = [stream]


def end(*_) -> None:
    """Take the line away, if there is one: after an inner line was taken away there is none."""
    while _begun:
        stream = _begun.pop()
        stream.write(CLEAR)
        stream.flush()
