"""Guidance lowers what the detector finds, in every family, and leaves the pipeline as it was."""

import diffusers
import pytest
import torch
from helpers_tiny_pipelines import FAMILIES, PROMPTS, tiny_pipeline

import diffdoctor
from diffdoctor._errors import UserError


class BrightDetector(torch.nn.Module):
    """What is bright is broken."""

    def forward(self, pictures):
        return 8 * (torch.nn.functional.avg_pool2d(pictures.mean(1, keepdim=True), 2) - 0.5)

    def confidence(self, pictures):
        return torch.nn.functional.interpolate(self(pictures), scale_factor=2.0).sigmoid()


def draw(pipeline, name, scale=1.0):
    pipeline.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": 32} if name in ("sd3", "flux") else {}
    return pipeline(
        list(PROMPTS), height=16, width=16, num_inference_steps=4, guidance_scale=scale, output_type="pt",
        generator=[torch.Generator().manual_seed(i) for i in range(3)], **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, scale):
    pipeline, detector = tiny_pipeline(name), BrightDetector()
    if name in ("sd", "sdxl"):
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
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
    ["DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"],
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
    with pytest.raises(ValueError, match="start"), diffdoctor.guide(tiny_pipeline("sd"), BrightDetector(), start=2.0):
        pass
    pipeline = tiny_pipeline("sd")
    pipeline.scheduler = diffusers.PNDMScheduler()
    with pytest.raises(UserError, match="DDIM"), diffdoctor.guide(pipeline, BrightDetector()):
        pass
