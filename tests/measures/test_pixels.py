"""Pixel and component measures against scikit-learn, hand-worked cases and pycocotools."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffdoctor.evaluate.detector.measure import evaluate_maps
from diffdoctor.measures.components import Matches, components, match_components, mean_average_precision
from diffdoctor.measures.pixels import (
    auroc_of,
    average_precision,
    flagged,
    flagged_share,
    map_distances,
    pixel_measures,
)

pytest.importorskip("pycocotools")


def random_maps(count=12, side=24, seed=0, clean=4):
    """Confidence maps (N, H, W) and masks with blobs; the first `clean` masks are empty."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[0:side, 0:side]
    masks, maps = np.zeros((2, count, side, side), np.float32)
    for i in range(count):
        for _ in range(rng.integers(1, 3)):
            y, x, r = *rng.uniform(4, side - 4, 2), rng.uniform(2, 5)
            if i >= clean:
                masks[i] = np.maximum(masks[i], np.hypot(ys - y, xs - x) < r)
            dy, dx = rng.normal(0, 1.2, 2)
            strength = rng.uniform(0.3, 1) * (0.6 if i < clean else 1)
            maps[i] = np.maximum(maps[i], strength * (np.hypot(ys - y - dy, xs - x - dx) < r * rng.uniform(0.8, 1.3)))
    maps = np.clip(maps + rng.normal(0, 0.05, maps.shape), 0, 1).astype(np.float32)
    return maps, masks


def test_counts_give_iou_f1_precision_and_recall():
    mask = np.zeros((1, 4, 4))
    mask[0, :2] = 1  # 8 pixels
    confidence = np.zeros((1, 4, 4))
    confidence[0, 1:3] = 0.5  # 8 pixels, 4 of them right
    measures = pixel_measures(confidence, mask)
    assert measures["iou"] == pytest.approx(4 / 12)
    assert measures["f1"] == pytest.approx(0.5)
    assert measures["precision"] == measures["recall"] == 0.5
    assert measures["mse"] == measures["mse_nonempty"] == pytest.approx((4 * 1 + 4 * 0.25 + 4 * 0.25) / 16)
    assert math.isnan(measures["mse_empty"])


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
def test_average_precision_and_auroc_equal_scikit_learn(rounded):
    metrics = pytest.importorskip("sklearn.metrics")
    maps, masks = random_maps()
    maps = np.round(maps, 1) if rounded else maps
    expected = metrics.average_precision_score(masks.ravel() >= 0.5, maps.ravel())
    assert average_precision(maps, masks) == pytest.approx(expected, abs=1e-12)
    assert auroc_of(maps.ravel(), masks.ravel() >= 0.5) == pytest.approx(
        metrics.roc_auc_score(masks.ravel() >= 0.5, maps.ravel()), abs=1e-12
    )


def test_map_distances_of_known_maps():
    mask = np.zeros((2, 2, 2))
    mask[0, 0] = 1
    result = map_distances(mask, mask)
    assert result["mse"].tolist() == [0, 0]
    assert result["cc"][0] == pytest.approx(1)
    assert result["sim"][0] == pytest.approx(1)
    assert result["kld"][0] == pytest.approx(0, abs=1e-5)
    assert np.isnan([result[name][1] for name in ("cc", "sim", "kld")]).all()
    result = map_distances(np.full((1, 2, 2), 0.25), mask[:1])
    assert result["sim"][0] == pytest.approx(0.5)
    assert result["kld"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert result["cc"][0] == 0


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_flagged_is_two_per_cent_of_pixels_at_half(kind):
    confidence = np.zeros((3, 1, 10, 10), np.float32)
    confidence[0, 0, 0, :2] = 0.5
    confidence[1, 0, 0, 0] = 1.0
    confidence[2, 0] = 0.499
    confidence = torch.from_numpy(confidence) if kind == "tensor" else confidence
    assert flagged(confidence).tolist() == [True, False, False]
    assert flagged(confidence[:, 0]).tolist() == [True, False, False]
    assert flagged_share(confidence).tolist() == pytest.approx([0.02, 0.01, 0])


def test_components_are_those_of_scipy_s_closing():
    rng = np.random.default_rng(0)
    for _ in range(100):
        found = rng.random(tuple(rng.integers(1, 20, 2))) < rng.choice([0.0, 0.1, 0.3, 0.6])
        closed = ndimage.binary_closing(np.pad(found, 2), np.ones((3, 3), bool))[2:-2, 2:-2]
        labels, count = ndimage.label(closed, np.ones((3, 3), bool))
        areas = [int((labels == number).sum()) for number in range(1, count + 1)]
        assert sorted(c.area for c in components(found.astype(float))) == sorted(a for a in areas if a >= 4)


def test_components_are_closed_joined_diagonally_and_at_least_four_pixels():
    confidence = np.zeros((30, 30))
    confidence[2:6, 2:6] = 0.8
    confidence[2:6, 7:11] = 0.8  # one pixel apart: closed into one
    confidence[15:17, 15:17] = 0.6
    confidence[17:19, 17:19] = 1.0  # diagonal: one component
    confidence[25, 25] = confidence[25, 27] = 1.0  # three pixels after closing: too small
    confidence[28:, 0:2] = 0.9  # at the corner: not eaten by the closing
    found = components(confidence)
    assert [c.area for c in found] == [4, 8, 36]
    assert found[0].box == (0, 28, 2, 2)
    assert found[2].box == (2, 2, 9, 4)
    # Scored by the mean confidence over the component, the closed gaps included.
    assert found[2].score == pytest.approx(0.8 * 32 / 36)


def test_the_smallest_component_grows_with_the_picture():
    confidence = np.zeros((200, 200))
    confidence[10:13, 10:12] = 1  # 6 pixels; 0.02 % are 8
    confidence[50:53, 50:53] = 1
    assert [c.area for c in components(confidence)] == [9]


def coco_oracle(maps, masks):
    """mAP@0.5 by a plain loop over pictures: greedy matching by score, 101-point interpolation."""
    scores, hits, total = [], [], 0
    for confidence, mask in zip(maps, masks, strict=True):
        truths = [c.mask for c in components(mask)]
        total += len(truths)
        free = set(range(len(truths)))
        for component in components(confidence):
            overlap = {t: (component.mask & truths[t]).sum() / (component.mask | truths[t]).sum() for t in free}
            best = max(overlap, key=overlap.get, default=None)
            hit = best is not None and overlap[best] >= 0.5
            free -= {best} if hit else set()
            scores.append(component.score)
            hits.append(hit)
    order = np.argsort(-np.array(scores), kind="stable")
    hits = np.array(hits)[order]
    recall, precision = np.cumsum(hits) / total, np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return np.mean([max(precision[recall >= r], default=0) for r in np.linspace(0, 1, 101)])


@pytest.mark.parametrize("seed", range(4))
def test_map50_equals_a_plain_loop_and_the_bootstrap_s_own_sums(seed):
    maps, masks = random_maps(seed=seed)
    map50, matches = mean_average_precision(maps, masks), match_components(maps, masks)
    assert 0.05 < map50 < 0.95
    assert map50 == pytest.approx(coco_oracle(maps, masks), abs=1e-9)
    assert matches.average_precision(np.arange(len(maps))) == pytest.approx(map50, abs=1e-9)
    # A resampled set measured afresh equals the one put together from what is kept.
    chosen = np.random.default_rng(seed).integers(len(maps), size=len(maps))
    assert matches.average_precision(chosen) == pytest.approx(
        mean_average_precision(maps[chosen], masks[chosen]), abs=1e-9
    )


def pycocotools_map50(maps, masks):
    """mAP@0.5 as pycocotools itself matches and accumulates the components."""
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    sets = []
    for arrays in (masks, maps):
        entries = []
        for index, array in enumerate(arrays, start=1):
            for found in components(array)[:100]:
                code = coco_mask.encode(np.asfortranarray(found.mask.astype(np.uint8)))
                entry = {"image_id": index, "category_id": 1, "segmentation": code, "bbox": list(found.box)}
                entries.append(
                    {**entry, "area": found.area, "iscrowd": 0, "score": found.score, "id": len(entries) + 1}
                )
        made = COCO()
        images = [{"id": index + 1, "height": maps.shape[1], "width": maps.shape[2]} for index in range(len(maps))]
        made.dataset = {"images": images, "annotations": entries, "categories": [{"id": 1, "name": "artifact"}]}
        made.createIndex()
        sets.append(made)
    evaluation = COCOeval(*sets, "segm")
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.maxDets = [100]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"].mean()


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
def test_map50_is_pycocotools_own_number_in_one_go_and_in_parts(rounded):
    maps, masks = random_maps(60, seed=11, clean=20)
    maps = np.round(maps, 1) if rounded else maps
    expected = pycocotools_map50(maps, masks)
    assert 0.05 < expected < 0.95
    assert mean_average_precision(maps, masks) == expected
    parts = [match_components(maps[first : first + 7], masks[first : first + 7]) for first in range(0, 60, 7)]
    assert Matches.joined(parts).average_precision(np.arange(60)) == expected


def test_what_is_found_on_clean_pictures_lowers_map50():
    masks = np.zeros((4, 16, 16))
    masks[:2, 4:9, 4:9] = 1
    maps = masks * 0.8
    assert mean_average_precision(maps, masks) == pytest.approx(1)
    maps[2:, 3:8, 3:8] = 0.95
    assert mean_average_precision(maps, masks) == pytest.approx(0.5, abs=0.01)


def test_what_is_found_where_nothing_is_decided_is_neither_right_nor_wrong():
    masks, maps, ignore = np.zeros((3, 32, 32)), np.zeros((3, 32, 32)), np.zeros((3, 32, 32), bool)
    masks[:, 2:10, 2:10], maps[:2, 2:10, 2:10] = 1, 0.8  # two of three are found
    maps[0, 20:28, 20:28], maps[2, 20:28, 20:28] = 0.9, 0.95  # and two things that nobody marked
    assert mean_average_precision(maps, masks, ignore) == mean_average_precision(maps, masks)
    ignore[0, 24:28, 20:28] = True  # half of the first one's pixels
    matches = match_components(maps, masks, ignore)
    assert matches.scores == pytest.approx([0.8, 0.8, 0.95]) and matches.hits.tolist() == [True, True, False]
    assert matches.truths.tolist() == [1, 1, 1] and matches.lengths.tolist() == [1, 1, 1]
    half = ignore.copy()
    half[0, 24, 20] = False
    assert len(match_components(maps, masks, half).scores) == 4
    # what matches the truth is right, wherever it lies
    ignore[:2, 2:10, 2:10] = True
    assert match_components(maps, masks, ignore).hits.tolist() == [True, True, False]
    ignore[2] = True
    maps[2, 2:10, 2:10] = 0.7
    assert mean_average_precision(maps, masks, ignore) == pytest.approx(1)
    assert math.isnan(mean_average_precision(maps[:1], masks[:1] * 0, ignore[:1]))
    with pytest.raises(ValueError, match=r"ignore: expected \(3, 32, 32\) bool, got \(3, 32, 32\) float64"):
        match_components(maps, masks, masks)


def test_no_damage_at_all_has_no_map50():
    assert math.isnan(mean_average_precision(np.ones((2, 16, 16)), np.zeros((2, 16, 16))))


def test_empty_maps_find_nothing():
    maps, masks = random_maps()
    assert mean_average_precision(np.zeros_like(maps), masks) == 0


def test_evaluate_maps_has_every_measure_and_intervals_around_them():
    maps, masks = random_maps(count=40, clean=15)
    result = evaluate_maps(maps, masks, bootstrap=200)
    assert result["pictures"] == 40
    assert result["damaged"] == 25
    for name in (
        "map50",
        "iou",
        "f1",
        "auprc",
        "auroc",
        "mse",
        "mse_empty",
        "mse_nonempty",
        "kld",
        "cc",
        "sim",
        "hit_rate",
    ):
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high, name
        assert low < high or name == "hit_rate"
    assert result["false_positive_rate"] == pytest.approx(flagged(maps[:15]).mean())
    assert evaluate_maps(maps, masks, bootstrap=50) == evaluate_maps(maps, masks, bootstrap=50)


@pytest.mark.parametrize("logits", [1.0, 12.0], ids=["soft", "saturated"])
def test_the_interval_of_auprc_is_that_of_drawing_the_pictures_themselves(logits):
    maps, masks = random_maps(count=40, clean=15)
    maps = 1 / (1 + np.exp(-logits * (maps - 0.5)))
    result = evaluate_maps(maps, masks, bootstrap=300, seed=5)
    rng = np.random.default_rng(5)
    draws = (rng.integers(40, size=40) for _ in range(300))
    expected = np.quantile([average_precision(maps[draw], masks[draw]) for draw in draws], [0.025, 0.975])
    assert result["auprc_interval"] == pytest.approx(expected, abs=0.004)
    assert expected[1] - expected[0] > 0.02
    assert result["auprc_interval"][0] < result["auprc"] < result["auprc_interval"][1]


@pytest.mark.parametrize(
    ("confidence", "mask", "match"),
    [
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 5)), "mask: expected"),
        (np.zeros((4, 4)), np.zeros((4, 4)), "confidence: expected shape"),
        (np.full((1, 4, 4), 1.5), np.zeros((1, 4, 4)), r"confidence: expected values in \[0, 1\]"),
        (np.full((1, 4, 4), np.nan), np.zeros((1, 4, 4)), "NaN"),
    ],
)
def test_bad_maps_are_refused(confidence, mask, match):
    with pytest.raises(ValueError, match=match):
        pixel_measures(confidence, mask)


def test_uint8_maps_are_read_as_255ths():
    maps, masks = random_maps()
    as_bytes = np.rint(maps * 255).astype(np.uint8)
    expected = pytest.approx(pixel_measures(as_bytes / 255, masks)["mse"])
    assert pixel_measures(as_bytes, masks)["mse"] == expected
    assert pixel_measures(torch.from_numpy(as_bytes), torch.from_numpy(masks))["mse"] == expected


@pytest.mark.parametrize("measure", [pixel_measures, mean_average_precision, evaluate_maps])
def test_uint8_masks_of_0_and_1_are_refused(measure):
    maps, masks = random_maps()
    with pytest.raises(ValueError, match="mask: expected 255 where a picture is broken"):
        measure(maps, (masks > 0.5).astype(np.uint8))
    assert measure(maps, masks > 0.5)
