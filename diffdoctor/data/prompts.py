"""Prompts from a file, with the category and the label of each where they are known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from diffdoctor.runs.errors import UserError, expected, first_line, missing_extra

COLUMNS = ("prompt", "category", "label")


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
    """Prompts from a text file (one per line), a .jsonl file (one object per line) or a .parquet file.

    The latter two have `prompt`, and may have `category` and `label`. Blank prompts and nulls are ignored.

    Raises:
        UserError: the file cannot be read, has no column `prompt` or holds no prompt.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        rows = readers.get(path.suffix.lower(), _read_text)(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({error})") from None
    for number, row in enumerate(rows, start=1):
        if "prompt" not in row:
            names = ", ".join(map(str, row)) or "nothing"
            raise UserError(expected(f"--prompts {path}", f"`prompt` in row {number}", names))
        if not isinstance(row["prompt"], (str, type(None))):
            raise UserError(expected(f"--prompts {path}", f"text as `prompt` in row {number}", repr(row["prompt"])))
    found = [Prompt(*(str("" if row.get(name) is None else row[name]).strip() for name in COLUMNS)) for row in rows]
    found = [prompt for prompt in found if prompt.text]
    if not found:
        raise UserError(expected(f"--prompts {path}", "at least one prompt", "none"))
    return found


def _read_text(path: Path) -> list[dict]:
    return [{"prompt": line} for line in _text(path).splitlines()]


def _text(path: Path) -> str:
    # Editors on Windows write a byte order mark, which would become part of the first prompt.
    return path.read_text(encoding="utf-8-sig")


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    # Not splitlines(), which also splits at characters that JSON strings may hold.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(expected(f"--prompts {path}", f"a JSON object in line {number}", repr(line[:80])))
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[dict]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_extra("pyarrow", "stages") from None
    try:
        names = parquet.read_schema(path).names
        if "prompt" not in names:
            return [dict.fromkeys(names)]
        return parquet.read_table(path, columns=[name for name in COLUMNS if name in names]).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(expected(f"--prompts {path}", "a Parquet file", first_line(error))) from None
