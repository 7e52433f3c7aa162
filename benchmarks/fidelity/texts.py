"""Texts of fidelity.py, and the pieces of a text that are measured."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import re
from pathlib import Path

from torch import Tensor

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")  # where Debian's package puts it
HOW = "`apt-get install debian-handbook`, or `--handbook` with its folder of pages or with a plain text"
GOLDEN = (5**0.5 - 1) / 2
PARAGRAPH = re.compile(r"<p\b[^>]*>(.*?)</p>", re.DOTALL | re.IGNORECASE)
SHORT = 80  # characters; shorter paragraphs are captions and links


@dataclasses.dataclass(frozen=True)
class Text:
    """name: what tables call it; about: what it is and what it was used for."""

    name: str
    about: str
    content: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()[:12]


def python_help() -> Text:
    """Help topics that come with Python; they differ a little between its versions."""
    from pydoc_data.topics import topics

    about = "Python's help topics (`pydoc_data.topics`): development text"
    return Text("python help", about, "\n\n".join(topics[name] for name in sorted(topics)))


def handbook(path: Path | None) -> Text | None:
    """The Debian handbook, from a folder of HTML pages or a text file; None where it is not at the usual place.

    Raises FileNotFoundError for a path that was asked for and is not there.
    """
    if path is None and not HANDBOOK.is_dir():
        return None
    path = path or HANDBOOK
    if path.is_dir():
        pages = [page.read_text(encoding="utf-8") for page in sorted(path.glob("*.html"))]
        content = "\n\n".join(paragraph for page in pages for paragraph in paragraphs(page))
    else:
        content = path.read_text(encoding="utf-8")
    return Text("handbook", "the Debian handbook: confirmation text, on which nothing was chosen", content)


def paragraphs(page: str) -> list[str]:
    """Plain text of the <p> elements of an HTML page that are long enough to be prose."""
    plain = (html.unescape(re.sub(r"<[^>]+>", "", inside)) for inside in PARAGRAPH.findall(page))
    return [words for text in plain if len(words := " ".join(text.split())) > SHORT]


def file_text(path: Path) -> Text:
    return Text(path.stem, "given with `--text`", path.read_text(encoding="utf-8"))


def spread(count: int) -> list[int]:
    """A permutation of range(count), every beginning of which is spread evenly: more windows then only add some."""
    return sorted(range(count), key=lambda i: i * GOLDEN % 1)


def piece_of(ids: Tensor, length: int, index: int) -> Tensor:
    """[length]: the index-th piece measured of ids [T], of pieces side by side. Raises ValueError past the last."""
    count = len(ids) // length
    if index >= count:
        raise ValueError(f"the text has {count} pieces of {length} tokens, asked for: {index + 1}; use fewer --windows")
    start = spread(count)[index] * length
    return ids[start : start + length]
