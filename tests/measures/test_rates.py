import math

import numpy as np
import pytest
from scipy.stats import binomtest

from diffdoctor.measures.rates import paired_bootstrap, preference_rate, wilson_interval


@pytest.mark.parametrize(("count", "total"), [(0, 10), (10, 10), (3, 100), (702, 2000), (1, 1)])
def test_wilson_interval_equals_scipys(count, total):
    expected = binomtest(count, total).proportion_ci(method="wilson")
    assert wilson_interval(count, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_of_nothing_knows_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_refuses_more_than_all():
    with pytest.raises(ValueError, match="count: expected 0 to total = 5, got 6"):
        wilson_interval(6, 5)


def test_paired_bootstrap_respects_the_pairing():
    rng = np.random.default_rng(0)
    before = rng.random(2000) < 0.35
    cured = before & (rng.random(2000) < 0.1)
    change = paired_bootstrap(before, cured)
    assert change["ratio"] == pytest.approx(cured.sum() / before.sum())
    assert change["difference"] == pytest.approx(cured.mean() - before.mean())
    low, high = change["ratio_interval"]
    assert low < change["ratio"] < high
    # Identical flags: paired resampling sees no change at all, an unpaired one would.
    assert paired_bootstrap(before, before)["difference_interval"] == [0.0, 0.0]


def test_paired_bootstrap_equals_resampling_pictures():
    rng = np.random.default_rng(1)
    before, after = rng.random(400) < 0.4, rng.random(400) < 0.1
    rows = rng.integers(0, 400, size=(4000, 400))
    expected = np.percentile(after[rows].mean(1) - before[rows].mean(1), [2.5, 97.5])
    assert paired_bootstrap(before, after)["difference_interval"] == pytest.approx(expected, abs=0.01)


def test_paired_bootstrap_has_no_ratio_when_nothing_was_flagged():
    change = paired_bootstrap([False] * 20, [True] * 2 + [False] * 18)
    assert change["ratio"] is None
    assert change["difference"] == pytest.approx(0.1)


def test_paired_bootstrap_refuses_unpaired_input():
    with pytest.raises(ValueError, match=r"before, after: expected the same shape \(N,\)"):
        paired_bootstrap([True, False], [True])


def test_preference_rate_is_wilsons_without_ties_and_covers_with_them():
    for wins, losses in ((0, 7), (3, 4), (10, 0), (60, 40)):
        rate, *interval = preference_rate(wins, losses, 0)
        assert rate == pytest.approx(wins / (wins + losses))
        assert interval == pytest.approx(wilson_interval(wins, wins + losses), abs=1e-9)
    assert preference_rate(0, 0, 0) == (0.5, 0, 1)
    _, low, high = preference_rate(0, 0, 50)
    assert 0.4 < low < 0.5 < high < 0.6  # ties alone say something
    total = 12
    for win, loss in ((0.5, 0.2), (0.2, 0.2), (0.05, 0.1)):
        covered = 0.0
        for wins in range(total + 1):
            for losses in range(total + 1 - wins):
                ties = total - wins - losses
                _, low, high = preference_rate(wins, losses, ties)
                if low <= (1 + win - loss) / 2 <= high:
                    ways = math.comb(total, wins) * math.comb(total - wins, losses)
                    covered += ways * win**wins * loss**losses * (1 - win - loss) ** ties
        assert covered > 0.93
