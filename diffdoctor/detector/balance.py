"""Class balance: which categories the detector flags too often or too rarely, and sampling that counteracts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from diffdoctor.detector.samples import DetectorData
from diffdoctor.runs.errors import UserError, expected


@dataclasses.dataclass(frozen=True)
class CategoryStatistics:
    """One category's aggregate.

    Attributes:
        category: its name.
        pictures: number of its pictures.
        mean_confidence: mean over its pictures of the map's mean, in [0, 1].
        flagged: share of its pictures that are flagged, in [0, 1].
        z: distance of `mean_confidence` from the categories' median, in robust deviations (1.4826 x the median
            absolute deviation, at least 1e-3).
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
    """The paper's statistics: the detector's mean confidence per category, with a verdict on the abnormal ones.

    An abnormally high category is one that the detector flags for what it shows (the shortcut "every hand is broken"),
    an abnormally low one is overlooked; both need new pictures.

    Args:
        categories: (N,) the pictures' categories.
        mean_confidence: (N,) mean of each picture's confidence map, in [0, 1].
        flagged: (N,) whether each picture is flagged.
        limit: |z| from which a category is abnormal; two categories or fewer have no verdict.

    Returns:
        One `CategoryStatistics` a category, the highest mean confidence first.

    Raises:
        ValueError: the lengths differ.
    """
    names = np.asarray(list(categories), dtype=object)
    means, flags = np.asarray(mean_confidence, np.float64), np.asarray(flagged, bool)
    if not len(names) == len(means) == len(flags):
        got = f"{len(means)} and {len(flags)}"
        raise ValueError(expected("mean_confidence, flagged", f"{len(names)} entries", got))
    unique = sorted(set(names))
    chosen = [names == name for name in unique]
    sums = ((int(rows.sum()), float(means[rows].sum()), int(flags[rows].sum())) for rows in chosen)
    return statistics_of_sums(dict(zip(unique, sums, strict=True)), limit=limit)


def statistics_of_sums(sums: Mapping[str, tuple[int, float, int]], *, limit: float = 3.0) -> list[CategoryStatistics]:
    """`category_statistics` from sums over the categories' pictures.

    Args:
        sums: {category: (pictures, sum of the maps' means, flagged pictures)}.
        limit: see `category_statistics`.
    """
    unique = list(sums)
    category_means = np.array([mean / count for count, mean, _ in sums.values()])
    median = np.median(category_means) if len(category_means) else 0.0
    spread = np.median(np.abs(category_means - median)) if len(category_means) else 0.0
    deviation = max(1.4826 * float(spread), 1e-3)
    result = []
    for name, mean in zip(unique, category_means, strict=True):
        count, _, flagged = sums[name]
        z = float((mean - median) / deviation)
        abnormal = len(unique) > 2 and abs(z) >= limit
        verdict = ("over-flagged" if z > 0 else "under-flagged") if abnormal else ""
        result.append(CategoryStatistics(name, count, float(mean), flagged / count, z, verdict))
    return sorted(result, key=lambda s: -s.mean_confidence)


def sampling_weights(data: DetectorData, *, strength: float = 1.0, damaged_share: float = 0.5) -> np.ndarray:
    """Weights that sample the categories evenly, and damaged and clean pictures by a fixed share within each category.

    A category of which nearly all pictures are damaged teaches that the category itself is the damage; sampling its few
    clean pictures as often prevents that shortcut.

    Args:
        data: the labelled pictures; the category is "" where a picture has none.
        strength: exponent in [0, 1]: 0 samples all pictures alike, 1 all groups alike.
        damaged_share: of the damaged pictures in a category that has both damaged and clean ones, in (0, 1); less than
            a half makes a detector that flags fewer clean pictures, and overlooks more.

    Returns:
        (N,) float64, summing to 1.

    Raises:
        ValueError: an option is out of range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(expected("strength", "a number in [0, 1]", strength))
    if not 0 < damaged_share < 1:
        raise ValueError(expected("damaged_share", "a share in (0, 1)", damaged_share))
    categories, damaged = labels_of(data)
    keys: dict[tuple[str, bool], int] = {}
    pairs = zip(categories, damaged, strict=True)
    groups = np.fromiter((keys.setdefault(pair, len(keys)) for pair in pairs), np.int64, len(categories))
    shares = np.empty(len(keys))
    for (name, is_damaged), group in keys.items():
        own = damaged_share if is_damaged else 1 - damaged_share
        shares[group] = own if (name, not is_damaged) in keys else 1.0
    weights = (shares / np.bincount(groups))[groups] ** strength
    return weights / weights.sum()


def training_weights(data: DetectorData, *, balance: bool = False, damaged_share: float = 0.5) -> np.ndarray | None:
    """The weights by which training draws pictures; None: all alike.

    Args:
        data: the labelled pictures; of a `JoinedData` with `shares`, each set gets its share whatever its size.
        balance: `sampling_weights` over all, or within each set that has a share.
        damaged_share: see `sampling_weights`.

    Returns:
        (N,) float64, summing to 1, or None.

    Raises:
        UserError: a set with a share has no pictures.
        ValueError: an option is out of range.
    """
    shares = getattr(data, "shares", None)
    if shares is None:
        return sampling_weights(data, damaged_share=damaged_share) if balance else None
    weights = np.zeros(len(data))
    for number, share in enumerate(shares):
        rows = np.flatnonzero(data.numbers == number)
        if not len(rows):
            raise UserError(expected("shares", "pictures in every set", f"none in set {number}"))
        own = sampling_weights(data.where(rows), damaged_share=damaged_share) if balance else 1 / len(rows)
        weights[rows] = share / sum(shares) * own
    return weights


def labels_of(data: DetectorData) -> tuple[list[str], list[bool]]:
    """(categories, damaged) of every picture, from the manifest where the data has one, else picture by picture."""
    if hasattr(data, "categories") and hasattr(data, "mask_max"):
        return [str(c) for c in data.categories], [bool(m > 0) for m in data.mask_max]
    samples = (data[index] for index in range(len(data)))
    pairs = [(str(s.get("category") or ""), bool(np.any(s["mask"]))) for s in samples]
    return [p[0] for p in pairs], [p[1] for p in pairs]
