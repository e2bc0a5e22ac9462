"""Prompts from a file, with the category and the label of each where they are known."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffdoctor.data.columns import ParquetColumns
from diffdoctor.data.text import is_unicode, read_text, split_lines
from diffdoctor.runs.errors import UserError, expected

# A class may be named by its number.
_TYPES = {"prompt": (str,), "category": (str, int, float), "label": (str, int, float)}
COLUMNS = tuple(_TYPES)
# Far beyond what any text encoder takes: a file without line ends is not one prompt.
MAX_CHARACTERS = 20_000
MAX_BYTES = 2**26
_MAX_ROWS = 10**7


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: the prompt itself.
        category: a group for which measures are computed separately; "": none.
        label: what the picture must show, as a classifier names it; "": not known.
    """

    text: str
    category: str = ""
    label: str = ""


def read_prompt_file(path: str | Path) -> list[Prompt]:
    r"""Prompts from a text file (one per line), a .jsonl file (one object per line) or a .parquet file.

    The latter two have `prompt`, and may have `category` and `label`. Blank prompts and nulls are ignored. A line ends
    at \n, \r\n or \r; see `text.read_text` for the encodings.

    Raises:
        UserError: the file cannot be read or is too large, has no column `prompt`, holds no prompt, or one that is no
            text or longer than 20,000 characters; names the row.
    """
    path, name = Path(path), f"--prompts {path}"
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    found = []
    for number, row in enumerate(readers.get(path.suffix.lower(), _read_lines)(path, name), start=1):
        if "prompt" not in row:
            names = ", ".join(map(str, row)) or "nothing"
            raise UserError(expected(name, f"`prompt` in row {number}", names))
        texts = []
        for column, types in _TYPES.items():
            value = row.get(column)
            if not isinstance(value, (*types, type(None))):
                raise UserError(expected(name, f"text as `{column}` in row {number}", _short(repr(value))))
            texts.append(text := "" if value is None else str(value).strip())
            if len(text) > MAX_CHARACTERS:
                what = f"up to {MAX_CHARACTERS:,} characters as `{column}` in row {number}"
                raise UserError(expected(name, what, f"{len(text):,}"))
            if not is_unicode(text):
                got = f"half of a surrogate pair in {_short(ascii(text))}"
                raise UserError(expected(name, f"Unicode as `{column}` in row {number}", got))
        if texts[0]:
            found.append(Prompt(*texts))
    if not found:
        raise UserError(expected(name, "at least one prompt", "none"))
    return found


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def _read_lines(path: Path, name: str) -> Iterable[dict]:
    return ({"prompt": line} for line in split_lines(read_text(path, limit=MAX_BYTES, name=name)))


def _read_jsonl(path: Path, name: str) -> Iterable[dict]:
    for number, line in enumerate(split_lines(read_text(path, limit=MAX_BYTES, name=name)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(expected(name, f"a JSON object in line {number}", repr(line[:80])))
        yield row


def _read_parquet(path: Path, name: str) -> Iterable[dict]:
    with ParquetColumns(path, name=name) as table:
        if "prompt" not in table.names:
            yield dict.fromkeys(table.names)
            return
        if table.rows > _MAX_ROWS:
            raise UserError(expected(name, f"up to {_MAX_ROWS:,} rows", f"{table.rows:,}"))
        names = [column for column in COLUMNS if column in table.names]
        columns = [table.values(column, longest=MAX_CHARACTERS) for column in names]
        for values in zip(*columns, strict=True):
            yield dict(zip(names, values, strict=True))
