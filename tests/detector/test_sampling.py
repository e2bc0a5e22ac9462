"""What a training step sees: a function of seed, step and place; class balance; augmentation."""

import dataclasses

import numpy as np
import pytest
import torch

from diffdoctor.detector import train_detector
from diffdoctor.detector.balance import category_statistics, sampling_weights, training_weights
from diffdoctor.detector.config import AugmentConfig
from diffdoctor.detector.samples import ArrayData, JoinedData, StepSamples, augment, shrink_and_pad
from diffdoctor.detector.validate import quick_measures
from support.detector import fresh, quick, shapes

pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")


def test_samples_are_a_function_of_seed_step_and_place():
    data, config = shapes(), AugmentConfig()
    one, two = (StepSamples(data, 8, 5, config) for _ in range(2))
    keys = [(step, place) for step in range(12) for place in range(8)]
    forward = {key: one[key] for key in keys}
    for key in reversed(keys):
        assert all(torch.equal(a, b) for a, b in zip(two[key], forward[key], strict=True))
    # Without weights every picture is seen once in a pass over the data.
    seen = [one.index_of(*divmod(i, 8)) for i in range(120)]
    assert sorted(seen[:60]) == sorted(seen[60:]) == list(range(60))
    assert seen[:60] != seen[60:]


def test_balanced_weights_even_out_categories_and_damage():
    masks = np.zeros((10, 16, 16), np.float32)
    masks[:7] = 1
    categories = ["hand"] * 8 + ["tree"] * 2  # 7 of 8 hands are damaged, no tree is
    data = ArrayData(shapes(10).pictures, masks, category=categories)
    weights = sampling_weights(data)
    assert weights.sum() == pytest.approx(1)
    assert weights[:7].sum() == pytest.approx(0.25)
    assert weights[7] == pytest.approx(0.25)
    assert weights[8:].sum() == pytest.approx(0.5)
    samples = StepSamples(data, 8, 0, AugmentConfig.none(), weights)
    drawn = np.bincount([samples.index_of(*divmod(i, 8)) for i in range(4000)], minlength=10) / 4000
    np.testing.assert_allclose(drawn, weights, atol=0.03)


def test_each_set_is_drawn_by_its_share_whatever_its_size():
    masks = np.zeros((4, 16, 16), np.float32)
    masks[0] = 1
    few, many = shapes(4, label=["human"] * 4), shapes(40)
    few.masks = masks
    data = JoinedData([few, many], shares=(1, 3))
    weights = training_weights(data)
    np.testing.assert_allclose(weights, np.repeat([0.25 / 4, 0.75 / 40], [4, 40]))
    balanced = training_weights(data, balance=True)
    np.testing.assert_allclose(balanced[:4], [0.125, *[0.125 / 3] * 3])
    assert balanced[4:].sum() == pytest.approx(0.75)
    without = data.where(np.arange(2, 44))
    np.testing.assert_allclose(training_weights(without), np.repeat([0.25 / 2, 0.75 / 40], [2, 40]))
    assert training_weights(JoinedData([few, many])) is None
    assert data.fingerprint() != JoinedData([few, many], shares=(1, 2)).fingerprint()
    with pytest.raises(ValueError, match="set 1"):
        training_weights(data.where(np.arange(4)))
    for shares in ((1,), (1, 0), (1, float("inf"))):
        with pytest.raises(ValueError, match="shares: expected one positive number for each of 2 sets"):
            JoinedData([few, many], shares=shares)


def test_a_training_draws_by_the_shares():
    few, many = shapes(2, seed=1), ArrayData(np.full((60, 16, 16, 3), 255, np.uint8))
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.level = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images):
            seen.extend((images.flatten(1).amin(1) < 1).tolist())
            return images[:, :1] * 0 + self.level

    config = quick(augment=AugmentConfig.none(), steps=50)
    train_detector(config, JoinedData([few, many], shares=(1, 1)), detector=Spy(), progress=False)
    assert np.mean(seen) == pytest.approx(0.5, abs=0.08)


def test_a_clean_picture_that_a_person_labelled_is_not_damaged():
    config = dataclasses.replace(AugmentConfig.none(), inject_share=1.0)
    for label, damaged in (("human", False), ("real", True)):
        samples = StepSamples(shapes(20, label=[label] * 20), 20, 0, config)
        assert any(samples[0, slot][1].any() for slot in range(20)) == damaged


def things(hands, count, damaged, seed):
    """Rings ("hands") or squares on dark ground, the first `damaged` of them grained; the mask is the whole thing."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[0:16, 0:16]
    pictures, masks = np.zeros((count, 16, 16, 3)), np.zeros((count, 16, 16), np.float32)
    for index in range(count):
        y, x, r = *rng.uniform(5, 11, 2), rng.uniform(3, 4.5)
        distance = np.hypot(ys - y, xs - x) if hands else np.maximum(abs(ys - y), abs(xs - x))
        light = 0.2 + 0.5 * np.clip(r - distance, 0, 1) * ((distance > r - 2.2) if hands else 1)
        pictures[index] = light[..., None] + rng.normal(0, 0.02, (16, 16, 3))
        if index < damaged:
            masks[index] = distance < r
            pictures[index] += masks[index][..., None] * rng.normal(0, 0.15, (16, 16, 1))
    pictures = np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8)
    return ArrayData(pictures, masks, category=["hand" if hands else "square"] * count)


def test_balance_takes_away_the_shortcut_that_hands_are_always_broken():
    # 190 of 200 hands are damaged, 10 of 200 squares: without balance, to find hands is nearly as good.
    train = JoinedData([things(True, 200, 190, 0), things(False, 200, 10, 1)])
    shifted = dataclasses.replace(AugmentConfig.none(), shift=0.15, exposure=0.1)
    rates = {}
    for balance in (False, True):
        config = quick(steps=300, batch_size=16, learning_rate=5e-3, bce=1, mse=0, dice=0, ema_decay=0.9)
        config = dataclasses.replace(config, balance=balance, augment=shifted)
        detector = train_detector(config, train, detector=fresh(), progress=False).detector
        clean = quick_measures(detector, things(True, 100, 0, 2))["false_positive_rate"]
        rates[balance] = clean, quick_measures(detector, things(True, 100, 100, 3))["hit_rate"]
    assert rates[False][0] > 0.5
    assert rates[True][0] <= 0.5 * rates[False][0]
    assert rates[True][1] > 0.9


def test_category_statistics_name_the_abnormal():
    rng = np.random.default_rng(0)
    names = [f"c{i}" for i in range(8) for _ in range(20)] + ["hands"] * 20 + ["sky"] * 5
    means = np.concatenate([rng.normal(0.1, 0.01, 160), rng.normal(0.6, 0.01, 20), np.zeros(5)])
    result = {s.category: s for s in category_statistics(names, means, means > 0.3)}
    assert next(iter(result)) == "hands"
    assert result["hands"].verdict == "over-flagged"
    assert result["hands"].flagged == 1
    assert result["sky"].verdict == "under-flagged"
    assert result["sky"].pictures == 5
    assert all(result[f"c{i}"].verdict == "" for i in range(8))


def test_shrinking_keeps_the_whole_picture_and_pads_with_the_border_s_colour():
    picture = np.full((40, 40, 3), 10, np.uint8)
    picture[10:30, 10:30] = 200
    for seed in range(20):
        small, _ = shrink_and_pad(picture, np.zeros(picture.shape[:2], np.float32), np.random.default_rng(seed))
        assert small.shape == picture.shape
        bright = (small > 100).all(axis=2).sum()
        assert 0.35**2 * 400 < bright < 0.95**2 * 400
        assert (small[[0, -1]] == 10).any()


def test_damaged_pictures_are_never_damaged_again_or_shrunk():
    config = AugmentConfig(inject_share=1, shrink_share=1, shift=0, exposure=0, noise=0)
    picture, mask = shapes(1)[0]["picture"], np.zeros((16, 16), np.float32)
    mask[4:8, 4:8] = 1
    got = augment(picture, mask, config, np.random.default_rng(0))
    assert np.array_equal(got[0], picture)
    assert np.array_equal(got[1], mask)
    got = augment(picture, np.zeros_like(mask), config, np.random.default_rng(0))
    assert got[1].any()


def test_picture_and_mask_move_together():
    rng = np.random.default_rng(0)
    mask = np.zeros((32, 32), np.float32)
    mask[10:14, 20:26] = 1
    picture = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, axis=2)
    config = dataclasses.replace(AugmentConfig.none(), shift=0.2, flip_share=0.5)
    places = set()
    for _ in range(20):
        moved, moved_mask = augment(picture, mask, config, rng)
        assert np.array_equal(moved[..., 0] > 127, moved_mask > 0.5)
        places.add(tuple(np.argwhere(moved_mask > 0)[0]))
    assert len(places) > 5
