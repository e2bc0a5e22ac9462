"""Roll-outs draw what the pipeline's own call draws; replays repeat them; gradients are those of finite differences."""

import diffusers
import pytest
import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.treat.families import Family, family_of, register_family
from diffdoctor.treat.rollout import initial_latents, picture_generators, replay, roll_out
from diffdoctor.treat.sampling import Guidance, Sampling
from diffdoctor.treat.schedulers import Sampler
from support.tiny_pipelines import FAMILIES, PROMPTS, call_options, drawn, tiny_pipeline

SEEDS = (11, 12, 13)
SCHEDULERS = {
    "sd": (
        "DDIMScheduler",
        "DDPMScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ),
    "sdxl": ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"),
    "sd3": (
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ),
    "qwen_image": ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"),
    "flux2": ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"),
    "sana": ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"),
    "wan": ("UniPCMultistepScheduler",),
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
CASES = [
    *(
        (family, scheduler, scale)
        for family in FAMILIES
        for scheduler in SCHEDULERS.get(family, ("FlowMatchEulerDiscreteScheduler",))
        for scale in (1.0, 5.0)
    ),
    # these count guidance from 0
    *((family, "FlowMatchEulerDiscreteScheduler", 0.0) for family in ("z_image", "krea2")),
]
# A prediction without guidance is one of the two that guidance makes: three ways of guidance show that it is repeated.
REPLAYED = [case for case in CASES if case[2] != 1.0 or case[0] in ("sd", "flux", "qwen_image")]


def prepared(name, scheduler, scale, steps=4, dtype=torch.float32, prediction_type="epsilon"):
    """Of a tiny pipeline with this scheduler: its sampling, conditioning, first latents and generators."""
    pipeline = tiny_pipeline(name, prediction_type=prediction_type) if name == "sd" else tiny_pipeline(name)
    changes = {"clip_sample": False} if scheduler in ("DDIMScheduler", "DDPMScheduler") else {}
    if name not in ("sd", "sdxl") and "Multistep" in scheduler:
        changes = FLOW
    elif scheduler.startswith("FlowMatch") and name == "wan":
        changes = {"shift": 3.0}
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **changes)
    pipeline.to(dtype)
    family = family_of(pipeline)
    family.max_sequence_length = 32
    cpu = torch.device("cpu")
    sampler = Sampler(pipeline.scheduler, device=cpu, timestep_options=family.timestep_options(steps, 16, 16))
    conditioning = family.encode_prompts(PROMPTS, guidance_scale=scale, height=16, width=16, device=cpu)
    generators = picture_generators(SEEDS)
    sampling = Sampling(family, sampler, Guidance(scale))
    latents = initial_latents(sampling, generators, 16, 16, cpu, dtype)
    return sampling, conditioning, latents, generators


@pytest.mark.parametrize(("name", "scheduler", "scale"), CASES)
def test_roll_out_draws_what_the_pipeline_draws(name, scheduler, scale):
    sampling, conditioning, latents, generators = prepared(name, scheduler, scale)
    family = sampling.family
    rollout = roll_out(sampling, conditioning, latents, generators, chunk=2)
    ours = family.decode(rollout.final).clamp(0, 1)
    options = call_options(name, scale)
    family.pipeline.set_progress_bar_config(disable=True)
    theirs = drawn(family.pipeline(
        prompt=list(PROMPTS), height=16, width=16, num_inference_steps=4, output_type="pt",
        generator=picture_generators(SEEDS), **options,
    ))  # fmt: skip
    assert (theirs - theirs[:1]).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "scheduler", "scale"), REPLAYED)
def test_replay_of_some_pictures_repeats_the_roll_out(name, scheduler, scale):
    sampling, conditioning, latents, generators = prepared(name, scheduler, scale, steps=5, dtype=torch.float64)
    rollout = roll_out(sampling, conditioning, latents, generators, keep=(0, 3))
    index = torch.tensor([2, 0])
    for first in (3, 0):
        again = replay(sampling, rollout, index, first=first)
        torch.testing.assert_close(again.detach(), rollout.final[index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "scheduler"), [(name, s) for name in ("sd", "sd3") for s in SCHEDULERS[name]])
def test_replay_gradient_is_that_of_finite_differences(name, scheduler):
    sampling, conditioning, latents, generators = prepared(name, scheduler, 1.0, dtype=torch.float64)
    denoiser = sampling.family.denoiser
    weight = (denoiser.conv_out if name == "sd" else denoiser.proj_out).weight
    denoiser.requires_grad_(False)
    weight.requires_grad_(True)
    index = torch.tensor([1])
    cotangent = torch.randn(1, *latents.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value():
        # 2 of 4 steps: DPM++ 2M needs its stored history here
        return (replay(sampling, rollout, index, first=2) * cotangent).sum()

    rollout = roll_out(sampling, conditioning, latents, generators, keep=(2,))
    gradient = torch.autograd.grad(value(), weight)[0]
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-3
    with torch.no_grad():
        weight += step * direction
        above = value()
        weight -= 2 * step * direction
        below = value()
    expected = (above - below) / (2 * step)
    # Euler keeps the latents in fp32 and DDPM some coefficients: that bounds the step from below, and the error
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    "scheduler",
    ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoised_inverts_renoised(scheduler, prediction_type):
    sampler = prepared("sd", scheduler, 1.0, prediction_type=prediction_type)[0].sampler
    generator = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    for step in range(len(sampler)):
        latents = sampler.renoised(clean, noise, step)
        alpha, sigma = sampler._alpha_sigma(step)
        prediction = noise if prediction_type == "epsilon" else alpha * noise - sigma * clean
        torch.testing.assert_close(sampler.denoised(prediction, step, latents), clean, atol=2e-4, rtol=2e-4)


def test_training_pair_is_the_schedulers_own():
    sampling = prepared("sd", "DDIMScheduler", 1.0, prediction_type="v_prediction")[0]
    generator = torch.Generator().manual_seed(4)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    noisy, timesteps, target = sampling.sampler.training_pair(latents, noise, torch.tensor([0.0, 0.5, 0.999999]))
    scheduler = sampling.family.pipeline.scheduler
    assert timesteps.tolist() == [0, 500, 999]
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps))
    from diffdoctor import weighted_loss

    velocity = scheduler.get_velocity(latents, noise, timesteps)
    assert weighted_loss(velocity, target) < 1e-10


def test_flow_training_pair():
    sampler = prepared("flux", "FlowMatchEulerDiscreteScheduler", 1.0)[0].sampler
    latents, noise = torch.zeros(4, 4, 8, 8), torch.ones(4, 4, 8, 8)
    noisy, timesteps, _ = sampler.training_pair(latents, noise, torch.tensor([0.05, 0.3, 0.6, 0.95]))
    torch.testing.assert_close(noisy[:, 0, 0, 0] * 1000, timesteps)
    assert (timesteps.diff() > 0).all()
    assert timesteps.min() > 0
    assert timesteps.max() < 1000


def test_packing_is_flux_own():
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    theirs = diffusers.FluxPipeline._pack_latents(latents, 2, 3, 4, 6)
    family = prepared("flux", "FlowMatchEulerDiscreteScheduler", 1.0)[0].family
    assert torch.equal(family.to_pipeline(latents), theirs)
    assert torch.equal(family.from_pipeline(theirs, 8, 12), latents)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_latent_consistency_model_is_told_its_guidance(name):
    pipeline = tiny_pipeline(name)
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, time_cond_proj_dim=8)
    family, options, cpu = family_of(pipeline), {"height": 16, "width": 16}, torch.device("cpu")
    assert not family.uses_negative(5.0)
    sampler = Sampler(pipeline.scheduler, device=cpu, timestep_options=family.timestep_options(2, 16, 16))
    sampling, drawings = Sampling(family, sampler, Guidance(5.0)), []
    for scale in (5.0, 1.0):
        conditioning = family.encode_prompts(PROMPTS, guidance_scale=scale, device=cpu, **options)
        generators = picture_generators(SEEDS)
        latents = initial_latents(sampling, generators, 16, 16, cpu, torch.float32)
        drawings.append(roll_out(sampling, conditioning, latents, generators).final)
    theirs = pipeline(
        list(PROMPTS), num_inference_steps=2, guidance_scale=5.0, output_type="latent",
        generator=picture_generators(SEEDS), **options,
    ).images  # fmt: skip
    torch.testing.assert_close(drawings[0], theirs, atol=1e-5, rtol=1e-5)
    assert (drawings[0] - drawings[1]).abs().max() > 1e-3


def test_pipelines_scheduler_is_left_alone_and_clipping_is_noticed(caplog):
    pipeline = tiny_pipeline("sd")
    pipeline.scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=True)
    before = dict(vars(pipeline.scheduler))
    sampler = Sampler(pipeline.scheduler, device=torch.device("cpu"), timestep_options={"num_inference_steps": 3})
    assert "clip_sample" in caplog.text
    assert not sampler.scheduler.config.clip_sample
    assert pipeline.scheduler.config.clip_sample
    assert vars(pipeline.scheduler).keys() == before.keys()
    assert torch.equal(pipeline.scheduler.timesteps, before["timesteps"])


@pytest.mark.parametrize(("scheduler", "nearest"), [("PNDMScheduler", "DDIM"), ("HeunDiscreteScheduler", "Euler")])
def test_scheduler_that_cannot_be_replayed_is_refused(scheduler, nearest):
    with pytest.raises(UserError, match=nearest):
        Sampler(getattr(diffusers, scheduler)(), device=torch.device("cpu"), timestep_options={})


def test_unknown_pipeline_is_refused_and_a_family_can_be_added():
    class OtherPipeline:
        pass

    with pytest.raises(UserError, match=r"OtherPipeline.*StableDiffusionPipeline"):
        family_of(OtherPipeline())

    class OtherFamily(Family):
        pipeline_classes = ("OtherPipeline",)

    register_family(OtherFamily)
    assert isinstance(family_of(OtherPipeline()), OtherFamily)
    with pytest.raises(ValueError, match="pipeline_classes"):
        register_family(Family)


def test_flux2_encodes_as_its_pipeline_and_back():
    pipeline = tiny_pipeline("flux2")
    family = family_of(pipeline)
    pictures = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    latents = family.encode(pictures)
    assert latents.shape[1:] == family.latent_shape(16, 24)
    theirs = pipeline._encode_vae_image(pictures * 2 - 1, generator=None)
    torch.testing.assert_close(latents, theirs, atol=1e-5, rtol=1e-5)
    raw = pipeline.vae.encode(pictures * 2 - 1).latent_dist.mode()
    again = pipeline.vae.decode(raw, return_dict=False)[0] / 2 + 0.5
    torch.testing.assert_close(family.decode(latents), again, atol=1e-5, rtol=1e-5)


def test_a_distilled_flux2_has_no_negative_prediction():
    pipeline = tiny_pipeline("flux2")
    pipeline.register_to_config(is_distilled=True)
    family = family_of(pipeline)
    assert not family.uses_negative(4.0)
    options = {"height": 16, "width": 16, "device": torch.device("cpu")}
    family.max_sequence_length = 32
    assert family.encode_prompts(PROMPTS, guidance_scale=4.0, **options).negative is None
