"""What a run of many stages has done: entries that are appended to one file and never changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffdoctor.runs import strict_json


class Ledger:
    """A file of JSON lines, one an entry; a line that a kill cut short is none.

    Args:
        path: of the file; need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def entries(self) -> list[dict[str, Any]]:
        """All entries, in the order in which they were appended."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                continue
            if isinstance(entry, dict):
                found.append(entry)
        return found

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            file.seek(0)
            # A line that was cut short makes way.
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(strict_json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
