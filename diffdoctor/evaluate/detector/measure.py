"""All measures of a detector on labelled pictures, with bootstrap intervals, per category and per generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from diffdoctor.detector.balance import category_statistics
from diffdoctor.detector.predict import Diagnosed, diagnose_data
from diffdoctor.detector.samples import DetectorData
from diffdoctor.measures.pixels import average_precision, is_flagged
from diffdoctor.measures.statistics import PictureStatistics


def evaluate_maps(
    confidence: np.ndarray, mask: np.ndarray, *, bootstrap: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, float | list[float] | int]:
    """All measures of confidence maps against masks, with bootstrap intervals over pictures.

    Args:
        confidence: (N, H, W) in [0, 1].
        mask: (N, H, W) in [0, 1]; a picture is damaged where any pixel is >= 0.5.
        bootstrap: number of resamples of the set; 0 gives no intervals.
        level: coverage of the percentile intervals, in (0, 1).
        seed: of the resampling.

    Returns:
        pictures, damaged (counts); map50; iou, f1, precision, recall, auprc, mse, mse_empty, mse_nonempty, kld, cc, sim
        (pixels); auroc (of the largest confidence), average_precision, false_positive_rate, hit_rate (pictures, the
        latter two by the flagged rule). For all but the counts, `<name>_interval`: [low, high]; that of auprc is
        computed from 128 bins of confidence and shifted to the exact value. NaN where the set has no picture of the
        kind that a measure is about.

    Raises:
        ValueError: the shapes differ, a value is outside [0, 1], or there is no picture.
    """
    confidence, mask = np.asarray(confidence), np.asarray(mask)
    found = PictureStatistics.of(confidence, mask)
    auprc = average_precision(confidence, mask)
    return found.with_intervals(np.arange(len(found)), auprc, bootstrap=bootstrap, level=level, seed=seed)


def evaluate_detector(
    detector: nn.Module,
    data: DetectorData,
    *,
    batch_size: int = 64,
    size: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All measures of a detector on labelled pictures.

    Args:
        detector: a `Detector`, or a module with its `confidence`.
        data: the labelled pictures.
        batch_size: pictures at a time.
        size: side in pixels to which maps and masks are resized; None: the pictures must agree in size.
        bootstrap: number of resamples of the set; 0 gives no intervals.
        seed: of the resampling.

    Returns:
        `overall`, `per_category` and `per_generator` (by name), each as `evaluate_maps` returns, and `categories`:
        the statistics of `detector.balance.category_statistics` over the clean pictures.
    """
    found = diagnose_data(detector, data, batch_size=batch_size, size=size)
    return measure(found, bootstrap=bootstrap, seed=seed)


def measure(found: Diagnosed, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """All measures of a detector from its maps, as `evaluate_detector` returns.

    Args:
        found: the maps and masks.
        bootstrap: number of resamples of the set; 0 gives no intervals.
        seed: of the resampling.
    """
    statistics = PictureStatistics.of(found.confidence, found.masks)

    def auprc(column, name, chosen):
        return average_precision(found.confidence[chosen], found.masks[chosen])

    return measure_statistics(statistics, found.categories, found.generators, auprc, bootstrap=bootstrap, seed=seed)


def measure_statistics(
    statistics: PictureStatistics,
    categories: Sequence[str],
    generators: Sequence[str],
    auprc: Callable[[str, str, np.ndarray], float],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All measures of a detector from the pictures' statistics, as `evaluate_detector` returns.

    Args:
        statistics: of N pictures.
        categories: N names.
        generators: N names.
        auprc: callable from ("", ""), ("category", name) or ("generator", name) and the indices (n,) of these pictures
            to the AUPRC of their pixels.
        bootstrap: number of resamples of the set; 0 gives no intervals.
        seed: of the resampling.
    """

    def of(column, name, chosen):
        return statistics.with_intervals(chosen, auprc(column, name, chosen), bootstrap=bootstrap, seed=seed)

    def by(column, names):
        names = np.asarray(names, dtype=object)
        return {str(name): of(column, name, np.flatnonzero(names == name)) for name in sorted(set(names))}

    clean = np.flatnonzero(~statistics.columns["damaged"])
    share, mean = (statistics.columns[name][clean] for name in ("share", "mean"))
    names = [categories[index] for index in clean]
    table = category_statistics(names, mean, is_flagged(share)) if names else []
    return {
        "overall": of("", "", np.arange(len(statistics))),
        "per_category": by("category", categories),
        "per_generator": by("generator", generators),
        "categories": [dataclasses.asdict(entry) for entry in table],
    }
