"""Agreement: the closed form against the krippendorff package, and what each measure sees and does not."""

import math

import numpy as np
import pytest

from diffdoctor.annotate.agreement import agreement_of, compare
from diffdoctor.annotate.alpha import Tallies, tally
from diffdoctor.annotate.overlap import iou, tolerant_iou

krippendorff = pytest.importorskip("krippendorff")


def reference(values, level="nominal"):
    return krippendorff.alpha(reliability_data=np.asarray(values, float), level_of_measurement=level)


@pytest.mark.parametrize("raters", [2, 3, 5])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_alpha_is_that_of_the_krippendorff_package(raters, missing):
    rng = np.random.default_rng(raters)
    truth = rng.uniform(size=(4, 500)) < 0.2
    masks = [truth ^ (rng.uniform(size=truth.shape) < 0.1 * (1 + index)) for index in range(raters)]
    answered = [rng.uniform(size=truth.shape) >= missing for _ in masks]
    pictures = [tally([m[i] for m in masks], [a[i] for a in answered]) for i in range(len(truth))]
    values = [np.where(given, mask, np.nan).ravel() for mask, given in zip(masks, answered, strict=True)]
    assert Tallies(pictures).alpha() == pytest.approx(reference(values), abs=1e-12)
    # of a resampling, as if the pictures stood there so often
    times = np.array([2, 0, 1, 3])
    repeated = [np.repeat(np.reshape(each, truth.shape), times, axis=0).ravel() for each in values]
    assert Tallies(pictures).alpha(times) == pytest.approx(reference(repeated), abs=1e-12)


def test_alpha_of_one_class_or_of_one_rater_is_not_defined():
    nothing = np.zeros(9, bool)
    assert math.isnan(Tallies([tally([nothing, nothing])]).alpha())
    assert math.isnan(Tallies([tally([~nothing])]).alpha())
    assert math.isnan(Tallies([]).alpha())


def test_tolerant_iou_forgives_a_rim_and_not_a_place():
    square = np.zeros((100, 200), bool)
    square[40:60, 40:60] = True
    moved = np.roll(square, 2, axis=1)  # 1 % of the diagonal is 2.2 pixels
    assert iou(square, moved) < tolerant_iou(square, moved) == 1
    assert tolerant_iou(square, np.roll(square, 100, axis=1)) == 0
    assert tolerant_iou(square, np.zeros_like(square)) == 0
    assert math.isnan(tolerant_iou(np.zeros_like(square), np.zeros_like(square)))
    for shift in (0, 1, 3, 9, 25):
        other = np.roll(square, shift, axis=0)
        assert iou(square, other) <= tolerant_iou(square, other) == tolerant_iou(other, square)


def area_rate_alpha(pictures):
    """Alpha for interval data of the marked areas: a usual shortcut."""
    return reference([[masks[rater].mean() for masks in pictures] for rater in range(3)], "interval")


def empty_is_one(pictures):
    """Mean IoU in which two empty masks agree fully: another."""
    pairs = [(m[a], m[b]) for m in pictures for a, b in ((0, 1), (0, 2), (1, 2))]
    return np.mean([1.0 if math.isnan(value := iou(*pair)) else value for pair in pairs])


COLUMNS = ("pixel_alpha", "picture_alpha", "area_rate", "iou_where_marked", "empty_is_one")


def measures(pictures):
    found = agreement_of([compare([1, 2, 3], masks) for masks in pictures], bootstrap=0)
    return {name: found[name] for name in ("pixel_alpha", "picture_alpha", "iou_where_marked")} | {
        "area_rate": area_rate_alpha(pictures),
        "empty_is_one": empty_is_one(pictures),
    }


def simulated(jitter=0.0, missed=0.0, invented=0.0, misplaced=False):
    """80 pictures, two fifths clean, by three raters; with `misplaced` the third marks the other half."""
    from diffdoctor.annotate.simulated import Annotator

    size, pictures = 64, []
    for index in range(80):
        rng = np.random.default_rng([7, index])
        truth = np.zeros((size, size), bool)
        if index % 5 >= 2:
            rows, columns = np.mgrid[:size, :size]
            y, x = rng.uniform(12, size - 12, 2)
            truth = ((rows - y) / rng.uniform(6, 12)) ** 2 + ((columns - x) / rng.uniform(6, 12)) ** 2 < 1
        rater = Annotator(jitter_px=jitter, missed=missed, missed_per_log_area=0.0, false_rate=invented)
        masks = [rater.marks(truth, seed=[index, who]).mask for who in range(3)]
        if misplaced:
            masks[2] = np.roll(masks[2], (size // 2, size // 2), axis=(0, 1))
        pictures.append(masks)
    return measures(pictures)


def test_three_kinds_of_raters_and_what_the_shortcuts_hide():
    steady = simulated(jitter=1.4)
    careless = simulated(jitter=1.4, missed=0.15, invented=0.1)
    misplaced = simulated(jitter=0.3, misplaced=True)
    # pixels' alpha, pictures' alpha, area's alpha, IoU where marked, IoU with two empty masks as 1
    table = [[each[name] for name in COLUMNS] for each in (steady, careless, misplaced)]
    print(*([round(float(value), 3) for value in row] for row in table), sep="\n")
    np.testing.assert_allclose(table[0], [0.80, 0.99, 0.93, 0.64, 0.80], atol=0.06)
    np.testing.assert_allclose(table[1], [0.71, 0.63, 0.77, 0.45, 0.66], atol=0.1)
    np.testing.assert_allclose(table[2], [0.31, 1.00, 0.996, 0.31, 0.60], atol=0.06)


def test_intervals_come_from_pictures_and_hold_the_value():
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=(30, 8, 8)) < 0.3
    masks = [[each ^ (rng.uniform(size=each.shape) < 0.1) for _ in range(2)] for each in truth]
    found = agreement_of([compare([1, 2], pair) for pair in masks], bootstrap=200)
    for name in ("pixel_alpha", "iou_where_marked", "tolerant_iou"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high
    assert agreement_of([], bootstrap=10)["pixel_alpha"] is None


def test_what_a_rater_ignores_is_not_answered():
    first, second = np.zeros((2, 10, 10), bool)
    first[:5], second[:5, :5] = True, True
    first[9], second[9] = True, True
    undecided = np.zeros((10, 10), bool)
    undecided[:5, 5:] = True
    assert compare([1, 2], [first, second]).pixels == {(2, 2): 35, (2, 1): 25, (2, 0): 40}
    assert compare([1, 2], [first, second], [None, undecided]).pixels == {(2, 2): 35, (2, 0): 40}
