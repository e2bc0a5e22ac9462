"""The built-in kinds of damage, and the names of all.

A further kind is one function here, or in a plugin; see `registry.damage_kind` for its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffdoctor.detector.damage.drawing import blur, cells_of, other_colour, pixel_grid, resample, smooth_noise, strokes
from diffdoctor.detector.damage.registry import Region, damage_kind, registered_kinds
from diffdoctor.runs.errors import expected


def damage_kinds() -> tuple[str, ...]:
    """The names of all registered kinds, sorted."""
    return registered_kinds()


def check_kinds(kinds: Sequence[str] | None) -> tuple[str, ...]:
    """Check names of kinds of damage.

    Args:
        kinds: the names; None: all.

    Returns:
        The names.

    Raises:
        TypeError: it is no sequence of strings.
        ValueError: a kind is unknown, or there is none.
    """
    known = damage_kinds()
    if kinds is None:
        return known
    if isinstance(kinds, str) or not all(isinstance(kind, str) for kind in kinds):
        raise TypeError(expected("kinds", "a sequence of names", repr(kinds)))
    unknown = [kind for kind in kinds if kind not in known]
    if unknown or not kinds:
        raise ValueError(expected("kinds", f"some of {', '.join(known)}", ", ".join(unknown) or "none"))
    return tuple(kinds)


@damage_kind("warp")
def warp(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Melted: a strong local elastic displacement."""
    ys, xs = pixel_grid(picture)
    sigma = max(1.0, 0.3 * region.radius)
    reach = (0.4 + 0.6 * strength) * region.radius
    return resample(
        picture,
        ys + reach * smooth_noise(rng, ys.shape, sigma),
        xs + reach * smooth_noise(rng, xs.shape, sigma),
    )


@damage_kind("swirl")
def swirl(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Turned about the region's centre, most in the middle: half a turn to a turn and a half."""
    ys, xs = pixel_grid(picture)
    dy, dx = ys - region.centre[0], xs - region.centre[1]
    turn = rng.choice((-1.0, 1.0)) * np.pi * (1 + 2 * strength)
    angle = turn * np.clip(1 - np.hypot(dy, dx) / (1.3 * region.radius), 0, 1)
    cos, sin = np.cos(angle), np.sin(angle)
    return resample(picture, region.centre[0] + cos * dy - sin * dx, region.centre[1] + sin * dy + cos * dx)


@damage_kind("patch_permutation")
def patch_permutation(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """The region's cells are permuted; no cell keeps its position."""
    cells = cells_of(region, rng, 2, 4)
    order = np.roll(rng.permutation(len(cells)), 1)
    partners = np.roll(order, 1)
    result = picture.copy()
    for target, partner in zip(order, partners, strict=True):
        result[cells[target]] = picture[cells[partner]]
    return result


@damage_kind("duplicate")
def duplicate(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Another part of the picture, turned or mirrored, is repeated here."""
    height, width = picture.shape[:2]
    ys, xs = pixel_grid(picture)
    reach = (0.7 + strength) * region.radius
    angle = rng.uniform(0, 2 * np.pi)
    turn = rng.choice((0.5, 1.0, 1.5)) * np.pi
    flip = rng.choice((-1.0, 1.0))
    dy, dx = ys - region.centre[0], flip * (xs - region.centre[1])
    cy = np.clip(region.centre[0] + reach * np.sin(angle), 0.25 * height, 0.75 * height)
    cx = np.clip(region.centre[1] + reach * np.cos(angle), 0.25 * width, 0.75 * width)
    return resample(picture, cy + np.cos(turn) * dy - np.sin(turn) * dx, cx + np.sin(turn) * dy + np.cos(turn) * dx)


@damage_kind("removal", visible=0.8)
def removal(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A missing part: the region is filled with the smooth continuation of its surroundings."""
    outside = (region.alpha <= 0.01).astype(np.float32)[..., None]
    filled = np.zeros_like(picture)
    weight = np.zeros_like(outside)
    # Coarser and coarser averages of the outside, each used where the finer ones hold nothing.
    for sigma in (1.0, 2.0, 4.0, 8.0):
        scale = sigma * max(1.0, region.radius / 8)
        total = blur(outside, scale)
        share = (1 - weight) * np.clip(total * 20, 0, 1)
        filled += share * blur(picture * outside, scale) / np.maximum(total, 1e-6)
        weight += share
    mean = (picture * outside).sum(axis=(0, 1)) / max(float(outside.sum()), 1.0)
    return filled + (1 - weight) * mean


@damage_kind("smear")
def smear(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Dragged in one direction, like wet paint under a finger."""
    ys, xs = pixel_grid(picture)
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
    for cell in cells_of(region, rng, 1, 3):
        patch = np.rot90(picture[cell], int(rng.integers(1, 4)))
        if rng.uniform() < 0.5:
            patch = patch[:, ::-1]
        if rng.uniform() < 0.5 * strength:
            patch = low + high - patch
        result[cell] = patch
    return result


@damage_kind("watermark")
def watermark(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A half-transparent row of invented signs."""
    thickness = max(1.0, 0.18 * region.radius)
    coverage = strokes(region, rng, picture.shape[:2], int(rng.integers(3, 6)), thickness)[..., None]
    return picture + (0.5 + 0.4 * strength) * coverage * (other_colour(picture, region, rng) - picture)


@damage_kind("texture_noise")
def texture_noise(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A stray fine texture laid over the region, grey or coloured."""
    height, width = picture.shape[:2]
    channels = 3 if rng.uniform() < 0.3 else 1
    noise = smooth_noise(rng, (height, width, channels), rng.uniform(0.02, 0.2) * region.radius)
    spread = max(float(noise.std()), 1e-6)
    return np.clip(picture + (0.2 + 0.25 * strength) * noise / spread, 0, 1)


@damage_kind("over_smooth", visible=0.6)
def over_smooth(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Waxy: all detail of the region is gone."""
    return blur(picture, max(1.5, (0.25 + 0.5 * strength) * region.radius))


@damage_kind("strip_shift")
def strip_shift(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Strips of the region slide against each other."""
    ys, xs = pixel_grid(picture)
    thickness = max(1, round(region.radius * rng.uniform(0.25, 0.5)))
    along_rows = rng.uniform() < 0.5
    line = (ys if along_rows else xs).astype(int) // thickness
    reach = max(2.0, (0.4 + 0.8 * strength) * region.radius)
    offsets = rng.uniform(0.5, 1.0, line.max() + 1) * reach * np.where(np.arange(line.max() + 1) % 2, 1, -1)
    offset = np.rint(offsets)[line]
    return resample(picture, ys, xs + offset) if along_rows else resample(picture, ys + offset, xs)


@damage_kind("fuse", visible=0.8)
def fuse(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Two objects in one: the picture turned by half or mirrored shines through."""
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
    ys, xs = pixel_grid(picture)
    angle = rng.uniform(0, np.pi)
    dy, dx = np.sin(angle), np.cos(angle)
    side = np.where((ys - region.centre[0]) * -dx + (xs - region.centre[1]) * dy > 0, 1.0, -1.0)
    reach = max(1.5, (0.35 + 0.4 * strength) * region.radius)
    return resample(picture, ys + side * reach * dy, xs + side * reach * dx)


@damage_kind("pixelate", visible=0.6)
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
    """An extra limb: a thick bent stroke in one of the picture's own colours."""
    coverage = strokes(region, rng, picture.shape[:2], 1, max(1.5, 0.4 * region.radius))[..., None]
    return picture + (0.7 + 0.3 * strength) * coverage * (other_colour(picture, region, rng) - picture)


@damage_kind("tint")
def tint(picture: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A stain in a colour that does not belong there."""
    colour = np.zeros(3, np.float32)
    colour[rng.choice(3, size=int(rng.integers(1, 3)), replace=False)] = 1.0
    return picture + (0.25 + 0.4 * strength) * (colour - picture)
