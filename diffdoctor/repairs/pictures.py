"""Finished pictures as they are stored: read with all that belongs to them, changed inside a mask, written as PNG."""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffdoctor.data.codec import UnreadablePicture, open_picture, turned
from diffdoctor.runs.errors import expected

if TYPE_CHECKING:
    from PIL import Image

MODES = ("RGB", "RGBA", "L", "LA", "P", "I;16")
_REFUSED = {
    "CMYK": "a CMYK picture, whose inks a model of RGB pictures cannot redraw: convert it first",
    "1": "a picture of one bit a pixel, black and white",
    "LAB": "a picture in Lab colours: convert it first",
    "F": "a picture of floats or of 32 bits a pixel, which have no fixed scale",
    "I": "a picture of floats or of 32 bits a pixel, which have no fixed scale",
}
_DEEP_COLOUR = "a picture of more than 8 bits a colour, of which Pillow reads 8"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
# Copied as they are; iCCP, eXIf, pHYs and tRNS are written by Pillow from their contents.
_KEPT_CHUNKS = (*_TEXT_CHUNKS, b"cHRM", b"cICP", b"gAMA", b"sBIT", b"sRGB", b"tIME", b"sPLT")
_EXIF_ORIENTATION, _TIFF_BITS = 0x0112, 258
_LUMA = np.array([299, 587, 114], np.float32) / 1000  # as Pillow turns colours into grey (ITU-R 601-2)


@dataclass(frozen=True)
class Picture:
    """A picture as it is stored, upright.

    Attributes:
        pixels: (H, W) or (H, W, C), uint8 or uint16, with alpha where there is one; of a palette, the indices.
        mode: Pillow's, one of `MODES`.
        palette: (N, 3) uint8 colours; None without a palette.
        fixed: (H, W) bool, the pixels that are wholly transparent, which are never changed; None: there are none.
        key: the one transparent colour of a picture without alpha, which no changed pixel may get; None: none.
        texts: of a PNG file, by keyword.
        save_options: of Pillow's `save`: metadata, ICC profile, resolution.
    """

    pixels: np.ndarray
    mode: str = "RGB"
    palette: np.ndarray | None = None
    fixed: np.ndarray | None = None
    key: tuple[int, ...] | None = None
    texts: dict[str, str] = field(default_factory=dict)
    save_options: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[:2]

    def rgb(self) -> np.ndarray:
        """The picture as a detector sees it, (H, W, 3) uint8: without alpha, sixteen bits scaled to eight."""
        if self.palette is not None:
            return self.palette[self.pixels]
        pixels = self.pixels if self.pixels.ndim == 3 else self.pixels[..., None]
        if pixels.dtype == np.uint16:
            pixels = np.rint(pixels / 257).astype(np.uint8)
        return pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)

    def blended(self, redrawn: np.ndarray, weight: np.ndarray, place: tuple[slice, slice]) -> Picture:
        """The picture with a part of it replaced, as far as its mode can hold it.

        Args:
            redrawn: (h, w, 3) float32 in [0, 1].
            weight: (h, w) float32 in [0, 1] of the new part; where it is 0 not a bit changes.
            place: rows and columns of the part.
        """
        result = self.pixels.copy()
        part, moved = result[place], weight > 0
        if self.fixed is not None:
            moved &= ~self.fixed[place]
        if self.palette is not None:
            mixed = _mixed(self.palette[part] / np.float32(255), redrawn, weight)
            part[moved] = self._nearest(mixed[moved] * 255)
            return replace(self, pixels=result)
        largest, channels = np.float32(np.iinfo(part.dtype).max), 3 if self.mode in ("RGB", "RGBA") else 1
        colours = part[..., :channels] if part.ndim == 3 else part[..., None]
        new = redrawn if channels == 3 else (redrawn @ _LUMA)[..., None]
        mixed = np.rint(_mixed(colours / largest, new, weight) * largest).clip(0, largest).astype(part.dtype)
        if self.key is not None:
            # one level off the colour that would make the pixel transparent
            hit = (mixed == np.array(self.key, part.dtype)).all(-1)
            mixed[hit, 0] = np.where(mixed[hit, 0] > 0, mixed[hit, 0] - 1, 1)
        colours[moved] = mixed[moved]
        return replace(self, pixels=result)

    def _nearest(self, colours: np.ndarray) -> np.ndarray:
        """Indices of the opaque palette entries that are nearest to colours (n, 3)."""
        alpha = self.save_options.get("transparency")
        opaque = np.ones(len(self.palette), bool)
        if isinstance(alpha, int):
            opaque[alpha] = False
        elif alpha is not None:
            values = np.frombuffer(alpha, np.uint8)[: len(opaque)]
            opaque[: len(values)] = values == 255
        allowed = np.flatnonzero(opaque)
        if not len(allowed):
            allowed = np.arange(len(opaque))
        distances = ((colours[:, None] - self.palette[allowed].astype(np.float32)) ** 2).sum(-1)
        return allowed[distances.argmin(1)].astype(self.pixels.dtype)

    def to_image(self) -> Image.Image:
        """The picture for Pillow, without what `save_options` adds."""
        from PIL import Image

        # a grey picture of 16 bits is told by its dtype
        image = Image.fromarray(np.ascontiguousarray(self.pixels))
        if self.palette is not None:
            image.putpalette(self.palette.tobytes())
        return image

    def png(self) -> bytes:
        """The picture as a PNG file with its metadata, ICC profile and resolution."""
        buffer = io.BytesIO()
        self.to_image().save(buffer, format="PNG", **self.save_options)
        return buffer.getvalue()


def _mixed(old: np.ndarray, new: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return old + weight[..., None] * (new - old)


def read_picture(source: bytes | str | os.PathLike) -> Picture:
    """Read a picture with all that its PNG file can hold of it, turned upright by its EXIF orientation.

    Args:
        source: the bytes of a file, or its path.

    Raises:
        UnreadablePicture: it is broken, or of a kind of which the pixels outside a mask could not be kept: several
            frames, CMYK, more than 8 bits a colour, floats.
    """
    with open_picture(source) as image:
        # phones put a preview or a map of depth behind their photographs
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise UnreadablePicture("a picture of several frames or pages")
        if image.mode in _REFUSED:
            raise UnreadablePicture(_REFUSED[image.mode])
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        _refuse_other_depths(image, data)
        return _picture(image, data)


def as_picture(value: Any) -> Picture:
    """A picture from what a user of the Python function has: an array, an image of Pillow's, a path.

    Raises:
        TypeError: it is none of these.
        ValueError: an array that is no picture; see also `read_picture`.
    """
    from PIL import Image

    if isinstance(value, Picture):
        return value
    if isinstance(value, (str, os.PathLike)):
        return read_picture(value)
    if isinstance(value, Image.Image):
        if value.mode not in MODES:
            raise UnreadablePicture(_REFUSED.get(value.mode, f"a picture of the mode {value.mode}"))
        return _picture(value, b"")
    if not isinstance(value, np.ndarray):
        raise TypeError(expected("pictures", "arrays, images of Pillow's or paths", type(value).__name__))
    if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3 or 0 in value.shape:
        raise ValueError(expected("pictures", "uint8 (H, W, 3)", f"{value.dtype} {value.shape}"))
    return Picture(value)


def _refuse_other_depths(image: Image.Image, data: bytes) -> None:
    depth = 8
    if image.format == "PNG":
        depth = data[24]
    elif image.format == "TIFF":
        bits = image.tag_v2.get(_TIFF_BITS, (8,))
        depth = max(bits) if isinstance(bits, tuple) else bits
    grey16 = image.mode in ("I;16", "I;16B")
    if not (image.mode == "P" or depth == (16 if grey16 else 8)):
        raise UnreadablePicture(_DEEP_COLOUR if depth > 8 and not grey16 else f"a picture of {depth} bits a pixel")


def _picture(image: Image.Image, data: bytes) -> Picture:
    image.load()
    upright = turned(image)
    if upright.mode == "I;16B":
        upright = upright.convert("I;16")
    if upright.mode not in MODES:
        raise UnreadablePicture(f"a picture of the mode {upright.mode}")
    pixels, palette = np.array(upright), None
    if upright.mode == "P":
        palette = np.frombuffer(upright.palette.tobytes(), np.uint8)
        if upright.palette.mode == "RGBA":
            raise UnreadablePicture("a picture with a palette of colours and alpha")
        palette = palette.reshape(-1, 3)
        if pixels.max(initial=0) >= len(palette):
            raise UnreadablePicture("a picture with indices beyond its palette")
    options = _save_options(image, data)
    fixed, key = _transparent(pixels, upright.mode, options.get("transparency"), palette)
    texts = {name: str(text) for name, text in getattr(image, "text", {}).items()}
    return Picture(pixels, upright.mode, palette, fixed, key, texts, options)


def _transparent(pixels, mode: str, value, palette) -> tuple[np.ndarray | None, tuple[int, ...] | None]:
    """(H, W) where a picture is wholly transparent, and the colour that makes it so."""
    if mode in ("RGBA", "LA"):
        fixed, key = pixels[..., -1] == 0, None
    elif value is None:
        return None, None
    elif mode == "P":
        table = np.full(len(palette), 255, np.uint8)
        if isinstance(value, int):
            table[value : value + 1] = 0
        else:
            found = np.frombuffer(value, np.uint8)[: len(table)]
            table[: len(found)] = found
        fixed, key = table[pixels] < 255, None
    else:
        key = value if isinstance(value, tuple) else (value,)
        fixed = (np.atleast_3d(pixels) == np.array(key)).all(-1)
    return (fixed if fixed.any() else None), key


def _save_options(image: Image.Image, data: bytes) -> dict[str, Any]:
    from PIL.PngImagePlugin import PngInfo

    kept, info = PngInfo(), image.info
    for name, content in png_chunks(data):
        if name in _KEPT_CHUNKS:
            kept.add(name, content)
    if image.format != "PNG" and (xmp := info.get("xmp")):
        text = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else xmp
        kept.add_itxt("XML:com.adobe.xmp", text)
    if isinstance(info.get("comment"), bytes) and image.format != "PNG":
        kept.add_itxt("Comment", info["comment"].decode("utf-8", "replace"))
    options: dict[str, Any] = {"pnginfo": kept}
    if exif := info.get("exif"):
        options["exif"] = upright_exif(exif)
    for name in ("icc_profile", "dpi", "transparency"):
        if (value := info.get(name)) is not None and not (name == "transparency" and image.mode in ("RGBA", "LA")):
            options[name] = value
    return options


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(name, content) of a PNG file's chunks other than its pixels, as they stand there; empty for another file."""
    found, start = [], len(_SIGNATURE)
    while data.startswith(_SIGNATURE) and start + 12 <= len(data):
        length, name = struct.unpack(">I4s", data[start : start + 8])
        if name == b"IEND":
            break
        if name != b"IDAT":
            found.append((name, data[start + 8 : start + 8 + length]))
        start += 12 + length
    return found


def upright_exif(exif: bytes) -> bytes:
    """EXIF data that say that the picture is upright, and are the same else.

    Changed in place: written anew by a library, they would lose what it does not know, such as makers' notes.
    """
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    order = {b"II": "<", b"MM": ">"}.get(exif[start : start + 2])
    if order is None or len(exif) < start + 10:
        return exif
    entries = start + struct.unpack_from(f"{order}I", exif, start + 4)[0]
    if entries + 2 > len(exif):
        return exif
    changed = bytearray(exif)
    for number in range(struct.unpack_from(f"{order}H", exif, entries)[0]):
        entry = entries + 2 + 12 * number
        if entry + 12 > len(exif):
            break
        if struct.unpack_from(f"{order}H", exif, entry)[0] == _EXIF_ORIENTATION:
            struct.pack_into(f"{order}H", changed, entry + 8, 1)
    return bytes(changed)
