"""train-detector's output folder: its own run goes on there; another's, and whatever else lies there, is left alone."""

import json
import re
import shutil

import pytest
import torch

from diffdoctor.cli import main
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.detector import load_detector, train_detector
from diffdoctor.runs.errors import UserError
from support.detector import StopAt, fresh, held_out, quick, shapes, weights_of
from support.pictures import tree

pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("pycocotools")


@pytest.fixture
def sets(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        data = shapes(12, seed=seed)
        write_shards((data[i] for i in range(12)), tmp_path / name, shard_size=6)
    return tmp_path


def command(folder, data, *options, output="out"):
    """Exit code of a short training; a later option replaces an earlier one."""
    short = {"--training.steps": 2, "--training.batch_size": 4, "--training.warmup_steps": 0, "--validation_share": 0}
    short |= {"--architecture": "conv", "--min_side": 16} | dict(zip(options[::2], options[1::2], strict=True))
    words = [str(word) for name, value in short.items() if value is not None for word in (name, value)]
    return main(["train-detector", str(folder / data), "--output", str(folder / output), *words])


def test_a_run_in_a_folder_named_like_its_results_is_not_replaced(sets, capsys):
    assert not command(sets, "one", output="runs/detector")
    before = tree(sets / "runs")
    assert command(sets, "one", output="runs") == 2
    assert "runs/detector: would be replaced, but holds 'config.yaml'" in capsys.readouterr().err
    shutil.move(sets / "runs" / "detector", sets / "runs" / "best")
    assert command(sets, "one", output="runs") == 2
    shutil.move(sets / "runs" / "best", sets / "runs" / "detector")
    assert tree(sets / "runs") == before
    with pytest.raises(UserError, match="would be replaced"):
        train_detector(quick(steps=1), shapes(), detector=fresh(), output_dir=sets / "runs", progress=False)
    assert tree(sets / "runs") == before


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("data", "options", "named", "every"),
    [
        ("two", (), "data", 1),
        ("two", (), "data", 0),
        ("one", ("--min_side", 32), "min_side", 1),
        ("one", ("--architecture", "tiny"), "network", 1),
        ("one", ("--architecture", "tiny"), "detector", 0),
        ("one", ("--training.learning_rate", 0.1), "learning_rate", 1),
        ("one", ("--validation", "two"), "validation", 0),
        ("one", ("--initial", "first", "--architecture", None, "--min_side", None), "weights", 1),
        ("one", ("--resampled", "true"), "buffer", 0),
    ],
)
def test_another_run_in_the_same_folder_is_refused_and_changes_nothing(
    sets, capsys, monkeypatch, data, options, named, every
):
    monkeypatch.chdir(sets)
    assert not command(sets, "one", "--training.seed", 1, output="other")
    shutil.move("other/detector", "first")
    rest = ("--training.checkpoint_every", every)
    assert not command(sets, "one", *rest)
    before = tree(sets / "out")
    capsys.readouterr()
    assert command(sets, data, *options, *rest) == 2
    error = capsys.readouterr().err
    assert re.search(rf" of a run with another (.*, )?{named}[ ,;]", error)
    assert tree(sets / "out") == before
    # The same call again is none of these.
    assert not command(sets, "one", *rest)
    assert tree(sets / "out") == before


def test_a_stream_of_other_shards_is_another_run(sets, capsys):
    options = ("--resampled", "true", "--shuffle_buffer", 4, "--training.checkpoint_every", 1)
    assert not command(sets, "one", *options)
    assert not command(sets, "one", *options)
    assert command(sets, "two", *options) == 2
    assert "of a run with another data;" in capsys.readouterr().err


def test_results_of_which_nobody_knows_the_run_are_refused(tmp_path):
    for name in ("detector", "best"):
        fresh().save_pretrained(tmp_path / name / name)
        before = tree(tmp_path / name)
        with pytest.raises(UserError, match=f"holds {name} of another run .*; choose"):
            train_detector(quick(steps=1), shapes(), detector=fresh(), output_dir=tmp_path / name, progress=False)
        assert tree(tmp_path / name) == before


@pytest.mark.cpu
def test_a_run_stopped_between_its_best_and_its_first_checkpoint_goes_on(tmp_path):
    config = quick(checkpoint_every=10, validate_every=2)
    options = {"validation": held_out(), "progress": False}
    whole = train_detector(config, shapes(), detector=fresh(), output_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train_detector(config, StopAt(shapes(), 40), detector=fresh(), output_dir=tmp_path / "out", **options)
    assert (tmp_path / "out" / "best").is_dir()
    assert not any((tmp_path / "out" / "checkpoints").glob("step-*"))
    result = train_detector(config, shapes(), detector=fresh(), output_dir=tmp_path / "out", **options)
    assert result.history == whole.history
    assert torch.equal(weights_of(load_detector(tmp_path / "out" / "detector")), weights_of(whole.detector))
    assert tree(tmp_path / "out" / "best") == tree(tmp_path / "whole" / "best")


def test_a_run_that_left_no_result_does_not_bind_the_next(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_detector(quick(), StopAt(shapes(), 0), detector=fresh(), output_dir=tmp_path, progress=False)
    changed = quick(steps=1)
    train_detector(changed, shapes(), detector=fresh(), output_dir=tmp_path, progress=False)
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["steps"] == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--encoder", "nothere"), "encoder: expected none with architecture conv, got 'nothere'"),
        (("--encoder", "nothere", "--architecture", None, "--initial", "first"), "encoder: expected none with initial"),
        (("--initial", "first"), "architecture: expected none with initial, whose own is kept, got 'conv'"),
        (("--initial", "first", "--architecture", None), "min_side: expected none with initial"),
        (("--min_side", 0), "min_side: expected >= 1 pixels, got 0"),
        (("--training.augment.kinds", "foo"), "kinds: expected some of"),
        (("--training.size", 0), "size: expected >= 1 pixels, got 0"),
    ],
)
def test_options_that_would_have_no_effect_or_no_sense_are_refused(sets, capsys, options, named):
    assert command(sets, "one", *options) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (sets / "out").exists()


def test_training_goes_on_from_a_file_in_the_published_layout(sets):
    pytest.importorskip("transformers")
    from diffdoctor.detector import ArtifactDetector

    small = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 40, 64), "decoder_hidden_size": 16}
    detector = ArtifactDetector(small, head_norm="batch")
    state = detector.to_file_keys(detector.state_dict())
    torch.save({key.removeprefix("segformer."): value for key, value in state.items()}, sets / "published.bin")
    options = ("--initial", sets / "published.bin", "--architecture", None, "--min_side", None, "--training.steps", 1)
    assert not command(sets, "one", *options, "--training.batch_size", 1)
    assert load_detector(sets / "out" / "detector").preprocess_config.input_size == 512
