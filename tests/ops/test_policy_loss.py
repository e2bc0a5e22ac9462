"""policy_loss: the losses of published trainers, written out as their code computes them."""

import math

import pytest
import torch

import diffdoctor

ETA, STEP = 0.7, 3
SIGMAS = torch.linspace(1, 0, 11, dtype=torch.float64)


def rollout(shape=(4, 3, 6, 5), step_noise=1.0, seed=0):
    """A step drawn by a policy, and the prediction of the policy a little later, with a graph."""
    generator = torch.Generator().manual_seed(seed)
    latents, old_pred, noise, change = torch.randn(4, *shape, dtype=torch.float64, generator=generator).unbind()
    coefs = diffdoctor.flow_sde_coefs(SIGMAS, STEP, ETA)
    a, b, sigma = coefs
    next_latents = a * latents + b * old_pred + step_noise * sigma * noise
    model_pred = (old_pred + 0.2 * change).requires_grad_()
    return model_pred, old_pred, latents, next_latents, coefs


def sde_step_with_logprob(model_output, latents, prev_sample):
    """Flow-GRPO's: the log-probability of every element, the step's mean, and its rate of noise."""
    sigma, dt = SIGMAS[STEP], SIGMAS[STEP + 1] - SIGMAS[STEP]
    std_dev_t = torch.sqrt(sigma / (1 - sigma)) * ETA
    mean = latents * (1 + std_dev_t**2 / (2 * sigma) * dt)
    mean = mean + model_output * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    std = std_dev_t * torch.sqrt(-1 * dt)
    log_prob = -((prev_sample - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return log_prob, mean, std_dev_t


def clipped_loss(log_prob, old, advantages, clip_range):
    ratio = torch.exp(log_prob - old)
    unclipped = -advantages * ratio
    return torch.maximum(unclipped, -advantages * torch.clamp(ratio, 1.0 - clip_range, 1.0 + clip_range))


def assert_same(loss, expected, model_pred):
    grad, wanted = (torch.autograd.grad(x, model_pred, retain_graph=True)[0] for x in (loss, expected))
    assert wanted.abs().max() > 0
    torch.testing.assert_close((loss, grad), (expected, wanted))


@pytest.mark.parametrize("beta", [0.0, 0.04], ids=["", "kl"])
def test_flow_grpo(beta):
    model_pred, old_pred, latents, next_latents, coefs = rollout()
    advantages, clip_range = torch.tensor([0.7, -6.0, 1.2, -0.3], dtype=torch.float64), 0.02
    everything = (1, 2, 3)
    log_prob, mean, std_dev_t = sde_step_with_logprob(model_pred, latents, next_latents)
    old, mean_ref, _ = sde_step_with_logprob(old_pred, latents, next_latents)
    clamped = torch.clamp(advantages, -5, 5)
    expected = clipped_loss(log_prob.mean(everything), old.mean(everything), clamped, clip_range).mean()
    expected = expected + beta * ((mean - mean_ref) ** 2).mean(everything).div(2 * std_dev_t**2).mean()

    old_log_prob = diffdoctor.policy_log_prob(old_pred, latents, next_latents, coefs=coefs)
    # The paper's code divides the KL by the noise's rate, not by the step's deviation.
    kl_weight = beta * (SIGMAS[STEP] - SIGMAS[STEP + 1]).item()
    for stored in (old_log_prob, old_log_prob.mean(everything)):
        loss = diffdoctor.policy_loss(
            model_pred, latents, next_latents, stored, advantages, coefs=coefs, level="sample",
            clip_range=(clip_range, clip_range), advantage_clip=5.0, ref_pred=old_pred, kl_weight=kl_weight,
        )  # fmt: skip
        assert_same(loss, expected, model_pred)


def test_flow_grpo_per_pixel_is_that_of_imagedoctor_and_sdg():
    """The log-probability is averaged over channels alone; the reward is a map, its advantage without a deviation."""
    model_pred, old_pred, latents, next_latents, coefs = rollout()
    rewards = torch.rand(4, 1, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    advantages = rewards - rewards.mean(0, keepdim=True)
    log_prob = sde_step_with_logprob(model_pred, latents, next_latents)[0].mean(1, keepdim=True)
    old = sde_step_with_logprob(old_pred, latents, next_latents)[0].mean(1, keepdim=True)
    expected = clipped_loss(log_prob, old, advantages, 0.02).mean()
    loss = diffdoctor.policy_loss(
        model_pred, latents, next_latents, diffdoctor.policy_log_prob(old_pred, latents, next_latents, coefs=coefs),
        diffdoctor.group_advantages(rewards, 4, scale=None), coefs=coefs, clip_range=(0.02, 0.02),
    )  # fmt: skip
    assert_same(loss, expected, model_pred)


def test_ddpo():
    """DDIM steps with noise, each sample at a timestep of its own."""
    model_pred, old_pred, latents, next_latents, _ = rollout()
    alphas_cumprod = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    timesteps, eta, clip_range = torch.tensor([981, 401, 201, 21]), 1.0, 1e-4
    current, before = (alphas_cumprod[t].reshape(-1, 1, 1, 1) for t in (timesteps, timesteps - 20))
    std = eta * torch.sqrt((1 - before) / (1 - current) * (1 - current / before))

    def log_prob(epsilon):
        original = (latents - torch.sqrt(1 - current) * epsilon) / torch.sqrt(current)
        mean = torch.sqrt(before) * original + torch.sqrt(1 - before - std**2) * epsilon
        value = -((next_latents - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
        return value.mean((1, 2, 3))

    advantages = torch.tensor([0.7, -1.0, 1.2, -0.3], dtype=torch.float64)
    model_pred = (old_pred + 1e-6 * torch.tensor([1, 1, 2, 2]).reshape(-1, 1, 1, 1)).requires_grad_()
    expected = clipped_loss(log_prob(model_pred), log_prob(old_pred), advantages, clip_range).mean()
    coefs = diffdoctor.ddim_coefs(alphas_cumprod, timesteps, eta, num_inference_steps=50)
    loss = diffdoctor.policy_loss(
        model_pred, latents, next_latents, diffdoctor.policy_log_prob(old_pred, latents, next_latents, coefs=coefs),
        advantages, coefs=coefs, level="sample",
    )  # fmt: skip
    assert_same(loss, expected, model_pred)
