"""Exact labels for free: damages a clean picture visibly and returns the mask of what changed.

The kinds of damage are in `damage.kinds`, one small function each, and the choice of the region is in `damage.regions`.
Here are the draw, the check that the change is visible, and the mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from diffdoctor.detector.damage.kinds import check_kinds
from diffdoctor.detector.damage.regions import draw_region
from diffdoctor.detector.damage.registry import Region, damage_function, visible_share
from diffdoctor.runs.errors import UserError, expected, first_line

# Smallest change of a pixel (largest channel difference, of 1) that counts as changed.
CHANGE_EPS = 16 / 255
MIN_SIDE = 16


@dataclasses.dataclass(frozen=True)
class Injected:
    """A picture with its damage.

    Attributes:
        picture: (H, W, 3), of the dtype that was given.
        mask: (H, W) float32 in [0, 1]; 0 everywhere for a benign or clean picture.
        kind: name of the kind of damage; "benign:<name>" for a benign change.
    """

    picture: np.ndarray
    mask: np.ndarray
    kind: str


class NoVisibleDamage(ValueError):
    """None of the given kinds leaves a visible change on this picture (most often because it is flat)."""


def check_range(name: str, value: float | Sequence[float], low: float, high: float) -> tuple[float, float]:
    """A number or a pair as a range.

    Args:
        name: of the option, for the error.
        value: a number, or (lowest, highest).
        low: bound that the lowest must exceed.
        high: bound that the highest must not exceed.

    Returns:
        (lowest, highest).

    Raises:
        ValueError: it is no range in (low, high].
    """
    pair = (value, value) if np.isscalar(value) else tuple(value)
    if len(pair) != 2 or not (low < pair[0] <= pair[1] <= high):
        raise ValueError(expected(name, f"low <= high in ({low}, {high}]", repr(value)))
    return float(pair[0]), float(pair[1])


def to_float(picture: np.ndarray) -> np.ndarray:
    """Check a picture (H, W, 3), uint8 or float in [0, 1], and bring it to float32 in [0, 1].

    Raises:
        TypeError: it is no array, or of another dtype.
        ValueError: its shape or a value is not as described.
    """
    if not isinstance(picture, np.ndarray):
        raise TypeError(expected("picture", "a numpy array", type(picture).__name__))
    if picture.ndim != 3 or picture.shape[2] != 3 or min(picture.shape[:2]) < MIN_SIDE:
        raise ValueError(expected("picture", f"(H, W, 3) with H and W >= {MIN_SIDE}", picture.shape))
    if picture.dtype == np.uint8:
        return picture.astype(np.float32) / 255.0
    if not np.issubdtype(picture.dtype, np.floating):
        raise TypeError(expected("picture", "uint8 or a float dtype", picture.dtype))
    picture = picture.astype(np.float32)
    if not np.isfinite(picture).all() or picture.min() < 0 or picture.max() > 1:
        raise ValueError(expected("picture", "finite values in [0, 1] for a float picture", "others"))
    return picture


def quantise(picture: np.ndarray) -> np.ndarray:
    """A float picture in [0, 1], or a little beyond, to uint8."""
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def as_dtype(picture: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A uint8 picture unchanged for uint8, or scaled to [0, 1] for a floating-point dtype."""
    return picture if dtype == np.uint8 else (picture.astype(np.float32) / 255.0).astype(dtype)


def inject(
    picture: np.ndarray,
    rng: np.random.Generator,
    kinds: Sequence[str] | None = None,
    strength: float | tuple[float, float] = (0.5, 1.0),
    area: float | tuple[float, float] = (0.03, 0.33),
    *,
    visible: float = 0.2,
    attempts: int = 12,
) -> Injected:
    """Damage one region of a picture, and return its exact mask.

    A kind, a region (more often on content than on flat background), a size and a strength are drawn; the damage is
    blended in with a soft border of random width. A draw whose change is not visible is repeated.

    Args:
        picture: (H, W, 3), uint8 or float in [0, 1]; H, W >= 16.
        rng: of every draw: the same state gives the same result.
        kinds: names to draw from, see `damage_kinds()`; None takes all.
        strength: a number or a range within (0, 1].
        area: size of the region as a share of the picture, a number or a range within (0, 1], drawn log-uniformly;
            a region has at least 16 pixels.
        visible: smallest mean change (largest channel difference, of 1) over the changed pixels; of some kinds a share
            of it, see `registry.damage_kind`.
        attempts: draws before giving up.

    Returns:
        `Injected`; the mask is 1 where the picture really changed, with a rim of one pixel (more on large pictures)
        and a soft edge.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range.
        NoVisibleDamage: `attempts` draws in a row left no visible change.
    """
    clean = to_float(picture)
    names = check_kinds(kinds)
    strength = check_range("strength", strength, 0, 1)
    area = check_range("area", area, 0, 1)
    quantised = quantise(clean).astype(np.float32) / 255.0
    kind = names[rng.integers(len(names))]
    for attempt in range(attempts):
        if attempt and attempt % 4 == 0:
            kind = names[rng.integers(len(names))]
        # After a draw that was too faint, the next is a little larger and stronger.
        push = attempt / attempts
        low = strength[0] + (strength[1] - strength[0]) * push
        region = draw_region(clean, rng, area[0] * (area[1] / area[0]) ** (0.5 * push), area[1])
        damaged = _damaged(kind, clean, region, rng, float(rng.uniform(low, strength[1])))
        alpha = region.alpha[..., None]
        result = quantise(clean + alpha * (damaged - clean))
        change = np.abs(result.astype(np.float32) / 255.0 - quantised).max(axis=2)
        changed = change > CHANGE_EPS
        least = visible * visible_share(kind)
        if changed.sum() < max(6, 0.2 * np.pi * region.radius**2) or change[changed].mean() < least:
            continue
        return Injected(as_dtype(result, picture.dtype), mask_of_change(changed), kind)
    raise NoVisibleDamage(f"picture: no visible damage of kind {', '.join(names)} in {attempts} attempts (is it flat?)")


def _damaged(kind: str, clean: np.ndarray, region: Region, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A kind's function on a picture; it may be a user's."""
    try:
        damaged = damage_function(kind)(clean, region, rng, strength)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"the kind of damage {kind!r} failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(damaged, np.ndarray) or damaged.shape != clean.shape or not np.isfinite(damaged).all():
        got = f"shape {damaged.shape}" if isinstance(damaged, np.ndarray) else type(damaged).__name__
        what = f"finite values of shape {clean.shape} from its function"
        raise UserError(expected(f"the kind of damage {kind!r}", what, got))
    return damaged


def mask_of_change(changed: np.ndarray) -> np.ndarray:
    """The soft mask of changed pixels: gaps closed, a thin rim, a soft edge.

    The rim is one pixel wide for sides of up to 256 pixels, and grows with the picture.

    Args:
        changed: (H, W) bool.

    Returns:
        (H, W) float32 in [0, 1].
    """
    from scipy import ndimage

    rim = max(1, round(min(changed.shape) / 256))
    square = np.ones((2 * rim + 1, 2 * rim + 1), bool)
    padded = np.pad(changed, 2 * rim, mode="edge")
    filled = ndimage.binary_erosion(ndimage.binary_dilation(padded, square, iterations=2), square)
    soft = ndimage.gaussian_filter(filled.astype(np.float32), 0.5 * rim, truncate=2.0)
    return np.clip(soft[2 * rim : -2 * rim, 2 * rim : -2 * rim], 0, 1)
