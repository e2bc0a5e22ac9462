"""What a treatment leaves to look at: curves and samples."""

import importlib.util

import numpy as np
import pytest
import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.treat.tracking import sample_sheet
from support.curves import events_of
from support.tiny_pipelines import tiny_pipeline
from support.treatment import random_detector, run


def test_curves_and_samples_of_a_run(tmp_path):
    result = run(output_dir=tmp_path, steps=4, evaluate_every=2, sample_every=1, sample_pictures=2)
    events = events_of(tmp_path / "logs", images=0, scalars=0)
    names = {"loss", "artifact_loss", "offline_loss", "grad_norm", "learning_rate", "replayed", "skipped"}
    assert {f"train/{name}" for name in names} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4]
    losses = [point.value for point in events.Scalars("train/loss")]
    assert losses == pytest.approx([row["loss"] for row in result.history])
    measured = events.Scalars("pictures/flagged_area")
    assert [point.step for point in measured] == [0, 2, 4]
    assert measured[-1].value == pytest.approx(result.measurements[-1].flagged_area)
    assert [picture.step for picture in events.Images("samples")] == [0, 1, 2, 3, 4]
    names = [path.name for path in sorted((tmp_path / "samples").iterdir())]
    assert names == [f"step-{step:08d}.png" for step in range(5)]


def test_a_run_that_goes_on_cuts_its_curves_off_there(tmp_path, monkeypatch):
    from diffdoctor.treat import treatment

    class Stop(Exception):
        pass

    take = treatment.Treatment._take_step

    def stopping(self):
        if self.step == 3:
            raise Stop
        take(self)

    monkeypatch.setattr(treatment.Treatment, "_take_step", stopping)
    with pytest.raises(Stop):
        run(output_dir=tmp_path, steps=4, checkpoint_every=2)
    monkeypatch.setattr(treatment.Treatment, "_take_step", take)
    # Within one second the first file's name may well come after the second's.
    (first,) = (tmp_path / "logs").iterdir()
    first.rename(first.with_name("events.out.tfevents.9999999999.first"))
    run(output_dir=tmp_path, steps=4, checkpoint_every=2, log_with="tensorboard")
    assert [point.step for point in events_of(tmp_path / "logs", scalars=0).Scalars("train/loss")] == [1, 2, 3, 4]


def test_no_tracker_and_no_samples(tmp_path):
    run(output_dir=tmp_path, steps=1, log_with="none", sample_pictures=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "lora",
        "ranking.html",
        "ranking.parquet",
        "run.json",
        "treat.json",
    ]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed(tmp_path):
    with pytest.raises(UserError, match="pip install wandb"):
        run(output_dir=tmp_path, steps=1, log_with="wandb")


def test_sample_sheet_shows_every_picture_above_its_diagnosis():
    pictures = torch.stack([torch.full((3, 16, 16), level) for level in (0.0, 0.5, float("nan"))])
    confidence = torch.zeros(3, 1, 16, 16)
    confidence[1, 0, :8] = 1
    sheet = sample_sheet(pictures, confidence)
    assert sheet.shape == (2 * 68 + 4, 3 * 68 + 4, 3)
    assert sheet.dtype == np.uint8
    plain, diagnosis = sheet[4 + 32, 68 + 4 + 32], sheet[68 + 4 + 8, 68 + 4 + 32]
    assert plain.tolist() == [128, 128, 128]
    assert diagnosis[0] > diagnosis[2] + 50


def test_text_encoders_leave_and_return():
    pipeline = run(tiny_pipeline("sd"), random_detector(), steps=1, text_encoders="offload").pipeline
    assert pipeline.text_encoder is not None
    freed = run(tiny_pipeline("sd"), random_detector(), steps=1, text_encoders="free").pipeline
    assert freed.text_encoder is None
