"""Sets whose manifest's columns stay on the disk: memory maps, which all processes of a machine share.

The columns are written once as .npy files to the cache (see `store_cache`), part by part, so that no process ever holds
the rows: a set stays as it is, wherever it lies and whoever wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffdoctor.data.manifest import column_parts, count_rows
from diffdoctor.data.shards import MANIFEST_COLUMNS, ShardData, attributes_of
from diffdoctor.data.store_cache import cache_folder, fetching, made_folder
from diffdoctor.data.store_path import Location, StorePath, absolute
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_dir, clear_leftovers, delete_dir

# Rows from which `open_set` leaves the columns on the disk.
MAPPED_FROM = 100_000
_TEXTS, _UNUSED = "texts.json", 30 * 24 * 3600.0  # seconds
_FORM = 1  # of the files


class CodedTexts:
    """A column of texts of which many are equal: numbers on the disk, and each text once in memory.

    Args:
        codes: (N,) integers.
        texts: (K,) the text of each.
    """

    def __init__(self, codes: np.ndarray, texts: np.ndarray):
        self.codes, self.texts = codes, texts

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> Any:
        return self.texts[self.codes[index]]

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), 2**16):
            yield from self[begin : begin + 2**16]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        values = self.texts[np.asarray(self.codes)]
        return values if dtype is None else values.astype(dtype)

    def __eq__(self, other: object) -> np.ndarray:
        return np.asarray(self) == (np.asarray(other) if isinstance(other, CodedTexts) else other)

    def __ne__(self, other: object) -> np.ndarray:
        return ~(self == other)

    __hash__ = None


class MappedData(ShardData):
    """`ShardData` whose columns are memory maps, of any number of pictures; it is sent to other processes by its place.

    Texts (`categories`, `generators`, `labels`, `shards`, `picture_files`) are `CodedTexts`, the other columns arrays.
    """

    def _columns(self, manifest: str) -> dict[str, Any]:
        self._mapped = _written(self.folder, manifest)
        return _loaded(self._mapped)

    def __getstate__(self) -> dict[str, Any]:
        mapped = {path.stem for path in self._mapped.glob("*.npy")}
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | _loaded(state["_mapped"])


def open_set(folder: str | Location) -> ShardData:
    """A set of shards, whose columns stay on the disk where it has many pictures.

    Raises:
        UserError: see `ShardData`.
    """
    return (MappedData if count_rows(folder) >= MAPPED_FROM else ShardData)(folder)


def _loaded(folder: Path) -> dict[str, Any]:
    texts = json.loads((folder / _TEXTS).read_text(encoding="ascii"))
    # As arrays of their own class: indexing a memmap costs ten times as much.
    columns = {path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in folder.glob("*.npy")}
    coded = {name: CodedTexts(columns[name], np.array(found, object)) for name, found in texts.items()}
    return columns | coded


def _written(folder: Location, manifest: str) -> Path:
    """The folder of a set's columns, which are written unless they are there."""
    path = folder / manifest
    facts = path.stat()
    stamp = facts.stamp if isinstance(path, StorePath) else f"{facts.st_size}@{facts.st_mtime_ns}"
    name = hashlib.sha256(f"{_FORM}\n{absolute(path)}\n{stamp}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
    place = cache_folder() / "columns"
    made = place / name
    if not made.is_dir():
        made_folder("columns")
        with fetching(place, name):
            if not made.is_dir():
                _clear(place, name)
                with atomic_dir(made) as temporary:
                    _write(folder, manifest, temporary)
    with suppress(OSError):
        os.utime(made)
    return made


def _clear(place: Path, name: str) -> None:
    """Delete columns that nobody has opened for a month, and what a kill left of these."""
    clear_leftovers(place, name)
    for entry in place.iterdir():
        if entry.is_dir() and time.time() - entry.stat().st_mtime > _UNUSED:
            delete_dir(entry)


def _write(folder: Location, manifest: str, into: Path) -> None:
    longest = max((part["key"].dtype.itemsize // 4 for part in column_parts(folder, ("key",), manifest)), default=1)
    rows, codes = count_rows(folder, manifest), {}
    with ExitStack() as closing:
        files: dict[str, BinaryIO] = {}
        for part in column_parts(folder, MANIFEST_COLUMNS, manifest):
            for name, column in attributes_of(part).items():
                if column.dtype == object:
                    known = codes.setdefault(name, {})
                    column = np.fromiter((known.setdefault(text, len(known)) for text in column), np.int32, len(column))
                if name == "keys":
                    column = column.astype(f"<U{longest}")
                if name not in files:
                    files[name] = closing.enter_context(open(into / f"{name}.npy", "wb"))
                    header = {"descr": column.dtype.str, "fortran_order": False, "shape": (rows, *column.shape[1:])}
                    np.lib.format.write_array_header_1_0(files[name], header)
                files[name].write(np.ascontiguousarray(column).data)
    if not files:  # no rows, of which no file can be mapped
        raise UserError(expected(folder, "at least one picture", "none"))
    texts = strict_json.dumps({name: list(known) for name, known in codes.items()})
    (into / _TEXTS).write_text(texts, encoding="ascii")
