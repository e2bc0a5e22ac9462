"""The measures that are taken during a training."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from diffdoctor.detector.predict import diagnosed_batches
from diffdoctor.detector.samples import DetectorData
from diffdoctor.measures.statistics import PictureStatistics


def quick_measures(
    detector: nn.Module, data: DetectorData, *, size: int | None = None, strict: bool = False
) -> dict[str, float]:
    """The measures of a detector on a set by which a training is validated.

    Args:
        detector: a `Detector`, or a module with its `confidence`.
        data: labelled pictures.
        size: side in pixels to which maps and masks are resized; None keeps their sizes.
        strict: raise at a broken picture instead of skipping it.

    Returns:
        iou, map50, false_positive_rate and hit_rate; NaN where the set has no picture of the kind a measure is about.
    """
    parts = diagnosed_batches(detector, data, size=size, strict=strict)
    parts = [PictureStatistics.of(part.confidence, part.masks, part.ignore) for part in parts]
    names = ("iou", "map50", "false_positive_rate", "hit_rate")
    if not parts:
        return dict.fromkeys(names, math.nan)
    found = PictureStatistics.joined(parts)
    measured = found.measures(np.arange(len(found)))
    return {name: measured[name] for name in names}
