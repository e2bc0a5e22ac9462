"""Parts of the study that are stored when they are done, each named after what it was made of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from diffdoctor.runs.files import atomic_dir, atomic_write_json
from diffdoctor.runs.units import Units
from diffdoctor.version import __version__

RECORD = "part.json"


class Parts:
    """A folder of parts; one that was made of other settings, or from other parts, is another part.

    Args:
        folder: of the parts.
    """

    def __init__(self, folder: str | Path):
        self.units = Units(Path(folder), f"/{RECORD}")

    def made(self, name: str, settings: dict, make: Callable[[Path], dict | None]) -> Path:
        """The folder of a part, made by `make(folder)` unless it is there.

        Args:
            name: of the part; the folder's name adds a digest of the settings.
            settings: all that the part depends on, as JSON values; other parts by their folders' names.
            make: writes the part's files into the folder it is given, and may return what its record is to hold beside
                settings, seconds and CPU seconds.
        """
        text = json.dumps({"diffdoctor": __version__, **settings}, sort_keys=True)
        unit = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        path = self.units.path(unit).parent
        if not self.units.is_done(unit):
            print(f"signs: {unit}", file=sys.stderr, flush=True)
            with atomic_dir(path) as folder:
                wall, cpu = time.perf_counter(), time.process_time()
                found = make(folder) or {}
                seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
                atomic_write_json(folder / RECORD, {"settings": settings, **seconds, **found})
        return path


def record_of(path: Path) -> dict:
    """What was written of a part: settings, seconds, cpu_seconds and what its making returned."""
    return json.loads((path / RECORD).read_text(encoding="utf-8"))


@contextlib.contextmanager
def cpu_seconds() -> Iterator[dict]:
    """Yields a dict that holds `cpu_seconds` of the block, of all threads of this process, when it is over."""
    found, started = {}, time.process_time()
    yield found
    found["cpu_seconds"] = time.process_time() - started
