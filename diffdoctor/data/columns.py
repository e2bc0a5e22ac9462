"""Columns of Parquet files from elsewhere: types and lengths are checked before Python values are made of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.data.store_path import StorePath, at
from diffdoctor.runs.errors import UserError, expected, first_line, missing_extra
from diffdoctor.runs.files import atomic_path


class ParquetColumns:
    """The columns of a Parquet file, a context.

    Args:
        path: of the file.
        name: of the file in errors; None: its path.

    Attributes:
        names: of the columns.
        rows: number of rows.
        metadata: of the file, both sides bytes.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike | StorePath, *, name: str | None = None):
        self.name = str(path) if name is None else name
        self._pa, parquet = pyarrow_modules()
        try:
            # Not by its path, which Arrow refuses unless it is Unicode.
            self._file = at(path).open("rb")
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror or error})") from None
        try:
            schema = parquet.read_schema(self._file)
            self.names, self.metadata = schema.names, schema.metadata or {}
            # Texts that repeat are read once, and not once for each row.
            texts = [field.name for field in schema if self._is_text(field.type)]
            self._table = parquet.ParquetFile(self._file, read_dictionary=texts)
            self.rows, self._groups = self._table.metadata.num_rows, None
        except Exception as error:
            self._file.close()
            raise self._unreadable(error) from error

    def texts(self, column: str, *, longest: int) -> np.ndarray:
        """A column of texts.

        Args:
            column: its name.
            longest: largest number of characters in a text.

        Returns:
            (N,) shared `str` objects, None for a null.

        Raises:
            UserError: it is no column of texts, or one is too long or no Unicode.
        """
        kind, read = self._column(column)
        if self._pa.types.is_null(kind):
            return np.full(self.rows, None, object)
        if not self._is_text(kind):
            raise UserError(expected(self.name, f"text in the column {column}", kind))
        parts = [np.empty(0, object)]
        for chunk in read.chunks:
            coded = chunk if self._pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
            # A character takes up to four bytes.
            if (_lengths(coded.dictionary) > 4 * longest).any():
                raise UserError(expected(self.name, f"up to {longest:,} characters in the column {column}", "more"))
            try:
                texts = np.array([*coded.dictionary.to_pylist(), None], dtype=object)
            except UnicodeDecodeError as error:
                raise UserError(expected(self.name, f"UTF-8 in the column {column}", first_line(error))) from None
            parts.append(texts[coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)])
        return np.concatenate(parts)

    def numbers(self, column: str) -> np.ndarray:
        """A column of numbers as an array (N,).

        Raises:
            UserError: it is no column of numbers, or one of them is missing.
        """
        kind, read = self._column(column)
        if not (self._pa.types.is_integer(kind) or self._pa.types.is_floating(kind)):
            raise UserError(expected(self.name, f"numbers in the column {column}", kind))
        if read.null_count:
            raise UserError(expected(self.name, f"a number in every row of the column {column}", "nulls"))
        return read.to_numpy()

    def values(self, column: str, *, longest: int) -> list[Any]:
        """A column of texts or numbers as Python's values, None for a null."""
        kind, read = self._column(column)
        is_number = self._pa.types.is_integer(kind) or self._pa.types.is_floating(kind)
        return read.to_pylist() if is_number else self.texts(column, longest=longest).tolist()

    def parts(self, rows: int = 2**16) -> Iterator[ParquetColumns]:
        """The table in parts of at least so many neighbouring rows, as far as the file's groups allow, and the rest."""
        facts, groups, count = self._table.metadata, [], 0
        for number in range(facts.num_row_groups):
            groups.append(number)
            count += facts.row_group(number).num_rows
            if count >= rows or number == facts.num_row_groups - 1:
                part = copy.copy(self)
                part.rows, part._groups = count, groups
                yield part
                groups, count = [], 0

    def _column(self, column: str):
        if self.names.count(column) > 1:
            raise UserError(expected(self.name, f"one column {column}", f"{self.names.count(column)}"))
        try:
            table, groups = self._table, self._groups
            read = table.read(columns=[column]) if groups is None else table.read_row_groups(groups, columns=[column])
            read = read.column(column)
        except Exception as error:
            raise self._unreadable(error) from error
        kind = read.type
        return (kind.value_type if self._pa.types.is_dictionary(kind) else kind), read

    def _is_text(self, kind) -> bool:
        types = self._pa.types
        if types.is_dictionary(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind)

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(expected(self.name, "a Parquet file", f"one that cannot be read ({first_line(error)})"))

    def __enter__(self) -> ParquetColumns:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def _lengths(texts) -> np.ndarray:
    """Of an array of texts: the bytes in each."""
    import pyarrow.compute

    lengths = pyarrow.compute.binary_length(texts)
    return lengths.fill_null(0).to_numpy(zero_copy_only=False)


def pyarrow_modules():
    """pyarrow and pyarrow.parquet.

    Raises:
        UserError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "stages") from None
    return pyarrow, pyarrow.parquet


def write_parquet(path: str | Path, table) -> None:
    """Write a pyarrow table as a Parquet file, whole or not at all."""
    _, parquet = pyarrow_modules()
    # Not by its path, which Arrow refuses unless it is Unicode.
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        parquet.write_table(table, file)
