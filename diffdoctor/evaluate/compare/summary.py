"""What the answers say: which is preferred, whether raters agree, and whether scores agree with them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from diffdoctor.evaluate.compare.answers import CHOICES, Answers
from diffdoctor.evaluate.compare.pairs import Pair
from diffdoctor.measures.agreement import nominal_alpha
from diffdoctor.measures.rates import preference_rate, wilson_interval
from diffdoctor.measures.statistics import percentile_interval

_RESAMPLES = 1000


def summarise(pairs: Sequence[Pair], answers: Answers, lower: Iterable[str] = (), seed: int = 0) -> dict[str, Any]:
    """The content of compare.json but for names and versions; NaN where something is not defined.

    A rater's newest answer to a pair counts. A pair's verdict is what more of its raters chose, a or b; where as many
    chose either, or all chose neither, it is a tie.

    Args:
        pairs: all pairs, with their scores.
        answers: of the raters.
        lower: names of the scores of which less is better.
        seed: of the resampling of pairs.
    """
    from scipy.stats import binomtest

    counts = {pair.name: counts_of(answers.of_pair(pair.name).values()) for pair in pairs}
    answered = [pair for pair in pairs if counts[pair.name].any()]
    verdicts = {pair.name: verdict_of(counts[pair.name]) for pair in answered}
    rows = [row for pair in answered for row in answers.of_pair(pair.name).values()]
    result: dict[str, Any] = {"pairs": len(pairs), "answered": len(answered), "answers": len(rows)}
    result["preference"] = _preference(verdicts.values())
    wins, losses = result["preference"]["b"], result["preference"]["a"]
    result["preference"]["p_value"] = binomtest(wins, wins + losses).pvalue if wins + losses else math.nan
    categories = defaultdict(list)
    for pair in answered:
        categories[pair.category].append(verdicts[pair.name])
    if len(categories) > 1:
        result["per_category"] = {name: _preference(found) for name, found in sorted(categories.items())}
    result["left"] = _left(rows)
    result["agreement"] = _agreement(np.array([counts[pair.name] for pair in answered]).reshape(-1, 3), seed)
    result["raters"] = {name: _rater(found) for name, found in sorted(_by_rater(rows).items())}
    result["scores"] = _scores(answered, verdicts, {*lower})
    return result


def verdict_of(counts: np.ndarray) -> int:
    """What more of a pair's raters chose: 1 for b, -1 for a, 0 for a tie."""
    return int(np.sign(counts[1] - counts[0]))


def counts_of(rows: Iterable[dict[str, Any]]) -> np.ndarray:
    """How many chose a, b and neither."""
    chosen = [row["choice"] for row in rows]
    return np.array([chosen.count(choice) for choice in CHOICES])


def _preference(verdicts: Iterable[int]) -> dict[str, Any]:
    """How often b is preferred, of verdicts that are 1 for b, -1 for a and 0 for a tie."""
    found = list(verdicts)
    wins, losses, ties = (found.count(verdict) for verdict in (1, -1, 0))
    rate, *interval = preference_rate(wins, losses, ties)
    return {"rate": rate, "interval": interval, "a": losses, "b": wins, "ties": ties}


def _left(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of the left picture among the answers that chose one; sides are dealt by lot, so it should be 1/2."""
    chosen = [row["choice"] == row["left"] for row in rows if row["choice"] != "neither"]
    rate = sum(chosen) / len(chosen) if chosen else math.nan
    return {"rate": rate, "interval": list(wilson_interval(sum(chosen), len(chosen))), "answers": len(chosen)}


def _agreement(counts: np.ndarray, seed: int) -> dict[str, Any]:
    """Of the pairs that two or more raters judged: alpha, and the share of two raters' answers that are the same."""
    counts = counts[counts.sum(axis=1) >= 2]
    given = counts.sum(axis=1)
    same = (counts * (counts - 1)).sum(axis=1) / (given * (given - 1))
    rng = np.random.default_rng(seed)
    resamples = _RESAMPLES if len(counts) > 1 else 0
    draws = [nominal_alpha(counts[rng.integers(len(counts), size=len(counts))]) for _ in range(resamples)]
    return {
        "pairs": len(counts),
        "same": float(same.mean()) if len(counts) else math.nan,
        "alpha": nominal_alpha(counts),
        "alpha_interval": percentile_interval(draws, 0.95),
    }


def _by_rater(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in rows:
        found[row["rater"]].append(row)
    return found


def _rater(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    chosen = counts_of(rows)
    return {
        **dict(zip(CHOICES, chosen.tolist(), strict=True)),
        "left": _left(rows)["rate"],
        "seconds": statistics.median(row["ms"] for row in rows) / 1000,
    }


def _scores(pairs: Sequence[Pair], verdicts: dict[str, int], lower: set[str]) -> dict[str, Any]:
    """Of the pairs with a verdict whose scores differ, the share in which the better score is what people chose."""
    names = sorted({name for pair in pairs for name in pair.scores})
    found = {}
    for name in names:
        agrees, equal = [], 0
        for pair in pairs:
            if name not in pair.scores or not verdicts[pair.name]:
                continue
            better = np.sign(pair.scores[name][1] - pair.scores[name][0]) * (-1 if name in lower else 1)
            if not abs(better) > 0:  # equal, or not a number
                equal += 1
            else:
                agrees.append(better == verdicts[pair.name])
        share = sum(agrees) / len(agrees) if agrees else math.nan
        interval = list(wilson_interval(sum(agrees), len(agrees)))
        found[name] = {"agreement": share, "interval": interval, "pairs": len(agrees), "equal": equal}
        found[name]["lower_is_better"] = name in lower
    return found
