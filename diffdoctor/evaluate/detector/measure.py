"""All measures of a detector on labelled pictures, with intervals, per category, generator and kind of damage."""

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
from diffdoctor.measures.rates import wilson_interval
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
        `overall`, `per_category` and `per_generator` (by name), each as `evaluate_maps` returns; `per_kind` and
        `clean_per_kind` of `measures_of_kinds`; and `categories`: the statistics of
        `detector.balance.category_statistics` over the clean pictures.
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
    statistics = PictureStatistics.of(found.confidence, found.masks, found.ignore)

    def auprc(column, name, chosen):
        return average_precision(found.confidence[chosen], found.masks[chosen])

    names = (found.categories, found.generators, found.kinds)
    return measure_statistics(statistics, *names, auprc, bootstrap=bootstrap, seed=seed)


def measure_statistics(
    statistics: PictureStatistics,
    categories: Sequence[str],
    generators: Sequence[str],
    kinds: Sequence[str],
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
        kinds: N names, see `Diagnosed`.
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
        **measures_of_kinds(statistics, kinds),
        "categories": [dataclasses.asdict(entry) for entry in table],
    }


def measures_of_kinds(statistics: PictureStatistics, kinds: Sequence[str]) -> dict[str, dict[str, dict]]:
    """How much of each kind of damage is found, and how many clean pictures of each kind are flagged.

    Args:
        statistics: of N pictures.
        kinds: N names, see `Diagnosed`.

    Returns:
        `per_kind`: {kind: pictures, hit_rate, hit_rate_interval, map50, iou, precision, recall} of the damaged
        pictures; `clean_per_kind`: {kind: pictures, false_positive_rate, false_positive_rate_interval} of the others.
        Intervals are Wilson's, of 95 %. Both are empty where no kind is known; else "" is of the pictures without one:
        damage that is not known, or pictures as they are.
    """
    names, damaged = np.asarray(kinds, dtype=object), statistics.columns["damaged"]
    result: dict[str, dict[str, dict]] = {"per_kind": {}, "clean_per_kind": {}}
    if not any(kinds):
        return result
    measures = {
        "per_kind": ("hit_rate", "map50", "iou", "precision", "recall"),
        "clean_per_kind": ("false_positive_rate",),
    }
    for (key, shown), among in zip(measures.items(), (damaged, ~damaged), strict=True):
        for kind in sorted(set(names[among])):
            chosen = np.flatnonzero(among & (names == kind))
            found, rate = statistics.measures(chosen), shown[0]
            flags = int(is_flagged(statistics.columns["share"][chosen]).sum())
            result[key][kind] = {
                "pictures": len(chosen),
                **{name: found[name] for name in shown},
                f"{rate}_interval": list(wilson_interval(flags, len(chosen))),
            }
    return result
