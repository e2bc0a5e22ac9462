"""The treatment as a whole: it learns, resumes, notices what goes wrong, and keeps what was good."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch

from diffdoctor.detector import ConvDetector
from diffdoctor.runs.errors import UserError
from diffdoctor.treat import TreatConfig, treat, treatment
from diffdoctor.treat import train as trainer
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import WEIGHTS_NAME, lora_state
from diffdoctor.treat.methods import METHODS
from diffdoctor.treat.monitor import Measurement, Monitor
from diffdoctor.treat.prompts import check_prompts
from diffdoctor.treat.schedulers import Sampler
from diffdoctor.treat.terms import offline_term, prepare_offline
from support.tiny_pipelines import FAMILIES, PROMPTS, tiny_pipeline
from support.treatment import BrightDetector, gradient_norms, pairs, random_detector, run, small


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_by_every_method(name, method, scale):
    result = run(tiny_pipeline(name), method=method, guidance_scale=scale, steps=1, batch_size=2, sampling_steps=2)
    row = result.history[0]
    assert result.skipped == 0
    assert row["grad_norm"] > 0
    assert row["replayed"] == (0 if method == "weighted" else 2)
    state = lora_state(family_of(result.pipeline))
    assert result.best_step == 0 or any(float(v.abs().max()) > 0 for k, v in state.items() if "lora_B" in k)


@pytest.mark.parametrize("method", ["draft_k", "drtune"])
def test_treatment_lowers_the_detectors_confidence(method):
    result = run(
        detector=BrightDetector(), method=method, steps=20, batch_size=4, learning_rate=2e-2, rank=4,
        evaluate_pictures=8, offline_weight=0.0, max_grad_norm=0.0, min_diversity=0.0, min_sharpness=0.0,
        modulate="none",
    )  # fmt: skip
    first, last = result.measurements[0], result.measurements[-1]
    assert last.mean_confidence < 0.85 * first.mean_confidence
    assert result.best_step == 20


def test_offline_term_alone_learns_the_pairs():
    picture, prompts = np.full((4, 16, 16, 3), 200, np.uint8), [PROMPTS[0]] * 4
    result = run(
        method="weighted", steps=25, batch_size=8, learning_rate=2e-2, rank=8, offline=(picture, prompts),
        offline_confidence=1.0, min_diversity=0.0, min_sharpness=0.0,
    )  # fmt: skip
    losses = [row["loss"] for row in result.history]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_same_seed_same_lora_and_another_seed_another():
    states = [lora_state(family_of(run(seed=seed, max_skipped=3).pipeline)) for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


class Interrupted(Exception):
    pass


def saved(folder):
    from safetensors.torch import load_file

    return load_file(folder / "lora" / WEIGHTS_NAME)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resume_gives_the_same_lora_as_an_undisturbed_run(tmp_path, monkeypatch, ema):
    options = {"steps": 5, "checkpoint_every": 2, "evaluate_every": 2, "ema_decay": ema, "map_source": "shuffled"}
    run(output_dir=tmp_path / "whole", **options)
    term = treatment.artifact_term
    calls = []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Interrupted
        return term(*args, **kwargs)

    monkeypatch.setattr(treatment, "artifact_term", interrupting)
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
    term = treatment.artifact_term

    def interrupting(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return term(*args, **kwargs)

    monkeypatch.setattr(treatment, "artifact_term", interrupting)
    # A test run in the background of a shell inherits an ignored SIGINT.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(output_dir=tmp_path, steps=3)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.setattr(treatment, "artifact_term", term)
    with pytest.raises(UserError, match="another learning_rate"):
        run(output_dir=tmp_path, steps=3, learning_rate=1e-3)
    with pytest.raises(UserError, match="another detector"):
        run(detector=ConvDetector((8, 16)).eval(), output_dir=tmp_path, steps=3)
    for part, change in OTHER_ORIGINS:
        with pytest.raises(UserError, match=f"a run with another {part}[;,]"):
            run(**change(), output_dir=tmp_path, steps=3)
    # what changes no result may differ
    assert len(run(output_dir=tmp_path, steps=3, log_with="none", checkpoint_every=7).history) == 3


class BrokenDetector(torch.nn.Module):
    """Gives NaN logits in the graph from one call on, for a number of calls."""

    def __init__(self, first, count):
        super().__init__()
        self.inner, self.first, self.count, self.calls = random_detector(), first, count, 0

    def confidence(self, pictures):
        return self.inner.confidence(pictures)

    def forward(self, pictures):
        self.calls += 1
        broken = self.first <= self.calls < self.first + self.count
        return self.inner(pictures) * (float("nan") if broken else 1.0)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    result = run(detector=BrokenDetector(2, 1), steps=3)
    assert result.skipped == 1
    assert result.history[1]["grad_norm"] is None
    assert all(torch.isfinite(value).all() for value in lora_state(family_of(result.pipeline)).values())


def test_too_many_skipped_steps_end_the_treatment():
    with pytest.raises(UserError, match="4 steps in a row"):
        run(detector=BrokenDetector(2, 100), steps=9, max_skipped=4)


def test_collapse_is_noticed_and_good_weights_kept():
    result = run(
        detector=BrightDetector(), steps=60, learning_rate=3.0, evaluate_every=2, max_grad_norm=0.0,
        offline_weight=0.0, evaluate_pictures=9, warmup_steps=0, max_skipped=100,
    )  # fmt: skip
    assert result.stopped.startswith("collapse")
    assert len(result.history) < 60
    first = result.measurements[0]
    best = next(m for m in result.measurements if m.step == result.best_step)
    assert best.diversity >= 0.5 * first.diversity
    assert best.sharpness >= 0.5 * first.sharpness


def test_a_monitor_that_sees_more_artifacts_stops_the_treatment():
    class DarkDetector(BrightDetector):
        def forward(self, pictures):
            return -super().forward(pictures)

    options = {"steps": 30, "learning_rate": 5e-2, "evaluate_every": 3, "offline_weight": 0.0, "max_grad_norm": 0.0,
               "min_diversity": 0.0, "min_sharpness": 0.0, "modulate": "none"}  # fmt: skip
    pipeline = tiny_pipeline("sd", prediction_type="v_prediction")
    result = treat(
        pipeline, BrightDetector(), PROMPTS, small(**options), monitor=DarkDetector(), progress=False
    )  # fmt: skip
    assert result.stopped.startswith("reward hacking")
    assert len(result.history) < 30
    best = next(m for m in result.measurements if m.step == result.best_step)
    assert best.monitor_area <= 1.25 * result.measurements[0].monitor_area + 1e-3


def test_the_last_of_equally_good_weights_is_kept():
    monitor = Monitor(small())
    for step, score in enumerate((0.1, 0.02, 0.01, 0.0105, 0.04)):
        monitor.add(Measurement(step, score, 0.0, 0.0, 1.0, 1.0), dict)
    assert monitor.best.step == 3


def test_uniform_maps_leave_the_offline_term_alone():
    result = run(map_source="uniform", steps=2)
    assert [row["artifact_loss"] for row in result.history] == [0.0, 0.0]
    assert all(row["offline_loss"] > 0 for row in result.history)
    assert result.best_step == 2


def test_options_that_save_memory_change_no_gradient():
    plain = gradient_norms(batch_size=4, map_source="detector")
    for options in ({"merge_rollout": False}, {"micro_batch_size": 1}, {"micro_batch_size": 3, "vae_slicing": True}):
        assert gradient_norms(batch_size=4, **options) == pytest.approx(plain, rel=1e-3)


def test_a_vae_that_gives_nan_in_its_dtype_is_noticed_at_once():
    pipeline = tiny_pipeline("sd")
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(1e6)
        pipeline.vae.decoder.conv_in.bias.add_(1e5)
    pipeline.vae.half()
    with pytest.raises(
        UserError, match="the VAE decodes pictures with values that are not finite in float16: load the VAE in float32"
    ):
        run(pipeline, steps=1)
    with torch.no_grad():
        pipeline = tiny_pipeline("sd")
        pipeline.vae.encoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(
        UserError, match="the VAE encodes the offline pictures with values that are not finite in float32"
    ):
        run(pipeline, steps=1)


def test_a_monitor_with_the_detectors_weights_is_refused():
    detector = random_detector()
    for monitor in (detector, random_detector()):
        with pytest.raises(UserError, match="monitor: a detector with weights of its own"):
            treat(
                tiny_pipeline("sd"), detector, PROMPTS, small(), offline=pairs(), monitor=monitor, progress=False
            )  # fmt: skip


def test_a_pipeline_that_places_its_own_parts_is_refused():
    pipeline = tiny_pipeline("sd")
    pipeline.unet._hf_hook = object()
    with pytest.raises(UserError, match="offloading or a device map"):
        run(pipeline)


class SquareDetector(torch.nn.Module):
    """Flags one square of every picture, by its place."""

    def confidence(self, pictures):
        maps = torch.zeros(len(pictures), 1, *pictures.shape[2:])
        maps[:, :, 4:8, 6:10] = 0.9
        return maps


def test_offline_pairs_teach_nothing_where_flagged():
    pipeline = tiny_pipeline("sd", prediction_type="v_prediction")
    family = family_of(pipeline)
    cpu = torch.device("cpu")
    config = small(offline_dilation=1)
    prepared = prepare_offline(family, SquareDetector(), pairs(), config, 16, 16, cpu, 4)
    expected = torch.ones(16, 16)
    expected[3:9, 5:11] = 0
    assert torch.equal(prepared.keep, expected.expand(6, 1, 16, 16))
    sampler = Sampler(pipeline.scheduler, device=cpu, timestep_options={"num_inference_steps": 3})

    def loss():
        return offline_term(family, sampler, prepared, config, draws=[1, 2, 3], total=3)

    with_flagged = float(loss().detach())
    uniform = prepare_offline(family, SquareDetector(), pairs(), small(map_source="uniform"), 16, 16, cpu, 4)
    everywhere = float(offline_term(family, sampler, uniform, config, draws=[1, 2, 3], total=3).detach())
    assert with_flagged < everywhere
    # the residual in the flagged latents does not count: 4 x 4 latent pixels, less their partly flagged rim
    prepared.keep[:] = 0
    assert float(loss().detach()) == 0.0


def test_offline_pairs_as_samples():
    pictures, prompts = pairs(3)
    samples = [{"picture": picture, "prompt": prompt} for picture, prompt in zip(pictures, prompts, strict=True)]
    a, b = run(offline=samples), run(offline=(pictures, prompts))
    assert a.history == b.history


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offline": ([], [])}, "offline"),
        ({"offline": (np.zeros((2, 16, 16, 3), np.float32), ["a", "b"])}, "uint8"),
        ({"height": 15}, "multiples of 2 pixels, 4 at least, were expected, got 15 x 16"),
        ({"height": 2, "width": 2}, "multiples of 2 pixels, 4 at least, were expected, got 2 x 2"),
        ({"sampling_steps": 2000}, "sampling_steps: DDPMScheduler does not take them"),
        ({"lora_targets": ("everything",)}, "lora_targets"),
    ],
)
def test_what_cannot_be_treated_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        run(**options)


def test_missing_offline_pairs_are_refused():
    with pytest.raises(UserError, match="offline"):
        treat(tiny_pipeline("sd"), random_detector(), PROMPTS, small(), progress=False)


@pytest.mark.parametrize("prompts", [[], ["  "], ["good", 3]])
def test_prompts_are_refused(prompts):
    with pytest.raises(UserError, match="prompts"):
        treat(tiny_pipeline("sd"), random_detector(), prompts, small(), offline=pairs(), progress=False)


def test_the_token_limit_is_the_one_that_the_pipeline_uses(caplog):
    words = ["a red square on the left of a blue one, and a green dot above both of them"]
    for name in ("sd3", "flux"):
        check_prompts(tiny_pipeline(name), words, max_sequence_length=8)
        assert "1 of 1 prompts are longer than 8 tokens" in caplog.text
        caplog.clear()
    # CLIP alone is not asked how long
    check_prompts(tiny_pipeline("sdxl"), words, max_sequence_length=8)
    without_t5 = tiny_pipeline("sd3")
    without_t5.tokenizer_3 = None
    check_prompts(without_t5, words, max_sequence_length=8)
    assert not caplog.text


def test_long_prompts_are_counted_cut_or_refused(caplog):
    long = "red square " * 60
    treat(tiny_pipeline("sd"), random_detector(), [long, PROMPTS[0]], small(steps=1), offline=pairs(), progress=False)
    assert "1 of 2 prompts are longer than 77 tokens" in caplog.text
    with pytest.raises(UserError, match="strict"):
        treat(tiny_pipeline("sd"), random_detector(), [long], small(strict=True), offline=pairs(), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "draft"}, "method: one of draft_k"),
        ({"batch_size": 0}, "batch_size: at least 1"),
        ({"clean_grad": -1.0}, "clean_grad"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"ema_decay": 1.5}, r"ema_decay: in \[0, 1\]"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TreatConfig(**options)


def test_a_run_killed_after_it_was_to_stop_does_not_go_on(tmp_path, monkeypatch):
    options = {"steps": 6, "checkpoint_every": 2, "evaluate_every": 2, "good_enough": 1.0, "output_dir": tmp_path}
    write = trainer._write

    def dying(*_):
        raise Interrupted

    monkeypatch.setattr(trainer, "_write", dying)
    # only the measurement at step 4 is good enough
    monkeypatch.setattr(Monitor, "add", stopping_at(4, Monitor.add))
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
    monkeypatch.setattr(treatment, "artifact_term", None)
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
    def adding(self, measurement, state):
        add(self, measurement, state)
        return "enough" if measurement.step == step else None

    return adding
