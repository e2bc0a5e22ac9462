"""Steps and advantages of trainers, each against what their code computes, written out."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

import diffdoctor
from diffdoctor.reference.policy_loss import per_sample


def step_of(coefs, latents, model_pred, noise):
    a, b, sigma = (per_sample(value, latents[:, :, None]).squeeze(2) for value in coefs)
    return a * latents + b * model_pred, a * latents + b * model_pred + sigma * noise


def tensors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 4, 5, 6, dtype=torch.float64, generator=generator).unbind()


@pytest.mark.parametrize("step", [0, 3, 8], ids=["first", "middle", "last"])
def test_flow_grpo_draws_this_step(step):
    latents, velocity, noise = tensors()
    sigmas, noise_level = torch.linspace(1, 0, 10, dtype=torch.float64), 0.7
    sigma, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
    std_dev_t = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))) * noise_level
    mean = latents * (1 + std_dev_t**2 / (2 * sigma) * dt)
    mean = mean + velocity * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    drawn = mean + std_dev_t * torch.sqrt(-1 * dt) * noise
    got = step_of(diffdoctor.flow_sde_coefs(sigmas, step, noise_level), latents, velocity, noise)
    torch.testing.assert_close(got, (mean, drawn))


def test_dance_grpo_draws_this_step():
    latents, velocity, noise = tensors()
    sigmas, eta, step = torch.linspace(1, 0, 10, dtype=torch.float64), 0.3, 4
    sigma, dsigma = sigmas[step], sigmas[step + 1] - sigmas[step]
    mean = latents + dsigma * velocity
    original = latents - sigma * velocity
    score = -(latents - original * (1 - sigma)) / sigma**2
    mean = mean - 0.5 * eta**2 * score * dsigma
    drawn = mean + eta * math.sqrt(-dsigma) * noise
    got = step_of(diffdoctor.flow_sde_coefs(sigmas, step, eta, "dance_grpo"), latents, velocity, noise)
    torch.testing.assert_close(got, (mean, drawn))


def test_steps_of_several_samples_and_types():
    sigmas, steps = torch.linspace(1, 0, 6), torch.tensor([4, 0, 2], dtype=torch.int32)
    many = diffdoctor.flow_sde_coefs(sigmas, steps)
    for index, step in enumerate(steps.tolist()):
        assert [x[index] for x in many] == list(diffdoctor.flow_sde_coefs(sigmas, step))
    assert {x.dtype for x in many} == {torch.float32}
    assert diffdoctor.flow_sde_coefs(sigmas, 0, dtype=torch.float64)[0].dtype == torch.float64
    a, b, sigma = diffdoctor.flow_sde_coefs(sigmas, 1, eta=0.0)
    assert (a, sigma) == (1, 0)
    torch.testing.assert_close(b, sigmas[2] - sigmas[1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddpo_draws_the_step_of_the_ddim_scheduler(prediction_type, eta):
    latents, model_pred, noise = tensors()
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    for timestep in (scheduler.timesteps[0], scheduler.timesteps[11], scheduler.timesteps[-1]):
        expected = scheduler.step(model_pred, timestep, latents, eta=eta, variance_noise=noise).prev_sample
        coefs = diffdoctor.ddim_coefs(
            scheduler.alphas_cumprod, timestep.expand(3), eta, num_inference_steps=20, prediction_type=prediction_type,
            final_alpha_cumprod=scheduler.final_alpha_cumprod,
        )  # fmt: skip
        torch.testing.assert_close(step_of(coefs, latents, model_pred, noise)[1], expected)


@pytest.mark.parametrize("shape", [(6,), (6, 1, 3, 4)], ids=["numbers", "maps"])
def test_group_advantages(shape):
    rewards = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = rewards.unflatten(0, (2, 3))
    mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True, correction=0)
    assert_close = torch.testing.assert_close
    assert_close(diffdoctor.group_advantages(rewards, 3), ((groups - mean) / (std + 1e-4)).flatten(0, 1))
    assert_close(diffdoctor.group_advantages(rewards, 3, scale=None), (groups - mean).flatten(0, 1))
    others = (groups.sum(1, keepdim=True) - groups) / 2
    got = diffdoctor.group_advantages(rewards, 3, scale=None, baseline="leave_one_out")
    assert_close(got, (groups - others).flatten(0, 1))
    order = torch.tensor([5, 0, 3, 1, 2, 4])
    ids = torch.tensor([70, 70, 70, -1, -1, -1])
    shuffled = diffdoctor.group_advantages(rewards[order], ids[order])
    assert_close(shuffled, diffdoctor.group_advantages(rewards, 3)[order])


def test_groups_without_a_difference_have_no_advantage():
    same = torch.full((4,), 0.3)
    assert diffdoctor.group_advantages(same, 2, eps=0.0).tolist() == [0.0] * 4
    assert diffdoctor.group_advantages(same, 1, baseline="leave_one_out").tolist() == [0.0] * 4
    assert diffdoctor.group_advantages(same.bfloat16(), 4).dtype == torch.float32


TABLE = torch.linspace(1, 0, 5)
REFUSED = {
    "a step beyond the table": (lambda: diffdoctor.flow_sde_coefs(TABLE, 4), ValueError, "step: expected an index"),
    "a step of a fraction": (lambda: diffdoctor.flow_sde_coefs(TABLE, 1.5), TypeError, "step: expected an int"),
    "steps of fractions": (lambda: diffdoctor.flow_sde_coefs(TABLE, TABLE), TypeError, "step: expected integers"),
    "a short table": (lambda: diffdoctor.flow_sde_coefs(TABLE[:1], 0), ValueError, "sigmas: expected shape"),
    "timesteps": (lambda: diffdoctor.flow_sde_coefs(1000 * TABLE, 0), ValueError, "sigmas: expected noise levels"),
    "a rising table": (lambda: diffdoctor.flow_sde_coefs(TABLE.flip(0), 0), ValueError, "that do not rise"),
    "a form": (lambda: diffdoctor.flow_sde_coefs(TABLE, 0, form="ode"), ValueError, "form: expected one of"),
    "a negative eta": (lambda: diffdoctor.flow_sde_coefs(TABLE, 0, eta=-1), ValueError, "eta: expected"),
    "an eta above 1": (
        lambda: diffdoctor.ddim_coefs(TABLE, torch.tensor([1]), 2.0, num_inference_steps=2), ValueError, "eta: expected"
    ),
    "no inference steps": (
        lambda: diffdoctor.ddim_coefs(TABLE, torch.tensor([1]), num_inference_steps=0), ValueError,
        "num_inference_steps: expected",
    ),
    "a group that does not divide": (lambda: diffdoctor.group_advantages(TABLE, 2), ValueError, "group: expected"),
    "groups of another length": (
        lambda: diffdoctor.group_advantages(TABLE, torch.arange(4)), ValueError, "group: expected shape (5,)"
    ),
    "integer rewards": (lambda: diffdoctor.group_advantages(torch.arange(4), 2), TypeError, "rewards: expected"),
    "maps of two channels": (
        lambda: diffdoctor.group_advantages(torch.zeros(4, 2, 3, 3), 2), ValueError, "rewards: expected shape"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    call, kind, message = REFUSED[case]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)
