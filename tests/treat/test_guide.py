"""Guidance lowers what the detector finds, in every family, and leaves the pipeline as it was."""

import diffusers
import numpy as np
import pytest
import torch

import diffdoctor
from diffdoctor.runs.errors import UserError
from diffdoctor.treat.families import family_of
from diffdoctor.treat.families.base import _as_for
from diffdoctor.treat.prediction_replay import Predictor
from diffdoctor.treat.schedulers import Sampler
from support.tiny_pipelines import FAMILIES, PROMPTS, call_options, drawn, tiny_pipeline
from support.treatment import BrightDetector


class LeftDetector(BrightDetector):
    """What is bright is broken, in the left half alone."""

    def forward(self, pictures):
        logits = super().forward(pictures)
        left = torch.arange(logits.shape[-1]) < logits.shape[-1] // 2
        return torch.where(left, logits, -20.0)


def draw(pipeline, name, scale=1.0, pictures=(0, 1, 2), **more):
    pipeline.set_progress_bar_config(disable=True)
    options = call_options(name, scale, pictures)
    return drawn(pipeline(
        prompt=[PROMPTS[i] for i in pictures], height=16, width=16, num_inference_steps=4,
        generator=[torch.Generator().manual_seed(i) for i in pictures], **{"output_type": "pt", **options, **more},
    ))  # fmt: skip


def flow_or_ddim(name):
    pipeline = tiny_pipeline(name)
    if name in ("sd", "sdxl"):
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, scale):
    pipeline, detector = flow_or_ddim(name), BrightDetector()
    before = draw(pipeline, name, scale)
    options = {"strength": 1.0, "start": 0.0, "stop": 1.0, "clean_grad": 1.0, "rewinds": 0, "height": 16, "width": 16}
    with diffdoctor.guide(pipeline, detector, **options) as log:
        guided = draw(pipeline, name, scale)
    assert len(log.flagged_area) == 4
    assert all(len(row) == 3 for row in log.flagged_area)
    assert detector.confidence(guided).mean() < 0.95 * detector.confidence(before).mean()
    torch.testing.assert_close(draw(pipeline, name, scale), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_no_strength_changes_nothing_with_any_scheduler(scheduler, prediction_type):
    pipeline = tiny_pipeline("sd", prediction_type=prediction_type)
    changes = {"clip_sample": False} if scheduler == "DDPMScheduler" else {}
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **changes)
    before = draw(pipeline, "sd")
    with diffdoctor.guide(pipeline, BrightDetector(), strength=0.0, rewinds=0, height=16, width=16):
        torch.testing.assert_close(draw(pipeline, "sd"), before, atol=1e-5, rtol=0)
    with diffdoctor.guide(pipeline, BrightDetector(), strength=1.0, start=0.0, rewinds=0, height=16, width=16):
        assert (draw(pipeline, "sd") - before).abs().max() > 1e-2


TRUE_CFG = {"negative_prompt": ["blurred"] * 3, "true_cfg_scale": 3.0}


@pytest.mark.parametrize(
    ("name", "scale", "more"),
    [*((name, scale, {}) for name in FAMILIES for scale in (1.0, 5.0)), ("flux", 1.0, TRUE_CFG)],
    ids=lambda value: "true_cfg" if value else None if isinstance(value, dict) else str(value),
)
def test_a_prediction_can_be_made_again_for_some_of_the_pictures(name, scale, more):
    pipeline = tiny_pipeline(name)
    scheduler, family = pipeline.scheduler, family_of(pipeline)
    predictor, sampler, seen = Predictor(family), Sampler.around(pipeline.scheduler), []

    def step(model_output, timestep, sample, *args, **kwargs):
        predictor.keep(len(seen), model_output)
        seen.append((model_output, sample))
        return original(model_output, timestep, sample, *args, **kwargs)

    original, scheduler.step = scheduler.step, step
    draw(pipeline, name, scale, **more)
    rows = torch.tensor([2, 0])
    for place, (model_output, sample) in enumerate(seen):
        again = predictor.predict(place, sampler.model_input(sample, place)[rows], rows)
        torch.testing.assert_close(again, model_output[rows], atol=1e-5, rtol=1e-4)
    predictor.close()
    assert not family.denoiser._forward_hooks


@pytest.mark.parametrize("name", FAMILIES)
def test_rewinds_draw_the_broken_part_again_and_hold_the_rest(name):
    pipeline, detector = flow_or_ddim(name), LeftDetector()
    options = {"strength": 0.0, "rewinds": 3, "height": 16, "width": 16, "seed": 1}
    family = family_of(pipeline)

    def draw_latents():
        drawn = draw(pipeline, name, 5.0, output_type="latent")
        # klein's pipeline gives the autoencoder's latents, of which four are one of those that it denoises
        return drawn if name == "flux2" else family.from_pipeline(drawn, 16, 16)

    before, latents = draw(pipeline, name, 5.0), draw_latents()
    with diffdoctor.guide(pipeline, detector, **options) as log:
        guided = draw(pipeline, name, 5.0)
    with diffdoctor.guide(pipeline, detector, **options):
        held = draw_latents()
    score = detector.confidence(guided).flatten(1).mean(1) - detector.confidence(before).flatten(1).mean(1)
    assert (score <= 1e-6).all()
    assert score.min() < -1e-3
    # half of the 8 latent columns, and one more by which the region grows: two where a column is a patch of two
    kept = {"flux2": 6, "flux2_dev": 3}.get(name, 5)
    torch.testing.assert_close(held[..., kept:], latents[..., kept:], atol=1e-5, rtol=1e-5)
    assert (held[..., : kept - 1] - latents[..., : kept - 1]).abs().max() > 0.05
    assert log.rewound[0] == 3
    assert len(log.final_area) == 3
    assert not family.denoiser._forward_hooks


def test_the_confidence_of_clean_pictures_sets_what_is_broken():
    pipeline, detector = flow_or_ddim("sd"), LeftDetector()
    options = {"strength": 0.0, "rewinds": 1, "rewind_area": 0.1, "height": 16, "width": 16}
    clean = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3)).astype(np.uint8)
    family = family_of(pipeline)
    with diffdoctor.guide(pipeline, detector, clean=clean, **options) as log:
        draw(pipeline, "sd", 5.0)
    with torch.no_grad():
        back = family.decode(family.encode(torch.from_numpy(clean).permute(0, 3, 1, 2) / 255)).clamp(0, 1)
    at = log.rewind_confidence
    share = (detector.confidence(back) >= at).flatten(1).float().mean(1)
    assert (share >= 0.1).float().mean() == pytest.approx(0.05, abs=0.02)
    with diffdoctor.guide(pipeline, detector, rewind_confidence=at, **options) as again:
        draw(pipeline, "sd", 5.0)
    assert again.rewound == log.rewound
    with pytest.raises(ValueError, match="clean"), diffdoctor.guide(pipeline, detector, clean=clean[:0], **options):
        pass


def test_a_picture_does_not_depend_on_its_batch():
    pipeline, options = flow_or_ddim("sd3"), {"height": 16, "width": 16, "strength": 0.0}
    with diffdoctor.guide(pipeline, LeftDetector(), **options):
        together, alone = draw(pipeline, "sd3", 5.0), draw(pipeline, "sd3", 5.0, pictures=(1,))
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=0)
    with diffdoctor.guide(pipeline, LeftDetector(), seed=1, **options):
        assert (draw(pipeline, "sd3", 5.0) - together).abs().max() > 1e-2


def test_a_prediction_of_three_passes_is_refused():
    pipeline = flow_or_ddim("sd")
    original = pipeline.unet.forward
    with diffdoctor.guide(pipeline, BrightDetector(), height=16, width=16), pytest.raises(UserError, match="rewinds=0"):
        pipeline.unet(torch.zeros(3, 4, 8, 8), 1, torch.zeros(3, 77, 32))
        pipeline.unet(torch.zeros(3, 4, 8, 8), 1, torch.zeros(3, 77, 32))
        draw(pipeline, "sd")
    assert pipeline.unet.forward == original
    assert "step" not in vars(pipeline.scheduler)


def test_a_prediction_that_is_rescaled_is_refused():
    pipeline = tiny_pipeline("z_image")
    options = {"height": 16, "width": 16, "strength": 0.0, "rewinds": 1, "rewind_confidence": 0.0}
    with diffdoctor.guide(pipeline, BrightDetector(), **options):
        draw(pipeline, "z_image", 5.0)
        with pytest.raises(
            UserError, match=r"ZImagePipeline's predictions, guided in the plain way, got rescaled ones"
        ):
            draw(pipeline, "z_image", 5.0, cfg_normalization=0.5)


def test_window_and_restoration_after_an_error():
    pipeline = tiny_pipeline("sdxl")
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with diffdoctor.guide(pipeline, BrightDetector(), start=0.5, stop=0.75, height=16, width=16) as log:
        draw(pipeline, "sdxl")
    assert len(log.flagged_area) == 1
    inside = []

    def fail():
        inside.append("step" in vars(pipeline.scheduler))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), diffdoctor.guide(pipeline, BrightDetector()):
        fail()
    assert inside == [True]
    assert "step" not in vars(pipeline.scheduler)


def test_a_clean_picture_is_left_alone():
    class Satisfied(BrightDetector):
        def forward(self, pictures):
            return super().forward(pictures) * 0 - 9

    pipeline = tiny_pipeline("flux")
    before = draw(pipeline, "flux")
    with diffdoctor.guide(pipeline, Satisfied(), strength=1.0, start=0.0, clean_grad=1.0, height=16, width=16):
        torch.testing.assert_close(draw(pipeline, "flux"), before, atol=1e-5, rtol=0)


def test_refusals():
    for option in ({"start": 2.0}, {"rewind_to": 1.0}, {"strength": -1.0}, {"rewinds": -1}):
        refused = pytest.raises(ValueError, match=next(iter(option)))
        with refused, diffdoctor.guide(tiny_pipeline("sd"), BrightDetector(), **option):
            pass
    pipeline = tiny_pipeline("sd")
    pipeline.scheduler = diffusers.PNDMScheduler()
    with pytest.raises(UserError, match="DDIM"), diffdoctor.guide(pipeline, BrightDetector()):
        pass


def test_the_detector_is_moved_to_where_the_pipeline_draws(monkeypatch):
    detector, moved = BrightDetector(), []
    monkeypatch.setattr(detector, "to", moved.append)
    pipeline = tiny_pipeline("sd")
    clean = np.zeros((2, 16, 16, 3), np.uint8)
    with diffdoctor.guide(pipeline, detector, clean=clean, height=16, width=16):
        assert moved == [pipeline._execution_device]
        draw(pipeline, "sd")
    assert moved == [pipeline._execution_device] * 2


def test_an_offloaded_autoencoders_statistics_follow_the_latents():
    statistics = torch.full((1, 4, 1, 1), 2.0)
    scale, shift = _as_for(torch.empty(1, 4, 2, 8, 8, device="meta"), (statistics, 0.5))
    assert scale.device.type == "meta"
    assert scale.shape == (1, 4, 1, 1, 1)
    assert shift == 0.5
    assert _as_for(torch.zeros(1, 4, 8, 8), (statistics, statistics))[1] is statistics
