"""The method `grpo`: its gradient against the same computation written out, its steps against the schedulers' own."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from diffdoctor.runs.errors import UserError
from diffdoctor.training.ema import RunningAverage
from diffdoctor.training.processes import Processes, seed_of
from diffdoctor.treat import TreatConfig, terms
from diffdoctor.treat.drawing import Drawing, Purpose
from diffdoctor.treat.families import family_of
from diffdoctor.treat.group_policy import GroupPolicy, window_of
from diffdoctor.treat.lora import add_lora
from diffdoctor.treat.reward import checked_reward
from diffdoctor.treat.rows import RowStore
from diffdoctor.treat.sampling import Guidance, Sampling
from diffdoctor.treat.schedulers import Sampler
from support.gpu import on_gpu
from support.tiny_pipelines import PROMPTS, tiny_pipeline
from support.treatment import random_detector

STEPS, SIZE, GROUP = 4, 16, 2
STEP = 3


class Bench:
    """A tiny Stable Diffusion with a LoRA that does something, drawn from by DDIM: two groups of two pictures."""

    def __init__(self, scale, **options):
        import diffusers

        self.pipeline = tiny_pipeline("sd", prediction_type="v_prediction")
        scheduler = diffusers.DDIMScheduler.from_config(self.pipeline.scheduler.config, clip_sample=False)
        self.pipeline.scheduler = self.scheduler = scheduler
        family = family_of(self.pipeline)
        self.parameters = add_lora(family, rank=2, alpha=4.0, groups=("attention",), seed=0)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        self.config = TreatConfig(
            method="grpo", batch_size=4, group_size=GROUP, sampling_steps=STEPS, guidance_scale=scale, grpo_window=2,
            replay_area=0.0, height=SIZE, width=SIZE, merge_rollout=False, **{"kl_weight": 0.0, **options},
        )  # fmt: skip
        sampler = Sampler(scheduler, device=torch.device("cpu"), timestep_options={"num_inference_steps": STEPS})
        self.sampling = Sampling(family, sampler, Guidance(scale), random_detector())
        self.processes = Processes("cpu")
        self.drawing = Drawing(self.sampling, PROMPTS, self.config, self.processes, (SIZE, SIZE))
        self.drawing.encode(RowStore("prompts", 2**20))
        self.initial = RunningAverage(self.parameters, float(bool(self.config.kl_weight)))
        for value in self.initial.values:
            value += 0.05 * torch.randn(value.shape, generator=generator)

    def policy(self, reward=None):
        parts = (self.sampling, self.drawing, self.config, self.processes, STEP, reward, self.initial)
        return GroupPolicy(*parts)

    def velocity(self, latents, t):
        rows = [self.drawing.prompt_row(STEP * 2 + group) for group in (0, 0, 1, 1)]
        unet, text = self.pipeline.unet, self.drawing.conditioning.rows(torch.arange(len(PROMPTS)))
        along = unet(latents, t, text.positive["encoder_hidden_states"][rows]).sample
        if self.config.guidance_scale == 1.0:
            return along
        without = unet(latents, t, text.negative["encoder_hidden_states"][rows]).sample
        return without + self.config.guidance_scale * (along - without)

    def gaussian(self, latents, velocity, t, eta):
        """Mean and deviation of the next latents by DDIM's formula (arXiv 2010.02502, equations 12 and 16)."""
        table, previous = self.scheduler.alphas_cumprod, int(t) - 1000 // STEPS
        c, p = table[t], table[previous] if previous >= 0 else self.scheduler.final_alpha_cumprod
        clean, noise = c.sqrt() * latents - (1 - c).sqrt() * velocity, c.sqrt() * velocity + (1 - c).sqrt() * latents
        sigma = eta * ((1 - p) / (1 - c) * (1 - c / p)).sqrt()
        return p.sqrt() * clean + (1 - p - sigma**2).sqrt() * noise, sigma

    def drawn(self, window):
        """Latents before and after every step, drawn by hand from the seeds of the step."""
        timesteps, config = self.sampling.sampler.timesteps, self.config
        seeds = [seed_of(config.seed, Purpose.PICTURES, STEP, group) for group in (0, 0, 1, 1)]
        own = [torch.Generator().manual_seed(seed_of(config.seed, Purpose.POLICY, STEP, n)) for n in range(4)]
        latents = [torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])]
        with torch.no_grad():
            for i, t in enumerate(timesteps):
                eta = config.grpo_eta if i in window else 0.0
                mean, sigma = self.gaussian(latents[-1], self.velocity(latents[-1], t), t, eta)
                noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in own]) if i in window else 0.0
                latents.append(mean + sigma * noise)
        return latents

    def advantage(self, final, reward=None):
        pictures, confidence = self.sampling.diagnose(final)
        groups = (-confidence).view(2, GROUP, 1, SIZE, SIZE)
        advantage = (groups - groups.mean(1, keepdim=True)).view(4, 1, SIZE, SIZE)
        if reward is None:
            return advantage
        given = reward(pictures, None).view(2, GROUP)
        given = (given - given.mean(1, keepdim=True)) / (given.std(1, correction=0, keepdim=True) + 1e-4)
        return advantage + self.config.reward_weight * given.view(4, 1, 1, 1)

    def loss(self, drawn, advantage, window, old=None):
        """The loss with a graph and the ratios; `old`: log-probabilities by step, None for those of today."""
        config, loss, ratios, found = self.config, 0.0, [], {}
        level = F.interpolate(advantage, (8, 8), mode="area")
        timesteps = self.sampling.sampler.timesteps

        def means():
            return {
                i: self.gaussian(drawn[i], self.velocity(drawn[i], timesteps[i]), timesteps[i], config.grpo_eta)
                for i in window
            }

        with torch.no_grad(), self.initial.in_place():
            before = means()
        for i, (mean, sigma) in means().items():
            log_prob = (-((drawn[i + 1] - mean) ** 2) / (2 * sigma**2)).mean(1, keepdim=True)
            found[i] = log_prob.detach()
            ratio, clip = (log_prob - (found if old is None else old)[i]).exp(), config.grpo_clip
            term = torch.maximum(-level * ratio, -level * ratio.clamp(1 - clip, 1 + clip))
            term = term + config.kl_weight * ((mean - before[i][0]) ** 2 / (2 * sigma**2)).mean(1, keepdim=True)
            loss = loss + term.mean() / len(window)
            ratios.append(ratio.detach())
        return loss, torch.cat(ratios), found

    def gradient(self):
        found = [p.grad.clone() for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return found


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 2e-4 * b.norm() + 1e-9
    assert sum(float(b.norm()) for b in theirs) > 1e-5


def brightness(pictures, prompts):
    return pictures.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("scale", "options", "reward"),
    [(1.0, {}, None), (5.0, {"grpo_eta": 1.0}, None), (1.0, {"kl_weight": 0.5, "reward_weight": 2.0}, brightness)],
    ids=["default", "guidance", "kl-reward"],
)
def test_gradient_by_hand(scale, options, reward):
    bench = Bench(scale, **options)
    policy = bench.policy(None if reward is None else checked_reward(reward))
    loss, ours = policy.backward(), bench.gradient()
    window = window_of(2, range(STEPS - 1), torch.Generator().manual_seed(seed_of(0, Purpose.METHOD, STEP)))
    drawn = bench.drawn(window)
    advantage = bench.advantage(drawn[-1], reward)
    torch.testing.assert_close(policy.parts[0].advantage, advantage, atol=1e-5, rtol=1e-4)
    theirs, ratios, _ = bench.loss(drawn, advantage, window)
    assert policy.replayed == 4
    assert bool((ratios == 1).all())
    assert abs(loss - float(theirs.detach())) < 1e-4
    assert_same(ours, torch.autograd.grad(theirs, bench.parameters))


def test_a_second_update_is_clipped_against_the_first():
    bench = Bench(1.0, grpo_updates=2, grpo_clip=0.01)
    policy = bench.policy()
    policy.backward()
    bench.gradient()
    drawn, advantage = policy.parts[0].rollout.latents, policy.parts[0].advantage
    _, _, old = bench.loss(drawn, advantage, policy.window)
    generator = torch.Generator().manual_seed(4)
    for parameter in bench.parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    loss, ours = policy.backward(), bench.gradient()
    theirs, ratios, _ = bench.loss(drawn, advantage, policy.window, old)
    outside = float(((ratios - 1).abs() > 0.01).float().mean())
    assert 0.05 < outside < 0.95  # some are cut, some are not
    assert abs(loss - float(theirs.detach())) < 1e-5
    assert_same(ours, torch.autograd.grad(theirs, bench.parameters))


def test_window():
    generator = torch.Generator().manual_seed(0)
    found = {window_of(3, range(9), generator) for _ in range(200)}
    assert {window.start for window in found} == set(range(7))
    assert {len(window) for window in found} == {3}
    assert {window_of(9, range(3), generator) for _ in range(5)} == {range(3)}


SCHEDULERS = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "TCDScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"solver_order": 1},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_steps_are_the_schedulers_own(kind):
    """Without noise those of the deterministic ones; with all of it the mean of the ancestral ones."""
    import diffusers

    options = SCHEDULERS[kind]
    if kind != "FlowMatchEulerDiscreteScheduler":
        options = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", **options}
    scheduler = getattr(diffusers, kind)(**options)
    sampler = Sampler(scheduler, device=torch.device("cpu"), timestep_options={"num_inference_steps": 7})
    ancestral = kind in ("DDPMScheduler", "EulerAncestralDiscreteScheduler")
    coefs = sampler.policy_coefs(1.0 if ancestral else 0.0, range(7))
    generator = torch.Generator().manual_seed(0)
    latents, prediction = torch.randn(2, 1, 4, 8, 8, generator=generator)
    for step in range(6):
        x = latents * sampler.initial_scale
        sampler.restore(None)
        generators = [torch.Generator().manual_seed(1)]
        theirs = sampler.step(prediction, step, x, generators)
        a, b, sigma = coefs[step]
        ours = a * x + b * prediction
        if ancestral:
            ours = ours + sigma * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_same_pictures_whatever_the_part_of_the_batch():
    def latents(**options):
        policy = Bench(1.0, **options).policy()
        return torch.cat([part.rollout.final for part in policy.parts])

    whole = latents()
    torch.testing.assert_close(latents(micro_batch_size=3), whole, atol=1e-5, rtol=1e-4)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"batch_size": 6, "group_size": 4}, "batch_size: expected a multiple of group_size 4, got 6"),
        ({"grpo_level": "picture"}, "grpo_level: expected one of pixel, sample"),
        ({"sampling_steps": 1}, "sampling_steps: expected at least 2 for grpo, got 1"),
        ({"grpo_eta": 0.0}, "grpo_eta: expected a positive number"),
    ],
)
def test_options_that_cannot_be(options, names):
    with pytest.raises(UserError, match=names):
        TreatConfig(method="grpo", **options)


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_pictures_are_not_kept_when_they_are_diagnosed(method, monkeypatch):
    bench, drawn, kept = Bench(1.0, micro_batch_size=2), [], []
    diagnose = bench.drawing.diagnose

    def watched(rollout):
        kept.append(sum(picture() is not None for picture in drawn))
        pictures, confidence = diagnose(rollout)
        drawn.append(weakref.ref(pictures))
        return pictures, confidence

    def replayed(*_, **__):
        kept.append(sum(picture() is not None for picture in drawn))
        return 0.0, 0

    monkeypatch.setattr(bench.drawing, "diagnose", watched)
    monkeypatch.setattr(terms, "artifact_term", replayed)
    if method == "grpo":
        bench.policy()
    else:
        terms.sampled_term(bench.drawing, SimpleNamespace(old=None, initial=None), STEP)
    assert len(drawn) == 2
    assert not any(kept)


def test_rewards_may_be_numbers_on_a_gpu():
    found = checked_reward(lambda pictures, prompts: [on_gpu(0.5), on_gpu(0.25)])(torch.rand(2, 3, 4, 4), ["a", "b"])
    assert found.tolist() == [0.5, 0.25]


def test_a_reward_that_is_none():
    pictures = torch.zeros(2, 3, 4, 4)
    with pytest.raises(UserError, match=r"reward: expected 2 numbers, one a picture, got \(2, 1\)"):
        checked_reward(lambda pictures, prompts: torch.zeros(2, 1))(pictures, ["a", "b"])
    with pytest.raises(UserError, match="reward: expected finite numbers, got nan"):
        checked_reward(lambda pictures, prompts: [0.0, float("nan")])(pictures, ["a", "b"])
    with pytest.raises(TypeError, match="reward: expected a function"):
        checked_reward(3)
