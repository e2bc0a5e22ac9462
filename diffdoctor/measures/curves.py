"""Curves and the exact AUPRC over all pixels of a set that memory does not hold: counts, and sorted scores on the disk.

A pixel takes four bytes there: the bits of its confidence in fp32, which for numbers in [0, 1] sort as the numbers do,
with the label below them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from diffdoctor.measures.statistics import slices

# Pixels that are sorted at once when runs are merged.
MERGED_PIXELS = 2**20
_END = 2**31


def encode(confidence: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sorted uint32 codes (n,) of pixels: the score's bits, and in the lowest whether the mask is >= 0.5.

    Args:
        confidence: float32 in [0, 1].
        mask: of the same shape, in [0, 1].
    """
    bits = np.ascontiguousarray(confidence, dtype=np.float32).view(np.uint32)
    # The shift takes the sign off a negative zero.
    return np.sort((bits.ravel() << np.uint32(1)) | (mask.ravel() >= 0.5))


@dataclasses.dataclass(frozen=True)
class Run:
    """Sorted codes in a file.

    Attributes:
        path: of the file.
        begin, end: the first code and the one after the last.
    """

    path: Path
    begin: int
    end: int

    def read(self) -> np.ndarray:
        """The codes (n,) uint32, mapped and not read."""
        return np.memmap(self.path, np.uint32, "r", 4 * self.begin, (self.end - self.begin,))


def average_precision_of_runs(runs: Iterable[Run], positives: int, most: int = MERGED_PIXELS) -> float:
    """`pixel.average_precision_of` of the pixels of all runs together, ties sharing a threshold as there.

    The range of codes is halved until a piece's pixels, over all runs, are few enough to be sorted in memory; each is
    read once.

    Args:
        runs: sorted codes.
        positives: how many of the pixels are artifacts.
        most: pixels that are sorted at once.
    """
    every = [run for run in runs if run.end > run.begin]
    if not positives:
        return float("nan")
    hits = pixels = 0
    result = 0.0
    stack: list[tuple[int, int, Sequence[Run]]] = [(0, _END, every)]
    while stack:
        low, high, pieces = stack.pop()
        size = sum(piece.end - piece.begin for piece in pieces)
        if not size:
            continue
        if size <= most:
            codes = np.sort(np.concatenate([piece.read() for piece in pieces]))[::-1]
            scores, labels = codes >> 1, (codes & 1).astype(np.int64)
            last = np.append(np.flatnonzero(np.diff(scores)), size - 1)
            found = hits + np.cumsum(labels)[last]
            seen = pixels + last + 1
        elif high - low == 2:
            # One score that more pixels share than may be sorted.
            right = sum(piece.end - piece.begin - int(np.searchsorted(piece.read(), low + 1)) for piece in pieces)
            found, seen = np.array([hits + right]), np.array([pixels + size])
        else:
            middle = (low + high) // 4 * 2
            halves = [_split(piece, middle) for piece in pieces]
            # The last put on is the first taken off: scores fall.
            stack.append((low, middle, [below for below, _ in halves if below.end > below.begin]))
            stack.append((middle, high, [above for _, above in halves if above.end > above.begin]))
            continue
        result += float(np.sum(np.diff(found, prepend=hits) / positives * (found / seen)))
        hits, pixels = int(found[-1]), int(seen[-1])
    return result


def _split(run: Run, code: int) -> tuple[Run, Run]:
    place = run.begin + int(np.searchsorted(run.read(), np.uint32(code)))
    return Run(run.path, run.begin, place), Run(run.path, place, run.end)


class PixelCurves:
    """Counts for the pixel precision-recall and calibration curves, added to map by map.

    Args:
        bins: of confidence, of equal width, for the calibration.
    """

    def __init__(self, bins: int = 10):
        self.bins = bins
        self.levels = np.zeros((2, 101), np.int64)
        self.places = np.zeros((3, bins))

    def add(self, confidence: np.ndarray, mask: np.ndarray) -> None:
        """Count the pixels of maps and masks of any one shape, in [0, 1]."""
        scores, labels = confidence.ravel(), mask.ravel() >= 0.5
        level = np.minimum((scores * 100).astype(int), 100)
        place = np.minimum((scores * self.bins).astype(int), self.bins - 1)
        self.levels += [np.bincount(level, minlength=101), np.bincount(level[labels], minlength=101)]
        self.places += [np.bincount(place, w, self.bins) for w in (None, scores, labels)]

    def merge(self, other: PixelCurves) -> None:
        """Add what another one counted."""
        self.levels += other.levels
        self.places += other.places

    def result(self) -> dict[str, np.ndarray]:
        """The curves, as `pixel_curves` returns them."""
        found, right = (np.cumsum(level[::-1]) for level in self.levels)
        pixels, scores, labels = self.places
        with np.errstate(invalid="ignore", divide="ignore"):
            mean, share = scores / pixels, labels / pixels
            recall, precision = right / right[-1], right / found
        return {
            "recall": recall,
            "precision": precision,
            "mean_confidence": mean,
            "artifact_share": share,
            "pixels": pixels.astype(np.int64),
            "expected_calibration_error": np.nansum(np.abs(mean - share) * pixels) / max(1, pixels.sum()),
        }


def pixel_curves(confidence: np.ndarray, mask: np.ndarray, bins: int = 10) -> dict[str, np.ndarray]:
    """Pixel precision-recall and calibration curves.

    Args:
        confidence, mask: (N, H, W) in [0, 1].
        bins: of confidence, of equal width, for the calibration.

    Returns:
        `recall`, `precision` (101,) at the thresholds 1.00, 0.99 ... 0.00; `mean_confidence`, `artifact_share`,
        `pixels` (bins,), NaN where a bin is empty; `expected_calibration_error` (), the mean distance of the two
        weighted by pixels.
    """
    result = PixelCurves(bins)
    for part in slices(confidence):
        result.add(confidence[part], mask[part])
    return result.result()
