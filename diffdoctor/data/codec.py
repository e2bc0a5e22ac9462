"""Pictures and masks as bytes: PNG, JPEG and WebP in, uint8 arrays out, and back."""

from __future__ import annotations

import io

import numpy as np

PICTURE_TYPES = ("png", "jpg", "jpeg", "webp")
# Refuses decompression bombs.
MAX_PIXELS = 2**27
_ORIENTATION = 0x0112


def encode_picture(picture: np.ndarray, picture_type: str) -> bytes:
    """Encode a picture (H, W, 3) uint8 as "png", "webp" (lossless) or else JPEG of quality 95."""
    from PIL import Image

    options = {"png": {"format": "PNG"}, "webp": {"format": "WEBP", "lossless": True}}
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, **options.get(picture_type, {"format": "JPEG", "quality": 95}))
    return buffer.getvalue()


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode a mask (H, W) uint8 as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()


def decode(data: bytes, mode: str) -> np.ndarray:
    """Decode a picture, rotated upright by its EXIF orientation.

    Sixteen bits a pixel are scaled to eight; transparency is dropped, as training scripts drop it.

    Args:
        data: the bytes of a PNG, JPEG or WebP file.
        mode: "RGB" or "L" (grey).

    Returns:
        uint8, (H, W, 3) for "RGB" or (H, W) for "L".

    Raises:
        ValueError: not a PNG, JPEG or WebP picture, broken, or too large.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            # Both conversions copy the picture, and are called only where they change something.
            if image.getexif().get(_ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                # Sixteen bits of grey, which Pillow would clip at 255.
                grey = np.rint(np.clip(np.asarray(image, np.float64), 0, 65535) / 257).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2) if mode == "RGB" else grey
            return np.array(image if image.mode == mode else image.convert(mode))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
