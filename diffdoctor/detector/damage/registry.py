"""The registry of the kinds of damage, and what a kind is told of the place where it goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


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


def registered_kinds() -> tuple[str, ...]:
    """The names of the kinds that are registered so far, sorted; see `kinds.damage_kinds`."""
    return tuple(sorted(_KINDS))


def damage_function(name: str) -> DamageFunction:
    """The function that is registered under `name`."""
    return _KINDS[name]
