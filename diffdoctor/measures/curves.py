"""Pixel curves from counts, and the exact AUPRC from sorted chunks of pixels that need not fit into memory.

A pixel of a sorted chunk takes four bytes: the bits of its confidence in fp32, which for numbers in [0, 1] sort as the
numbers do, with the label below them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from diffdoctor.measures.statistics import slices

# Pixels that are sorted at once when chunks are merged.
MERGED_PIXELS = 2**20
_END = 2**31


class SortedCodes(Protocol):
    """Sorted uint32 codes of pixels, as `encode` returns them: an array, or what reads slices of one from a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


def encode(confidence: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sorted uint32 codes (n,) of pixels: the score's bits, and in the lowest whether the mask is >= 0.5.

    Args:
        confidence: float32 in [0, 1], of any shape.
        mask: of the same shape, in [0, 1].

    Returns:
        (n,) uint32, ascending.
    """
    bits = np.ascontiguousarray(confidence, dtype=np.float32).view(np.uint32)
    # The shift takes the sign off a negative zero.
    return np.sort((bits.ravel() << np.uint32(1)) | (mask.ravel() >= 0.5))


@dataclasses.dataclass(frozen=True)
class _Range:
    """Codes `begin` to `end` of a chunk."""

    codes: SortedCodes
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def read(self) -> np.ndarray:
        return self.codes[self.begin : self.end]

    def split(self, code: int) -> tuple[_Range, _Range]:
        """The codes below `code`, and the others."""
        middle = self.begin + int(np.searchsorted(self.read(), np.uint32(code)))
        return _Range(self.codes, self.begin, middle), _Range(self.codes, middle, self.end)


def average_precision_of_chunks(chunks: Iterable[SortedCodes], positives: int, most: int = MERGED_PIXELS) -> float:
    """`pixels.average_precision_of` of the pixels of all chunks together; ties share a threshold as there.

    The range of codes is halved until its pixels, over all chunks, are few enough to be sorted in memory; each is read
    once.

    Args:
        chunks: sorted codes.
        positives: how many of the pixels are artifacts.
        most: pixels that are sorted at once.

    Returns:
        The average precision; NaN without a positive.
    """
    if not positives:
        return float("nan")
    hits = pixels = 0
    result = 0.0
    stack = [(0, _END, [_Range(chunk, 0, len(chunk)) for chunk in chunks if len(chunk)])]
    while stack:
        low, high, ranges = stack.pop()
        size = sum(map(len, ranges))
        if not size:
            continue
        if size <= most:
            codes = np.sort(np.concatenate([each.read() for each in ranges]))[::-1]
            scores, labels = codes >> 1, (codes & 1).astype(np.int64)
            last = np.append(np.flatnonzero(np.diff(scores)), size - 1)
            found = hits + np.cumsum(labels)[last]
            seen = pixels + last + 1
        elif high - low == 2:
            # One score that more pixels share than may be sorted.
            right = sum(len(each.split(low + 1)[1]) for each in ranges)
            found, seen = np.array([hits + right]), np.array([pixels + size])
        else:
            middle = (low + high) // 4 * 2
            halves = [each.split(middle) for each in ranges]
            # The last put on is the first taken off: scores fall.
            stack.append((low, middle, [below for below, _ in halves if len(below)]))
            stack.append((middle, high, [above for _, above in halves if len(above)]))
            continue
        result += float(np.sum(np.diff(found, prepend=hits) / positives * (found / seen)))
        hits, pixels = int(found[-1]), int(seen[-1])
    return result


class PixelCurves:
    """Counts for the pixel precision-recall and calibration curves, added to map by map.

    Args:
        bins: number of confidence bins of equal width, for the calibration.

    Attributes:
        thresholds: (2, 101) int64: pixels, and artifact pixels, by confidence in hundredths.
        calibration: (3, bins) float64: pixels, their summed confidence, and artifact pixels, by bin of confidence.
    """

    def __init__(self, bins: int = 10):
        self.bins = bins
        self.thresholds = np.zeros((2, 101), np.int64)
        self.calibration = np.zeros((3, bins))

    def add(self, confidence: np.ndarray, mask: np.ndarray) -> None:
        """Count the pixels of maps and masks of any one shape, in [0, 1]."""
        scores, labels = confidence.ravel(), mask.ravel() >= 0.5
        hundredth = np.minimum((scores * 100).astype(int), 100)
        bin_index = np.minimum((scores * self.bins).astype(int), self.bins - 1)
        self.thresholds += [np.bincount(hundredth, minlength=101), np.bincount(hundredth[labels], minlength=101)]
        self.calibration += [np.bincount(bin_index, weights, self.bins) for weights in (None, scores, labels)]

    def merge(self, other: PixelCurves) -> None:
        """Add the counts of another one."""
        self.thresholds += other.thresholds
        self.calibration += other.calibration

    def result(self) -> dict[str, np.ndarray]:
        """The curves, as `pixel_curves` returns them."""
        found, right = (np.cumsum(counts[::-1]) for counts in self.thresholds)
        pixels, scores, labels = self.calibration
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
        confidence: (N, H, W) in [0, 1].
        mask: (N, H, W) in [0, 1].
        bins: number of confidence bins of equal width, for the calibration.

    Returns:
        `recall`, `precision` (101,) at the thresholds 1.00, 0.99 ... 0.00; `mean_confidence`, `artifact_share`,
        `pixels` (bins,), NaN where a bin is empty; `expected_calibration_error` (), the mean distance of the two
        weighted by pixels.
    """
    result = PixelCurves(bins)
    for part in slices(confidence):
        result.add(confidence[part], mask[part])
    return result.result()
