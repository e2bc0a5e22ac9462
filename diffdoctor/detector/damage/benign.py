"""Benign changes: operations like those of damage, but mild and over the whole picture."""

from __future__ import annotations

import io

import numpy as np

from diffdoctor.detector.damage.drawing import blur, pixel_grid, resample, smooth_noise
from diffdoctor.detector.damage.injection import Injected, as_dtype, quantise, to_float


def benign(picture: np.ndarray, rng: np.random.Generator) -> Injected:
    """Change a picture mildly as a whole, without damage; the mask is zero.

    Without such pictures a detector learns the traces of resampling, recompression and blur instead of the damage.

    Args:
        picture: (H, W, 3), uint8 or float in [0, 1]; H, W >= 16.
        rng: of every draw: the same state gives the same result.

    Returns:
        The changed picture, whose kind is "benign:<name>".

    Raises:
        TypeError: the picture is no array, or of another dtype.
        ValueError: the picture's shape or values are not as described.
    """
    clean = to_float(picture)
    names = tuple(BENIGN)
    name = names[rng.integers(len(names))]
    result = quantise(BENIGN[name](clean, rng))
    return Injected(as_dtype(result, picture.dtype), np.zeros(picture.shape[:2], np.float32), f"benign:{name}")


def _global_warp(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    ys, xs = pixel_grid(picture)
    side = min(picture.shape[:2])
    reach, sigma = rng.uniform(0.02, 0.05) * side, 0.3 * side
    return resample(
        picture, ys + reach * smooth_noise(rng, ys.shape, sigma), xs + reach * smooth_noise(rng, xs.shape, sigma)
    )


def _recompress(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    buffer = io.BytesIO()
    quality = int(rng.integers(70, 96))
    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"), np.float32) / 255.0


def _mild_blur(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return blur(picture, rng.uniform(0.3, 0.6))


def _exposure(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(picture ** rng.uniform(0.75, 1.3) * rng.uniform(0.85, 1.1), 0, 1)


def _grain(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(picture + rng.uniform(0.005, 0.025) * rng.standard_normal(picture.shape), 0, 1)


def _rescale(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Enlarged or shrunk by up to a tenth about the centre: resampled everywhere."""
    ys, xs = pixel_grid(picture)
    cy, cx = (picture.shape[0] - 1) / 2, (picture.shape[1] - 1) / 2
    scale = rng.uniform(0.92, 1.1)
    return resample(picture, cy + (ys - cy) * scale, cx + (xs - cx) * scale)


BENIGN = {
    "global_warp": _global_warp,
    "recompress": _recompress,
    "mild_blur": _mild_blur,
    "exposure": _exposure,
    "grain": _grain,
    "rescale": _rescale,
}
