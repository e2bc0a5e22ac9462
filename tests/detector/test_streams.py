"""Training from shards: by an exact plan, or as a stream of resampled shards; broken pictures."""

import dataclasses

import numpy as np
import pytest
import torch

from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.shards import ShardData
from diffdoctor.data.stream import ShardStream
from diffdoctor.detector import train_detector
from diffdoctor.detector.config import AugmentConfig
from diffdoctor.detector.loading import ResampledSamples, StepPlan
from diffdoctor.detector.samples import ArrayData
from diffdoctor.runs.errors import UserError
from support.detector import fresh, quick, shapes

pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")


def test_training_reads_shards_like_arrays(tmp_path):
    data = shapes(20)
    write_shards((data[i] for i in range(20)), tmp_path / "set", shard_size=8)
    runs = [
        train_detector(quick(steps=5), d, detector=fresh(), progress=False) for d in (data, ShardData(tmp_path / "set"))
    ]
    assert runs[0].history == runs[1].history


def a_set(folder, count=30, broken=(), **fields):
    """Shards of shapes, the second half of them damaged; the pictures with these indices are broken."""
    clean = shapes(count)
    grain = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3))
    masks = np.zeros((count, 16, 16), np.float32)
    masks[count // 2 :, 3:9, 5:11] = 1
    for index in range(count // 2, count):
        clean.pictures[index, 3:9, 5:11] = grain[index]
    write_shards((ArrayData(clean.pictures, masks, **fields)[i] for i in range(count)), folder, shard_size=7)
    data = ShardData(folder)
    for index in broken:
        with open(folder / data.shards[index], "r+b") as file:
            file.seek(int(data.byte_ranges[index][0]))
            file.write(bytes(int(data.byte_ranges[index][1])))
    return data


def test_a_resampled_stream_trains_as_a_set_does(tmp_path):
    data = a_set(tmp_path / "set", 60)
    options = {"steps": 80, "batch_size": 16, "learning_rate": 4e-3, "bce": 1, "mse": 0, "dice": 0, "accumulate": 2}
    config = quick(**options, augment=AugmentConfig.none())
    validation = a_set(tmp_path / "other", 40)
    stream = ShardStream(tmp_path / "set", buffer=20, resampled=True)
    runs = [train_detector(config, d, detector=fresh(), validation=validation, progress=False) for d in (data, stream)]
    for run in runs:
        assert np.mean([entry["loss"] for entry in run.history[-20:]]) < 0.5 * run.history[0]["loss"]
        assert run.validations[-1]["hit_rate"] > 0.9
    assert runs[0].history != runs[1].history


def test_a_stream_s_parts_depend_on_the_workers_and_the_segment_alone(tmp_path):
    a_set(tmp_path / "set")
    stream = ShardStream(tmp_path / "set", buffer=6, resampled=True, seed=4)

    def parts(start, workers, process=0):
        plan = StepPlan(start, 9, process, slots=4, micro_batches=2, segment=4)
        samples = ResampledSamples(stream, plan, AugmentConfig(), None)
        loader = torch.utils.data.DataLoader(samples, batch_size=None, num_workers=workers)
        return [(pictures, masks) for pictures, masks, _ in loader]

    for workers in (0, 2):
        whole, rest = parts(0, workers), parts(4, workers)
        assert len(whole) == 18
        assert all(pictures.shape == (2, 3, 16, 16) for pictures, _ in whole)
        for one, two in zip(whole[8:], rest, strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])
        other = parts(0, workers, process=1)
        assert not any(torch.equal(one[0], two[0]) for one, two in zip(whole, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_replaced_and_named_or_stops_the_run(tmp_path, workers):
    data = a_set(tmp_path / "set", 16, broken=(3, 12))
    config = quick(steps=4, workers=workers)
    result = train_detector(config, data, detector=fresh(), progress=False)
    assert sorted(where.split(":")[1] for where in result.broken) == ["000000003", "000000012"]
    assert set(result.broken.values()) == {"a broken picture"}
    with pytest.raises(UserError, match=r"shard-00000.*: a broken picture$"):
        train_detector(dataclasses.replace(config, strict=True), data, detector=fresh(), progress=False)
    stream = ShardStream(tmp_path / "set", buffer=4, resampled=True)
    assert set(train_detector(config, stream, detector=fresh(), progress=False).broken.values()) == {"a broken picture"}


def test_the_command_streams_and_refuses_early_what_cannot_be(tmp_path):
    from diffdoctor.detector.commands.train import TrainDetectorConfig, run_train_detector

    a_set(tmp_path / "set", broken=(1,))
    a_set(tmp_path / "other", 8)
    write_shards([{"picture": np.zeros((20, 30, 3), np.uint8)}], tmp_path / "large")
    train, other = [str(tmp_path / "set")], [str(tmp_path / "other")]

    def run(data, validation, training=None, **options):
        options = {"architecture": "conv", "training": training or quick(steps=3), **options}
        return run_train_detector(TrainDetectorConfig(data, str(tmp_path / "run"), validation, **options))

    with pytest.raises(UserError, match="validation: expected folders"):
        run(train, [], resampled=True)
    with pytest.raises(UserError, match="balance: expected false with resampled, which does not count"):
        run(train, other, quick(balance=True), resampled=True)
    with pytest.raises(UserError, match=r"training.size: expected a side in pixels.*2 sizes \(16x16, 30x20\)"):
        run([*train, str(tmp_path / "large")], other)
    assert not (tmp_path / "run").exists()
    metrics = run(train, other, resampled=True, shuffle_buffer=8)
    with pytest.raises(UserError, match=r"a broken picture$"):
        run_train_detector(
            TrainDetectorConfig(train, str(tmp_path / "strict"), other, training=quick(steps=5), strict=True)
        )
    assert metrics["pictures"] is None
    assert metrics["validation_pictures"] == 8
    assert set(metrics["skipped"]) <= {"a broken picture"}
