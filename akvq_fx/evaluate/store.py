"""Store: what was measured so far, in one JSON file that a later run goes on with.

A cell is one task under one setting on one model. It holds one row (a dict of numbers, maybe texts) for each sample, in
the order of the samples, so that a run that was stopped goes on at its sample and a run with more samples adds to it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = "akvq_fx.evaluate 1"


class Store:
    """{"format", "cells": {digest of what: {"what": {...}, "rows": [{...}, ...]}}, "table": [...]}; no path: in memory.

    Raises ValueError for a file that is no such store.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path else None
        self.content: dict[str, Any] = {"format": FORMAT, "cells": {}, "table": []}
        if self.path and self.path.exists():
            try:
                found = json.loads(self.path.read_text())
            except ValueError as error:
                raise ValueError(f"{self.path} is no JSON ({error}); name another file for the results") from error
            if not isinstance(found, dict) or found.get("format") != FORMAT:
                raise ValueError(f"{self.path} holds no results of this program ({FORMAT}); name another file for them")
            self.content = found

    def rows(self, what: Mapping[str, Any]) -> list[dict]:
        """Rows of a cell so far, sample 0 first; `what` says all that its numbers depend on."""
        return list(self.content["cells"].get(digest(what), {"rows": []})["rows"])

    def add(self, what: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Append the next sample's row, and write the file."""
        cell = self.content["cells"].setdefault(digest(what), {"what": dict(what), "rows": []})
        cell["rows"].append(dict(row))
        self.write()

    def put_table(self, table: list[dict]) -> None:
        self.content["table"] = table
        self.write()

    def write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_name(self.path.name + ".part")
            beside.write_text(json.dumps(self.content, indent=1) + "\n")
            os.replace(beside, self.path)  # atomic: a stopped run leaves the old file or the new one


def digest(what: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
