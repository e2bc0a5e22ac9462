"""Text files of users (prompts, captions, metadata), read in one place."""

from __future__ import annotations

import codecs
import os
import re

from diffdoctor.runs.errors import UserError, expected

MAX_CAPTION_BYTES = 2**20
# The characters that end a line. Not str.splitlines(), which also splits at U+2028 and others that a text may hold.
_LINE_ENDS = re.compile("\r\n|\n|\r")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_WHAT = "text in UTF-8, or in UTF-16 with a byte order mark"


def read_text(path: str | os.PathLike, *, limit: int, name: str | None = None) -> str:
    """A text file in UTF-8, with a byte order mark or without, or in UTF-16 with one.

    Args:
        path: of the file.
        limit: largest size in bytes; no more is read.
        name: of the file in errors; None: its path.

    Returns:
        The text without the mark, its line ends as they stand.

    Raises:
        UserError: it cannot be read, is too large, or is in another encoding; names the file, and the line.
    """
    name = os.fspath(path) if name is None else name
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from None
    if len(data) > limit:
        raise UserError(expected(name, f"a text of at most {limit:,} bytes", "a larger file"))
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        # Of UTF-8 with a mark, the position is counted after it.
        start = error.start + (len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
        line = len(split_lines(data[:start].decode(encoding, "replace")))
        raise UserError(expected(f"{name}, line {line}", _WHAT, f"the byte 0x{data[start]:02x}")) from None
    # Other encodings, such as UTF-16 without a mark, are often valid UTF-8 with zeros.
    if (zero := text.find("\0")) >= 0:
        raise UserError(expected(f"{name}, line {len(split_lines(text[:zero]))}", _WHAT, "the byte 0x00"))
    return text


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, which end at \n, \r or \r\n and at nothing else."""
    return _LINE_ENDS.split(text)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no lone surrogates, which JSON's escapes can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def readable(name: str | os.PathLike) -> str:
    r"""The name of a file or member as Unicode: bytes that are not are written as \udcff."""
    return str(name).encode("utf-8", "backslashreplace").decode()
