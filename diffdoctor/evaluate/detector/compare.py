"""Two detectors on the same labelled pictures, with intervals of their difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from diffdoctor.detector.predict import diagnosed_batches
from diffdoctor.detector.samples import DetectorData, JoinedData
from diffdoctor.measures.pixels import is_flagged, mean_without_nan
from diffdoctor.measures.statistics import PictureStatistics, percentile_interval
from diffdoctor.runs.errors import UserError, expected


def compare_detectors(
    before: nn.Module,
    after: nn.Module,
    sets: Sequence[DetectorData],
    *,
    batch_size: int = 64,
    size: int | None = None,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """How much better one detector is than another on labelled pictures.

    Pictures are resampled with both detectors' maps of them, so that how hard they are does not widen the interval.
    Memory holds a batch of maps and about 1,200 bytes a picture.

    Args:
        before: a `Detector`, or a module with its `confidence`.
        after: likewise.
        sets: the labelled pictures.
        batch_size: pictures at a time.
        size: side in pixels to which maps and masks are resized; None keeps their sizes.
        bootstrap: number of resamples.
        level: coverage of the percentile intervals, in (0, 1).
        seed: of the resampling.

    Returns:
        pictures, damaged (counts); of each of map50, hit_rate and false_positive_rate `before`, `after`, `difference`
        and `difference_interval` [low, high]. NaN where the set has no picture of the kind a measure is about.

    Raises:
        UserError: there is no picture that can be read.
    """
    data, statistics = JoinedData(sets), []
    for detector in (before, after):
        batches = diagnosed_batches(detector, data, batch_size=batch_size, size=size)
        parts = [PictureStatistics.of(part.confidence, part.masks, part.ignore) for part in batches]
        if not parts:
            raise UserError(expected("sets", "labelled pictures", "none that can be read"))
        statistics.append(PictureStatistics.joined(parts))
    if len(statistics[0]) != len(statistics[1]):  # one of them takes smaller pictures alone
        raise UserError(expected("size", "a side of pictures that both detectors take", size))
    return paired_differences(*statistics, bootstrap=bootstrap, level=level, seed=seed)


def paired_differences(
    before: PictureStatistics, after: PictureStatistics, *, bootstrap: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """What `compare_detectors` returns, from both detectors' statistics of the same pictures."""
    count, rng = len(before), np.random.default_rng(seed)
    values = np.array([_rates(each, np.arange(count)) for each in (before, after)])
    draws = []
    for _ in range(bootstrap):
        chosen = rng.integers(count, size=count)
        draws.append(_rates(after, chosen) - _rates(before, chosen))
    result: dict[str, Any] = {"pictures": count, "damaged": int(before.columns["damaged"].sum())}
    for column, name in enumerate(("map50", "hit_rate", "false_positive_rate")):
        interval = percentile_interval([draw[column] for draw in draws], level)
        old, new = values[:, column].tolist()
        result[name] = {"before": old, "after": new, "difference": new - old, "difference_interval": interval}
    return result


def _rates(statistics: PictureStatistics, chosen: np.ndarray) -> np.ndarray:
    """mAP@0.5, hit rate and false-positive rate (3,) of the chosen pictures (n,)."""
    flags, damaged = is_flagged(statistics.columns["share"][chosen]), statistics.columns["damaged"][chosen]
    rates = [mean_without_nan(flags[damaged]), mean_without_nan(flags[~damaged])]
    return np.array([statistics.matches.average_precision(chosen), *rates])
