"""The demo's pictures: real digits, half of them damaged, split so that nobody sees what they must not."""

import numpy as np
import pytest
import torch

from diffdoctor.demo import data as demo_data
from diffdoctor.detector import ConvDetector
from diffdoctor.detector.validate import quick_measures

pytest.importorskip("sklearn")
pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def data():
    return demo_data.make_demo_data(0)


def test_all_digits_are_there_split_40_40_20_and_half_damaged(data):
    assert len(data) == 1797
    assert data.pictures.shape == (1797, 16, 16, 3)
    for name, share in (("detector", 0.4), ("judge", 0.4), ("heldout", 0.2)):
        part = data.split(name)
        assert len(part) == pytest.approx(share * 1797, abs=1)
        assert part.damaged.mean() == pytest.approx(0.5, abs=0.002)
        assert set(part.digits) == set(range(10))
    assert set(data.training.splits) == {"detector", "judge"}


def test_one_kind_is_kept_from_the_detector_and_given_to_base_and_judge(data):
    assert demo_data.HIDDEN_KIND not in demo_data.detector_training_config().augment.kinds
    assert demo_data.HIDDEN_KIND not in data.split("detector").kinds
    assert (data.split("judge").kinds == demo_data.HIDDEN_KIND).sum() >= 20
    assert demo_data.HIDDEN_KIND in data.training.kinds
    assert demo_data.HIDDEN_KIND in demo_data.judge_training_config().augment.kinds


def test_masks_say_where_and_clean_originals_of_damaged_pictures_are_nowhere(data):
    originals, digits = demo_data.clean_digits()
    assert np.array_equal(digits, data.digits)
    change = np.abs(data.pictures.astype(int) - originals.astype(int)).max(axis=(1, 2, 3))
    assert (change[data.damaged] > 0).all()
    assert (change[~data.damaged] == 0).all()
    assert data.masks[data.damaged].reshape(data.damaged.sum(), -1).max(axis=1).min() == 1
    assert not data.masks[~data.damaged].any()
    # Large enough for the flagged rule (2 % of 256 pixels).
    assert (data.masks[data.damaged] >= 0.5).sum(axis=(1, 2)).min() >= 6
    # The same digit was not scanned twice, so an original cannot come back as another picture.
    stored = {picture.tobytes() for picture in data.pictures}
    twins = [index for index in np.flatnonzero(data.damaged) if originals[index].tobytes() in stored]
    assert twins == []


def test_the_seed_decides_everything(data):
    again, other = demo_data.make_demo_data(0), demo_data.make_demo_data(1)
    assert np.array_equal(again.pictures, data.pictures)
    assert np.array_equal(again.splits, data.splits)
    assert not np.array_equal(other.splits, data.splits)


def test_shards_bring_everything_back(data, tmp_path):
    part = data.where(np.arange(50))
    demo_data.write_demo_data(part, tmp_path / "shards")
    read = demo_data.read_demo_data(tmp_path / "shards")
    assert np.array_equal(read.pictures, part.pictures)
    assert np.abs(read.masks - part.masks).max() <= 0.5 / 255 + 1e-6
    for name in ("digits", "kinds", "splits"):
        assert np.array_equal(getattr(read, name), getattr(part, name))
    assert read[3]["prompt"] == f"a handwritten {demo_data.WORDS[part.digits[3]]}"


def test_a_short_training_already_finds_held_out_damage(data):
    from diffdoctor.detector import train_detector

    config = demo_data.judge_training_config(steps=120, batch_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = ConvDetector((16, 32))
    trained = train_detector(config, data.split("judge"), detector=fresh, progress=False)
    measures = quick_measures(trained.detector, data.split("heldout"))
    assert measures["map50"] > 0.5
    assert measures["hit_rate"] > 0.8
    assert measures["false_positive_rate"] < 0.2
