"""Shares with their uncertainty: Wilson intervals, and a paired bootstrap for before against after."""

import math
from statistics import NormalDist

import numpy as np


def wilson_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of the share `count / total`.

    Args:
        count: how many of the `total` have the property, 0 to `total`.
        total: how many were looked at; 0 gives (0, 1), since nothing is known.
        confidence: coverage, between 0 and 1.

    Returns:
        (low, high), both in [0, 1].

    Raises:
        ValueError: if `count` is not in [0, total] or `confidence` not in (0, 1).

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if not 0 <= count <= total:
        raise ValueError(f"count must be between 0 and total = {total}, got {count}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = count / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the two terms cancel exactly in theory; rounding must not push the bound past the share.
    low = 0.0 if count == 0 else (centre - spread) / scale
    high = 1.0 if count == total else (centre + spread) / scale
    return low, high


def paired_bootstrap(before, after, *, resamples: int = 4000, confidence: float = 0.95, seed: int = 0) -> dict:
    """How the share of flagged pictures changed, with bootstrap intervals that respect the pairing.

    Pictures are resampled, each with its own before and after, so that the variation between prompts and seeds that
    both share does not widen the interval.

    Args:
        before: (N,) bool, flagged before the treatment.
        after: (N,) bool, the same pictures (prompt, seed, latents) after it.
        resamples: bootstrap resamples.
        confidence: coverage of the percentile intervals, between 0 and 1.
        seed: of the resampling.

    Returns:
        `ratio` (after / before; None when nothing was flagged before), `difference` (after − before), and
        `ratio_interval`, `difference_interval` as [low, high].

    Raises:
        ValueError: if the two do not have the same positive length.
    """
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if before.ndim != 1 or before.shape != after.shape or before.size == 0:
        raise ValueError(f"before and after must be (N,) with N > 0, got shapes {before.shape} and {after.shape}")
    # A picture is one of four kinds, so that a resample is one multinomial draw instead of N indices.
    kinds = np.bincount(2 * before + after, minlength=4)
    total = before.size
    draws = np.random.default_rng(seed).multinomial(total, kinds / total, size=resamples)
    before_share = (draws[:, 2] + draws[:, 3]) / total
    after_share = (draws[:, 1] + draws[:, 3]) / total
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    result = {
        "difference": float(after.mean() - before.mean()),
        "difference_interval": np.percentile(after_share - before_share, tails).tolist(),
        "ratio": None,
        "ratio_interval": None,
    }
    if before.any():
        seen = before_share > 0
        result["ratio"] = float(after.mean() / before.mean())
        result["ratio_interval"] = np.percentile(after_share[seen] / before_share[seen], tails).tolist()
    return result


def paired_mean(before, after, *, resamples: int = 4000, confidence: float = 0.95, seed: int = 0) -> dict:
    """How the mean of a measure changed, with a bootstrap interval that respects the pairing.

    Args:
        before: (N,) the measure of each picture before the treatment.
        after: (N,) of the same pictures (prompt, seed, latents) after it.
        resamples: bootstrap resamples.
        confidence: coverage of the percentile interval, between 0 and 1.
        seed: of the resampling.

    Returns:
        `before`, `after` (means), `difference` (after − before) and `difference_interval` as [low, high].

    Raises:
        ValueError: if the two do not have the same positive length.
    """
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape or before.size == 0:
        raise ValueError(f"before and after must be (N,) with N > 0, got shapes {before.shape} and {after.shape}")
    change = after - before
    rng = np.random.default_rng(seed)
    means = [change[rng.integers(change.size, size=change.size)].mean() for _ in range(resamples)]
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": float(change.mean()),
        "difference_interval": np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)]).tolist(),
    }
