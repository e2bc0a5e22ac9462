"""The region that is damaged: more often on content than on flat background, with a soft border."""

from __future__ import annotations

import numpy as np

from diffdoctor.detector.damage.registry import Region


def draw_region(picture: np.ndarray, rng: np.random.Generator, low: float, high: float) -> Region:
    """Draw a region: its centre, more often on content, and its shape (ellipse, box or blob).

    Args:
        picture: (H, W, 3) float32 in [0, 1].
        rng: of all draws.
        low: smallest size, as a share of the picture.
        high: largest size, as a share of the picture.
    """
    height, width = picture.shape[:2]
    share = np.exp(rng.uniform(np.log(low), np.log(high)))
    radius = float(np.sqrt(max(share * height * width, 16.0) / np.pi))
    aspect = np.exp(rng.uniform(-0.5, 0.5))
    ry, rx = min(radius * aspect, height / 2), min(radius / aspect, width / 2)
    y, x = _draw_centre(picture, rng, ry, rx)

    angle = rng.uniform(0, np.pi)
    grid_y, grid_x = np.mgrid[0:height, 0:width].astype(np.float32)
    dy, dx = grid_y - y, grid_x - x
    shape = rng.integers(3)
    if shape == 0:  # box
        distance = np.maximum(np.abs(dy) / ry, np.abs(dx) / rx) * (2 / np.sqrt(np.pi))
    else:
        u, v = np.cos(angle) * dy + np.sin(angle) * dx, -np.sin(angle) * dy + np.cos(angle) * dx
        distance = np.hypot(u / ry, v / rx)
        if shape == 2:  # blob: an ellipse with a wavy outline
            phi = np.arctan2(v, u)
            for wave in (2, 3, 5):
                distance = distance * (1 + 0.12 * rng.uniform() * np.cos(wave * phi + rng.uniform(0, 2 * np.pi)))
    feather = max(rng.uniform(0.0, 0.35), 0.5 / radius)
    alpha = np.clip((1 - distance) / feather + 0.5, 0, 1).astype(np.float32)
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    box = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
    return Region(alpha, box, (y, x), radius)


def _draw_centre(picture: np.ndarray, rng: np.random.Generator, ry: float, rx: float) -> tuple[float, float]:
    from scipy import ndimage

    height, width = picture.shape[:2]
    # Searching for content on a picture shrunk to about 64 pixels is exact enough, and quick on large ones.
    step = max(1, min(height, width) // 64)
    grey = picture[::step, ::step].mean(axis=2)
    content = np.abs(np.diff(grey, axis=0, append=grey[-1:])) + np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
    content = ndimage.gaussian_filter(content, max(1.0, 0.5 * min(ry, rx) / step))
    weight = (content / content.max() if content.max() > 0 else np.ones_like(content)) + 0.02
    index = rng.choice(weight.size, p=(weight / weight.sum()).ravel())
    y, x = divmod(int(index), weight.shape[1])
    y, x = y * step + rng.uniform(0, step), x * step + rng.uniform(0, step)
    return float(np.clip(y, ry / 2, height - ry / 2)), float(np.clip(x, rx / 2, width - rx / 2))
