"""Pictures and masks as bytes and files: the one place where pictures that users bring are decoded."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from diffdoctor.runs.errors import first_line

if TYPE_CHECKING:
    from PIL import Image

# What is decoded, whatever the file is called. No other format is tried: some decoders start a program (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
# As files and members of shards are called.
PICTURE_TYPES = ("png", "jpg", "jpeg", "jfif", "webp", "tif", "tiff", "bmp", "gif", "avif")
SUFFIXES = tuple(f".{name}" for name in PICTURE_TYPES)
WRITTEN_TYPES = ("png", "jpg", "jpeg", "webp")
# Refuses decompression bombs, and what no machine holds: 128 megapixels, and files of 512 MiB.
MAX_PIXELS = 2**27
MAX_FILE_BYTES = 2**29
BROKEN = "a broken picture"
_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 258


class UnreadablePicture(ValueError):
    """A picture that cannot be used.

    Attributes:
        reason: in words that are the same for all pictures with this fault.
        detail: what the decoder says; "": nothing more.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def encode_picture(picture: np.ndarray, picture_type: str) -> bytes:
    """Encode a picture (H, W, 3) uint8 as "png", "webp" (lossless) or else JPEG of quality 95."""
    from PIL import Image

    options = {"png": {"format": "PNG"}, "webp": {"format": "WEBP", "lossless": True}}
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, **options.get(picture_type, {"format": "JPEG", "quality": 95}))
    return buffer.getvalue()


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode a mask (H, W) uint8 as PNG."""
    return _mask_png(mask) if mask.any() else _empty_mask_png(mask.shape)


@functools.lru_cache(maxsize=64)
def _empty_mask_png(shape: tuple[int, int]) -> bytes:
    return _mask_png(np.zeros(shape, np.uint8))


def _mask_png(mask: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()


# Of a picture's sides in pixels, which may be swapped: why it is not to be decoded, in words as for `reason`; or None.
SizeCheck: TypeAlias = Callable[[int, int], "str | None"]
# From a picture's bytes, or the path of its file, to whatever a reader makes of it; raises `UnreadablePicture`.
PictureReader: TypeAlias = "Callable[[bytes | str | os.PathLike], Any]"


def decode(source: bytes | str | os.PathLike, mode: str, *, check: SizeCheck | None = None) -> np.ndarray:
    """Decode a picture, rotated upright by its EXIF orientation.

    Of a format with several frames or pages it is the first. Sixteen bits a pixel are scaled to eight; transparency is
    dropped, as training scripts drop it.

    Args:
        source: a PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF picture: its bytes, or the path of its file.
        mode: "RGB" or "L" (grey).
        check: refuses pictures by the size in their header, before they are decoded.

    Returns:
        uint8, (H, W, 3) for "RGB" or (H, W) for "L".

    Raises:
        UnreadablePicture: for whatever reason; a picture that is too large is not decoded.
    """
    with open_picture(source) as image:
        if check is not None and (reason := check(image.height, image.width)):
            raise UnreadablePicture(reason)
        return as_array(image, mode)


@contextmanager
def open_picture(source: bytes | str | os.PathLike) -> Iterator[Image.Image]:
    """A context with a picture of which the header was read, and found to be of a size that can be decoded.

    Args:
        source: see `decode`.

    Raises:
        UnreadablePicture: it cannot be read; or any error in the block, which a decoder may raise there.
    """
    from PIL import Image

    try:
        with _opened(source) as file, Image.open(file, formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large()
            yield image
    except UnreadablePicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large() from error
    except MemoryError as error:
        raise UnreadablePicture("a picture for which there is not enough memory") from error
    # Decoders of hostile bytes raise whatever comes: struct.error, RuntimeError, SyntaxError, ZeroDivisionError, ...
    except Exception as error:
        raise UnreadablePicture(BROKEN, _in_words(error)) from error


def _in_words(error: Exception) -> str:
    # The rest of Pillow's sentence is the address of a buffer.
    return first_line(error).partition(" <_io.")[0]


def _too_large() -> UnreadablePicture:
    return UnreadablePicture(f"a picture of more than {MAX_PIXELS:,} pixels")


@contextmanager
def _opened(source: bytes | str | os.PathLike) -> Iterator[io.BufferedIOBase]:
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    try:
        file = open(source, "rb")  # noqa: SIM115 (closed below; an error in the caller's block is none of opening)
    except OSError as error:
        raise UnreadablePicture("a file that cannot be read", error.strerror or str(error)) from error
    with file:
        if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
            raise UnreadablePicture(f"a file of more than {MAX_FILE_BYTES:,} bytes")
        yield file


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow was built with."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def picture_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) in pixels of an opened picture when it is upright, from its header."""
    # Pillow gives the upright size of a TIFF file, and turns it when it is loaded.
    turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def turned(image: Image.Image) -> Image.Image:
    """A picture that Pillow has opened, rotated upright by its EXIF orientation."""
    from PIL import Image

    # First of all: the orientation of a PNG file may stand behind its pixels.
    image.load()
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(_orientation(image))
    # Not ImageOps.exif_transpose, which also writes the rest of the EXIF data anew, and fails where it is odd.
    return image if turn is None else image.transpose(turn)


def as_array(image: Image.Image, mode: str) -> np.ndarray:
    """What `decode` returns, of a picture that Pillow has opened or made.

    Raises:
        UnreadablePicture: its values have no fixed scale (floats, integers beyond 16 bits).
    """
    image = turned(image)
    if image.mode[0] in "IF":
        grey = grey_levels(image, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2) if mode == "RGB" else grey
    # A conversion copies the picture, and so is done only where it changes something.
    return np.array(image if image.mode == mode else image.convert(mode))


def grey_levels(image: Image.Image, largest: int) -> np.ndarray:
    """Up to sixteen bits of grey, which Pillow would clip, scaled to 0..`largest` and rounded: (H, W) float64.

    Args:
        image: of a mode I or F.
        largest: of the result.

    Raises:
        UnreadablePicture: its values have no fixed scale (floats, integers beyond 16 bits).
    """
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UnreadablePicture("a picture of floats or of 32 bits a pixel, which have no fixed scale")
    return np.rint(values.astype(np.float64) * (largest / (2 ** _bits(image) - 1)))


def _bits(image: Image.Image) -> int:
    # Scanners and microscopes also write 10, 12 and 14 bits.
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, 16)
    bits = bits[0] if isinstance(bits, tuple) and bits else bits
    return bits if isinstance(bits, int) and 8 < bits <= 16 else 16


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    # The picture is whole, whatever its EXIF data are.
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def suffix_of(data: bytes) -> str:
    """What the file of a picture that `decode` takes is called behind the dot, by its content.

    Raises:
        UnreadablePicture: it is none.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return {"JPEG": "jpg", "TIFF": "tif"}.get(image.format or "", (image.format or "").lower())
    except Exception as error:  # decoders raise their own
        raise UnreadablePicture(BROKEN, first_line(error)) from error
