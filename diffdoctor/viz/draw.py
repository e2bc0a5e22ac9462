"""Pictures and confidence maps for people: enlarged, overlaid, laid out in a grid, encoded."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

GAP = 4
BACKGROUND = 255
# Height of a contact sheet's row titles, in pixels.
_TITLE = 14
# Side of a contact sheet's tiles, in pixels.
SHEET_TILE = 128


def png_bytes(picture: np.ndarray) -> bytes:
    """Encode a uint8 picture (H, W, 3) or (H, W), or a uint16 one (H, W), as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def map_png(confidence: np.ndarray, bits: int) -> bytes:
    """Encode a confidence map (H, W) in [0, 1] as a grey PNG of 8 or 16 bits."""
    scale, dtype = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    return png_bytes(np.rint(np.clip(confidence, 0, 1).astype(np.float64) * scale).astype(dtype))


def jpeg_bytes(picture: np.ndarray, quality: int = 88) -> bytes:
    """Encode a uint8 picture (H, W, 3) as JPEG, for photographs in a report: a tenth of a PNG's size."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def enlarge(picture: np.ndarray, scale: int) -> np.ndarray:
    """Repeat every pixel of a picture (H, W, ...) `scale` times in both directions."""
    return np.repeat(np.repeat(picture, scale, axis=0), scale, axis=1)


def heat_colours(confidence: np.ndarray) -> np.ndarray:
    """Confidence (H, W) in [0, 1] as uint8 (H, W, 3) colours: black, red, yellow, white."""
    value = np.clip(np.asarray(confidence, dtype=np.float32), 0, 1)[..., None]
    ramps = np.concatenate([3 * value, 3 * value - 1, 3 * value - 2], axis=-1)
    return (np.clip(ramps, 0, 1) * 255).astype(np.uint8)


def overlay(picture: np.ndarray, confidence: np.ndarray, strength: float = 0.75) -> np.ndarray:
    """Redden a picture where the detector is confident.

    Args:
        picture: uint8 (H, W, 3).
        confidence: (H, W) in [0, 1].
        strength: opacity of the colour at confidence 1.

    Returns:
        uint8 (H, W, 3).
    """
    result = np.empty_like(picture)
    colour = np.array([230.0, 20.0, 40.0], dtype=np.float32)
    # Some rows at a time: the floats of a whole picture take forty times its memory.
    step = max(1, 2**20 // picture.shape[1])
    for top in range(0, len(picture), step):
        rows = picture[top : top + step]
        alpha = (strength * np.clip(np.asarray(confidence[top : top + step], dtype=np.float32), 0, 1))[..., None]
        grey = rows.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
        # The colour keeps some of the picture's brightness, so that the picture stays visible.
        mixed = (1 - alpha) * rows + alpha * (0.7 * colour + 0.3 * grey)
        result[top : top + step] = np.clip(mixed, 0, 255).astype(np.uint8)
    return result


def grid(rows: Iterable[Iterable[np.ndarray]], gap: int = GAP, background: int = BACKGROUND) -> np.ndarray:
    """Lay out pictures in rows.

    Args:
        rows: of uint8 pictures (H, W, 3) of one size.
        gap: between the pictures and around them, in pixels.
        background: grey level of the gaps.

    Returns:
        uint8 (rows · (H + gap) + gap, columns · (W + gap) + gap, 3).
    """
    rows = [list(row) for row in rows]
    height, width = rows[0][0].shape[:2]
    columns = max(map(len, rows))
    sheet = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), background, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            sheet[top : top + height, left : left + width] = picture
    return sheet


def contact_sheet(examples: dict[str, list[tuple]], side: int = SHEET_TILE) -> bytes:
    """A sheet with a row for each kind of damage: clean picture, damaged picture and mask, named above the columns.

    Args:
        examples: {kind: [(clean (H, W, 3) uint8, damaged, mask (H, W) uint8)]}, at least one example.
        side: of a tile, in pixels.

    Returns:
        PNG bytes.
    """
    from PIL import Image, ImageDraw

    rows = {kind: triples for kind, triples in sorted(examples.items()) if triples}
    row_height, triple_width = side + _TITLE + GAP, 3 * side + GAP
    columns = max(map(len, rows.values()))
    sheet = Image.new("RGB", (columns * triple_width, _TITLE + len(rows) * row_height), (40, 40, 40))
    draw = ImageDraw.Draw(sheet)
    for column in range(3 * columns):
        name = ("clean", "damaged", "mask")[column % 3]
        draw.text((column // 3 * triple_width + column % 3 * side + 4, 1), name, fill=(160, 200, 255))
    for row, (kind, triples) in enumerate(rows.items()):
        top = _TITLE + row * row_height
        draw.text((4, top + 1), kind, fill=(255, 255, 255))
        for column, (clean, damaged, mask) in enumerate(triples):
            for index, picture in enumerate((clean, damaged, np.repeat(mask[..., None], 3, axis=2))):
                tile = Image.fromarray(picture)
                scale = side / max(tile.size)
                resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
                tile = tile.resize(tuple(max(1, round(s * scale)) for s in tile.size), resampling)
                sheet.paste(tile, (column * triple_width + index * side, top + _TITLE))
    return png_bytes(np.asarray(sheet))


def as_hwc(pictures: torch.Tensor) -> np.ndarray:
    """uint8 pictures (N, 3, H, W) as an array (N, H, W, 3)."""
    return pictures.permute(0, 2, 3, 1).contiguous().numpy()
