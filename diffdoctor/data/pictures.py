"""Pictures and masks as arrays: resized, and as networks take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from diffdoctor.runs.errors import expected


def to_images(
    pictures: torch.Tensor | np.ndarray | Sequence[np.ndarray], device: torch.device | str | None = None
) -> torch.Tensor:
    """Pictures in uint8 as float32 in [0, 1], channels first.

    Args:
        pictures: a tensor (B, 3, H, W) uint8; or an array (B, H, W, 3) uint8, or (H, W, 3) uint8 arrays of one size.
        device: to move them to; None leaves them.

    Returns:
        (B, 3, H, W) float32.

    Raises:
        TypeError: another dtype.
    """
    if not isinstance(pictures, torch.Tensor):
        pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    if pictures.dtype != torch.uint8:
        raise TypeError(expected("pictures", "uint8", pictures.dtype))
    # Moved as bytes, a quarter of the size of floats.
    return pictures.to(device, non_blocking=True).float() / 255.0


def as_batch(pictures: list[np.ndarray]) -> torch.Tensor:
    """(H, W, 3) uint8 pictures as one tensor (B, 3, H, W)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def as_mask(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W), uint8 0..255, bool or float in [0, 1], as float32."""
    mask = np.asarray(mask)
    return mask.astype(np.float32) / 255.0 if mask.dtype == np.uint8 else mask.astype(np.float32)


def shrink_to(picture: np.ndarray, longest: int | None) -> np.ndarray:
    """A picture (H, W, 3) or (H, W) uint8, of at most `longest` pixels a side, antialiased; None leaves it."""
    from PIL import Image

    if longest is None or max(picture.shape[:2]) <= longest:
        return picture
    scale = longest / max(picture.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in picture.shape[1::-1])
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def cover_crop(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (h, w, 3) uint8 resized, antialiased, to cover size = (H, W), and cropped at its centre."""
    from PIL import Image, ImageOps

    if picture.shape[:2] == tuple(size):
        return picture
    return np.asarray(ImageOps.fit(Image.fromarray(picture), size[::-1], Image.Resampling.LANCZOS))


def resize_pair(picture: np.ndarray, mask: np.ndarray, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """A picture and its mask, resized to a square, antialiased.

    Args:
        picture: (H, W, 3) uint8.
        mask: (H, W) float32 in [0, 1].
        size: side in pixels; None leaves them, as does a picture of that size.

    Returns:
        (size, size, 3) uint8 and (size, size) float32 in [0, 1].
    """
    from PIL import Image

    if size is None or picture.shape[:2] == (size, size):
        return picture, mask
    picture = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))
    mask = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.BILINEAR))
    return picture, np.clip(mask, 0, 1)
