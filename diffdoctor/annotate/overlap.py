"""How alike two masks of one picture are."""

from __future__ import annotations

import math

import numpy as np

# Of the picture's diagonal: how far apart two outlines of one thing may lie.
TOLERANCE = 0.01
# From this tolerant IoU on, two masks show the same.
ALIKE = 0.5


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) bool; NaN where both are empty."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else math.nan


def tolerant_iou(first: np.ndarray, second: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """The share of two masks' union that lies within a distance of the other mask.

    A marked pixel counts as shared where the other mask has a pixel at most `tolerance` diagonals away, so that two
    outlines of one thing that differ by less than that give 1. It is symmetric, and never below `iou`.

    Args:
        first, second: (H, W) bool.
        tolerance: distance as a share of the picture's diagonal.

    Returns:
        A number in [0, 1]; NaN where both are empty.
    """
    from scipy.ndimage import distance_transform_edt

    union = first | second
    if not union.any():
        return math.nan
    if not (first.any() and second.any()):
        return 0.0
    reach = tolerance * math.hypot(*first.shape)
    # Nothing outside the union's box is marked, and so nothing there changes a distance.
    rows, columns = (np.flatnonzero(union.any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    first, second, union = first[box], second[box], union[box]
    near_first, near_second = (distance_transform_edt(~mask) <= reach for mask in (first, second))
    shared = (first & near_second) | (second & near_first)
    return np.count_nonzero(shared) / np.count_nonzero(union)


def component_f1(first: np.ndarray, second: np.ndarray) -> float:
    """2 matched / (components of both), by `measures.components` at an IoU of at least 0.5; NaN without a component.

    Args:
        first, second: (H, W) bool.
    """
    from diffdoctor.measures.components import match_components

    matches = match_components(first[None].astype(np.float32), second[None].astype(np.float32))
    total = len(matches.scores) + int(matches.truths[0])
    return 2 * int(matches.hits.sum()) / total if total else math.nan
