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


class Signalled(torch.nn.Module):
    """A detector that sends its process a signal while it trains its n-th batch."""

    def __init__(self, step, number=signal.SIGINT):
        super().__init__()
        self.inner, self.left, self.number = fresh(), step, number

    def forward(self, images):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return self.inner(images)


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
    whole = train_detector(config, shapes(), detector=Signalled(0), output_dir=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_detector(config, shapes(), detector=Signalled(3, number), output_dir=tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-00000003"]
    assert "detector: stopped after step 3; the same call resumes there" in capsys.readouterr().err
    assert not (tmp_path / "run" / "detector").exists()
    handler = signal.getsignal(number)
    resumed = train_detector(config, shapes(), detector=Signalled(0), output_dir=tmp_path / "run", progress=False)
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
        return train_detector(config, stream, detector=Signalled(step), output_dir=tmp_path / folder, progress=False)

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
    words = ["--architecture=conv", "--min_side=16", "--training.batch_size=4", "--validation_share=0.25", *options]
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
    options = ["--training.steps=1", "--training.learning_rate=1e-9", "--validation_share=0.5"]
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
    assert "the detector is blind" in (labelled / "report" / "report.html").read_text()


def test_the_device_is_chosen_by_its_name(labelled, capsys):
    assert command(labelled, "out", "--training.steps=1", "--device=cpu") == 0
    assert command(labelled, "other", "--training.steps=1", "--device=cuda:99") == 2
    assert "device: 'cuda:99' cannot be used" in capsys.readouterr().err
    with pytest.raises(UserError, match="device"):
        train_detector(quick(steps=1), shapes(), detector=fresh(), device="gpu", progress=False)
