"""Class balance: which categories the detector flags too much or too little, and how to sample against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class CategoryStatistics:
    """One category's aggregate.

    Attributes:
        category: its name.
        pictures: how many.
        mean_confidence: mean over its pictures of the map's mean, in [0, 1].
        flagged: share of its pictures that are flagged, in [0, 1].
        z: how far `mean_confidence` lies from the categories' median, in robust deviations (1.4826 x the median
            absolute deviation, floored at 1e-3).
        verdict: "over-flagged", "under-flagged" or "".
    """

    category: str
    pictures: int
    mean_confidence: float
    flagged: float
    z: float
    verdict: str


def category_statistics(
    categories: Sequence[str], mean_confidence: Sequence[float], flagged: Sequence[bool], *, limit: float = 3.0
) -> list[CategoryStatistics]:
    """The paper's statistics: the detector's confidence summed up per category, the abnormal ones named.

    A category that is abnormally high is one that the detector flags for what it shows (the shortcut "every hand is
    broken"), an abnormally low one is overlooked; both need new pictures.

    Args:
        categories: (N,) the pictures' categories.
        mean_confidence: (N,) mean of each picture's confidence map, in [0, 1].
        flagged: (N,) whether each picture is flagged.
        limit: |z| from which a category is abnormal; two categories or fewer have no verdict.

    Returns:
        One `CategoryStatistics` a category, the highest mean confidence first.
    """
    names = np.asarray(list(categories), dtype=object)
    means, flags = np.asarray(mean_confidence, np.float64), np.asarray(flagged, bool)
    if not len(names) == len(means) == len(flags):
        raise ValueError(f"mean_confidence, flagged: expected {len(names)} entries, got {len(means)} and {len(flags)}")
    unique = sorted(set(names))
    levels = np.array([means[names == name].mean() for name in unique])
    median = np.median(levels) if len(levels) else 0.0
    deviation = max(1.4826 * float(np.median(np.abs(levels - median))) if len(levels) else 0.0, 1e-3)
    result = []
    for name, level in zip(unique, levels, strict=True):
        chosen = names == name
        z = float((level - median) / deviation)
        abnormal = len(unique) > 2 and abs(z) >= limit
        verdict = ("over-flagged" if z > 0 else "under-flagged") if abnormal else ""
        result.append(
            CategoryStatistics(name, int(chosen.sum()), float(level), float(flags[chosen].mean()), z, verdict)
        )
    return sorted(result, key=lambda s: -s.mean_confidence)


def sampling_weights(data, *, strength: float = 1.0, damaged_share: float = 0.5) -> np.ndarray:
    """Weights that sample the categories evenly, and damaged and clean pictures by a fixed share within each category.

    A category of which nearly all pictures are damaged teaches that the category itself is the damage; sampling its few
    clean pictures as often takes that shortcut away.

    Args:
        data: `DetectorData`; the category is "" where a picture has none.
        strength: exponent within [0, 1]: 0 samples all pictures alike, 1 evens the groups out.
        damaged_share: of the damaged pictures in a category that has both kinds, within (0, 1); less than a half makes
            a detector that flags fewer clean pictures, and overlooks more.

    Returns:
        (N,) float64, summing to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: expected within [0, 1], got {strength}")
    if not 0 < damaged_share < 1:
        raise ValueError(f"damaged_share: expected within (0, 1), got {damaged_share}")
    categories, damaged = labels_of(data)
    keys = list(zip(categories, damaged, strict=True))
    size = {key: keys.count(key) for key in set(keys)}
    share = {
        (name, hurt): (damaged_share if hurt else 1 - damaged_share) if (name, not hurt) in size else 1.0
        for name, hurt in size
    }
    weights = np.array([share[key] / size[key] for key in keys]) ** strength
    return weights / weights.sum()


def labels_of(data) -> tuple[list[str], list[bool]]:
    """(categories, damaged) of every picture, from the manifest where the data have one, else picture by picture."""
    if hasattr(data, "categories") and hasattr(data, "mask_max"):
        return [str(c) for c in data.categories], [bool(m > 0) for m in data.mask_max]
    samples = (data[index] for index in range(len(data)))
    pairs = [(str(s.get("category") or ""), bool(np.any(s["mask"]))) for s in samples]
    return [p[0] for p in pairs], [p[1] for p in pairs]
