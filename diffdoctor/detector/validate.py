"""The measures by which a training is watched."""

from __future__ import annotations

import math

import numpy as np

from diffdoctor.detector.predict import diagnosed_batches
from diffdoctor.measures.statistics import PictureStatistics


def quick_measures(detector, data, *, size: int | None = None, strict: bool = False) -> dict[str, float]:
    """iou, map50, false_positive_rate and hit_rate of a detector on a set, for watching a training run."""
    parts = diagnosed_batches(detector, data, size=size, strict=strict)
    parts = [PictureStatistics.of(part.confidence, part.masks) for part in parts]
    names = ("iou", "map50", "false_positive_rate", "hit_rate")
    if not parts:
        return dict.fromkeys(names, math.nan)
    found = PictureStatistics.joined(parts)
    measured = found.measures(np.arange(len(found)))
    return {name: measured[name] for name in names}
