"""Pixels that a person could not decide: kept in shards, read by every reader, and without a say in the loss."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffdoctor.data.manifest import IGNORE_OFFSETS
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData, read_shards
from diffdoctor.data.sources import find_sources
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.commands.inject_pictures import why_unused
from diffdoctor.detector.config import AugmentConfig
from diffdoctor.detector.losses import detector_loss
from diffdoctor.detector.samples import training_pair
from diffdoctor.evaluate.detector.measure import evaluate_detector
from diffdoctor.evaluate.model.measure import read_unit

NOTHING = AugmentConfig(inject_share=0, benign_share=0, shrink_share=0, flip_share=0, shift=0, blur=0)


def labelled():
    rng = np.random.default_rng(0)
    mask, ignore = np.zeros((16, 24), np.float32), np.zeros((16, 24), bool)
    mask[2:8, 2:9], ignore[10:, 12:] = 1, True
    picture = rng.integers(0, 256, (16, 24, 3), np.uint8)
    first = {"key": "a", "picture": picture, "mask": mask, "ignore": ignore, "label": "human"}
    return [first, {"key": "b", "picture": picture[::-1], "mask": mask, "label": "human"}]


def test_what_is_not_decided_survives_shards(tmp_path):
    samples = labelled()
    write_shards(samples, tmp_path / "set")
    data = ShardData(tmp_path / "set")
    for read in ([data[0], data[1]], list(read_shards(tmp_path / "set"))):
        np.testing.assert_array_equal(read[0]["ignore"], samples[0]["ignore"])
        assert read[0]["ignore"].dtype == bool and "ignore" not in read[1]
        for sample, was in zip(read, samples, strict=True):
            np.testing.assert_array_equal(sample["mask"], was["mask"])
    samples[0]["ignore"] = None
    write_shards(samples, tmp_path / "other")
    assert ShardData(tmp_path / "other").fingerprint() != data.fingerprint()


def test_webdataset_reads_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write_shards(labelled(), tmp_path / "set")
    shards = [str(path) for path in (tmp_path / "set").glob("*.tar")]
    first, second = webdataset.WebDataset(shards, shardshuffle=False).decode("l8")
    np.testing.assert_array_equal(first["ignore.png"] > 0, labelled()[0]["ignore"])
    assert "ignore.png" not in second


def test_sets_written_before_are_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_shards(labelled()[1:], tmp_path / "set")
    path = tmp_path / "set" / "manifest.parquet"
    parquet.write_table(parquet.read_table(path).drop_columns(list(IGNORE_OFFSETS)), path)
    assert "ignore" not in ShardData(tmp_path / "set")[0]


@pytest.mark.parametrize("weights", [{"mse": 1.0}, {"mse": 0.0, "bce": 1.0}, {"mse": 0.0, "dice": 1.0}])
def test_they_have_no_say_in_the_loss(weights):
    sample = labelled()[0]
    _, mask = training_pair(sample, None, NOTHING, np.random.default_rng(0))
    assert (mask[0].numpy() < 0).sum() == sample["ignore"].sum()
    undecided = mask < 0
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 16, 24, dtype=torch.float64, requires_grad=True)
    loss = detector_loss(logits, mask[None], **weights)
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad[0][undecided] == 0).all() and (grad[0][~undecided] != 0).all()
    # whatever stands there, the loss is the same; NaN too
    other = torch.where(undecided, torch.nan, logits.detach())
    assert detector_loss(other, mask[None], **weights) == loss
    # and it is the sum over the decided pixels of what it was
    if "dice" not in weights:
        sharp = torch.where(undecided, -40.0, logits.detach())
        summed = detector_loss(sharp, mask[None].clamp(min=0), **weights)
        assert float(loss.detach()) == pytest.approx(float(summed), rel=1e-12)


@pytest.mark.parametrize("label", ["human", "pseudo"])
def test_they_follow_a_picture_that_is_shrunk_and_damaged(label):
    picture, ignore = np.zeros((32, 48, 3), np.uint8), np.zeros((32, 48), bool)
    picture[8:20, 10:30], ignore[8:20, 10:30] = (200, 0, 0), True
    sample = {"picture": picture, "mask": np.zeros((32, 48), np.float32), "ignore": ignore, "label": label}
    config = replace(NOTHING, shrink_share=1.0, inject_share=0.5, kinds=("tint",), exposure=0, noise=0)
    damaged = 0
    for seed in range(12):
        changed, mask = training_pair(sample, None, config, np.random.default_rng(seed))
        red, found = (changed[0] > 2 * changed[1] + 100).numpy(), mask[0].numpy()
        damaged += bool((found > 0).any())
        if not (found > 0).any():
            assert (found[red] < 0).all() and 0 < (found < 0).sum() <= ignore.sum() * 0.9
    assert (damaged > 0) == (label == "pseudo")


def test_they_follow_a_resize():
    sample = labelled()[0]
    _, mask = training_pair(sample, 32, NOTHING, np.random.default_rng(0))
    assert (mask[0, 21:, 17:] < 0).all() and (mask[0, :18] >= 0).all() and mask.max() == 1


@pytest.mark.parametrize("size", [None, 48])
def test_what_is_found_there_does_not_count(size):
    class Marks(torch.nn.Module):
        def confidence(self, images):
            found = torch.zeros(images.shape[0], 1, *images.shape[2:])
            scale = images.shape[2] // 24
            found[..., 2 * scale : 8 * scale, 2 * scale : 9 * scale] = 0.8
            found[..., 10 * scale : 16 * scale, 14 * scale :] = 0.9
            return found

    samples = labelled()
    for sample in samples:  # square, since `size` is
        for name in {"picture", "mask", "ignore"} & {*sample}:
            sample[name] = np.concatenate([sample[name], np.zeros_like(sample[name][:8])])
    measured = evaluate_detector(Marks(), samples, size=size, bootstrap=0)["overall"]
    # of the second one nothing is undecided, and one of three counted is wrong, the most confident
    assert measured["map50"] == pytest.approx(2 / 3, abs=0.01)
    del samples[0]["ignore"]
    assert evaluate_detector(Marks(), samples, size=size, bootstrap=0)["overall"]["map50"] == pytest.approx(
        0.5, abs=0.01
    )


def test_they_are_crowds_in_coco(tmp_path):
    from diffdoctor.detector.exchange import coco_masks, coco_pictures, write_coco

    samples = labelled()
    write_shards(samples, tmp_path / "set")
    write_coco(tmp_path / "set", tmp_path / "coco")
    back = list(coco_pictures(tmp_path / "coco" / "annotations.json", tmp_path / "coco"))
    np.testing.assert_array_equal(back[0]["ignore"], samples[0]["ignore"])
    assert "ignore" not in back[1]
    for sample, was in zip(back, samples, strict=True):
        np.testing.assert_array_equal(sample["mask"], was["mask"])
    assert [crowds.any() for _, _, crowds in coco_masks(tmp_path / "coco" / "annotations.json")] == [True, False]


def test_ignore_of_another_shape_is_refused(tmp_path):
    bad = {**labelled()[0], "ignore": np.zeros((3, 3), bool)}
    with pytest.raises(ValueError, match=r"ignore: expected \(16, 24\) bool, got \(3, 3\) bool"):
        write_shards([bad], tmp_path / "set")


def test_a_picture_with_them_is_not_taken_for_a_clean_one(tmp_path):
    undecided, sound = ({**each, "mask": np.zeros((16, 24), np.float32)} for each in labelled())
    assert why_unused(undecided["picture"], undecided) == "a picture of which a part is not decided"
    assert why_unused(sound["picture"], sound) is None
    write_shards([undecided, sound], tmp_path / "set")
    unit = SimpleNamespace(sources=find_sources([str(tmp_path / "set")]))
    (found,) = read_unit(unit, (16, 24), SkipCounts(), damaged=False)
    np.testing.assert_array_equal(found, sound["picture"])
