"""What a request may send, JSON or gzip up to a size, and how it is refused."""

from __future__ import annotations

import json
import zlib
from typing import Any

from diffdoctor.runs.errors import UserError, expected

MAX_BODY = 8 * 2**20
MAX_JSON = 2**16


class Refused(UserError):
    """A request that cannot be served.

    Attributes:
        status: of HTTP.
        fields: further values of the answer.
    """

    def __init__(self, status: int, message: str, **fields: Any):
        super().__init__(message)
        self.status, self.fields = status, fields


class BadBody(UserError):
    """A request's body that is not as described; its message says what is wrong."""


class Inflater:
    """Undoes gzip while a body arrives, up to a size.

    Args:
        most: bytes to which the body may inflate.
    """

    def __init__(self, most: int):
        self.most, self.parts, self.size = most, [], 0
        self._stream = zlib.decompressobj(wbits=31)

    def add(self, data: bytes) -> None:
        """Take what arrived.

        Raises:
            BadBody: it is no gzip, or inflates beyond the size.
        """
        try:
            part = self._stream.decompress(data, self.most + 1 - self.size)
        except zlib.error as error:
            raise BadBody(expected("body", "gzip", error)) from None
        self.size += len(part)
        if self.size > self.most:
            raise BadBody(expected("body", f"at most {self.most:,} bytes inflated", "more"))
        self.parts.append(part)

    def finished(self) -> bytes:
        """The whole body.

        Raises:
            BadBody: it ends in the middle, or something stands behind its end.
        """
        if not self._stream.eof or self._stream.unused_data:
            raise BadBody(expected("body", "one whole gzip stream", "a part of one, or more"))
        return b"".join(self.parts)


def as_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        BadBody: it is none, or not UTF-8.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise BadBody(expected("body", "JSON", str(error)[:80])) from None
    if not isinstance(value, dict):
        raise BadBody(expected("body", "a JSON object", type(value).__name__))
    return value


def _refused(name: str) -> None:
    raise ValueError(name)


def text_of(fields: dict[str, Any], name: str, most: int = 80) -> str:
    """A text of a request.

    Raises:
        UserError: it is none, or too long.
    """
    value = fields.get(name)
    if not isinstance(value, str) or len(value) > most:
        raise UserError(expected(name, f"text of at most {most} characters", repr(value)[:80]))
    return value


def count_of(fields: dict[str, Any], name: str, least: int = 0, most: int = 2**40) -> int:
    """A whole number of a request.

    Raises:
        UserError: it is none, or out of bounds.
    """
    value = fields.get(name)
    if type(value) is not int or not least <= value <= most:
        raise UserError(expected(name, f"a whole number in {least}..{most}", repr(value)[:40]))
    return value
