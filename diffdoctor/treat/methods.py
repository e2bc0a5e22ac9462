"""What a treatment learns from its own pictures, or does without them: the methods, by name in `METHODS`.

A method takes the pictures to replay, runs backward and returns their loss. One graph is used up before the next is
made. A further method is a function and a line in `METHODS`. `grpo` alone takes groups of pictures: `group_policy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from diffdoctor.ops.modulate_gradient import GradientModulator
from diffdoctor.ops.target import Target
from diffdoctor.ops.weighted_loss import weighted_loss
from diffdoctor.training.ema import RunningAverage
from diffdoctor.training.processes import seed_of
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.picture_loss import latents_gradient
from diffdoctor.treat.rollout import Rollout, replay
from diffdoctor.treat.sampling import Sampling

LV_REPEATS = 2


@dataclass
class Replay:
    """What a method works on.

    Attributes:
        sampling: as in the roll-out.
        rollout: of B pictures.
        config: the treatment's options.
        index: (M,) the pictures to replay.
        confidence: (M, 1, H, W), their maps, as `Family.maps_for_latents` gives them.
        generator: of the method's own random choices, the same on every process.
        seeds: of the M pictures, for random choices that belong to a picture.
        divisor: what the sum over pictures is divided by.
        old: the running average of the LoRA that old predictions come from; empty for the LoRA as it is.
        initial: the LoRA before the first step; empty where nothing is held to it.
        partners: (M, C, h, w) final latents whose pictures' gradient is taken in place of the pictures' own, or None.
    """

    sampling: Sampling
    rollout: Rollout
    config: TreatConfig
    index: torch.Tensor
    confidence: torch.Tensor
    generator: torch.Generator
    seeds: Sequence[int]
    divisor: float
    old: RunningAverage
    initial: RunningAverage
    partners: torch.Tensor | None = None

    @property
    def steps(self) -> int:
        """Sampling steps of the roll-out."""
        return len(self.sampling.sampler)

    @property
    def own(self) -> list[int]:
        """Those of them at which the denoiser that is tuned predicts."""
        return self.sampling.own_steps

    def final_latents(self, **options) -> torch.Tensor:
        """Final latents (M, C, h, w) with a graph: `rollout.replay` with its options, modulated by the maps."""
        return replay(
            self.sampling,
            self.rollout,
            self.index,
            modulate_output=self.modulator("output"),
            modulate_latents=self.modulator("latents"),
            **options,
        )

    def modulator(self, where: str) -> GradientModulator | None:
        """What the gradient passes at "output" (the denoiser's) or between "latents"; None: nothing there."""
        config = self.config
        if config.modulate != where:
            return None
        modulator = GradientModulator(artifact_grad=config.artifact_grad, clean_grad=config.clean_grad)
        modulator.set(self.confidence)
        return modulator

    def descend(self, latents: torch.Tensor, repeats: int = 1) -> float:
        """Decode and diagnose final latents with a graph, and run backward through all of it.

        Args:
            latents: (M, C, h, w), from `final_latents`.
            repeats: how many of these the method averages over.

        Returns:
            The loss.
        """
        gradient, loss = latents_gradient(
            self.sampling, latents.detach(), self.config, self.divisor * repeats, self.partners
        )
        latents.backward(gradient)
        return loss


def graph_step_count(grad_steps: int | None, steps: int) -> int:
    """How many of the steps carry a gradient where `grad_steps` are asked for; None: a quarter, rounded up."""
    return min(math.ceil(steps / 4) if grad_steps is None else grad_steps, steps)


def draft_k(batch: Replay) -> float:
    """The graph runs through the last grad_steps steps (DRaFT-K, arXiv 2309.17400)."""
    chosen = batch.own[-graph_step_count(batch.config.grad_steps, len(batch.own)) :]
    return batch.descend(batch.final_latents(first=chosen[0], graph_steps=chosen))


def full(batch: Replay) -> float:
    """The graph runs through every step."""
    return batch.descend(batch.final_latents(first=batch.own[0], graph_steps=batch.own))


def drtune(batch: Replay) -> float:
    """Evenly spaced steps with a random offset carry a gradient; the denoiser's input is detached (arXiv 2405.00760).

    What reaches a step's prediction comes down the latents' linear path alone, so early steps are taught without the
    product of all later denoiser Jacobians.
    """
    steps = len(batch.own)
    count = graph_step_count(batch.config.grad_steps, steps)
    stride = steps / count
    offset = float(torch.rand((), generator=batch.generator)) * stride
    chosen = {batch.own[min(int(offset + i * stride), steps - 1)] for i in range(count)}
    return batch.descend(batch.final_latents(first=batch.own[0], graph_steps=sorted(chosen), detach_input=True))


def draft_lv(batch: Replay) -> float:
    """The final latents are noised `LV_REPEATS` times to the last step's level; each last step carries a gradient.

    The low-variance form of DRaFT with one step (arXiv 2309.17400, section 3.3).
    """
    sampler, rollout = batch.sampling.sampler, batch.rollout
    last = batch.steps - 1
    clean = rollout.final.index_select(0, batch.index.to(rollout.final.device))
    loss = 0.0
    for repeat in range(LV_REPEATS):
        generators = [torch.Generator().manual_seed(seed_of(seed, repeat)) for seed in batch.seeds]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g, dtype=clean.dtype) for g in generators])
        # the noised latents have no history: a multistep scheduler takes this step at first order
        fresh = Rollout(
            latents={last: sampler.renoised(clean, noise.to(clean.device), last)},
            states={last: None},
            generator_states=rollout.generator_states,
            final=clean,
            conditioning=rollout.conditioning.rows(batch.index),
            generators=rollout.generators,
        )
        renoised = replace(batch, rollout=fresh, index=torch.arange(len(clean)))
        loss += batch.descend(renoised.final_latents(first=last), LV_REPEATS)
    return loss


def leap_steps(steps: Sequence[int], generator: torch.Generator) -> tuple[int, int]:
    """Two of the steps, every pair equally likely, the earlier one first."""
    first, second = sorted(torch.randperm(len(steps), generator=generator)[:2].tolist())
    return steps[first], steps[second]


def leap(batch: Replay) -> float:
    """Two random steps carry a gradient, joined by leaps: the first leads to the second, the second to the picture.

    A leap follows the prediction in one step however far it is. Where it lands is replaced by what the roll-out had
    there, so that the value is the roll-out's and the gradient the leap's; of the gradient that comes down through the
    second prediction `leap_discount` is kept. Early steps are taught at the cost of two predictions (LeapAlign, arXiv
    2604.15311, without its weights of trajectories). For other than flow schedulers the leap is DDIM's.
    """
    sampling, rollout = batch.sampling, batch.rollout
    sampler, conditioning = sampling.sampler, rollout.conditioning.rows(batch.index)
    first, second = sorted(rollout.latents)
    index = batch.index.to(rollout.final.device)
    start, middle, end = (
        latents.index_select(0, index) for latents in (rollout.latents[first], rollout.latents[second], rollout.final)
    )
    modulate_output, modulate_latents = batch.modulator("output"), batch.modulator("latents")

    def land(leapt, actual):
        joined = leapt + (actual - leapt).detach()
        return joined if modulate_latents is None else modulate_latents(joined)

    def denoised(latents, model_input, step):
        prediction = sampling.predict(sampler.model_input(model_input, step), step, conditioning)
        if modulate_output is not None:
            prediction = modulate_output(prediction)
        return sampler.denoised(prediction, step, latents)

    clean = denoised(start, start, first)
    noise = sampler.noise_of(clean, start, first)
    middle = land(sampler.renoised(clean, noise, second), middle)
    model_input = torch.lerp(middle.detach(), middle, batch.config.leap_discount)
    return batch.descend(land(denoised(middle, model_input, second), end))


def nft(batch: Replay) -> float:
    """The final latents are noised to random times, and the prediction there is moved against an old one.

    Where the map is clean the old prediction is held, where it is flagged the prediction is led away from what the
    picture asks for: `Target.contrastive`, DiffusionNFT (arXiv 2509.16117) per pixel. Neither the VAE nor the detector
    is in the graph, and the detector need not be differentiable. What is trained is the guided prediction that drew the
    picture. With `anchor_weight` it is also held, where the map is clean, to that of the model before the treatment.
    """
    config, sampling = batch.config, batch.sampling
    clean = batch.rollout.final.index_select(0, batch.index.to(batch.rollout.final.device))
    conditioning = batch.rollout.conditioning.rows(batch.index)

    def predict(model_input, timesteps):
        guidance = sampling.guidance
        return sampling.family.predict(model_input, timesteps, conditioning, guidance.scale, guidance.cfg_grad)

    losses = []
    for repeat in range(config.nft_repeats):
        noise, uniform = [], []
        for seed in batch.seeds:
            generator = torch.Generator().manual_seed(seed_of(seed, repeat))
            noise.append(torch.randn(clean.shape[1:], generator=generator, dtype=clean.dtype))
            uniform.append(torch.rand((), generator=generator))
        noise = torch.stack(noise).to(clean.device)
        pair = sampling.sampler.training_pair(clean, noise, torch.stack(uniform), sampling.own_times)
        model_input, timesteps, target = pair
        with torch.no_grad():
            with batch.old.in_place():
                old = predict(model_input, timesteps)
            if config.anchor_weight:
                with batch.initial.in_place():
                    before = predict(model_input, timesteps)
        prediction = predict(model_input, timesteps)
        target = Target.contrastive(target, old, clean=config.nft_clean, artifact=config.nft_artifact)
        loss = weighted_loss(prediction, target, batch.confidence, artifact_weight=1.0, reduction="sample").sum()
        if config.anchor_weight:
            held = weighted_loss(prediction, before, batch.confidence, artifact_weight=0.0, reduction="sample").sum()
            loss = loss + config.anchor_weight * held
        loss = loss / (batch.divisor * config.nft_repeats)
        loss.backward()
        losses.append(loss.detach())
    # read at the end: until then nothing waits for a GPU
    return float(sum(map(float, losses)))


@dataclass(frozen=True)
class Method:
    """One way to treat.

    Attributes:
        run: replays a batch, runs backward and returns the loss; None: the method replays nothing.
        checkpointed_steps: from (config, the steps at which the denoiser that is tuned predicts, generator of the
            method's random choices) to the steps before which the roll-out stores its state.
        draws_groups: whether it learns from groups of pictures, in place of a replay (`group_policy`). With neither,
            the offline term is all there is.
        needs_gradient: whether a gradient passes through the detector. Without one there is nothing to learn from a
            map that is the same everywhere.
        has_old: whether old predictions are asked for.
        offline_weight: of the offline term, where the options do not say.
        needs_pairs: whether there must be offline pairs, where the options do not say.
        anchor_weight: where there are no offline pairs and the options do not say.
        kl_weight: likewise.
    """

    run: Callable[[Replay], float] | None
    checkpointed_steps: Callable[[TreatConfig, Sequence[int], torch.Generator], tuple[int, ...]]
    draws_groups: bool = False
    needs_gradient: bool = True
    has_old: bool = False
    offline_weight: float = 2.0
    needs_pairs: bool = True
    anchor_weight: float = 0.0
    kl_weight: float = 0.0

    @property
    def samples(self) -> bool:
        """Whether pictures are sampled at all."""
        return self.run is not None or self.draws_groups


METHODS = {
    "draft_k": Method(draft_k, lambda config, own, _: (own[-graph_step_count(config.grad_steps, len(own))],)),
    "draft_lv": Method(draft_lv, lambda config, own, _: (own[-1],)),
    "drtune": Method(drtune, lambda config, own, _: (own[0],)),
    "full": Method(full, lambda config, own, _: (own[0],)),
    "grpo": Method(
        None,
        lambda config, own, _: (),
        draws_groups=True,
        needs_gradient=False,
        offline_weight=0.1,
        needs_pairs=False,
        kl_weight=0.04,
    ),
    "leap": Method(leap, lambda config, own, generator: leap_steps(own, generator)),
    "nft": Method(
        nft,
        lambda config, own, _: (),
        needs_gradient=False,
        has_old=True,
        offline_weight=0.1,
        needs_pairs=False,
        anchor_weight=0.4,
    ),
    "weighted": Method(None, lambda config, own, _: (), needs_gradient=False, offline_weight=1.0),
}
