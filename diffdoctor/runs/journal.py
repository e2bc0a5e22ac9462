"""What a run over many pictures has done, in lines that survive a kill: one a picture, and a mark for a whole shard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

_PART = "part-*.jsonl"


class Records:
    """The records that all processes in all lives of a run have written; memory holds their places, not them.

    A line that a kill cut short is no record. Of two records of one name the later counts.

    Args:
        folder: of the records; need not exist.

    Attributes:
        whole: the marks of the shards of which every picture is recorded, as they were written.
    """

    def __init__(self, folder: Path):
        self.whole: set[str] = set()
        self._places: dict[str, tuple[Path, int]] = {}
        for file in sorted(folder.glob(_PART), key=lambda path: path.stat().st_mtime_ns):
            offset = 0
            with open(file, "rb") as lines:
                for line in lines:
                    self._take(line, file, offset)
                    offset += len(line)

    def _take(self, line: bytes, file: Path, offset: int) -> None:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
            if "shard" in entry:
                self.whole.add(entry["shard"])
            elif "path" in entry:
                self._places[entry["name"]] = file, offset
        except (ValueError, KeyError, TypeError):
            return

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[dict]:
        """The records in the order of their names."""
        files = {}
        try:
            for name in sorted(self._places):
                path, offset = self._places[name]
                if path not in files:
                    files[path] = open(path, "rb")  # noqa: SIM115 (several, closed below)
                files[path].seek(offset)
                yield json.loads(files[path].readline())
        finally:
            for file in files.values():
                file.close()


class RecordWriter:
    """One process' records of one life, as a context; the file is made with the first of them.

    Args:
        folder: of the records.
        process: index of this process.
    """

    def __init__(self, folder: Path, process: int):
        self.folder, self.process, self.file = folder, process, None

    def add(self, records: list[dict]) -> None:
        """Write records, or {"shard": mark} for a shard that is done; on the disk when this returns."""
        if not records:
            return
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            number = len(list(self.folder.glob(_PART)))
            self.file = open(self.folder / f"part-{self.process:04d}-{os.getpid()}-{number:04d}.jsonl", "xb")  # noqa: SIM115
        self.file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self.file.flush()
        os.fsync(self.file.fileno())

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.close()
