"""Ctrl-C and SIGTERM end a training with a checkpoint, from which it resumes to the same bits."""

import os
import signal

import pytest
import torch

from diffdoctor.cli import main
from diffdoctor.data.shard_writer import write_shards
from diffdoctor.data.stream import ShardStream
from diffdoctor.detector import train_detector
from diffdoctor.runs.errors import UserError
from support.detector import fresh, quick, shapes, weights_of

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")


def signalled(batch, number=signal.SIGINT):
    """A detector that sends its process a signal when it is given its n-th batch; 0: never."""
    detector, seen = fresh(), []

    def send(*_):
        seen.append(1)
        if len(seen) == batch:
            os.kill(os.getpid(), number)

    detector.register_forward_pre_hook(send)
    return detector


@pytest.fixture(autouse=True)
def handlers():
    """Python's own: a test run in the background of a shell inherits an ignored SIGINT."""

    def terminated(*_):
        raise KeyboardInterrupt

    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminated)
    yield
    for number, handler in before:
        signal.signal(number, handler)


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(("number", "every"), [(signal.SIGINT, 0), (signal.SIGTERM, 4)])
def test_the_step_is_finished_a_checkpoint_written_and_the_signal_delivered(tmp_path, capsys, number, every):
    config = quick(steps=6, checkpoint_every=every)
    whole = train_detector(config, shapes(), detector=signalled(0), output_dir=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_detector(config, shapes(), detector=signalled(3, number), output_dir=tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-00000003"]
    assert "detector: stopped after step 3; the same call resumes there" in capsys.readouterr().err
    assert not (tmp_path / "run" / "detector").exists()
    handler = signal.getsignal(number)
    resumed = train_detector(config, shapes(), detector=signalled(0), output_dir=tmp_path / "run", progress=False)
    assert signal.getsignal(number) is handler
    assert resumed.history == whole.history
    assert torch.equal(weights_of(resumed.detector), weights_of(whole.detector))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_training_resumes_in_the_middle_of_a_segment(tmp_path, workers):
    data = shapes(24)
    write_shards((data[i] for i in range(24)), tmp_path / "set", shard_size=8)
    config = quick(steps=7, checkpoint_every=5, accumulate=2, workers=workers)

    def train(folder, step=0):
        stream = ShardStream(tmp_path / "set", buffer=6, resampled=True, seed=4)
        return train_detector(config, stream, detector=signalled(step), output_dir=tmp_path / folder, progress=False)

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("run", 5)  # a micro-batch of the third step
    assert checkpoints(tmp_path / "run") == ["step-00000003"]
    resumed = train("run")
    assert resumed.history == whole.history
    assert torch.equal(weights_of(resumed.detector), weights_of(whole.detector))


def test_a_signal_to_a_worker_is_no_end_of_the_training(tmp_path):
    from diffdoctor.runs.signals import leave_signals_to_the_parent

    leave_signals_to_the_parent(0)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def command(folder, output, *options):
    words = ["--training.batch_size=4", "--validation_share=0.25", *options]
    return main(["train-detector", str(folder / "set"), f"--output={folder / output}", *words])


@pytest.fixture
def labelled(tmp_path):
    data = shapes(16)
    samples = [dict(data[i]) for i in range(16)]
    for sample in samples[::2]:
        sample["mask"] = sample["picture"].max(axis=2).astype("float32") / 255
    write_shards(samples, tmp_path / "set")
    return tmp_path


def test_a_training_that_ends_blind_says_so_and_fails_when_strict(labelled, capsys):
    blind = fresh()
    with torch.no_grad():
        blind.head.weight.zero_()
        blind.head.bias.fill_(-5.0)
    blind.save_pretrained(labelled / "blind")
    options = [f"--initial={labelled / 'blind'}", "--training.steps=1", "--training.learning_rate=1e-9"]
    assert command(labelled, "out", *options) == 0
    said = capsys.readouterr().err
    metrics = (labelled / "out" / "metrics.json").read_text()
    assert '"hit_rate": 0.0' in metrics
    sentence = "the detector is blind: it flags none of the damaged pictures of the validation set"
    assert f"warning: {sentence}" in said
    assert sentence in metrics
    assert command(labelled, "strict", *options, "--strict=true") == 3
    assert f"diffdoctor train-detector: error: {sentence}" in capsys.readouterr().err
    assert (labelled / "strict" / "detector" / "detector.json").is_file()
    evaluated = ["evaluate", "detector", str(labelled / "set"), f"--detector={labelled / 'out'}"]
    assert main([*evaluated, f"--output={labelled / 'report'}", "--strict=true"]) == 3
    assert "The detector is blind" in (labelled / "report" / "report.html").read_text()


def test_a_network_that_cannot_be_saved_is_refused_before_it_is_trained(tmp_path):
    module = torch.nn.Conv2d(3, 1, 3, padding=1)
    with pytest.raises(UserError, match=r"^detector: expected a network with save_pretrained, .* got Conv2d"):
        train_detector(quick(steps=1), shapes(), detector=module, output_dir=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_device_is_chosen_by_its_name(labelled, capsys):
    assert command(labelled, "out", "--architecture=conv", "--training.steps=1", "--device=cpu") == 0
    assert command(labelled, "other", "--training.steps=1", "--device=cuda:99") == 2
    assert "device: 'cuda:99' cannot be used" in capsys.readouterr().err
    with pytest.raises(UserError, match="device"):
        train_detector(quick(steps=1), shapes(), detector=fresh(), device="gpu", progress=False)
