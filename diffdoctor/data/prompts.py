"""Prompts from a file, with what is known of each: its category, and the label that it asks for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from diffdoctor.runs.errors import UserError, first_line, missing_extra

COLUMNS = ("prompt", "category", "label")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: the prompt itself.
        category: a group that gets figures of its own; "": none.
        label: what the picture must show, a classifier's word for it; "": not known.
    """

    text: str
    category: str = ""
    label: str = ""


def read_prompt_file(path: str | Path) -> list[Prompt]:
    """Prompts from a text file (one per line), a .jsonl file (one object per line) or a .parquet file.

    The latter two have `prompt`, and may have `category` and `label`. Blank prompts and nulls are left out.

    Raises:
        UserError: if the file cannot be read, has no column `prompt` or holds no prompt.
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
            raise UserError(f"--prompts {path}: `prompt` was expected in record {number}, got {names}")
        if not isinstance(row["prompt"], (str, type(None))):
            raise UserError(f"--prompts {path}: text was expected in record {number}, got {row['prompt']!r}")
    found = [Prompt(*(str("" if row.get(name) is None else row[name]).strip() for name in COLUMNS)) for row in rows]
    found = [prompt for prompt in found if prompt.text]
    if not found:
        raise UserError(f"--prompts {path}: holds no prompt")
    return found


def _read_text(path: Path) -> list[dict]:
    return [{"prompt": line} for line in _text(path).splitlines()]


def _text(path: Path) -> str:
    # Windows' editors put a byte order mark in front, which would become part of the first prompt
    return path.read_text(encoding="utf-8-sig")


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    # JSON strings may hold what str.splitlines takes for the end of a line
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"--prompts {path}: a JSON object was expected in line {number}")
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
        raise UserError(f"--prompts {path}: not a Parquet file ({first_line(error)})") from None
