"""Interruptions, kills, and the number of processes change no result of a training."""

import functools
import json

import numpy as np
import pytest
import torch

from diffdoctor.cli import main
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.detector import load_detector, train_detector
from diffdoctor.runs.errors import UserError
from support.detector import StopAt, fresh, held_out, quick, shapes, twenty_steps, weights_of

pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")


CONFIG = quick(checkpoint_every=3, validate_every=4)


@functools.cache
def undisturbed(kind):
    return train_detector(CONFIG, shapes(), detector=fresh(kind=kind), validation=held_out(), progress=False)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("reads", "kind"),
    [(0, "conv"), (20, "segformer"), (35, "conv"), (35, "segformer"), (50, "conv"), (90, "segformer")],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, reads, kind):
    config, whole = CONFIG, undisturbed(kind)
    options = {"validation": held_out(), "output_dir": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        train_detector(config, StopAt(shapes(), reads), detector=fresh(kind=kind), **options)
    # From the first checkpoint on, the weights that the run is started with do not matter.
    started = any((tmp_path / "checkpoints").glob("step-*"))
    assert started == (reads >= 35)
    resumed = train_detector(config, shapes(), detector=fresh(7 if started else 0, kind), **options)
    assert resumed.history == whole.history
    assert resumed.validations == whole.validations
    assert torch.equal(weights_of(resumed.detector), weights_of(whole.detector))
    assert torch.equal(weights_of(load_detector(tmp_path / "detector")), weights_of(whole.detector))
    assert (tmp_path / "best" / "detector.json").is_file()
    # A finished run is not trained again.
    again = train_detector(config, StopAt(shapes(), 0), detector=fresh(7, kind), **options)
    assert torch.equal(weights_of(again.detector), weights_of(whole.detector))


def test_checkpoints_of_another_run_are_refused(tmp_path):
    train_detector(quick(checkpoint_every=4), shapes(), detector=fresh(), output_dir=tmp_path, progress=False)
    with pytest.raises(UserError, match=r"of a run with another learning_rate \(expected .*, got 0\.0001\); choose"):
        train_detector(
            quick(checkpoint_every=4, learning_rate=1e-4),
            shapes(),
            detector=fresh(),
            output_dir=tmp_path,
            progress=False,
        )
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2
    # Not even what this call would not have kept is gone.
    with pytest.raises(
        UserError, match=r"another keep_checkpoints \(expected 2, got 1\), steps \(expected .*, got 14\); choose"
    ):
        train_detector(
            quick(checkpoint_every=4, keep_checkpoints=1, steps=14),
            shapes(),
            detector=fresh(),
            output_dir=tmp_path,
            progress=False,
        )
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


@pytest.mark.cpu
@pytest.mark.slow
def test_one_and_two_processes_give_the_same_losses(commands, tmp_path):
    out = tmp_path / "losses.json"
    commands.run("twenty_steps", out, output=tmp_path / "said", count=2)
    two = json.loads(out.read_text())
    assert two["processes"] == 2
    for kind in ("conv", "segformer"):
        (one, one_norm), (shared, shared_norm) = twenty_steps(kind), two[kind]
        assert one[-1] < one[0]
        assert shared[0] == pytest.approx(one[0], abs=1e-6)
        assert shared_norm == pytest.approx(one_norm, rel=1e-3)
        # A rounding may turn a ReLU at 0 on or off, on which CPU and when nobody knows. It changes the gradient by
        # 2e-4 of itself (measured), hence the losses by no more than that share of what the steps take off them.
        np.testing.assert_allclose(shared, one, rtol=0, atol=2e-4 * (one[0] - one[-1]))


@pytest.mark.cpu
@pytest.mark.slow
def test_the_command_in_two_processes_trains_the_same_detector(commands, tmp_path):
    data = shapes(24)
    write_shards((data[i] for i in range(24)), tmp_path / "set", shard_size=8)
    options = ["--architecture", "conv", "--training.steps", "4", "--training.batch_size", "8"]
    options += ["--training.checkpoint_every", "2", "--training.validate_every", "2", "--min_side", "16"]
    assert not main(["train-detector", str(tmp_path / "set"), "--output", str(tmp_path / "one"), *options])
    arguments = ["train-detector", tmp_path / "set", "--output", tmp_path / "two", *options]
    commands.run(*arguments, output=tmp_path / "said", count=2)
    one, two = (load_detector(tmp_path / name / "detector") for name in ("one", "two"))
    # Not the weights: a bias before a GroupNorm has a gradient of rounding errors alone, and AdamW enlarges it.
    images = torch.from_numpy(data.pictures[:8]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        torch.testing.assert_close(one.confidence(images), two.confidence(images), rtol=0, atol=1e-3)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert [entry["step"] for entry in one["validation"]] == [entry["step"] for entry in two["validation"]] == [2, 4]
