"""Shares with their uncertainty: Wilson intervals, and a paired bootstrap for before against after."""

from __future__ import annotations

import numpy as np

from diffdoctor.runs.errors import expected, missing_extra


def wilson_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of the share `count / total`, by scipy.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Args:
        count: how many of the `total` have the property, 0 to `total`.
        total: how many were looked at; 0 gives (0, 1), since nothing is known.
        confidence: coverage, between 0 and 1.

    Returns:
        (low, high), both in [0, 1].

    Raises:
        ValueError: `count` is not in [0, total], or `confidence` not in (0, 1).
    """
    if not 0 <= count <= total:
        raise ValueError(expected("count", f"0 to total = {total}", count))
    if not 0 < confidence < 1:
        raise ValueError(expected("confidence", "a number in (0, 1)", confidence))
    if total == 0:
        return 0.0, 1.0
    try:
        from scipy.stats import binomtest
    except ImportError:
        raise missing_extra("scipy", "stages") from None
    interval = binomtest(count, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def preference_rate(wins: int, losses: int, ties: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """How often one of two things is preferred, a tie as half: (wins + ties / 2) / pairs, with a score interval.

    The rate is 1/2 + d/2 of d = P(win) - P(loss), a difference of paired proportions, whose score interval keeps its
    coverage with few pairs and does not collapse where all pairs are alike.

    Source: T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998).

    Args:
        wins: pairs in which it is preferred.
        losses: pairs in which the other is.
        ties: pairs in which neither is.
        confidence: coverage, between 0 and 1.

    Returns:
        (rate, low, high); (0.5, 0, 1) without pairs.
    """
    try:
        from scipy.optimize import brentq
        from scipy.stats import norm
    except ImportError:
        raise missing_extra("scipy", "stages") from None
    total, z = wins + losses + ties, norm.ppf((1 + confidence) / 2)
    if total == 0:
        return 0.5, 0.0, 1.0

    def beyond(d: float, sign: int) -> float:
        # P(loss) of the largest likelihood where the difference is d
        b, c = -wins - losses + (2 * total - wins + losses) * d, -losses * d * (1 - d)
        loss = (np.sqrt(max(b * b - 8 * total * c, 0.0)) - b) / (4 * total)
        variance = max(total * (2 * loss + d * (1 - d)), 0.0)
        return sign * (wins - losses - total * d) - z * np.sqrt(variance)

    centre = (wins - losses) / total
    low = -1.0 if losses == total else brentq(beyond, -1, centre - 1e-12, args=(1,))
    high = 1.0 if wins == total else brentq(beyond, centre + 1e-12, 1, args=(-1,))
    return (1 + centre) / 2, float((1 + low) / 2), float((1 + high) / 2)


def paired_bootstrap(
    before: np.ndarray, after: np.ndarray, *, resamples: int = 4000, confidence: float = 0.95, seed: int = 0
) -> dict[str, float | list[float] | None]:
    """How the share of flagged pictures changed, with bootstrap intervals that respect the pairing.

    Pictures are resampled, each with its own before and after, so that the variation between prompts and seeds that
    both share does not widen the interval.

    Args:
        before: (N,) bool, flagged before the treatment.
        after: (N,) bool, the same pictures (prompt, seed, latents) after it.
        resamples: number of bootstrap resamples.
        confidence: coverage of the percentile intervals, between 0 and 1.
        seed: of the resampling.

    Returns:
        `ratio` (after / before; None when nothing was flagged before), `difference` (after − before), and
        `ratio_interval`, `difference_interval` as [low, high].

    Raises:
        ValueError: the two do not have the same positive length.
    """
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    _check_paired(before, after)
    # A picture is one of four kinds, so that a resample is one multinomial draw instead of N indices.
    kinds = np.bincount(2 * before + after, minlength=4)
    total = before.size
    draws = np.random.default_rng(seed).multinomial(total, kinds / total, size=resamples)
    before_share = (draws[:, 2] + draws[:, 3]) / total
    after_share = (draws[:, 1] + draws[:, 3]) / total
    result = {
        "difference": float(after.mean() - before.mean()),
        "difference_interval": _percentiles(after_share - before_share, confidence),
        "ratio": None,
        "ratio_interval": None,
    }
    if before.any():
        seen = before_share > 0
        result["ratio"] = float(after.mean() / before.mean())
        result["ratio_interval"] = _percentiles(after_share[seen] / before_share[seen], confidence)
    return result


def paired_mean(
    before: np.ndarray, after: np.ndarray, *, resamples: int = 4000, confidence: float = 0.95, seed: int = 0
) -> dict[str, float | list[float]]:
    """How the mean of a measure changed, with a bootstrap interval that respects the pairing.

    Args:
        before: (N,) the measure of each picture before the treatment.
        after: (N,) of the same pictures (prompt, seed, latents) after it.
        resamples: number of bootstrap resamples.
        confidence: coverage of the percentile interval, between 0 and 1.
        seed: of the resampling.

    Returns:
        `before`, `after` (means), `difference` (after − before) and `difference_interval` as [low, high].

    Raises:
        ValueError: the two do not have the same positive length.
    """
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    _check_paired(before, after)
    change = after - before
    rng = np.random.default_rng(seed)
    means = [change[rng.integers(change.size, size=change.size)].mean() for _ in range(resamples)]
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": float(change.mean()),
        "difference_interval": _percentiles(means, confidence),
    }


def _check_paired(before: np.ndarray, after: np.ndarray) -> None:
    if before.ndim != 1 or before.shape != after.shape or before.size == 0:
        got = f"{before.shape} and {after.shape}"
        raise ValueError(expected("before, after", "the same shape (N,) with N > 0", got))


def _percentiles(values, confidence: float) -> list[float]:
    return np.percentile(values, [50 * (1 - confidence), 50 * (1 + confidence)]).tolist()
