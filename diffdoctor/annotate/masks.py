"""Masks as bytes: how they are kept, and how they travel between page and server."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import expected
from diffdoctor.web.bodies import BadBody, as_object

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
