"""Autoguidance: predictions extrapolated from the model without its LoRA through the one with it."""

import inspect

import accelerate
import numpy as np
import pytest
import torch

import diffdoctor
from diffdoctor.cli import main
from diffdoctor.data.shards import read_shards
from diffdoctor.evaluate.model import sample_pictures
from diffdoctor.repairs import RepairOptions
from diffdoctor.runs.errors import UserError
from diffdoctor.treat.autoguidance import _Interval
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import add_lora, save_lora
from support.tiny_pipelines import PROMPTS, call_options, drawn, tiny_pipeline
from support.treatment import random_detector

# U-Net, packed tokens, a list of samples, video
FAMILIES = ("sd", "flux", "z_image", "wan")
ALWAYS = {"start": 0.0, "stop": 1.0}


def with_lora(name, adapter="treated", seed=0, pipeline=None):
    """A tiny pipeline with a LoRA that visibly changes what it draws."""
    pipeline = tiny_pipeline(name) if pipeline is None else pipeline
    generator, family = torch.Generator().manual_seed(seed), family_of(pipeline)
    for parameter in add_lora(family, rank=2, alpha=2.0, groups=("attention",), seed=seed, adapter=adapter):
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False)
    return pipeline


def draw(pipeline, name, scale=1.0, count=2, steps=2):
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    options = {"num_inference_steps": steps, "height": 16, "width": 16, "output_type": "pt", "generator": generators}
    return drawn(pipeline(prompt=list(PROMPTS[:count]), **options | call_options(name, scale, PROMPTS[:count])))


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_0_and_1_are_the_model_without_its_lora_and_with_it(name):
    pipeline = with_lora(name)
    plain, tuned = draw(tiny_pipeline(name), name), draw(pipeline, name)
    assert (plain - tuned).abs().max() > 1e-3
    for scale, expected in ((0, plain), (1, tuned)):
        with diffdoctor.autoguide(pipeline, scale, **ALWAYS):
            torch.testing.assert_close(draw(pipeline, name), expected, atol=1e-5, rtol=0)
    # everything is as it was
    assert not family_of(pipeline).denoiser._forward_hooks
    assert not any(parameter.requires_grad for parameter in family_of(pipeline).denoiser.parameters())
    assert torch.equal(draw(pipeline, name), tuned)


@pytest.mark.parametrize("method", ["auto", "inpaint", "resume"])
def test_repair_is_refused_inside(method):
    pipeline, options = with_lora("sd"), RepairOptions(method=method, height=16, width=16, sampling_steps=2)
    with diffdoctor.autoguide(pipeline):
        with diffdoctor.autoguide(pipeline, 3.0):
            pass
        with pytest.raises(UserError, match="repair: expected a pipeline that is not autoguided, got one inside"):
            diffdoctor.repair([], pipeline, random_detector(), options)
    assert diffdoctor.repair([], pipeline, random_detector(), options) == []


def test_a_treatment_is_refused_inside():
    pipeline = with_lora("sd")
    with (
        diffdoctor.autoguide(pipeline),
        pytest.raises(UserError, match="treat: expected a pipeline that is not autoguided, got one inside"),
    ):
        diffdoctor.treat.treat(pipeline, random_detector(), list(PROMPTS[:1]))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prediction_is_extrapolated(name):
    pipeline = with_lora(name)
    family, seen = family_of(pipeline), []
    watch = family.denoiser.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
    with diffdoctor.autoguide(pipeline, 1.7, **ALWAYS):
        draw(pipeline, name)
    watch.remove()
    module, args, kwargs, output = seen[0]

    def tensors(output):
        first = output[0] if isinstance(output, tuple) else output.sample
        return first if isinstance(first, list) else [first]

    with torch.no_grad():
        tuned = tensors(module(*args, **kwargs))
        pipeline.disable_lora()
        without = tensors(module(*args, **kwargs))
    found = tensors(output)
    assert len(found) == len(tuned) > 0
    for got, on, off in zip(found, tuned, without, strict=True):
        torch.testing.assert_close(got, off + 1.7 * (on - off), atol=1e-5, rtol=1e-5)
        assert (on - off).abs().max() > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_outside_of_the_interval_are_the_loras(name, monkeypatch):
    pipeline, extrapolated, steps = with_lora(name), [], []
    lerp = torch.lerp
    monkeypatch.setattr(torch, "lerp", lambda *args: extrapolated.append(len(steps)) or lerp(*args))
    denoiser = family_of(pipeline).denoiser
    watch = denoiser.register_forward_pre_hook(lambda *_: steps.append(1))
    with diffdoctor.autoguide(pipeline):
        # another number of steps is another run, the same number the same
        for count, inside in ((5, {2, 3, 4}), (4, {2, 3}), (4, {2, 3}), (1, set())):
            steps.clear(), extrapolated.clear()
            draw(pipeline, name, steps=count)
            assert (len(steps), set(extrapolated)) == (count, inside)
    watch.remove()


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux2", "flux2_dev", "qwen_image", "krea2", "chroma", "sana"])
def test_a_family_knows_what_its_scheduler_calls_the_denoisers_times(name):
    pipeline, given = tiny_pipeline(name), []
    family = family_of(pipeline)
    signature = inspect.signature(type(family.denoiser).forward)

    def watch(module, args, kwargs):
        given.append(signature.bind_partial(module, *args, **kwargs).arguments["timestep"])

    family.denoiser.register_forward_pre_hook(watch, with_kwargs=True)
    draw(pipeline, name, count=1, steps=3)
    found = list(dict.fromkeys(float(family.time_of(time).max()) for time in given))
    assert found == pytest.approx(pipeline.scheduler.timesteps.tolist(), abs=1e-3)


def test_a_time_that_the_scheduler_does_not_know_is_refused(monkeypatch):
    pipeline = with_lora("flux")
    monkeypatch.setattr(type(family_of(pipeline)), "time_of", lambda self, timesteps: timesteps)
    with pytest.raises(UserError, match=r"a family of your own has time_of .* got one at 1"):  # noqa: SIM117
        with diffdoctor.autoguide(pipeline):
            draw(pipeline, "flux")
    assert not pipeline.transformer._forward_hooks


def test_steps_whose_times_are_one_in_low_precision_are_told_apart_nearly():
    family = family_of(tiny_pipeline("flux2"))
    family.pipeline.scheduler.set_timesteps(100, mu=2.0)
    given = family.pipeline.scheduler.timesteps.to(torch.bfloat16) / 1000
    assert len(given.unique()) < 85
    interval = _Interval(family, 0.2, 0.7)
    inside = [step for step, time in enumerate(given) if interval.holds(time)]
    assert inside == list(range(inside[0], inside[-1] + 1))
    assert (inside[0], inside[-1]) == pytest.approx((20, 69), abs=2)


def test_where_one_of_two_denoisers_has_a_lora_the_others_steps_count(monkeypatch):
    pipeline, extrapolated = tiny_pipeline("wan22"), []
    family = family_of(pipeline)
    family.choose_denoiser("low")  # of the last two of four steps
    add_lora(family, rank=2, alpha=2.0, groups=("attention",), seed=0, adapter="treated")
    lerp = torch.lerp
    monkeypatch.setattr(torch, "lerp", lambda *args: extrapolated.append(1) or lerp(*args))
    for start, stop, times in ((0.0, 0.5, 0), (0.5, 0.75, 1), (0.5, 1.0, 2)):
        extrapolated.clear()
        with diffdoctor.autoguide(pipeline, start=start, stop=stop):
            draw(pipeline, "wan", steps=4)
        assert len(extrapolated) == times


def test_under_classifier_free_guidance():
    pipeline = with_lora("sd")
    with diffdoctor.autoguide(pipeline, 0, **ALWAYS):
        torch.testing.assert_close(draw(pipeline, "sd", 5.0), draw(tiny_pipeline("sd"), "sd", 5.0), atol=1e-5, rtol=0)


def test_other_adapters_stay_as_they_are():
    pipeline = with_lora("sd", "style")
    styled = draw(pipeline, "sd")
    pipeline = with_lora("sd", "treated", seed=1, pipeline=pipeline)
    both = draw(pipeline, "sd")
    assert (styled - both).abs().max() > 1e-3
    with diffdoctor.autoguide(pipeline, 0, adapters="treated", **ALWAYS):
        torch.testing.assert_close(draw(pipeline, "sd"), styled, atol=1e-5, rtol=0)
    with diffdoctor.autoguide(pipeline, 0, **ALWAYS):
        torch.testing.assert_close(draw(pipeline, "sd"), draw(tiny_pipeline("sd"), "sd"), atol=1e-5, rtol=0)
    assert torch.equal(draw(pipeline, "sd"), both)


def test_adapters_may_be_switched_inside():
    pipeline = with_lora("sd")
    plain, tuned = draw(tiny_pipeline("sd"), "sd"), draw(pipeline, "sd")
    with diffdoctor.autoguide(pipeline, 2.0, **ALWAYS):
        pipeline.disable_lora()
        torch.testing.assert_close(draw(pipeline, "sd"), plain, atol=1e-5, rtol=0)
        pipeline.enable_lora()
        assert (draw(pipeline, "sd") - tuned).abs().max() > 1e-3
    assert torch.equal(draw(pipeline, "sd"), tuned)


def test_magnitudes_of_dora_are_left_out_too():
    from peft import LoraConfig

    pipeline, generator = tiny_pipeline("sd"), torch.Generator().manual_seed(0)
    for name in ("style", "treated"):
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], use_dora=True)
        pipeline.unet.add_adapter(config, adapter_name=name)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    pipeline.unet.set_adapters(["style", "treated"], [0.7, 0.4])
    both = draw(pipeline, "sd")
    with diffdoctor.autoguide(pipeline, 0, adapters="treated", **ALWAYS):
        found = draw(pipeline, "sd")
    assert torch.equal(draw(pipeline, "sd"), both)
    pipeline.unet.set_adapters(["style"], [0.7])
    torch.testing.assert_close(found, draw(pipeline, "sd"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "sequential"])
def test_offloading_may_put_another_forward_and_other_parameters_in_place(whole):
    pipeline = with_lora("sd")
    plain, tuned = draw(tiny_pipeline("sd"), "sd"), draw(pipeline, "sd")
    if whole:
        pipeline.enable_model_cpu_offload(device="cpu")
    else:
        accelerate.cpu_offload(pipeline.unet, torch.device("cpu"), offload_buffers=True)
    with diffdoctor.autoguide(pipeline, 0, **ALWAYS):
        # another forward comes at the end of each call
        for _ in range(2):
            torch.testing.assert_close(draw(pipeline, "sd"), plain, atol=1e-5, rtol=0)
    assert torch.equal(draw(pipeline, "sd"), tuned)
    assert not any(parameter.requires_grad for name, parameter in pipeline.unet.named_parameters() if "lora_" in name)


@pytest.mark.study
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_denoiser(in_place):
    pipeline = with_lora("sd")
    plain, tuned = draw(tiny_pipeline("sd"), "sd"), draw(pipeline, "sd")
    if in_place:
        pipeline.unet.compile(backend="eager")
    else:
        pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    torch.testing.assert_close(draw(pipeline, "sd"), tuned, atol=1e-5, rtol=0)
    with diffdoctor.autoguide(pipeline, 0, start=0.0, stop=0.99):
        torch.testing.assert_close(draw(pipeline, "sd"), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(draw(pipeline, "sd"), tuned, atol=1e-5, rtol=0)


def test_a_detector_may_guide_inside():
    pipeline = with_lora("sd")
    tuned = draw(pipeline, "sd")
    options = {"strength": 0.0, "rewinds": 2, "rewind_confidence": 0.3, "rewind_area": 0.01}
    with diffdoctor.autoguide(pipeline, 1.0), diffdoctor.guide(pipeline, random_detector(), **options) as log:
        guided = draw(pipeline, "sd")
    assert sum(log.rewound) > 0
    with diffdoctor.guide(pipeline, random_detector(), **options):
        torch.testing.assert_close(draw(pipeline, "sd"), guided, atol=1e-5, rtol=0)
    assert torch.equal(draw(pipeline, "sd"), tuned)


def test_what_cannot_be_extrapolated_is_refused_and_nothing_is_left_changed():
    with pytest.raises(UserError, match="a LoRA that is loaded and active"), diffdoctor.autoguide(tiny_pipeline("sd")):
        pass
    pipeline = with_lora("sd")
    for options, message in (
        ({"adapters": "other"}, "other"),
        ({"adapters": ["treated", "other"]}, "other"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": "2"}, "scale: expected a finite number, got '2'"),
        ({"start": -0.1}, "start"),
        ({"stop": 1.5}, "stop"),
        ({"start": 0.7, "stop": 0.2}, "stop: expected at least start"),
    ):
        with pytest.raises(ValueError, match=message), diffdoctor.autoguide(pipeline, **options):
            pass
    cached = with_lora("flux")
    cached.transformer._cache_config = object()
    with pytest.raises(UserError, match="disable_cache"), diffdoctor.autoguide(cached):
        pass
    with pytest.raises(ZeroDivisionError), diffdoctor.autoguide(pipeline):
        raise ZeroDivisionError
    assert not pipeline.unet._forward_hooks
    pipeline.fuse_lora()
    with pytest.raises(UserError, match="fused"), diffdoctor.autoguide(pipeline):
        pass


def test_sample_draws_with_it(tmp_path, capsys):
    pipeline = with_lora("sd", "diffdoctor")
    save_lora(family_of(pipeline), tmp_path / "lora")
    tiny_pipeline("sd").save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    command = ["sample", f"--pipeline={tmp_path}/pipeline", f"--prompts={tmp_path}/prompts.txt", "--sampling_steps=2"]
    command += ["--height=16", "--width=16", "--batch_size=1", f"--output={tmp_path}/set", "--autoguidance=1.5"]
    assert main([*command]) == 2
    assert "autoguidance: expected a LoRA with it" in capsys.readouterr().err
    assert main([*command, f"--lora={tmp_path}/lora"]) == 0
    with diffdoctor.autoguide(pipeline, 1.5):
        options = {"num_inference_steps": 2, "height": 16, "width": 16, "progress": False}
        expected = sample_pictures(pipeline, PROMPTS[:1], [0], **options)[0]
    drawn = next(iter(read_shards(tmp_path / "set", masks="ignored")))["picture"]
    assert np.abs(drawn.astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 1
    assert not np.array_equal(drawn, sample_pictures(pipeline, PROMPTS[:1], [0], **options)[0].permute(1, 2, 0))
