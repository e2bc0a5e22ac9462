"""Pictures and confidence maps as something to look at: enlarged, overlaid, laid out in a grid."""

import io

import numpy as np

GAP = 4
BACKGROUND = 255
# Side of a contact sheet's tiles, in pixels.
SHEET_TILE = 128


def png_bytes(picture) -> bytes:
    """A uint8 picture (H, W, 3) or (H, W) as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def map_png(confidence: np.ndarray, bits: int) -> bytes:
    """A confidence map (H, W) in [0, 1] as an 8 or 16 bit grey PNG."""
    scale, dtype = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    return png_bytes(np.rint(np.clip(confidence, 0, 1).astype(np.float64) * scale).astype(dtype))


def jpeg_bytes(picture, quality: int = 88) -> bytes:
    """A uint8 picture (H, W, 3) as a JPEG file, for photographs in a report: a tenth of a PNG's size."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def enlarge(picture, scale: int):
    """Repeat every pixel `scale` times in both directions: small pictures stay as they are, pixel for pixel."""
    return np.repeat(np.repeat(picture, scale, axis=0), scale, axis=1)


def heat_colours(confidence):
    """Confidence (H, W) in [0, 1] as uint8 (H, W, 3) colours: black, red, yellow, white."""
    value = np.clip(np.asarray(confidence, dtype=np.float32), 0, 1)[..., None]
    ramps = np.concatenate([3 * value, 3 * value - 1, 3 * value - 2], axis=-1)
    return (np.clip(ramps, 0, 1) * 255).astype(np.uint8)


def overlay(picture, confidence, strength: float = 0.75):
    """Redden a picture where the detector is confident.

    Args:
        picture: uint8 (H, W, 3).
        confidence: (H, W) in [0, 1].
        strength: opacity of the colour at confidence 1.

    Returns:
        uint8 (H, W, 3).
    """
    alpha = (strength * np.clip(np.asarray(confidence, dtype=np.float32), 0, 1))[..., None]
    grey = picture.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    colour = np.array([230.0, 20.0, 40.0], dtype=np.float32)
    # The colour keeps some of the picture's light, so that what is underneath can still be read.
    return np.clip((1 - alpha) * picture + alpha * (0.7 * colour + 0.3 * grey), 0, 255).astype(np.uint8)


def grid(rows, gap: int = GAP, background: int = BACKGROUND):
    """Lay out uint8 pictures (H, W, 3) of one size: a list of rows, each a list of pictures.

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
    """PNG bytes: a row for each kind, with clean picture, damaged picture and mask of up to six examples.

    Args:
        examples: {kind: [(clean (H, W, 3) uint8, damaged, mask (H, W) uint8)]}.
        side: of a tile, in pixels.
    """
    from PIL import Image, ImageDraw

    rows = {kind: found for kind, found in sorted(examples.items()) if found}
    label, gap = 14, 4
    width = max(len(found) for found in rows.values()) * (3 * side + gap)
    sheet = Image.new("RGB", (width, len(rows) * (side + label + gap)), (40, 40, 40))
    draw = ImageDraw.Draw(sheet)
    for row, (kind, found) in enumerate(rows.items()):
        top = row * (side + label + gap)
        draw.text((4, top + 1), kind, fill=(255, 255, 255))
        for column, (clean, damaged, mask) in enumerate(found):
            for place, picture in enumerate((clean, damaged, np.repeat(mask[..., None], 3, axis=2))):
                tile = Image.fromarray(picture)
                scale = side / max(tile.size)
                resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
                tile = tile.resize(tuple(max(1, round(s * scale)) for s in tile.size), resampling)
                sheet.paste(tile, (column * (3 * side + gap) + place * side, top + label))
    return png_bytes(np.asarray(sheet))


def as_hwc(pictures):
    """uint8 pictures (N, 3, H, W) as a numpy array (N, H, W, 3)."""
    return pictures.permute(0, 2, 3, 1).contiguous().numpy()
