"""Every option of every served scheduler is drawn as the pipeline draws it, and repeated by a replay, or refused."""

import functools
import inspect
import warnings

import diffusers
import pytest
import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.treat.families import family_of
from diffdoctor.treat.rollout import initial_latents, picture_generators, replay, roll_out
from diffdoctor.treat.sampling import Sampling
from diffdoctor.treat.schedulers import Sampler
from support.tiny_pipelines import PROMPTS, tiny_pipeline

SERVED = {
    "DDIMScheduler": "sd",
    "DDPMScheduler": "sd",
    "LCMScheduler": "sd",
    "TCDScheduler": "sd",
    "EulerDiscreteScheduler": "sd",
    "EulerAncestralDiscreteScheduler": "sd",
    "DPMSolverMultistepScheduler": "sd",
    "UniPCMultistepScheduler": "sd",
    "FlowMatchEulerDiscreteScheduler": "sd3",
    "FlowMatchHeunDiscreteScheduler": "sd3",
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
# The values of options that are words or numbers of a list; switches are found by their defaults.
CHOICES = {
    "prediction_type": ("sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"),
    "interpolation_type": ("linear", "log_linear"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_type": ("discrete", "continuous"),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2"),
    "solver_order": (1, 2, 3),
    "time_shift_type": ("exponential", "linear"),
    "shift_terminal": (0.1,),
}
# Switched off with a notice: tests/treat/test_rollout.py.
SWITCHED_OFF = ("clip_sample", "thresholding")
# What one option needs of another.
WITH = {
    "rescale_betas_zero_snr": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "time_shift_type": {"use_dynamic_shifting": True},
    "shift_terminal": {"use_dynamic_shifting": True},
}


def options_of(kind):
    for name, parameter in inspect.signature(getattr(diffusers, kind).__init__).parameters.items():
        if isinstance(parameter.default, bool) and name not in SWITCHED_OFF:
            yield name, not parameter.default
        for value in CHOICES.get(name, ()):
            if value != parameter.default:
                yield name, value


CASES = [(kind, name, value) for kind in SERVED for name, value in options_of(kind)]
CASES += [
    (kind, FLOW, options)
    for kind in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    for options in ({}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}, {"solver_order": 1})
]


made = functools.cache(tiny_pipeline)


@functools.cache
def own_scheduler(name):
    return made(name).scheduler


def distances(kind, options):
    """How far a roll-out is from the pipeline's own pictures, and a replay from the roll-out, of each one's size."""
    name = "sd3" if options.get("use_flow_sigmas") else SERVED[kind]
    pipeline = made(name)
    own = own_scheduler(name)
    if kind in ("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"):
        options = {"clip_sample": False, **options}
    pipeline.scheduler = getattr(diffusers, kind).from_config(own.config, **options)
    family = family_of(pipeline)
    family.max_sequence_length = 32
    size = {"height": 16, "width": 16}
    cpu = torch.device("cpu")
    sampler = Sampler(pipeline.scheduler, device=cpu, timestep_options=family.timestep_options(4, 16, 16))
    sampling = Sampling(family, sampler)
    conditioning = family.encode_prompts(PROMPTS, guidance_scale=1.0, **size, device=cpu)
    generators = picture_generators((11, 12, 13))
    latents = initial_latents(sampling, generators, 16, 16, cpu, torch.float32)
    rollout = roll_out(sampling, conditioning, latents, generators, keep=(0, 2))
    more = {"max_sequence_length": 32} if name == "sd3" else {}
    theirs = pipeline(
        list(PROMPTS), num_inference_steps=4, guidance_scale=1.0, output_type="latent",
        generator=picture_generators((11, 12, 13)), **size, **more,
    ).images  # fmt: skip
    if not theirs.isfinite().all():
        # some noise schedules overflow with so few steps: `treat` refuses what is not finite
        assert torch.equal(theirs.isfinite(), rollout.final.isfinite())
        return 0.0, 0.0
    scale = float(rollout.final.abs().max())
    with torch.no_grad():
        again = [replay(sampling, rollout, torch.tensor([2, 0]), first=first) for first in (0, 2)]
    repeated = max(float((latents - rollout.final[[2, 0]]).abs().max()) for latents in again)
    return float((theirs - rollout.final).abs().max()) / scale, repeated / scale


@pytest.mark.parametrize(("kind", "name", "value"), CASES, ids=lambda value: str(value).removesuffix("Scheduler"))
def test_a_rollout_draws_what_the_pipeline_draws_and_is_repeated_or_is_refused(kind, name, value):
    options = {**FLOW, **value} if name is FLOW else {**WITH.get(name, {}), name: value}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn, repeated = distances(kind, options)
    except UserError:
        return
    except (ValueError, NotImplementedError, ImportError) as error:
        # an option that diffusers itself does not take here
        own = own_scheduler(SERVED[kind])
        with pytest.raises(type(error)):
            scheduler = getattr(diffusers, kind).from_config(own.config, **options)
            scheduler.set_timesteps(4, **({"mu": 1.0} if options.get("use_dynamic_shifting") else {}))
        return
    assert drawn < 1e-5
    assert repeated < 1e-4


def test_noise_from_the_global_random_state_is_refused_by_name():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    for make in (Sampler.around, lambda s: Sampler(s, device=torch.device("cpu"), timestep_options={})):
        with pytest.raises(UserError, match=r"FlowMatchEuler.*: expected stochastic_sampling False.*global"):
            make(scheduler)
