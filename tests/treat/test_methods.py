"""Each method's gradient against the same computation written out by hand, with DDIM's formula and plain PyTorch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffdoctor.detector import ConvDetector
from diffdoctor.training.ema import RunningAverage
from diffdoctor.training.processes import seed_of
from diffdoctor.treat import TreatConfig
from diffdoctor.treat.config import _CHOICES as config_choices
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import add_lora
from diffdoctor.treat.methods import METHODS, graph_step_count
from diffdoctor.treat.offline import checked_pairs, with_anchor
from diffdoctor.treat.rollout import initial_latents, picture_generators, roll_out
from diffdoctor.treat.sampling import Guidance, Sampling
from diffdoctor.treat.schedulers import Sampler
from diffdoctor.treat.terms import artifact_term
from support.tiny_pipelines import PROMPTS, tiny_pipeline

STEPS = 5
SIZE = 16


class Bench:
    """A tiny Stable Diffusion with a LoRA that does something, a random detector, and three sampled pictures."""

    def __init__(self, scale):
        import diffusers

        self.pipeline = tiny_pipeline("sd", prediction_type="v_prediction")
        self.pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            self.pipeline.scheduler.config, clip_sample=False, timestep_spacing="trailing"
        )
        self.family = family_of(self.pipeline)
        self.parameters = add_lora(self.family, rank=2, alpha=4.0, groups=("attention", "convolution"), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.detector = ConvDetector((8, 8)).eval().requires_grad_(False)
        self.scale = scale
        cpu = torch.device("cpu")
        self.sampler = Sampler(self.pipeline.scheduler, device=cpu, timestep_options={"num_inference_steps": STEPS})
        self.conditioning = self.family.encode_prompts(
            PROMPTS, guidance_scale=scale, height=SIZE, width=SIZE, device=cpu
        )
        # weights that old predictions come from, and those before the treatment: neither are the present ones
        self.old, self.initial = (RunningAverage(self.parameters, 0.5, warm_up=False) for _ in range(2))
        for average in (self.old, self.initial):
            average.values = [v + 0.05 * torch.randn(v.shape, generator=generator) for v in average.values]
        generators = picture_generators((5, 6, 7))
        self.latents = initial_latents(self.sampling(), generators, SIZE, SIZE, cpu, torch.float32)
        self.generators = generators

    def sampling(self, cfg_grad="both"):
        return Sampling(self.family, self.sampler, Guidance(self.scale, cfg_grad), self.detector)

    def ours(self, method, grad_steps, seed=9, **options):
        """The LoRA's gradient by `artifact_term`, every picture replayed."""
        config = TreatConfig(
            method=method, grad_steps=grad_steps, guidance_scale=self.scale, replay_area=0.0, **options
        )
        keep = METHODS[method].checkpointed_steps(config, range(STEPS), torch.Generator().manual_seed(seed))
        sampling = self.sampling(config.cfg_grad)
        rollout = roll_out(sampling, self.conditioning, self.latents, self.generators, keep=keep)
        _, confidence = sampling.diagnose(rollout.final)
        for parameter in self.parameters:
            parameter.grad = None
        loss, replayed = artifact_term(
            sampling, rollout, confidence, config,
            total=len(self.latents), generator=torch.Generator().manual_seed(seed), seeds=(5, 6, 7),
            old=self.old, initial=self.initial,
        )  # fmt: skip
        assert replayed == len(self.latents)
        return loss, [parameter.grad.clone() for parameter in self.parameters], confidence

    # --- the same by hand -------------------------------------------------------------------------------------------

    def alpha_sigma(self, step):
        alpha_bar = self.pipeline.scheduler.alphas_cumprod[self.sampler.timesteps[step]]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def velocity(self, latents, step):
        return self.velocity_at(latents, self.sampler.timesteps[step])

    def velocity_at(self, latents, t):
        unet, text = self.pipeline.unet, self.conditioning
        along = unet(latents, t, text.positive["encoder_hidden_states"]).sample
        if self.scale == 1.0:
            return along
        without = unet(latents, t, text.negative["encoder_hidden_states"]).sample
        return without + self.scale * (along - without)

    def next_latents(self, latents, velocity, step):
        alpha, sigma = self.alpha_sigma(step)
        clean, noise = alpha * latents - sigma * velocity, alpha * velocity + sigma * latents
        if step + 1 == STEPS:
            final = self.pipeline.scheduler.final_alpha_cumprod
            return final.sqrt() * clean + (1 - final).sqrt() * noise
        alpha, sigma = self.alpha_sigma(step + 1)
        return alpha * clean + sigma * noise

    def loss(self, latents):
        pictures = self.pipeline.vae.decode(latents / self.pipeline.vae.config.scaling_factor).sample / 2 + 0.5
        # forward value clamped, gradient as if it were not
        pictures = pictures + (pictures.clamp(0, 1) - pictures).detach()
        logits = F.interpolate(self.detector(pictures), (SIZE, SIZE), mode="bilinear", align_corners=False)
        confidence = logits.sigmoid().flatten(1)
        counted = (confidence > 0.1).float()
        return ((confidence * counted).sum(1) / (counted.sum(1) + 1e-5)).mean()

    def by_hand(self, chosen, *, detach_input=False, hook=None):
        latents = self.latents
        for step in range(STEPS):
            with torch.set_grad_enabled(step in chosen):
                velocity = self.velocity(latents.detach() if detach_input else latents, step)
            if hook is not None and step in chosen:
                velocity.register_hook(hook)
            latents = self.next_latents(latents, velocity, step)
        return self.loss(latents)

    def final(self):
        latents = self.latents
        with torch.no_grad():
            for step in range(STEPS):
                latents = self.next_latents(latents, self.velocity(latents, step), step)
        return latents

    def old_velocity(self, values, latents, t):
        """`velocity_at` where the LoRA has these values."""
        names = dict(zip(map(id, self.parameters), values, strict=True))
        own = {name: p for name, p in self.pipeline.unet.named_parameters() if id(p) in names}
        kept = {name: p.data for name, p in own.items()}
        for p in own.values():
            p.data = names[id(p)]
        try:
            with torch.no_grad():
                return self.velocity_at(latents, t)
        finally:
            for name, p in own.items():
                p.data = kept[name]

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.parameters)


@pytest.fixture(params=[1.0, 5.0], ids=["no-guidance", "guidance-5"])
def bench(request):
    return Bench(request.param)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9
    assert sum(float(b.norm()) for b in theirs) > 1e-4


@pytest.mark.parametrize(("method", "grad_steps", "chosen"), [("full", None, range(5)), ("draft_k", 2, (3, 4))])
def test_draft_and_full(bench, method, grad_steps, chosen):
    loss, ours, _ = bench.ours(method, grad_steps, modulate="none")
    theirs = bench.by_hand(chosen)
    assert abs(loss - float(theirs)) < 1e-5
    assert_same(ours, bench.gradient(theirs))


def test_modulation_by_one_changes_nothing(bench):
    _, plain, _ = bench.ours("draft_k", 2, modulate="none")
    _, ones, _ = bench.ours("draft_k", 2, artifact_grad=1.0, clean_grad=1.0)
    assert_same(ones, plain)


def test_modulation_at_the_output_is_a_hook_on_each_prediction(bench):
    _, ours, confidence = bench.ours("draft_k", 3, artifact_grad=1.0, clean_grad=0.2)
    level = F.interpolate(confidence, (8, 8), mode="area")
    modulation = 0.2 + 0.8 * level
    theirs = bench.gradient(bench.by_hand((2, 3, 4), hook=lambda gradient: gradient * modulation))
    assert_same(ours, theirs)
    plain = bench.gradient(bench.by_hand((2, 3, 4)))
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(ours, plain, strict=True)) > 0.05


def test_drtune(bench):
    seed = 3
    _, ours, _ = bench.ours("drtune", 2, seed=seed, modulate="none")
    offset = float(torch.rand((), generator=torch.Generator().manual_seed(seed))) * (STEPS / 2)
    chosen = {int(offset), int(offset + STEPS / 2)}
    assert len(chosen) == 2
    assert max(chosen) < STEPS
    assert_same(ours, bench.gradient(bench.by_hand(chosen, detach_input=True)))


def test_draft_lv(bench):
    _, ours, _ = bench.ours("draft_lv", None, modulate="none")
    latents = bench.final()
    alpha, sigma = bench.alpha_sigma(STEPS - 1)
    total = 0.0
    for repeat in range(2):
        seeds = [seed_of(own, repeat) for own in (5, 6, 7)]
        noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        noisy = alpha * latents + sigma * torch.stack(noise)
        total = total + bench.loss(bench.next_latents(noisy, bench.velocity(noisy, STEPS - 1), STEPS - 1)) / 2
    assert_same(ours, bench.gradient(total))


@pytest.mark.parametrize("discount", [0.0, 0.3, 1.0])
def test_leap(bench, discount):
    seed = 4
    loss, ours, _ = bench.ours("leap", None, seed=seed, modulate="none", leap_discount=discount)
    first, second = sorted(torch.randperm(STEPS, generator=torch.Generator().manual_seed(seed))[:2].tolist())
    assert first < second - 1
    drawn = [bench.latents]
    with torch.no_grad():
        for step in range(STEPS):
            drawn.append(bench.next_latents(drawn[-1], bench.velocity(drawn[-1], step), step))
    alpha, sigma = bench.alpha_sigma(first)
    velocity = bench.velocity(drawn[first], first)
    clean, noise = alpha * drawn[first] - sigma * velocity, alpha * velocity + sigma * drawn[first]
    alpha, sigma = bench.alpha_sigma(second)
    leapt = alpha * clean + sigma * noise
    middle = leapt + (drawn[second] - leapt).detach()
    velocity = bench.velocity(discount * middle + (1 - discount) * middle.detach(), second)
    leapt = alpha * middle - sigma * velocity
    theirs = bench.loss(leapt + (drawn[-1] - leapt).detach())
    assert abs(loss - float(theirs)) < 1e-5
    assert_same(ours, bench.gradient(theirs))


@pytest.mark.parametrize(
    "options",
    [{}, {"nft_clean": 0.5, "nft_artifact": -2.0, "nft_repeats": 2}, {"anchor_weight": 0.7}, {"map_source": "uniform"}],
    ids=["default", "repeated", "anchored", "uniform"],
)
def test_nft(bench, options):
    loss, ours, confidence = bench.ours("nft", None, **options)
    clean, artifact = options.get("nft_clean", 0.0), options.get("nft_artifact", -1.0)
    repeats, anchor = options.get("nft_repeats", 1), options.get("anchor_weight", 0.0)
    if "map_source" in options:
        confidence = confidence.mean((2, 3), keepdim=True).expand_as(confidence)
    level = F.interpolate(confidence, (8, 8), mode="area")
    latents, total = bench.final(), 0.0
    for repeat in range(repeats):
        generators = [torch.Generator().manual_seed(seed_of(own, repeat)) for own in (5, 6, 7)]
        noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
        t = (torch.stack([torch.rand((), generator=g) for g in generators]) * 1000).long()
        alpha_bar = bench.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        asked = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
        old = bench.old_velocity(bench.old.values, noisy, t)
        before = bench.old_velocity(bench.initial.values, noisy, t)
        velocity = bench.velocity_at(noisy, t)
        target = old + (clean + (artifact - clean) * level) * (asked - old)
        total = total + ((velocity - target) ** 2).mean() / repeats
        total = total + anchor * ((1 - level) * (velocity - before) ** 2).mean() / repeats
    assert abs(loss - float(total)) < 1e-4 * float(total)
    assert_same(ours, bench.gradient(total))


def test_nft_is_anchored_where_it_has_no_pairs():
    config, pair = TreatConfig(method="nft"), (np.zeros((1, 8, 8, 3), np.uint8), ["a digit"])
    assert with_anchor(config, None).anchor_weight == 0.4
    assert with_anchor(config, checked_pairs(pair, config)).anchor_weight == 0
    unused = TreatConfig(method="nft", offline_weight=0.0)
    assert with_anchor(unused, checked_pairs(pair, unused)).anchor_weight == 0.4
    assert with_anchor(TreatConfig(method="nft", anchor_weight=0.0), None).anchor_weight == 0
    assert with_anchor(TreatConfig(method="draft_k"), None).anchor_weight == 0


def test_grpo_is_held_by_its_divergence_where_it_has_no_pairs():
    config, pair = TreatConfig(method="grpo"), (np.zeros((1, 8, 8, 3), np.uint8), ["a digit"])
    assert with_anchor(config, None).kl_weight == 0.04
    assert with_anchor(config, checked_pairs(pair, config)).kl_weight == 0
    assert with_anchor(TreatConfig(method="grpo", kl_weight=0.0), None).kl_weight == 0
    assert with_anchor(TreatConfig(method="nft"), None).kl_weight == 0


def test_guidance_gradient_through_the_prompt_alone():
    bench = Bench(5.0)
    _, ours, _ = bench.ours("draft_k", 1, cfg_grad="cond", modulate="none")
    with torch.no_grad():
        latents = bench.latents
        for step in range(STEPS - 1):
            latents = bench.next_latents(latents, bench.velocity(latents, step), step)
        t, text = bench.sampler.timesteps[-1], bench.conditioning
        without = bench.pipeline.unet(latents, t, text.negative["encoder_hidden_states"]).sample
    along = bench.pipeline.unet(latents, t, text.positive["encoder_hidden_states"]).sample
    velocity = without + 5.0 * (along - without)
    assert_same(ours, bench.gradient(bench.loss(bench.next_latents(latents, velocity, STEPS - 1))))


def test_shuffled_maps_bring_another_pictures_gradient():
    bench = Bench(1.0)
    _, ours, confidence = bench.ours("draft_k", 1, map_source="shuffled", artifact_grad=1.0, clean_grad=0.2)
    shift = int(torch.randint(1, 3, (), generator=torch.Generator().manual_seed(9)))
    partner = [(i - shift) % 3 for i in range(3)]
    with torch.no_grad():
        latents = bench.latents
        for step in range(STEPS - 1):
            latents = bench.next_latents(latents, bench.velocity(latents, step), step)
    velocity = bench.velocity(latents, STEPS - 1)
    final = bench.next_latents(latents, velocity, STEPS - 1)
    decoded = bench.pipeline.vae.decode(final / bench.pipeline.vae.config.scaling_factor).sample
    pictures = decoded.detach().requires_grad_()
    encoded_loss = bench.detector(pictures / 2 + 0.5 + ((pictures / 2 + 0.5).clamp(0, 1) - pictures / 2 - 0.5).detach())
    logits = F.interpolate(encoded_loss, (SIZE, SIZE), mode="bilinear", align_corners=False)
    level = logits.sigmoid().flatten(1)
    counted = (level > 0.1).float()
    loss = ((level * counted).sum(1) / (counted.sum(1) + 1e-5)).mean()
    gradient = torch.autograd.grad(loss, pictures)[0][partner]
    modulation = 0.2 + 0.8 * F.interpolate(confidence[partner], (8, 8), mode="area")
    velocity.register_hook(lambda g: g * modulation)
    assert_same(ours, torch.autograd.grad(decoded, bench.parameters, gradient))


def test_the_options_know_every_method():
    assert config_choices["method"] == tuple(METHODS)


def test_step_counts():
    def checkpointed_steps(method, grad_steps, steps):
        return METHODS[method].checkpointed_steps(TreatConfig(grad_steps=grad_steps), range(steps), torch.Generator())

    assert [graph_step_count(None, steps) for steps in (1, 4, 10, 20)] == [1, 1, 3, 5]
    assert graph_step_count(9, 4) == 4
    assert checkpointed_steps("draft_k", 3, 10) == (7,)
    assert checkpointed_steps("draft_lv", 3, 10) == (9,)
    assert checkpointed_steps("drtune", 3, 10) == checkpointed_steps("full", None, 10) == (0,)
    assert {checkpointed_steps("leap", None, 2) for _ in range(5)} == {(0, 1)}
    assert checkpointed_steps("weighted", None, 10) == checkpointed_steps("nft", None, 10) == ()
