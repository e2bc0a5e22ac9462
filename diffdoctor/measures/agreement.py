"""How far people who judged the same things agree."""

from __future__ import annotations

import math

import numpy as np


def nominal_alpha(counts: np.ndarray) -> float:
    """Krippendorff's alpha for nominal data with any number of raters and missing answers.

    Source: K. Krippendorff, Computing Krippendorff's alpha-reliability (2011).

    Args:
        counts: (units, classes), how many raters put a unit in a class; units with fewer than two answers do not count.

    Returns:
        1 for full agreement, 0 for that of answers dealt out by lot; NaN where all answers are of one class or no unit
        was answered twice.
    """
    counts = np.asarray(counts, np.float64)
    counts = counts[counts.sum(axis=1) >= 2]
    given, classes = counts.sum(axis=1, keepdims=True), counts.sum(axis=0)
    total = classes.sum()
    apart = total**2 - np.square(classes).sum()
    if not apart > 0:
        return math.nan
    observed = ((given**2 - np.square(counts).sum(axis=1, keepdims=True)) / (given - 1)).sum() / total
    return float(1 - observed * total * (total - 1) / apart)
