"""The registry of the kinds of damage, and the region that a kind is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from diffdoctor.runs.errors import expected


@dataclasses.dataclass(frozen=True)
class Region:
    """The region that is damaged.

    Attributes:
        alpha: (H, W) float32 in [0, 1], opacity with which the damage is blended in.
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
_VISIBLE: dict[str, float] = {}


def damage_kind(name: str, *, visible: float = 1.0) -> Callable[[DamageFunction], DamageFunction]:
    """Register a kind of damage under `name`.

    The function is called as `f(picture, region, rng, strength)` with picture (H, W, 3) float32 in [0, 1] (not to be
    modified), a `Region`, a `numpy.random.Generator` and a strength in (0, 1], and returns the damaged picture of the
    same shape. It need not respect the region's border: the result is blended in by `region.alpha`.

    Args:
        name: of the kind.
        visible: share of the change that `inject` asks for (its `visible`) which this kind must reach, in (0, 1]; less
            than 1 for damage that is seen by its structure, and hardly changes a pixel's value.

    Returns:
        The decorator.

    Raises:
        TypeError: the name is empty or no string.
        ValueError: a kind of this name exists already, or `visible` is out of range.
    """
    if not 0 < visible <= 1:
        raise ValueError(expected("visible", "a share in (0, 1]", visible))
    if not isinstance(name, str) or not name:
        raise TypeError(expected("name", "a non-empty string", repr(name)))

    def register(function: DamageFunction) -> DamageFunction:
        if name in _KINDS and _KINDS[name] is not function:
            raise ValueError(expected("name", "a new name", f"{name!r}, which is registered already"))
        _KINDS[name], _VISIBLE[name] = function, float(visible)
        return function

    return register


def registered_kinds() -> tuple[str, ...]:
    """The names of the kinds that are registered so far, sorted; `kinds.damage_kinds` includes the built-in ones."""
    return tuple(sorted(_KINDS))


def damage_function(name: str) -> DamageFunction:
    """The function that is registered under `name`."""
    return _KINDS[name]


def visible_share(name: str) -> float:
    """The share of `inject`'s `visible` that this kind must reach."""
    return _VISIBLE.get(name, 1.0)
