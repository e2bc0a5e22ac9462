"""Tools for the kinds of damage and the benign changes: resampling, blur, noise, cells and strokes."""

from __future__ import annotations

import itertools

import numpy as np

from diffdoctor.detector.damage.registry import Region


def resample(picture: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Sample a picture bilinearly; beyond the border its last pixels are repeated.

    Args:
        picture: (H, W, C) float32.
        ys: rows in pixels, of any shape.
        xs: columns in pixels, of the same shape.

    Returns:
        (*ys.shape, C) float32.
    """
    height, width = picture.shape[:2]
    ys, xs = np.clip(ys, 0, height - 1), np.clip(xs, 0, width - 1)
    y0, x0 = np.minimum(ys.astype(np.intp), height - 2), np.minimum(xs.astype(np.intp), width - 2)
    fy, fx = (ys - y0)[..., None].astype(np.float32), (xs - x0)[..., None].astype(np.float32)
    top = picture[y0, x0] * (1 - fx) + picture[y0, x0 + 1] * fx
    bottom = picture[y0 + 1, x0] * (1 - fx) + picture[y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def pixel_grid(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row and the column of each pixel of a picture (H, W, ...), both (H, W) float32."""
    return np.mgrid[0 : picture.shape[0], 0 : picture.shape[1]].astype(np.float32)


def blur(picture: np.ndarray, sigma: float, truncate: float = 4.0) -> np.ndarray:
    """Gaussian blur; beyond the border its last pixels are repeated.

    Args:
        picture: (H, W, C) float32.
        sigma: standard deviation, in pixels.
        truncate: radius of the filter, in standard deviations.
    """
    from scipy import ndimage

    return ndimage.gaussian_filter(picture, (sigma, sigma, 0), mode="nearest", truncate=truncate)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """White noise blurred over the first two axes, scaled to a largest magnitude of 1.

    Args:
        rng: of the noise.
        shape: of the result.
        sigma: standard deviation of the blur, in pixels.
    """
    from scipy import ndimage

    sigmas = (sigma, sigma) + (0,) * (len(shape) - 2)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), sigmas, mode="wrap")
    return noise / max(float(np.abs(noise).max()), 1e-6)


def cells_of(region: Region, rng: np.random.Generator, low: int, high: int) -> list[tuple[slice, slice]]:
    """Cut the region's box into equal square cells of at least 2 pixels; a remainder is left out.

    Args:
        region: whose box is cut.
        rng: of the number of cells.
        low: fewest cells along the shorter side.
        high: most cells along the shorter side.

    Returns:
        (rows, columns) of each cell.
    """
    y0, y1, x0, x1 = region.box
    count = int(rng.integers(low, high + 1))
    size = max(2, min(y1 - y0, x1 - x0) // count)
    rows, columns = (y1 - y0) // size, (x1 - x0) // size
    return [
        (slice(y0 + r * size, y0 + (r + 1) * size), slice(x0 + c * size, x0 + (c + 1) * size))
        for r in range(rows)
        for c in range(columns)
    ]


def other_colour(picture: np.ndarray, region: Region, rng: np.random.Generator) -> np.ndarray:
    """A colour (3,) of the picture that differs from the region: of 16 drawn pixels, the farthest from its mean."""
    mean = np.average(picture.reshape(-1, 3), axis=0, weights=region.alpha.reshape(-1))
    pixels = picture.reshape(-1, 3)[rng.integers(picture.shape[0] * picture.shape[1], size=16)]
    colour = pixels[np.abs(pixels - mean).sum(axis=1).argmax()]
    if np.abs(colour - mean).max() < 0.3:
        colour = (mean + 0.5) % 1.0
    return colour.astype(np.float32)


def strokes(
    region: Region, rng: np.random.Generator, shape: tuple[int, int], count: int, thickness: float
) -> np.ndarray:
    """Random bent strokes inside the region's box.

    Args:
        region: whose box holds the strokes.
        rng: of the strokes.
        shape: (H, W) of the picture.
        count: number of strokes.
        thickness: of a stroke, in pixels.

    Returns:
        (H, W) coverage in [0, 1].
    """
    y0, y1, x0, x1 = region.box
    ys, xs = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    coverage = np.zeros(shape, np.float32)
    for _ in range(count):
        points = rng.uniform((y0, x0), (y1 - 1, x1 - 1), size=(3, 2))
        for (ay, ax), (by, bx) in itertools.pairwise(points):
            dy, dx = by - ay, bx - ax
            t = np.clip(((ys - ay) * dy + (xs - ax) * dx) / max(dy * dy + dx * dx, 1e-6), 0, 1)
            distance = np.hypot(ys - ay - t * dy, xs - ax - t * dx)
            coverage = np.maximum(coverage, np.clip(thickness / 2 - distance + 0.5, 0, 1))
    return coverage
