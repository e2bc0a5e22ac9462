"""Statistics of each picture, from which the measures of any set of the pictures are computed without their maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from diffdoctor.measures.components import Matches, match_components
from diffdoctor.measures.pixels import (
    auroc_of,
    average_precision_of,
    distance_means,
    flagged_share,
    from_counts,
    is_flagged,
    map_distances,
    maps_pair,
    mean_without_nan,
    picture_counts,
    refuse_zero_one,
)
from diffdoctor.runs.errors import expected

# Bins of confidence, an eighth of a logit wide, from which the AUPRC's interval is drawn.
LEVELS = 128
# Pixels that are measured at once, at about 100 bytes each.
SLICE_PIXELS = 2**20


def slices(confidence: np.ndarray) -> Iterator[slice]:
    """Slices of pictures (N, H, W), of at most `SLICE_PIXELS` pixels or of one picture."""
    step = max(1, SLICE_PIXELS // max(1, confidence[0].size)) if len(confidence) else 1
    for first in range(0, len(confidence), step):
        yield slice(first, first + step)


class PictureStatistics:
    """The statistics of N pictures, about 1,200 bytes each.

    Attributes:
        columns: arrays of length N. `counts` (N, 3): true positive, false positive and false negative pixels; `mse`,
            `kld`, `cc`, `sim`: see `pixels.map_distances`; `damaged`, `empty`: any pixel of the mask >= 0.5, none > 0;
            `share`, `peak`, `mean`: of the confidence, the share of pixels >= 0.5, the largest and the mean;
            `missed`: share of pixels that are damaged and below 0.5; `levels` (N, 2, LEVELS): how many sound and how
            many damaged pixels have a confidence of each level.
        matches: of the components.
    """

    def __init__(self, columns: dict[str, np.ndarray], matches: Matches):
        self.columns, self.matches = columns, matches

    @classmethod
    def of(cls, confidence: np.ndarray, mask: np.ndarray, ignore: np.ndarray | None = None) -> PictureStatistics:
        """The statistics of confidence maps against masks.

        Args:
            confidence: (N, H, W) or (N, 1, H, W) in [0, 1] (or uint8).
            mask: the truth, of the same shape.
            ignore: (N, H, W) bool, where it is not decided, which mAP alone heeds; None: nowhere.

        Raises:
            ValueError: they differ in shape, a value is outside [0, 1], or masks are uint8 0 and 1.
        """
        refuse_zero_one(np.asarray(mask))
        confidence, mask = _floats(confidence), _floats(mask)
        if confidence.shape != mask.shape or confidence.ndim != 3:
            maps_pair(confidence, mask)
            raise AssertionError("unreachable: such maps are refused")
        if not confidence.size:
            raise ValueError(expected("confidence", "at least one picture", "none"))
        parts = [(part, None if ignore is None else ignore[part]) for part in slices(confidence)]
        return cls.joined([cls._of(confidence[part], mask[part], undecided) for part, undecided in parts])

    @classmethod
    def _of(cls, confidence: np.ndarray, mask: np.ndarray, ignore: np.ndarray | None) -> PictureStatistics:
        true = mask >= 0.5
        columns = {
            "counts": picture_counts(confidence, mask),
            **map_distances(confidence, mask),
            "damaged": true.any(axis=(1, 2)),
            "empty": ~(mask > 0).any(axis=(1, 2)),
            "share": flagged_share(confidence),
            "peak": confidence.max(axis=(1, 2)),
            "mean": confidence.mean(axis=(1, 2)),
            "missed": (true & (confidence < 0.5)).mean(axis=(1, 2)),
            "levels": _levels(confidence, true),
        }
        return cls(columns, match_components(confidence, mask, ignore))

    @classmethod
    def joined(cls, parts: Sequence[PictureStatistics]) -> PictureStatistics:
        """The statistics of all pictures of one or more parts, in order."""
        names = parts[0].columns
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
        return cls(columns, Matches.joined([part.matches for part in parts]))

    def __len__(self) -> int:
        return len(self.columns["damaged"])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays by name, for a file."""
        return {f"column_{name}": column for name, column in self.columns.items()} | {
            f"match_{name}": column for name, column in self.matches.to_arrays().items()
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> PictureStatistics:
        """The inverse of `to_arrays`; other names in the mapping are ignored."""
        found = {kind: {} for kind in ("column", "match")}
        for name in arrays:
            kind, _, rest = name.partition("_")
            if kind in found:
                found[kind][rest] = arrays[name]
        return cls(found["column"], Matches(**found["match"]))

    def measures(self, chosen: np.ndarray) -> dict[str, float]:
        """All measures but the pixels' AUPRC of the pictures with these indices; repeats count as often.

        Args:
            chosen: (n,) indices.

        Returns:
            Numbers by name; NaN where no picture is of the kind that a measure is about.
        """
        column = {name: values[chosen] for name, values in self.columns.items() if name != "levels"}
        damaged, flags = column["damaged"], is_flagged(column["share"])
        return {
            "map50": self.matches.average_precision(chosen),
            **from_counts(column["counts"]),
            **distance_means(column, column["empty"]),
            "auroc": auroc_of(column["peak"], damaged),
            "average_precision": average_precision_of(column["peak"], damaged),
            "false_positive_rate": mean_without_nan(flags[~damaged]),
            "hit_rate": mean_without_nan(flags[damaged]),
        }

    def with_intervals(
        self, chosen: np.ndarray, auprc: float, *, bootstrap: int = 1000, level: float = 0.95, seed: int = 0
    ) -> dict[str, float | list[float] | int]:
        """The measures of the chosen pictures with bootstrap intervals, as `evaluate_maps` returns.

        Args:
            chosen: (n,) indices.
            auprc: of their pixels.
            bootstrap: number of resamples; 0 gives no intervals.
            level: coverage of the percentile intervals, in (0, 1).
            seed: of the resampling.

        Returns:
            See `evaluate.detector.measure.evaluate_maps`.
        """
        measured = self.measures(chosen)
        result: dict = {"pictures": len(chosen), "damaged": int(self.columns["damaged"][chosen].sum())}
        pixels = ("iou", "f1", "precision", "recall", "auprc", "mse", "mse_empty", "mse_nonempty", "kld", "cc", "sim")
        result |= {name: auprc if name == "auprc" else measured[name] for name in pixels} | measured
        if bootstrap and len(chosen):
            rng = np.random.default_rng(seed)
            levels = self.columns["levels"][chosen].reshape(len(chosen), -1).astype(np.float64)
            # The levels' AUPRC is a little off the exact one, by nearly the same amount in every draw.
            shift = auprc - _average_precision_of_levels(levels.sum(axis=0))
            draws = []
            for _ in range(bootstrap):
                drawn = rng.integers(len(chosen), size=len(chosen))
                times = np.bincount(drawn, minlength=len(chosen))
                area = _average_precision_of_levels(times @ levels) + shift
                draws.append(self.measures(chosen[drawn]) | {"auprc": float(np.clip(area, 0, 1))})
            for name in draws[0]:
                result[f"{name}_interval"] = percentile_interval([draw[name] for draw in draws], level)
        return result

    def worst(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The worst misses and the worst false positives.

        Args:
            count: largest number of each.

        Returns:
            Indices of the damaged pictures of which most was missed, and of the clean ones of which most is flagged.
        """
        damaged = self.columns["damaged"]
        indices = np.arange(len(self))
        result = []
        for chosen, by in ((damaged, "missed"), (~damaged, "share")):
            result.append(indices[chosen][np.argsort(-self.columns[by][chosen], kind="stable")][:count])
        return result[0], result[1]


def percentile_interval(draws: Sequence[float] | np.ndarray, level: float) -> list[float]:
    """[low, high] that hold a share `level` of resampled values; those that are NaN are left out, and none give NaN."""
    values = np.asarray(draws, float)
    values, tail = values[~np.isnan(values)], (1 - level) / 2
    return np.quantile(values, [tail, 1 - tail]).tolist() if values.size else [math.nan, math.nan]


def _floats(maps) -> np.ndarray:
    """(N, H, W) or (N, 1, H, W), uint8 as 255ths, to (N, H, W)."""
    maps = np.asarray(maps)
    maps = maps[:, 0] if maps.ndim == 4 and maps.shape[1] == 1 else maps
    return maps / 255.0 if maps.dtype == np.uint8 else maps


def _levels(confidence: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pixels (N, 2, LEVELS) uint32 by truth and level of confidence, the levels an eighth of a logit wide."""
    scores = np.clip(confidence, 1e-6, 1 - 1e-6)
    level = np.clip(np.floor(8 * np.log(scores / (1 - scores))) + LEVELS // 2, 0, LEVELS - 1).astype(np.int64)
    bins = (2 * np.arange(len(true))[:, None, None] + true) * LEVELS + level
    return np.bincount(bins.ravel(), minlength=2 * LEVELS * len(true)).reshape(-1, 2, LEVELS).astype(np.uint32)


def _average_precision_of_levels(levels: np.ndarray) -> float:
    """AUPRC of pixel counts (2 * LEVELS,), sound ones first; NaN without a damaged one."""
    sound, damaged = np.cumsum(levels.reshape(2, LEVELS)[:, ::-1], axis=1)
    if not damaged[-1]:
        return math.nan
    precision = damaged / np.maximum(sound + damaged, 1)
    return float(np.sum(np.diff(damaged, prepend=0) * precision) / damaged[-1])
