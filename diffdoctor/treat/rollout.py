"""Full sampling without a graph, and the replay of chosen steps of chosen pictures with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diffdoctor.treat.families import Conditioning
from diffdoctor.treat.sampling import Sampling
from diffdoctor.treat.schedulers import Sampler


@dataclass
class Rollout:
    """What a replay needs of the sampling of B pictures.

    Attributes:
        latents: before step i, (B, C, h, w), of videos (B, C, t, h, w), for every stored step i; without a graph.
        states: the scheduler's state before step i.
        generator_states: of the B pictures' generators before step i, for stochastic schedulers.
        final: as the latents, after the last step.
        conditioning: of the B prompts.
        generators: the B pictures' generators, as the roll-out left them.
    """

    latents: dict[int, torch.Tensor]
    states: dict[int, dict]
    generator_states: dict[int, list[torch.Tensor]]
    final: torch.Tensor
    conditioning: Conditioning
    generators: list[torch.Generator]

    def generators_at(self, step: int, index: Sequence[int]) -> list[torch.Generator] | None:
        """New generators of the pictures at index, as they were before this step."""
        if step not in self.generator_states:
            return None
        states = self.generator_states[step]
        return [_generator_from(states[i]) for i in index]


def picture_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator on the CPU per picture, so that a picture depends on its own seed alone, on any device."""
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def initial_latents(
    sampling: Sampling, generators: Sequence[torch.Generator], height: int, width: int, device, dtype
) -> torch.Tensor:
    """First latents (B, C, h, w), (B, C, t, h, w) of videos: what the pipeline draws from the same generators."""
    shape = sampling.family.latent_shape(height, width)
    noise = torch.stack([torch.randn(shape, generator=generator, dtype=dtype) for generator in generators])
    return noise.to(device) * sampling.sampler.initial_scale


@torch.no_grad()
def roll_out(
    sampling: Sampling,
    conditioning: Conditioning,
    latents: torch.Tensor,
    generators: list[torch.Generator],
    *,
    keep: Sequence[int] = (),
    chunk: int | None = None,
    coefs: Sequence[tuple[float, float, float]] | None = None,
    noise: Sequence[torch.Generator] | None = None,
) -> Rollout:
    """Sample without a graph.

    Args:
        sampling: whose predictions and steps are taken.
        conditioning: of B prompts.
        latents: (B, C, h, w), from `initial_latents`.
        generators: B, for stochastic schedulers; advanced as the pipeline's own call would.
        keep: the steps before which latents and states are stored for a replay.
        chunk: pictures per call of the denoiser; None: all at once.
        coefs: (a, b, sigma) of every step, whose next latents are then drawn from N(a latents + b prediction, sigma^2);
            None: the scheduler's own steps.
        noise: B generators, which such steps draw from.
    """
    sampler, kept = sampling.sampler, set(keep)
    stored, states, generator_states = {}, {}, {}
    sampler.restore(None)
    for step in range(len(sampler)):
        if step in kept:
            stored[step], states[step] = latents, sampler.state()
            if sampler.stochastic:
                generator_states[step] = [generator.get_state() for generator in generators]
        model_input = sampler.scale_input(latents, step)
        prediction = _predict_in_chunks(sampling, model_input, step, conditioning, chunk)
        if coefs is None:
            latents = sampler.step(prediction, step, latents, generators)
        else:
            latents = _drawn(latents, prediction, coefs[step], noise)
    return Rollout(stored, states, generator_states, latents, conditioning, generators)


def replay(
    sampling: Sampling,
    rollout: Rollout,
    index: torch.Tensor,
    *,
    first: int,
    graph_steps: Sequence[int] | None = None,
    detach_input: bool = False,
    modulate_output: Callable[[torch.Tensor], torch.Tensor] | None = None,
    modulate_latents: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Repeat the steps from `first` on, with a graph, for the pictures at index (M,): final latents (M, C, h, w).

    Args:
        sampling: as in the roll-out.
        rollout: of B pictures.
        index: (M,) which of them.
        first: a step that the roll-out kept.
        graph_steps: the steps whose prediction carries a gradient; None: all from `first` on.
        detach_input: cut the graph at the denoiser's input, so that a gradient passes along the latents' linear path
            alone.
        modulate_output: applied to each prediction that carries a gradient.
        modulate_latents: applied to the latents after each step that carries a gradient.
    """
    sampler = sampling.sampler
    chosen = range(first, len(sampler)) if graph_steps is None else graph_steps
    conditioning = rollout.conditioning.rows(index)
    latents = rollout.latents[first].index_select(0, index.to(rollout.final.device))
    generators = rollout.generators_at(first, index.tolist())
    sampler.restore(rollout.states[first], index)
    for step in range(first, len(sampler)):
        with_graph = step in chosen
        model_input = sampler.scale_input(latents.detach() if detach_input or not with_graph else latents, step)
        with torch.set_grad_enabled(with_graph and torch.is_grad_enabled()):
            prediction = sampling.predict(model_input, step, conditioning)
        if with_graph and modulate_output is not None:
            prediction = modulate_output(prediction)
        latents = sampler.step(prediction, step, latents, generators)
        if with_graph and modulate_latents is not None:
            latents = modulate_latents(latents)
    return latents


@torch.no_grad()
def redraw_inside(
    sampler: Sampler,
    predict: Callable[[torch.Tensor, int], torch.Tensor],
    clean: torch.Tensor,
    region: torch.Tensor,
    noise: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """Sample finished latents again inside a region, from an earlier noise level on; outside they are held.

    At each step the estimate of the clean latents is replaced by the given ones outside the region, and the noise by
    the given one, as in RePaint (arXiv 2201.09865) without its resampling.

    Args:
        sampler: the steps.
        predict: the guided prediction (B, C, h, w) for latents (B, C, h, w) before the denoiser's input is scaled, at a
            step.
        clean: (B, C, h, w), the latents to change, fp32.
        region: (B, 1, h, w) in [0, 1]: 1 where they are drawn again.
        noise: (B, C, h, w), standard normal.
        first: the step to begin at; 0: from noise alone inside the region.

    Returns:
        (B, C, h, w).
    """
    latents = sampler.renoised(clean, noise, first)
    for step in range(first, len(sampler)):
        denoised = sampler.denoised(predict(latents, step), step, latents)
        estimate = torch.lerp(clean, denoised, region)
        if step + 1 < len(sampler):
            noise = torch.lerp(noise, sampler.noise_of(estimate, latents, step), region)
            latents = sampler.renoised(estimate, noise, step + 1)
    return estimate


def _drawn(latents, prediction, coefs, generators) -> torch.Tensor:
    a, b, sigma = coefs
    mean = a * latents + b * prediction.to(latents.dtype)
    if sigma == 0:
        return mean
    noise = torch.stack([torch.randn(latents.shape[1:], generator=g, dtype=latents.dtype) for g in generators])
    return mean + sigma * noise.to(latents.device)


def _predict_in_chunks(sampling, model_input, step, conditioning, chunk) -> torch.Tensor:
    if chunk is None or chunk >= len(model_input):
        return sampling.predict(model_input, step, conditioning)
    parts = []
    for rows in torch.arange(len(model_input)).split(chunk):
        parts.append(sampling.predict(model_input[rows[0] : rows[-1] + 1], step, conditioning.rows(rows)))
    return torch.cat(parts)


def _generator_from(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator("cpu")
    generator.set_state(state)
    return generator
