"""Masks as bytes: how they are kept, and how they travel between page and server."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected

MAX_BODY = 8 * 2**20
MAX_HEADER = 2**18
# Of a body's pixels: a picture of 4096 x 4096 (larger ones are cut into tasks).
MAX_SIDE = 4096


def digest(pixels: np.ndarray, bits: int) -> str:
    """The name of a mask: sha256 of its size, its bits a pixel and its pixels."""
    height, width = pixels.shape
    head = f"{height}x{width}x{bits}:".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def pack(pixels: np.ndarray, bits: int) -> bytes:
    """A mask (H, W) uint8 as it is kept: 8 bits a pixel, or for 0 and 255 alone one bit."""
    return zlib.compress((np.packbits(pixels > 0, axis=1) if bits == 1 else pixels).tobytes(), 6)


def unpack(data: bytes, height: int, width: int, bits: int) -> np.ndarray:
    """The mask (H, W) uint8 of `pack`."""
    row = (width + 7) // 8 if bits == 1 else width
    values = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, row)
    return np.unpackbits(values, axis=1, count=width) * np.uint8(255) if bits == 1 else values


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


def envelope(fields: Mapping[str, Any], planes: Mapping[str, np.ndarray]) -> bytes:
    """JSON values and planes (H, W) uint8 as one body: the length of the JSON, the JSON, the planes in its order."""
    head = strict_json.dumps({**fields, "planes": list(planes)}).encode()
    pixels = [np.ascontiguousarray(plane, np.uint8).tobytes() for plane in planes.values()]
    return b"".join([struct.pack("<I", len(head)), head, *pixels])


# The values that each plane may hold.
_VALUES = {"mask": (0, 255), "ignore": (0, 255), "refused": (0, 255), "forced": (0, 1, 2)}


def largest_envelope(height: int, width: int) -> int:
    """Bytes of the largest `envelope` for a picture of this size."""
    return 4 + MAX_HEADER + 3 * height * width


def open_envelope(
    body: bytes, height: int, width: int, allowed: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON values and planes (H, W) uint8 of `envelope`.

    Args:
        body: not compressed.
        height, width: of the picture.
        allowed: names of the planes that may be there.

    Raises:
        BadBody: the body is not as described, or a plane holds other values.
    """
    if len(body) < 4 or not (length := struct.unpack_from("<I", body)[0]) <= min(MAX_HEADER, len(body) - 4):
        raise BadBody(expected("body", "the length of its JSON, and the JSON", f"{len(body)} bytes"))
    fields = as_object(body[4 : 4 + length])
    names = fields.get("planes", [])
    if not isinstance(names, list) or not all(name in allowed for name in names) or len(set(names)) < len(names):
        raise BadBody(expected("planes", f"names among {', '.join(allowed)}, each once", names))
    pixels = np.frombuffer(body, np.uint8, offset=4 + length)
    if len(pixels) != len(names) * height * width:
        what = f"{len(names)} planes of {height} x {width} bytes"
        raise BadBody(expected("planes", what, f"{len(pixels):,} bytes"))
    planes = dict(zip(names, pixels.reshape(len(names), height, width), strict=True))
    for name, plane in planes.items():
        if not np.isin(plane, np.array(_VALUES[name], np.uint8)).all():
            raise BadBody(expected(name, f"bytes among {_VALUES[name]}", "others"))
    return fields, planes


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
