"""The captions of a folder of pictures: from its `metadata.jsonl`, or from a text file beside each picture."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffdoctor.data.tar import SkipCounts
from diffdoctor.data.text import MAX_CAPTION_BYTES, is_unicode, read_text, readable, split_lines
from diffdoctor.runs.errors import UserError, expected

METADATA_NAME = "metadata.jsonl"
_FIELDS = ("text", "caption", "prompt")
_MAX_BYTES = 2**29


def read_metadata(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a folder's `metadata.jsonl` in their order, each with its picture's path relative to the folder.

    Returns:
        [(path, row)]; empty where there is no such file.

    Raises:
        UserError: a row is no JSON object with a `file_name`, or its caption is no text; names file and line.
    """
    path = folder / METADATA_NAME
    rows = []
    for number, line in enumerate(split_lines(read_text(path, limit=_MAX_BYTES)) if path.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((posixpath.normpath(row["file_name"]), row))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            got = f"{line[:80]!r} ({error})"
            raise UserError(expected(f"{path}, line {number}", "a JSON object with a file_name", got)) from None
        for field in _FIELDS:
            if not (row.get(field) is None or (isinstance(row[field], str) and is_unicode(row[field]))):
                raise UserError(expected(f"{path}, line {number}", f"text as {field}", ascii(row[field])[:80]))
    return rows


def captions_of(folder: Path, pictures: Iterable[str], counts: SkipCounts) -> dict[str, str]:
    """The captions in a folder's metadata by their picture.

    A row may name its picture as another system does: with backslashes, with letters in composed form, with the suffix
    in the other case.

    Args:
        folder: of pictures.
        pictures: their paths relative to the folder, with slashes.
        counts: filled with captions whose picture is not there.

    Raises:
        UserError: see `read_metadata`.
    """
    spelt: dict[str, str] = {}
    for picture in pictures:
        spelt.setdefault(_spelling(picture), picture)
        spelt[picture] = picture
    captions = {}
    for name, row in read_metadata(folder):
        text = next((row[field] for field in _FIELDS if row.get(field) is not None), None)
        picture = spelt.get(name, spelt.get(_spelling(name)))
        if text is None:
            continue
        if picture is None:
            counts.add(f"a caption in {METADATA_NAME} whose picture is not there", readable(name))
        else:
            captions[picture] = text
    return captions


def _spelling(name: str) -> str:
    stem, suffix = posixpath.splitext(posixpath.normpath(name.replace("\\", "/")))
    return unicodedata.normalize("NFC", stem) + suffix.lower()


def caption_file(picture: Path) -> Path | None:
    """The text file beside a picture that has its caption (`cat.png`, `cat.txt`), or None."""
    for suffix in (".txt", ".TXT"):
        if (path := picture.with_suffix(suffix)).is_file():
            return path
    return None


def own_caption(picture: Path, folder: Path, captions: dict[str, str]) -> str | None:
    """The caption of a picture of a folder: from the folder's metadata, else from the text file beside it, else None.

    Args:
        picture: the file.
        folder: in which it lies.
        captions: of the folder's metadata, see `captions_of`.

    Raises:
        UserError: see `read_caption`.
    """
    text = captions.get(picture.relative_to(folder).as_posix())
    beside = caption_file(picture) if text is None else None
    return text if beside is None else read_caption(beside)


def read_caption(path: Path) -> str:
    """The whole of a caption file, without white space around it.

    Raises:
        UserError: see `text.read_text`.
    """
    return read_text(path, limit=MAX_CAPTION_BYTES).strip()
