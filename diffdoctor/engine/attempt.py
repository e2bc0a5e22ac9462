"""One attempt at a unit of work: where its files lie until it is committed."""

from __future__ import annotations

import secrets
from pathlib import Path

# Below the output folder; nobody reads what lies there before a commit names it.
ATTEMPTS = ".attempts"


class Attempt:
    """One attempt at a unit, and the files that it writes.

    Args:
        output: folder of the run.
        unit: the unit's id.
    """

    def __init__(self, output: Path, unit: str):
        self.output, self.unit, self.token = output, unit, secrets.token_hex(4)
        self.files: dict[str, Path] = {}

    def name(self, name: str) -> str:
        """What a file of the unit is called once the run is finished."""
        return name

    def path(self, name: str) -> Path:
        """Where to write a file of the unit.

        Args:
            name: its path below the output folder once the run is finished, such as "shard-000123.tar"; no other
                unit's.
        """
        self.files[name] = place_of(self.output, self.unit, self.token, name)
        return self.files[name]

    def remove(self) -> None:
        """Delete what was written."""
        for path in self.files.values():
            path.unlink(missing_ok=True)


def place_of(output: Path, unit: str, token: str, name: str) -> Path:
    """Where a file of an attempt lies until the run is finished.

    Args:
        output: folder of the run.
        unit: the unit's id.
        token: of the attempt.
        name: the file's path below the folder afterwards.
    """
    return output / ATTEMPTS / f"{unit}.{token}.{Path(name).name}"
