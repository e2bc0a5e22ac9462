"""The Parquet manifest of a set of shards: a row for each picture, with its byte ranges."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffdoctor.runs.errors import UserError, expected, missing_extra

MANIFEST = "manifest.parquet"
TEXTS = ("key", "shard", "label", "category", "generator", "prompt")
COLUMNS = (*TEXTS, "round", "height", "width", "mask_mean", "mask_max")
OFFSETS = ("picture_offset", "picture_size", "mask_offset", "mask_size", "json_offset", "json_size")


class ManifestWriter:
    """Writes rows to a Parquet file, group by group; the file is complete when the writer was closed.

    Args:
        path: of the file.
        group: rows in a group, which are held in memory.
    """

    def __init__(self, path: Path, group: int = 1000):
        pa, parquet = _pyarrow()
        types = dict.fromkeys(TEXTS, pa.string()) | dict.fromkeys(("round", "height", "width"), pa.int32())
        types |= dict.fromkeys(("mask_mean", "mask_max"), pa.float32()) | dict.fromkeys(OFFSETS, pa.int64())
        self.schema, self.group, self.rows = pa.schema(list(types.items())), group, []
        self.table, self.writer = pa.Table, parquet.ParquetWriter(path, self.schema)

    def add(self, row: dict) -> None:
        """Add a picture's row: its `COLUMNS` and `OFFSETS`."""
        self.rows.append(row)
        if len(self.rows) >= self.group:
            self._flush()

    def close(self) -> None:
        """Write the last group and the file's footer."""
        self._flush()
        self.writer.close()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(self.table.from_pylist(self.rows, schema=self.schema))
            self.rows = []


def read_manifest(folder: str | Path) -> dict[str, list]:
    """The manifest's columns by name, as lists.

    Raises:
        UserError: there is no manifest, or it cannot be read.
    """
    table = _read(folder, (*COLUMNS, *OFFSETS))
    return {name: table.column(name).to_pylist() for name in table.column_names}


def read_columns(folder: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Some of the manifest's columns as arrays.

    Args:
        folder: of the set.
        names: of the columns.

    Returns:
        (N,) arrays by name: keys as NumPy strings, other texts as shared `str` objects, the rest as numbers.

    Raises:
        UserError: there is no manifest, or it cannot be read.
    """
    pa, _ = _pyarrow()
    table = _read(folder, names)
    result = {}
    for name in names:
        column = table.column(name).combine_chunks()
        if name == "key":
            result[name] = np.array(column.to_pylist(), dtype=str)
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            # Few texts for many rows: 8 bytes a row.
            coded = column.fill_null("").dictionary_encode()
            texts = np.array(coded.dictionary.to_pylist() or [""], dtype=object)
            result[name] = texts[coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)]
        else:
            result[name] = column.to_numpy(zero_copy_only=False)
    return result


def _read(folder: str | Path, names: tuple[str, ...]):
    pa, parquet = _pyarrow()
    path = Path(folder) / MANIFEST
    if not path.is_file():
        what = f"a folder of shards with {MANIFEST}, as `diffdoctor inject` writes them"
        raise UserError(expected(folder, what, f"no {MANIFEST}"))
    try:
        with parquet.ParquetFile(path) as file:
            missing = [name for name in names if name not in file.schema_arrow.names]
            if missing:
                raise UserError(expected(path, f"the columns {', '.join(missing)}", "a manifest without them"))
            return file.read(columns=list(names))
    except (OSError, pa.ArrowException) as error:
        raise UserError(expected(path, "a Parquet file", f"one that cannot be read ({error})")) from error


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "stages") from None
    return pyarrow, pyarrow.parquet
