"""Putting what was redrawn back: sizes, the colour at the seam, and how visible the seam is."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, C) float32 in [0, 1] at another size, bicubic and antialiased, clipped; itself at its own."""
    if picture.shape[:2] == tuple(size):
        return picture
    planes = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
    planes = F.interpolate(planes, tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return planes[0].permute(1, 2, 0).clamp(0, 1).numpy()


def mask_at(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) bool at another size: every pixel that has a part in it."""
    if mask.shape == tuple(size):
        return mask
    planes = torch.from_numpy(mask.astype(np.float32))[None, None]
    return F.adaptive_avg_pool2d(planes, tuple(size))[0, 0].numpy() > 0


def matched(redrawn: np.ndarray, original: np.ndarray, mask: np.ndarray, rim: int) -> np.ndarray:
    """What was redrawn, in the original's colours at the seam.

    Around the mask both show the same, but for what the model's autoencoder and the sampling changed. That difference,
    averaged over the pixels within `rim` of the mask, with weights that fall off with the distance to each pixel, is
    taken from the redrawn pixels.

    Args:
        redrawn: (h, w, 3) float32 in [0, 1].
        original: the same part of the picture.
        mask: (h, w) bool, what was redrawn.
        rim: pixels.

    Returns:
        (h, w, 3) float32 in [0, 1]; `redrawn` where nothing lies around the mask.
    """
    from scipy import ndimage

    ring = (ndimage.distance_transform_edt(~mask) <= rim) & ~mask
    if not ring.any():
        return redrawn
    difference = np.where(ring[..., None], original - redrawn, 0)
    mean = difference.sum((0, 1)) / ring.sum()
    reach = max(1.0, rim, float(np.sqrt(mask.sum())) / 2)
    weight = ndimage.gaussian_filter(ring.astype(np.float32), reach, mode="constant", truncate=3)[..., None]
    local = ndimage.gaussian_filter(difference.astype(np.float32), (reach, reach, 0), mode="constant", truncate=3)
    # where the ring is out of the filter's reach, its mean
    shift = (local + 1e-6 * mean) / (weight + 1e-6)
    return np.clip(redrawn + shift, 0, 1).astype(np.float32)


def seam_energy(rgb: np.ndarray, mask: np.ndarray) -> tuple[float, int]:
    """Gradient energy along a mask's rim, over the pairs of neighbours of which one is inside the mask and one outside.

    Args:
        rgb: (H, W, 3) uint8.
        mask: (H, W) bool.

    Returns:
        The mean squared difference of a channel, of values in [0, 1], and the number of pairs; (0, 0) without a rim.
    """
    values, total, pairs = rgb.astype(np.float32) / 255, 0.0, 0
    for axis in (0, 1):
        rim = np.diff(mask, axis=axis)
        total += float((np.diff(values, axis=axis)[rim] ** 2).mean(-1).sum())
        pairs += int(rim.sum())
    return total / max(1, pairs), pairs
