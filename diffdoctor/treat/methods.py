"""How much of the sampling carries a gradient: `draft_k`, `draft_lv`, `drtune`, `full`.

Each method yields, for the pictures to replay, one or several final latents with a graph; their losses are averaged,
and one graph is used up before the next is made. `weighted` samples nothing and has no entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from diffdoctor.training.processes import seed_of
from diffdoctor.treat.families import Family
from diffdoctor.treat.rollout import Guidance, Rollout, replay
from diffdoctor.treat.schedulers import Sampler

LV_REPEATS = 2
METHODS = ("draft_k", "draft_lv", "drtune", "full", "weighted")


@dataclass
class Replay:
    """What a method works on.

    Attributes:
        family, sampler, rollout, guidance: of the batch.
        index: (M,) the pictures to replay.
        modulate: "output", "latents" or None: where `modulator` acts.
        modulator: on a prediction or on latents (M, C, h, w).
        generator: of the method's own random choices, the same on every process.
        seeds: of the M pictures, for random choices of their own.
    """

    family: Family
    sampler: Sampler
    rollout: Rollout
    guidance: Guidance
    index: torch.Tensor
    modulate: str | None
    modulator: Callable[[torch.Tensor], torch.Tensor] | None
    generator: torch.Generator
    seeds: Sequence[int]

    def run(self, **options) -> torch.Tensor:
        """`replay` with this batch and this modulation."""
        return replay(
            self.family,
            self.sampler,
            self.rollout,
            self.index,
            self.guidance,
            modulate_output=self.modulator if self.modulate == "output" else None,
            modulate_latents=self.modulator if self.modulate == "latents" else None,
            **options,
        )


def graph_step_count(method: str, grad_steps: int, steps: int) -> int:
    """How many steps carry a gradient; grad_steps 0 stands for a quarter of the steps, rounded up."""
    if method == "full":
        return steps
    if method == "draft_lv":
        return 1
    return min(grad_steps or math.ceil(steps / 4), steps)


def kept_steps(method: str, grad_steps: int, steps: int) -> tuple[int, ...]:
    """The steps before which the roll-out stores its state for the method."""
    if method == "drtune":
        return (0,)
    if method == "weighted":
        return ()
    return (steps - graph_step_count(method, grad_steps, steps),)


def draft_k(batch: Replay, grad_steps: int) -> Iterator[torch.Tensor]:
    """The graph runs through the last grad_steps steps (DRaFT-K, arXiv 2309.17400)."""
    steps = len(batch.sampler)
    yield batch.run(first=steps - graph_step_count("draft_k", grad_steps, steps))


def full(batch: Replay, grad_steps: int) -> Iterator[torch.Tensor]:
    """The graph runs through every step."""
    yield batch.run(first=0)


def drtune(batch: Replay, grad_steps: int) -> Iterator[torch.Tensor]:
    """Evenly spaced steps with a random offset carry a gradient; the denoiser's input is detached (arXiv 2405.00760).

    What reaches a step's prediction comes down the latents' linear path alone, so early steps are taught without the
    product of all later denoiser Jacobians.
    """
    steps = len(batch.sampler)
    count = graph_step_count("drtune", grad_steps, steps)
    stride = steps / count
    offset = float(torch.rand((), generator=batch.generator)) * stride
    chosen = {min(int(offset + i * stride), steps - 1) for i in range(count)}
    yield batch.run(first=0, graph_steps=sorted(chosen), detach_input=True)


def draft_lv(batch: Replay, grad_steps: int) -> Iterator[torch.Tensor]:
    """The final latents are noised `LV_REPEATS` times to the last step's level; each last step carries a gradient.

    The low-variance form of DRaFT with one step (arXiv 2309.17400, section 3.3).
    """
    sampler, rollout = batch.sampler, batch.rollout
    last = len(sampler) - 1
    clean = rollout.final.index_select(0, batch.index.to(rollout.final.device))
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
        everything = torch.arange(len(clean))
        yield replace(batch, rollout=fresh, index=everything).run(first=last)


FINAL_LATENTS: dict[str, Callable[[Replay, int], Iterator[torch.Tensor]]] = {
    "draft_k": draft_k,
    "draft_lv": draft_lv,
    "drtune": drtune,
    "full": full,
}
"""Method name -> function from (batch, grad_steps) to final latents with a graph, each (M, C, h, w)."""
