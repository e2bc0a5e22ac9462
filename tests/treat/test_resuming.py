"""A treatment that ends early resumes to the same LoRA, and a finished one is left alone."""

import json
import os
import re
import signal

import pytest
import torch

from diffdoctor.detector import ConvDetector
from diffdoctor.maps import PictureRanking
from diffdoctor.runs.errors import UserError
from diffdoctor.treat import train as trainer
from diffdoctor.treat import treatment
from diffdoctor.treat.lora import WEIGHTS_NAME
from diffdoctor.treat.monitor import EarlyStopping
from support.tiny_pipelines import PROMPTS, tiny_pipeline
from support.treatment import pairs, run


class Interrupted(Exception):
    pass


def saved(folder):
    from safetensors.torch import load_file

    return load_file(folder / "lora" / WEIGHTS_NAME)


@pytest.mark.cpu
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"method": "nft", "anchor_weight": 0.3, "ema_decay": 0.9},
        {"method": "grpo", "group_size": 3, "grpo_updates": 2, "kl_weight": 0.1},
    ],
    ids=["draft_k", "nft-ema", "grpo"],
)
def test_resume_gives_the_same_lora_as_an_undisturbed_run(tmp_path, monkeypatch, method):
    options = {"steps": 5, "checkpoint_every": 2, "evaluate_every": 2, "map_source": "shuffled", **method}
    run(output_dir=tmp_path / "whole", **options)
    name = "GroupPolicy" if method.get("method") == "grpo" else "sampled_term"
    term = getattr(treatment, name)
    calls = []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted
        return term(*args, **kwargs)

    monkeypatch.setattr(treatment, name, interrupting)
    with pytest.raises(Interrupted):
        run(output_dir=tmp_path / "broken", **options)
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "broken" / "lora").exists()
    result = run(output_dir=tmp_path / "broken", **options)
    assert len(calls) == 4 + 3
    assert [row["step"] for row in result.history] == [1, 2, 3, 4, 5]
    whole, resumed = saved(tmp_path / "whole"), saved(tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-00000005"]
    assert json.loads((tmp_path / "broken" / "treat.json").read_text())["best_step"] == result.best_step
    rankings = [PictureRanking.load(tmp_path / name / "ranking.parquet").rows() for name in ("whole", "broken")]
    assert rankings[0] == rankings[1] and sum(row["visits"] for row in rankings[0]) % 5 == 0 < len(rankings[0])


def tuned(part):
    """The pipeline with a single weight of one of its parts a little larger."""
    pipeline = tiny_pipeline("sd", prediction_type="v_prediction")
    with torch.no_grad():
        next(getattr(pipeline, part).parameters()).view(-1)[0] += 1e-3
    return pipeline


def with_scheduler(**changes):
    pipeline = tiny_pipeline("sd", prediction_type="v_prediction")
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
    return pipeline


def other_pairs():
    pictures, prompts = pairs()
    pictures = pictures.copy()
    pictures[3, 2, 1, 0] ^= 1
    return pictures, prompts


OTHER_ORIGINS = [
    ("pipeline", lambda: {"pipeline": tuned("unet")}),
    ("pipeline", lambda: {"pipeline": tuned("vae")}),
    ("pipeline", lambda: {"pipeline": tuned("text_encoder")}),
    ("offline", lambda: {"offline": other_pairs()}),
    ("scheduler", lambda: {"pipeline": with_scheduler(timestep_spacing="linspace")}),
]


def test_interruption_writes_a_checkpoint_and_other_settings_are_refused(tmp_path, monkeypatch):
    term = treatment.sampled_term

    def interrupting(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return term(*args, **kwargs)

    monkeypatch.setattr(treatment, "sampled_term", interrupting)
    # A test run in the background of a shell inherits an ignored SIGINT.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(output_dir=tmp_path, steps=3)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.setattr(treatment, "sampled_term", term)
    with pytest.raises(UserError, match="another learning_rate"):
        run(output_dir=tmp_path, steps=3, learning_rate=1e-3)
    with pytest.raises(UserError, match="another detector"):
        run(detector=ConvDetector((8, 16)).eval(), output_dir=tmp_path, steps=3)
    for part, change in OTHER_ORIGINS:
        with pytest.raises(UserError, match=f"a run with another {part}[;,]"):
            run(**change(), output_dir=tmp_path, steps=3)
    # what changes no result may differ
    assert len(run(output_dir=tmp_path, steps=3, log_with="none", checkpoint_every=7).history) == 3


def test_a_run_killed_after_it_was_to_stop_does_not_go_on(tmp_path, monkeypatch):
    options = {"steps": 6, "checkpoint_every": 2, "evaluate_every": 2, "good_enough": 1.0, "output_dir": tmp_path}
    write = trainer._write

    def dying(*_):
        raise Interrupted

    monkeypatch.setattr(trainer, "_write", dying)
    # only the measurement at step 4 is good enough
    monkeypatch.setattr(EarlyStopping, "add", stopping_at(4, EarlyStopping.add))
    with pytest.raises(Interrupted):
        run(**options)
    monkeypatch.setattr(trainer, "_write", write)
    result = run(**options)
    assert len(result.history) == 4
    assert result.stopped == "enough"


@pytest.mark.parametrize("every", [0, 2])
def test_a_finished_run_is_neither_repeated_nor_written_over(tmp_path, monkeypatch, every):
    options = {"output_dir": tmp_path, "log_with": "none", "sample_pictures": 0, "checkpoint_every": every}
    first = run(steps=2, **options)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "lora" / WEIGHTS_NAME).unlink()
    monkeypatch.setattr(treatment, "sampled_term", None)
    again = run(steps=2, **options)
    assert (again.history, again.best_step, again.measurements) == (first.history, first.best_step, first.measurements)
    pictures = [
        result.pipeline(list(PROMPTS[:2]), num_inference_steps=2, height=16, width=16, output_type="pt",
                        generator=torch.Generator().manual_seed(0)).images
        for result in (first, again)
    ]  # fmt: skip
    assert torch.equal(*pictures)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    seconds = re.compile(rb'"seconds": [0-9.]+')
    assert {path: seconds.sub(b"", text) for path, text in after.items()} == {
        path: seconds.sub(b"", text) for path, text in before.items()
    }
    other = r"another learning_rate \(expected 0\.0005, got 0\.001\), steps \(expected 2, got 3\)"
    with pytest.raises(UserError, match=f"{other}; choose another output folder"):
        run(steps=3, learning_rate=1e-3, **options)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == after


def stopping_at(step, add):
    def adding(self, measurement, *rest):
        add(self, measurement, *rest)
        return "enough" if measurement.step == step else None

    return adding
