"""What a run over many pictures has done, in lines that survive a kill: one a picture, and a mark for a whole shard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from diffdoctor.runs import strict_json

_PART = "part-*.jsonl"


class Journal:
    """Records that each process of each attempt at a run appends to a file of its own; a context.

    A line that a kill cut short is no record.

    Args:
        folder: of the files; need not exist.
        process: index of this process among those that share the work.
    """

    def __init__(self, folder: Path, process: int = 0):
        self.folder, self.process, self._file = folder, process, None

    def read(self) -> Records:
        """What all processes of all attempts have recorded so far."""
        return Records(self.folder)

    def append(self, records: list[dict]) -> None:
        """Write records, or {"shard": mark} for a shard that is done; on the disk when this returns."""
        if not records:
            return
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # After all that is there: parts may have been removed since.
            number = 1 + max([_number(part)[0] for part in self.folder.glob(_PART)], default=-1)
            self._file = open(self.folder / f"part-{self.process:04d}-{os.getpid()}-{number:04d}.jsonl", "xb")  # noqa: SIM115
        self._file.write(b"".join(strict_json.dumps(record).encode() + b"\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()


class Records:
    """The records in a journal's folder by name, of two of one name the later; memory holds their offsets, not them.

    Attributes:
        shards: the marks of the shards of which every picture is recorded.
    """

    def __init__(self, folder: Path):
        self.folder, self.shards = folder, set()
        self._offsets: dict[str, tuple[Path, int]] = {}
        # By the number at the end of the name, which grows with the attempts. Not by time: a clock may go back.
        for file in sorted(folder.glob(_PART), key=_number):
            offset = 0
            with open(file, "rb") as lines:
                for line in lines:
                    self._index(line, file, offset)
                    offset += len(line)

    def _index(self, line: bytes, file: Path, offset: int) -> None:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
            if "shard" in entry:
                self.shards.add(entry["shard"])
            elif "path" in entry:
                self._offsets[entry["name"]] = file, offset
        except (ValueError, KeyError, TypeError):
            return

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[dict]:
        """The records in the order of their names."""
        files = {}
        try:
            for name in sorted(self._offsets):
                path, offset = self._offsets[name]
                if path not in files:
                    files[path] = open(path, "rb")  # noqa: SIM115 (several, closed below)
                files[path].seek(offset)
                yield json.loads(files[path].readline())
        finally:
            for file in files.values():
                file.close()


def _number(part: Path) -> tuple[int, str]:
    number = part.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0, part.name
