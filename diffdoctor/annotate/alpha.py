"""Krippendorff's alpha of binary answers, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def tally(masks: Sequence[np.ndarray], answered: Sequence[np.ndarray] | None = None) -> dict[tuple[int, int], int]:
    """How many units were answered by m raters of whom k marked them: {(m, k): units}, with m >= 2.

    Args:
        masks: of each rater, bool arrays of one shape: whether a unit is marked.
        answered: of each rater, whether a unit was answered; None: all were.

    Returns:
        The counts; what fewer than two raters answered is left out.
    """
    if answered is None:
        answered = [np.ones_like(masks[0], bool)] * len(masks)
    m = np.sum(list(answered), axis=0, dtype=np.int64)
    k = np.sum([mask & given for mask, given in zip(masks, answered, strict=True)], axis=0, dtype=np.int64)
    size = len(masks) + 1
    counts = np.bincount((m * size + k).ravel(), minlength=size * size)
    return {divmod(int(code), size): int(counts[code]) for code in np.flatnonzero(counts) if code >= 2 * size}


class Tallies:
    """The tallies of many pictures, from which alpha follows for any resampling of them.

    Args:
        tallies: of each picture, see `tally`.
    """

    def __init__(self, tallies: Sequence[dict[tuple[int, int], int]]):
        self.keys = sorted({key for each in tallies for key in each})
        self.counts = np.array([[each.get(key, 0) for key in self.keys] for each in tallies], np.float64)
        self.counts = self.counts.reshape(len(tallies), len(self.keys))

    def alpha(self, times: np.ndarray | None = None) -> float:
        """Krippendorff's alpha for nominal data of two classes.

        With n = sum of m over the units, n1 = sum of k and n0 = n - n1, it is 1 - [sum of 2 k (m - k) / (m - 1), over
        n] / [2 n0 n1 / (n (n - 1))]. Source: K. Krippendorff, Computing Krippendorff's alpha-reliability (2011), whose
        coincidence matrix has these entries where there are two classes.

        Args:
            times: (N,) how often each picture counts; None: once.

        Returns:
            At most 1; NaN where all answers are of one class, or no unit was answered twice.
        """
        if not self.keys:
            return math.nan
        units = self.counts.sum(axis=0) if times is None else np.asarray(times, np.float64) @ self.counts
        m, k = np.array(self.keys, np.float64).T
        n, marked = float(units @ m), float(units @ k)
        if not 0 < marked < n:
            return math.nan
        observed = float(units @ (2 * k * (m - k) / (m - 1))) / n
        return 1 - observed / (2 * (n - marked) * marked / (n * (n - 1)))
