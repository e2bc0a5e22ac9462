"""The Parquet manifest of a set of shards: a row for each picture, with its byte ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tarfile import BLOCKSIZE

import numpy as np

from diffdoctor.data.columns import ParquetColumns, pyarrow_modules
from diffdoctor.data.store_path import Location, at
from diffdoctor.runs.errors import UserError, expected

MANIFEST = "manifest.parquet"
TEXTS = ("key", "shard", "label", "category", "generator", "prompt")
COLUMNS = (*TEXTS, "round", "height", "width", "mask_mean", "mask_max")
OFFSETS = ("picture_offset", "picture_size", "mask_offset", "mask_size", "json_offset", "json_size")
# Of the optional member KEY.ignore.png; 0 where there is none, and in sets written before there were any.
IGNORE_OFFSETS = ("ignore_offset", "ignore_size")
# Further columns that a set may have: of a label set the file that holds a picture, as a path from the set's folder, in
# which `picture_offset` and `picture_size` lie; a picture's `identity.picture_uid` and `picture_hash`.
PICTURE_FILE = "picture_file"
MORE = (PICTURE_FILE, "uid", "phash")
# Characters. Keys are held in an array in which each takes as much as the longest.
_LONGEST, _LONGEST_TEXT = {"key": 1024, "shard": 255, PICTURE_FILE: 4096, "uid": 64}, 2**20
_ABSENT = {**dict.fromkeys(IGNORE_OFFSETS, 0), PICTURE_FILE: "", "uid": "", "phash": 0}


class ManifestWriter:
    """Writes rows to a Parquet file, group by group; the file is complete when the writer was closed.

    Args:
        path: of the file.
        group: rows in a group, which are held in memory.
        more: which of `MORE` it has.
    """

    def __init__(self, path: Path, group: int = 1000, more: Sequence[str] = ()):
        pa, parquet = pyarrow_modules()
        types = dict.fromkeys(TEXTS, pa.string()) | dict.fromkeys(("round", "height", "width"), pa.int32())
        types |= dict.fromkeys(("mask_mean", "mask_max"), pa.float32())
        types |= dict.fromkeys((*OFFSETS, *IGNORE_OFFSETS), pa.int64())
        types |= {name: pa.int64() if name == "phash" else pa.string() for name in MORE if name in more}
        self.schema, self.group, self.rows = pa.schema(list(types.items())), group, []
        # Not by its path, which Arrow refuses unless it is Unicode.
        self.file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self.table, self.writer = pa.Table, parquet.ParquetWriter(self.file, self.schema)

    def add(self, row: dict) -> None:
        """Add a picture's row: its `COLUMNS` and `OFFSETS`, and `IGNORE_OFFSETS` if it has such a member."""
        self.rows.append(dict.fromkeys(IGNORE_OFFSETS, 0) | row)
        if len(self.rows) >= self.group:
            self._flush()

    def add_part(self, path: Location) -> int:
        """Add the rows of another such file, as a group of their own; returns how many there are."""
        _, parquet = pyarrow_modules()
        self._flush()
        with path.open("rb") as file:
            table = parquet.read_table(file, columns=self.schema.names).cast(self.schema)
        self.writer.write_table(table, row_group_size=max(1, len(table)))
        return len(table)

    def close(self) -> None:
        """Write the last group and the file's footer."""
        with self.file:
            self._flush()
            self.writer.close()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(self.table.from_pylist(self.rows, schema=self.schema))
            self.rows = []


def read_manifest(folder: str | Location) -> dict[str, list]:
    """The manifest's columns by name, as lists.

    Raises:
        UserError: see `read_columns`.
    """
    return {name: values.tolist() for name, values in read_columns(folder, (*COLUMNS, *OFFSETS)).items()}


def read_columns(folder: str | Location, names: tuple[str, ...], manifest: str = MANIFEST) -> dict[str, np.ndarray]:
    """Some of the manifest's columns as arrays.

    Args:
        folder: of the set.
        names: of the columns.
        manifest: path of the manifest from the folder.

    Returns:
        (N,) arrays by name: keys as NumPy strings, other texts as shared `str` objects, the rest as numbers; zeros and
        "" for `IGNORE_OFFSETS` and `MORE` that the manifest does not have.

    Raises:
        UserError: there is no manifest, it cannot be read, or its columns are not as `ManifestWriter` writes them.
    """
    with _opened(folder, names, manifest) as table:
        return _read(table, names)


def column_parts(
    folder: str | Location, names: tuple[str, ...], manifest: str = MANIFEST, *, rows: int = 2**16
) -> Iterator[dict[str, np.ndarray]]:
    """What `read_columns` gives, in parts of about so many neighbouring rows, so that no column is held as a whole."""
    with _opened(folder, names, manifest) as table:
        for part in table.parts(rows):
            yield _read(part, names)


def count_rows(folder: str | Location, manifest: str = MANIFEST) -> int:
    """The number of the manifest's rows.

    Raises:
        UserError: see `read_columns`.
    """
    with _opened(folder, (), manifest) as table:
        return table.rows


@contextmanager
def _opened(folder: str | Location, names: tuple[str, ...], manifest: str) -> Iterator[ParquetColumns]:
    """The manifest, of which it is checked that it has these columns and no more rows than there can be."""
    folder = at(folder)
    path = folder / manifest
    if not path.is_file():
        what = f"a folder of shards with {MANIFEST}, as `diffdoctor inject` writes them"
        raise UserError(expected(folder, what, f"no {MANIFEST}"))
    with ParquetColumns(path) as table:
        if missing := [name for name in names if name not in table.names and name not in _ABSENT]:
            raise UserError(expected(path, f"the columns {', '.join(missing)}", "a manifest without them"))
        # A row takes a few bytes in a file that was made to exhaust memory; its members take three blocks of a shard.
        most = sum(shard.stat().st_size for shard in folder.glob("*.tar")) // (3 * BLOCKSIZE)
        if table.rows > max(most, 1000):
            raise UserError(expected(path, f"up to {most:,} rows, which its shards can hold", f"{table.rows:,}"))
        yield table


def _read(table: ParquetColumns, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    absent = {*names} - {*table.names}
    return {name: _filled(name, table.rows) if name in absent else _values(table, name) for name in names}


def is_label_set(folder: str | Location) -> bool:
    """Whether a folder's manifest says that the pictures lie elsewhere."""
    path = at(folder) / MANIFEST
    if not path.is_file():
        return False
    with ParquetColumns(path) as table:
        return PICTURE_FILE in table.names


def _filled(name: str, rows: int) -> np.ndarray:
    return np.full(rows, _ABSENT[name], object if name in (PICTURE_FILE, "uid") else np.int64)


def _values(table: ParquetColumns, name: str) -> np.ndarray:
    if name not in (*TEXTS, PICTURE_FILE, "uid"):
        return table.numbers(name)
    texts = table.texts(name, longest=_LONGEST.get(name, _LONGEST_TEXT))
    texts[np.equal(texts, None)] = ""
    return texts.astype(str) if name == "key" else texts
