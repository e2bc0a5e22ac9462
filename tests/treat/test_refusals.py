"""What cannot be treated is refused, and prompts that are too long are counted."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.treat import TreatConfig, treat
from diffdoctor.treat.checks import _ACTING, warn_of_idle_options
from diffdoctor.treat.loading import replace_scheduler
from diffdoctor.treat.methods import METHODS
from diffdoctor.treat.prompts import check_prompts
from diffdoctor.treat.schedulers import Sampler
from support.tiny_pipelines import PROMPTS, tiny_pipeline
from support.treatment import pairs, random_detector, run, small


def test_a_monitor_with_the_detectors_weights_is_refused():
    detector = random_detector()
    for monitor in (detector, random_detector()):
        with pytest.raises(UserError, match="monitor: expected a detector with other weights"):
            treat(
                tiny_pipeline("sd"), detector, PROMPTS, small(), offline=pairs(), monitor=monitor, progress=False
            )  # fmt: skip


def test_a_pipeline_that_places_its_own_parts_is_refused():
    pipeline = tiny_pipeline("sd")
    pipeline.unet._hf_hook = object()
    with pytest.raises(UserError, match="offloading or a device map"):
        run(pipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offline": ([], [])}, "offline"),
        ({"offline": (np.zeros((2, 16, 16, 3), np.float32), ["a", "b"])}, "uint8"),
        ({"height": 15}, "height, width: expected multiples of 2 pixels, 4 at least, got 15 x 16"),
        ({"height": 2, "width": 2}, "height, width: expected multiples of 2 pixels, 4 at least, got 2 x 2"),
        ({"sampling_steps": 2000}, "sampling_steps: DDPMScheduler does not take them"),
        ({"lora_targets": ("everything",)}, "lora_targets"),
        ({"map_source": "shuffled", "micro_batch_size": 1}, "micro_batch_size: expected with shuffled maps"),
        ({"map_source": "shuffled", "micro_batch_size": 2}, "got 2 at a time of 3 on a process"),
        ({"map_source": "shuffled", "batch_size": 1, "method": "nft"}, "batch_size: expected with shuffled maps"),
    ],
)
def test_what_cannot_be_treated_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        run(**options)


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_scheduler_that_does_not_take_the_noise_levels(name):
    pipeline = tiny_pipeline("chroma")
    replace_scheduler(pipeline, name)
    with pytest.raises(UserError, match=rf"^scheduler: expected one that takes the noise levels .*, got {name}"):
        run(pipeline)


def test_another_scheduler_stays_one_of_flow_matching():
    pipeline = tiny_pipeline("sd3")
    for name in ("UniPCMultistepScheduler", "FlowMatchHeunDiscreteScheduler"):
        replace_scheduler(pipeline, name)
        sampler = Sampler(pipeline.scheduler, device=torch.device("cpu"), timestep_options={"num_inference_steps": 4})
        assert sampler.is_flow
        assert pipeline.scheduler.config.get("flow_shift", pipeline.scheduler.config.get("shift")) == 3.0
    with pytest.raises(UserError, match="--scheduler: expected one of flow matching"):
        replace_scheduler(pipeline, "DDIMScheduler")
    with pytest.raises(UserError, match="--scheduler: expected none of flow matching"):
        replace_scheduler(tiny_pipeline("sd"), "FlowMatchEulerDiscreteScheduler")


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
        ({"method": "draft"}, "method: expected one of draft_k"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"clean_grad": -1.0}, "clean_grad"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"height": 0}, "height: expected at least 1, or None for the pipeline's own, got 0"),
        ({"grad_steps": 0}, "grad_steps: expected at least 1, or None for a quarter of sampling_steps, got 0"),
        ({"alpha": 0.0}, "alpha: expected a positive number, or None for the rank, got 0.0"),
        ({"attention_backend": ""}, "attention_backend: expected a name, or None for the pipeline's own, got ''"),
        ({"ema_decay": 1.5}, r"ema_decay: expected a number in \[0, 1\]"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TreatConfig(**options)


def test_options_without_effect_are_named(caplog):
    for method, options, idle in (
        ("nft", {"kl_weight": 0.1, "grad_steps": 2, "anchor_weight": 0.2}, "grad_steps, kl_weight"),
        ("draft_k", {"anchor_weight": 0.4, "clean_grad": 0.0}, "anchor_weight"),
        ("grpo", {"artifact_method": "mean", "kl_weight": 0.1}, "artifact_method"),
        ("drtune", {"grad_steps": 2, "modulate": "none"}, None),
    ):
        caplog.clear()
        warn_of_idle_options(TreatConfig(method=method, **options))
        said = [f"options without effect with method {method}: {idle}"] if idle else []
        assert [record.getMessage() for record in caplog.records] == said
    assert {field.name for field in fields(TreatConfig)} >= _ACTING.keys()
    assert {method for methods in _ACTING.values() for method in methods} <= METHODS.keys()
