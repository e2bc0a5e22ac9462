"""The Parquet manifest of a set of shards: a row for each picture, with the bytes at which it stands."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffdoctor.runs.errors import UserError, missing_extra

MANIFEST = "manifest.parquet"
TEXTS = ("key", "shard", "label", "category", "generator", "prompt")
COLUMNS = (*TEXTS, "round", "height", "width", "mask_mean", "mask_max")
OFFSETS = ("picture_offset", "picture_size", "mask_offset", "mask_size", "json_offset", "json_size")


class ManifestWriter:
    """Writes rows to a Parquet file in groups, so that memory holds one group; close it for the file to be whole.

    Args:
        path: of the file.
        group: rows in a group.
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
        """Write what is left and the file's end."""
        self._flush()
        self.writer.close()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(self.table.from_pylist(self.rows, schema=self.schema))
            self.rows = []


def read_manifest(folder: str | Path) -> dict[str, list]:
    """The manifest's columns as lists; raises `UserError` where there is none or it cannot be read."""
    table = _read(folder, (*COLUMNS, *OFFSETS))
    return {name: table.column(name).to_pylist() for name in table.column_names}


def read_columns(folder: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Some of the manifest's columns as arrays, texts as shared `str` objects (keys as a NumPy string array).

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
        raise UserError(
            f"{folder}: no {MANIFEST} there; expected a folder of shards, as `diffdoctor inject` writes them"
        )
    try:
        with parquet.ParquetFile(path) as file:
            missing = [name for name in names if name not in file.schema_arrow.names]
            if missing:
                raise UserError(f"{path}: the manifest lacks the columns {', '.join(missing)}")
            return file.read(columns=list(names))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: no manifest that can be read ({error})") from error


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "stages") from None
    return pyarrow, pyarrow.parquet
