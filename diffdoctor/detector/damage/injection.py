"""Free labels: a clean picture in, a visibly damaged one and the exact map of what changed out.

The damage itself stands in `diffdoctor.detector.damage.kinds`, one small function per kind. Here are the registry, the
choice of the place, the check that the change can be seen, the mask, and the benign look-alikes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

# Smallest change of a pixel (largest channel difference, of 1) that counts as changed.
CHANGE_EPS = 16 / 255
MIN_SIDE = 16


@dataclasses.dataclass(frozen=True)
class Region:
    """Where one damage goes.

    Attributes:
        alpha: (H, W) float32 in [0, 1], the soft region; the damage is blended in by it.
        box: (y0, y1, x0, x1) in pixels, the half-open box that holds alpha > 0.
        centre: (y, x) in pixels.
        radius: radius in pixels of the circle of the region's area.
    """

    alpha: np.ndarray
    box: tuple[int, int, int, int]
    centre: tuple[float, float]
    radius: float


@dataclasses.dataclass(frozen=True)
class Injected:
    """A picture with its damage.

    Attributes:
        picture: (H, W, 3), of the dtype that was given.
        mask: (H, W) float32 in [0, 1]; 0 everywhere for a benign or clean picture.
        kind: the damage's name; "benign:<name>" for a look-alike.
    """

    picture: np.ndarray
    mask: np.ndarray
    kind: str


class NoVisibleDamage(ValueError):
    """None of the kinds asked for leaves a visible change on this picture (a flat one, most often)."""


DamageFunction = Callable[[np.ndarray, Region, np.random.Generator, float], np.ndarray]
_KINDS: dict[str, DamageFunction] = {}


def damage_kind(name: str) -> Callable[[DamageFunction], DamageFunction]:
    """Register a kind of damage under `name`.

    The function is called as `f(picture, region, rng, strength)` with picture (H, W, 3) float32 in [0, 1] (not to be
    modified), a `Region`, a `numpy.random.Generator` and a strength in (0, 1], and returns the damaged picture of the
    same shape. It need not respect the region's border: the result is blended in by `region.alpha`.

    Raises:
        ValueError: a kind of this name exists already.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a non-empty string, got {name!r}")

    def register(function: DamageFunction) -> DamageFunction:
        if name in _KINDS and _KINDS[name] is not function:
            raise ValueError(f"name: expected a new name, got {name!r}, which is registered already")
        _KINDS[name] = function
        return function

    return register


def damage_kinds() -> tuple[str, ...]:
    """The names of all registered kinds, sorted."""
    from diffdoctor.detector.damage import kinds as damage  # noqa: F401  (registers the built-in kinds)

    return tuple(sorted(_KINDS))


def check_kinds(kinds: Sequence[str] | None) -> tuple[str, ...]:
    """The names of these kinds of damage, of all for None; raises where one is unknown or there is none."""
    known = damage_kinds()
    if kinds is None:
        return known
    if isinstance(kinds, str) or not all(isinstance(kind, str) for kind in kinds):
        raise TypeError(f"kinds: expected a sequence of names, got {kinds!r}")
    unknown = [kind for kind in kinds if kind not in known]
    if unknown or not kinds:
        raise ValueError(f"kinds: expected some of {', '.join(known)}; got {', '.join(unknown) or 'none'}")
    return tuple(kinds)


def check_range(name: str, value, low: float, high: float) -> tuple[float, float]:
    """A number or a pair as (lowest, highest); raises `ValueError` naming `name` where it is not within (low, high]."""
    pair = (value, value) if np.isscalar(value) else tuple(value)
    if len(pair) != 2 or not (low < pair[0] <= pair[1] <= high):
        raise ValueError(f"{name}: expected low <= high in ({low}, {high}], got {value!r}")
    return float(pair[0]), float(pair[1])


def to_float(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 or float in [0, 1] to float32 in [0, 1]."""
    if not isinstance(picture, np.ndarray):
        raise TypeError(f"picture: expected a numpy array, got {type(picture).__name__}")
    if picture.ndim != 3 or picture.shape[2] != 3 or min(picture.shape[:2]) < MIN_SIDE:
        raise ValueError(f"picture: expected (H, W, 3) with H and W >= {MIN_SIDE}, got {picture.shape}")
    if picture.dtype == np.uint8:
        return picture.astype(np.float32) / 255.0
    if not np.issubdtype(picture.dtype, np.floating):
        raise TypeError(f"picture: expected uint8 or a float dtype, got {picture.dtype}")
    picture = picture.astype(np.float32)
    if not np.isfinite(picture).all() or picture.min() < 0 or picture.max() > 1:
        raise ValueError("picture: expected finite values in [0, 1] for a float picture")
    return picture


def _quantise(picture: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


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
    """Damage a picture at one place and say exactly where.

    A kind, a place (more often on content than on flat background), a size and a strength are drawn; the damage is
    blended in with a soft border of random width. A draw whose change cannot be seen is thrown away and drawn again.

    Args:
        picture: (H, W, 3), uint8 or float in [0, 1]; H, W >= 16.
        rng: the source of every draw: the same state gives the same result.
        kinds: names to draw from, see `damage_kinds()`; None takes all.
        strength: a number or a range within (0, 1].
        area: size of the region as a share of the picture, a number or a range within (0, 1], drawn log-uniformly;
            a region has at least 16 pixels.
        visible: smallest mean change (largest channel difference, of 1) over the changed pixels.
        attempts: draws before giving up.

    Returns:
        `Injected`; the mask is 1 where the picture really changed, with a rim of one pixel (more on large pictures)
        and a soft edge.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
        NoVisibleDamage: `attempts` draws in a row left no visible change.
    """
    clean = to_float(picture)
    names = check_kinds(kinds)
    strength = check_range("strength", strength, 0, 1)
    area = check_range("area", area, 0, 1)
    quantised = _quantise(clean).astype(np.float32) / 255.0
    kind = names[rng.integers(len(names))]
    for attempt in range(attempts):
        if attempt and attempt % 4 == 0:
            kind = names[rng.integers(len(names))]
        # What was too faint is drawn a little larger and stronger the next time.
        push = attempt / attempts
        low = strength[0] + (strength[1] - strength[0]) * push
        region = draw_region(clean, rng, area[0] * (area[1] / area[0]) ** (0.5 * push), area[1])
        damaged = _KINDS[kind](clean, region, rng, float(rng.uniform(low, strength[1])))
        alpha = region.alpha[..., None]
        result = _quantise(clean + alpha * (damaged - clean))
        change = np.abs(result.astype(np.float32) / 255.0 - quantised).max(axis=2)
        changed = change > CHANGE_EPS
        if changed.sum() < max(6, 0.2 * np.pi * region.radius**2) or change[changed].mean() < visible:
            continue
        if picture.dtype != np.uint8:
            result = (result.astype(np.float32) / 255.0).astype(picture.dtype)
        return Injected(result, mask_of_change(changed), kind)
    raise NoVisibleDamage(f"picture: no visible damage of kind {', '.join(names)} in {attempts} attempts (is it flat?)")


def mask_of_change(changed: np.ndarray) -> np.ndarray:
    """Changed pixels (H, W) bool to the soft mask (H, W) float32: gaps closed, a thin rim, a soft edge.

    The rim is one pixel up to 256 pixels of side and grows with the picture.
    """
    from scipy import ndimage

    rim = max(1, round(min(changed.shape) / 256))
    square = np.ones((2 * rim + 1, 2 * rim + 1), bool)
    padded = np.pad(changed, 2 * rim, mode="edge")
    filled = ndimage.binary_erosion(ndimage.binary_dilation(padded, square, iterations=2), square)
    soft = ndimage.gaussian_filter(filled.astype(np.float32), 0.5 * rim, truncate=2.0)
    return np.clip(soft[2 * rim : -2 * rim, 2 * rim : -2 * rim], 0, 1)


def draw_region(picture: np.ndarray, rng: np.random.Generator, low: float, high: float) -> Region:
    """Draw a place, more often on content, and a shape (ellipse, box, blob) of low..high of the picture."""
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


def benign(picture: np.ndarray, rng: np.random.Generator) -> Injected:
    """A look-alike that is not damage: the same operations, mild and over the whole picture; its mask is zero.

    Without them a detector learns the traces of resampling, recompression and blur instead of the damage.
    """
    from diffdoctor.detector.damage import kinds as damage

    clean = to_float(picture)
    names = tuple(damage.BENIGN)
    name = names[rng.integers(len(names))]
    result = _quantise(damage.BENIGN[name](clean, rng))
    if picture.dtype != np.uint8:
        result = (result.astype(np.float32) / 255.0).astype(picture.dtype)
    return Injected(result, np.zeros(picture.shape[:2], np.float32), f"benign:{name}")
