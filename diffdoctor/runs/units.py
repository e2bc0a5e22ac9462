"""Work in units, each on the disk when it is done: shared among processes, and not done again after a kill."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from diffdoctor.runs.files import atomic_path


class Units:
    """Units of work, a file each: a unit is done when its file is there. Each is written by one process.

    Args:
        folder: of the files; need not exist.
        suffix: of the files' names, behind the units'.
    """

    def __init__(self, folder: Path, suffix: str):
        self.folder, self.suffix = folder, suffix

    def path(self, unit: str, suffix: str | None = None) -> Path:
        """The unit's file, or another one beside it."""
        return self.folder / f"{unit}{self.suffix if suffix is None else suffix}"

    def is_done(self, unit: str) -> bool:
        return self.path(unit).is_file()

    def missing(self, units: Iterable[str]) -> list[str]:
        """Those that are still to be done."""
        return [unit for unit in units if not self.is_done(unit)]

    def done(self) -> list[str]:
        """The units that are done, by name."""
        return sorted(path.name.removesuffix(self.suffix) for path in self.folder.glob(f"[!.]*{self.suffix}"))

    @contextmanager
    def writing(self, unit: str, suffix: str | None = None) -> Iterator[BinaryIO]:
        """Write the unit's file; it is there, whole, when the block ends without an error, and the unit is done.

        Args:
            suffix: write a further file of the unit instead, which comes before the unit's own.
        """
        with atomic_path(self.path(unit, suffix)) as temporary, open(temporary, "wb") as file:
            yield file
