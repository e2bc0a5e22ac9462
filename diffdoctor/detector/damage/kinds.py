"""The built-in kinds of damage and their benign look-alikes: functions of (H, W, 3) float32 pictures in [0, 1]."""

from __future__ import annotations

import io
import itertools

import numpy as np

from diffdoctor.detector.damage.injection import Region, damage_kind


def resample(picture: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Bilinear samples of picture (H, W, C) at rows ys and columns xs (any equal shape), the border held."""
    height, width = picture.shape[:2]
    ys, xs = np.clip(ys, 0, height - 1), np.clip(xs, 0, width - 1)
    y0, x0 = np.minimum(ys.astype(np.intp), height - 2), np.minimum(xs.astype(np.intp), width - 2)
    fy, fx = (ys - y0)[..., None].astype(np.float32), (xs - x0)[..., None].astype(np.float32)
    top = picture[y0, x0] * (1 - fx) + picture[y0, x0 + 1] * fx
    bottom = picture[y0 + 1, x0] * (1 - fx) + picture[y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _grid(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.mgrid[0 : picture.shape[0], 0 : picture.shape[1]].astype(np.float32)


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    from scipy import ndimage

    return ndimage.gaussian_filter(picture, (sigma, sigma, 0), mode="nearest")


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """White noise blurred over the first two axes, scaled to a largest magnitude of 1."""
    from scipy import ndimage

    sigmas = (sigma, sigma) + (0,) * (len(shape) - 2)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), sigmas, mode="wrap")
    return noise / max(float(np.abs(noise).max()), 1e-6)


def _cells(region: Region, rng: np.random.Generator, low: int, high: int) -> list[tuple[slice, slice]]:
    """Cut the region's box into equal cells of at least 2 pixels, low to high a side; a remainder is left out."""
    y0, y1, x0, x1 = region.box
    count = int(rng.integers(low, high + 1))
    size = max(2, min(y1 - y0, x1 - x0) // count)
    rows, columns = (y1 - y0) // size, (x1 - x0) // size
    return [
        (slice(y0 + r * size, y0 + (r + 1) * size), slice(x0 + c * size, x0 + (c + 1) * size))
        for r in range(rows)
        for c in range(columns)
    ]


def _other_colour(picture: np.ndarray, region: Region, rng: np.random.Generator) -> np.ndarray:
    """A colour of the picture that stands out from the region: of 16 drawn pixels the one farthest from its mean."""
    mean = np.average(picture.reshape(-1, 3), axis=0, weights=region.alpha.reshape(-1))
    pixels = picture.reshape(-1, 3)[rng.integers(picture.shape[0] * picture.shape[1], size=16)]
    colour = pixels[np.abs(pixels - mean).sum(axis=1).argmax()]
    if np.abs(colour - mean).max() < 0.3:
        colour = (mean + 0.5) % 1.0
    return colour.astype(np.float32)


def _strokes(
    region: Region, rng: np.random.Generator, shape: tuple[int, int], count: int, thickness: float
) -> np.ndarray:
    """(H, W) coverage in [0, 1] of random bent strokes inside the region's box."""
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


@damage_kind("warp")
def warp(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Melted: a strong local elastic displacement."""
    ys, xs = _grid(picture)
    sigma = max(1.0, 0.3 * region.radius)
    reach = (0.4 + 0.6 * strength) * region.radius
    return resample(
        picture,
        ys + reach * _smooth_noise(rng, ys.shape, sigma),
        xs + reach * _smooth_noise(rng, xs.shape, sigma),
    )


@damage_kind("swirl")
def swirl(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Turned about the region's centre, most in the middle: half a turn to a turn and a half."""
    ys, xs = _grid(picture)
    dy, dx = ys - region.centre[0], xs - region.centre[1]
    turn = rng.choice((-1.0, 1.0)) * np.pi * (1 + 2 * strength)
    angle = turn * np.clip(1 - np.hypot(dy, dx) / (1.3 * region.radius), 0, 1)
    cos, sin = np.cos(angle), np.sin(angle)
    return resample(picture, region.centre[0] + cos * dy - sin * dx, region.centre[1] + sin * dy + cos * dx)


@damage_kind("patch_permutation")
def patch_permutation(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """The region's cells change places; no cell keeps its own."""
    cells = _cells(region, rng, 2, 4)
    order = np.roll(rng.permutation(len(cells)), 1)
    source = np.roll(order, 1)
    result = picture.copy()
    for target, origin in zip(order, source, strict=True):
        result[cells[target]] = picture[cells[origin]]
    return result


@damage_kind("duplicate")
def duplicate(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """What stands elsewhere, turned or mirrored, stands here too."""
    height, width = picture.shape[:2]
    ys, xs = _grid(picture)
    reach = (0.7 + strength) * region.radius
    angle = rng.uniform(0, 2 * np.pi)
    turn = rng.choice((0.5, 1.0, 1.5)) * np.pi
    flip = rng.choice((-1.0, 1.0))
    dy, dx = ys - region.centre[0], flip * (xs - region.centre[1])
    cy = np.clip(region.centre[0] + reach * np.sin(angle), 0.25 * height, 0.75 * height)
    cx = np.clip(region.centre[1] + reach * np.cos(angle), 0.25 * width, 0.75 * width)
    return resample(picture, cy + np.cos(turn) * dy - np.sin(turn) * dx, cx + np.sin(turn) * dy + np.cos(turn) * dx)


@damage_kind("removal")
def removal(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A missing part: the region is filled with the smooth continuation of its surroundings."""
    outside = (region.alpha <= 0.01).astype(np.float32)[..., None]
    filled = np.zeros_like(picture)
    weight = np.zeros_like(outside)
    # Coarser and coarser averages of the outside, each used where the finer ones hold nothing.
    for sigma in (1.0, 2.0, 4.0, 8.0):
        scale = sigma * max(1.0, region.radius / 8)
        total = _blur(outside, scale)
        share = (1 - weight) * np.clip(total * 20, 0, 1)
        filled += share * _blur(picture * outside, scale) / np.maximum(total, 1e-6)
        weight += share
    mean = (picture * outside).sum(axis=(0, 1)) / max(float(outside.sum()), 1.0)
    return filled + (1 - weight) * mean


@damage_kind("smear")
def smear(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Dragged in one direction, like wet paint under a finger."""
    ys, xs = _grid(picture)
    angle = rng.uniform(0, 2 * np.pi)
    length = (1.0 + 1.5 * strength) * region.radius
    steps = int(np.clip(np.ceil(length), 3, 24))
    total = np.zeros_like(picture)
    for t in np.linspace(0, length, steps):
        total = np.maximum(total * 0.92, resample(picture, ys + t * np.sin(angle), xs + t * np.cos(angle)))
    return total


@damage_kind("glyph_scramble")
def glyph_scramble(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Glyph-sized cells are turned, mirrored and inverted in place, as in unreadable lettering."""
    result = picture.copy()
    low, high = float(picture.min()), float(picture.max())
    for cell in _cells(region, rng, 1, 3):
        patch = np.rot90(picture[cell], int(rng.integers(1, 4)))
        if rng.uniform() < 0.5:
            patch = patch[:, ::-1]
        if rng.uniform() < 0.5 * strength:
            patch = low + high - patch
        result[cell] = patch
    return result


@damage_kind("watermark")
def watermark(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A half-transparent row of made-up signs."""
    thickness = max(1.0, 0.18 * region.radius)
    coverage = _strokes(region, rng, picture.shape[:2], int(rng.integers(3, 6)), thickness)[..., None]
    return picture + (0.5 + 0.4 * strength) * coverage * (_other_colour(picture, region, rng) - picture)


@damage_kind("texture_noise")
def texture_noise(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A stray fine texture laid over the region, grey or coloured."""
    height, width = picture.shape[:2]
    channels = 3 if rng.uniform() < 0.3 else 1
    noise = _smooth_noise(rng, (height, width, channels), rng.uniform(0.02, 0.2) * region.radius)
    spread = max(float(noise.std()), 1e-6)
    return np.clip(picture + (0.2 + 0.25 * strength) * noise / spread, 0, 1)


@damage_kind("over_smooth")
def over_smooth(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Waxy: all detail of the region is gone."""
    return _blur(picture, max(1.5, (0.25 + 0.5 * strength) * region.radius))


@damage_kind("strip_shift")
def strip_shift(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Strips of the region slide against each other."""
    ys, xs = _grid(picture)
    thickness = max(1, round(region.radius * rng.uniform(0.25, 0.5)))
    along_rows = rng.uniform() < 0.5
    line = (ys if along_rows else xs).astype(int) // thickness
    reach = max(2.0, (0.4 + 0.8 * strength) * region.radius)
    offsets = rng.uniform(0.5, 1.0, line.max() + 1) * reach * np.where(np.arange(line.max() + 1) % 2, 1, -1)
    offset = np.rint(offsets)[line]
    return resample(picture, ys, xs + offset) if along_rows else resample(picture, ys + offset, xs)


@damage_kind("fuse")
def fuse(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Two things in one place: the picture turned by half or mirrored shines through."""
    ghost = (picture[::-1, ::-1], picture[:, ::-1], picture[::-1])[rng.integers(3)]
    share = 0.5 + 0.3 * strength
    return (1 - share) * picture + share * ghost


@damage_kind("phase_scramble")
def phase_scramble(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """The region keeps its spectrum but loses its order: the Fourier phases are random."""
    y0, y1, x0, x1 = region.box
    patch = picture[y0:y1, x0:x1]
    phase = np.angle(np.fft.fft2(rng.standard_normal(patch.shape[:2])))[..., None]
    # The phases of a real noise are odd, so the result stays real; frequency 0 keeps the mean colour.
    phase[0, 0] = 0
    result = picture.copy()
    scrambled = np.fft.ifft2(np.fft.fft2(patch, axes=(0, 1)) * np.exp(1j * phase), axes=(0, 1)).real
    result[y0:y1, x0:x1] = np.clip(scrambled, 0, 1)
    return result


@damage_kind("seam")
def seam(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """The two sides of a cut through the region do not meet."""
    ys, xs = _grid(picture)
    angle = rng.uniform(0, np.pi)
    dy, dx = np.sin(angle), np.cos(angle)
    side = np.where((ys - region.centre[0]) * -dx + (xs - region.centre[1]) * dy > 0, 1.0, -1.0)
    reach = max(1.5, (0.35 + 0.4 * strength) * region.radius)
    return resample(picture, ys + side * reach * dy, xs + side * reach * dx)


@damage_kind("pixelate")
def pixelate(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """The region in coarse square blocks."""
    height, width = picture.shape[:2]
    block = max(3, round((0.4 + 0.4 * strength) * region.radius))
    rows, columns = np.arange(0, height, block), np.arange(0, width, block)
    total = np.add.reduceat(np.add.reduceat(picture, rows, axis=0), columns, axis=1)
    count = np.outer(np.diff(rows, append=height), np.diff(columns, append=width))[..., None]
    blocks = (total / count).astype(np.float32)
    return blocks[np.arange(height)[:, None] // block, np.arange(width)[None] // block]


@damage_kind("ghost_limb")
def ghost_limb(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A limb too many: a thick bent stroke in one of the picture's own colours."""
    coverage = _strokes(region, rng, picture.shape[:2], 1, max(1.5, 0.4 * region.radius))[..., None]
    return picture + (0.7 + 0.3 * strength) * coverage * (_other_colour(picture, region, rng) - picture)


@damage_kind("tint")
def tint(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A stain of a colour that does not belong there."""
    colour = np.zeros(3, np.float32)
    colour[rng.choice(3, size=int(rng.integers(1, 3)), replace=False)] = 1.0
    return picture + (0.25 + 0.4 * strength) * (colour - picture)


def _global_warp(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    ys, xs = _grid(picture)
    side = min(picture.shape[:2])
    reach, sigma = rng.uniform(0.02, 0.05) * side, 0.3 * side
    return resample(
        picture, ys + reach * _smooth_noise(rng, ys.shape, sigma), xs + reach * _smooth_noise(rng, xs.shape, sigma)
    )


def _recompress(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    buffer = io.BytesIO()
    quality = int(rng.integers(70, 96))
    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"), np.float32) / 255.0


def _mild_blur(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _blur(picture, rng.uniform(0.3, 0.6))


def _exposure(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(picture ** rng.uniform(0.75, 1.3) * rng.uniform(0.85, 1.1), 0, 1)


def _grain(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(picture + rng.uniform(0.005, 0.025) * rng.standard_normal(picture.shape), 0, 1)


def _rescale(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Enlarged or shrunk by up to a tenth about the centre: resampled everywhere."""
    ys, xs = _grid(picture)
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
