"""What draws a treatment's pictures and what diagnoses them: one object for the parts that always go together."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from diffdoctor.detector.confidence import by_frame, confidence_of
from diffdoctor.treat.families import Conditioning, Family
from diffdoctor.treat.schedulers import Sampler


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance.

    Attributes:
        scale: the family's guidance scale; a second denoiser's is the family's own `guidance_scale_2`.
        cfg_grad: whether the negative prediction carries a gradient: "both" (it does) or "cond" (it does not).
    """

    scale: float = 1.0
    cfg_grad: str = "both"


@dataclass
class Sampling:
    """A pipeline's way to a diagnosed picture.

    Attributes:
        family: of the pipeline.
        sampler: the steps of its scheduler.
        guidance: the same for roll-out and replay.
        detector: pictures (B, 3, H, W) in [0, 1] to logits (B, 1, h, w), with `.confidence`; None where nothing is
            diagnosed.
        frames_per_call: frames of videos that the detector is given at a time; None: all.
    """

    family: Family
    sampler: Sampler
    guidance: Guidance = field(default_factory=Guidance)
    detector: torch.nn.Module | None = None
    frames_per_call: int | None = None

    @functools.cached_property
    def own_times(self) -> tuple[float, float]:
        """The part of the distribution of times at which the denoiser that is tuned predicts."""
        return self.sampler.part_of_times(self.family.trains_at)

    @functools.cached_property
    def own_steps(self) -> list[int]:
        """The sampler's steps at which the denoiser that is tuned predicts: all, unless there are two."""
        return [step for step, time in enumerate(self.sampler.timesteps.tolist()) if self.family.trains_at(time)]

    def predict(self, latents: torch.Tensor, step: int, conditioning: Conditioning) -> torch.Tensor:
        """The guided prediction (B, C, h, w) at a step.

        Args:
            latents: (B, C, h, w), already through `Sampler.scale_input`.
            step: of the sampler.
            conditioning: of B prompts.
        """
        timestep = self.sampler.timesteps[step]
        return self.family.predict(latents, timestep, conditioning, self.guidance.scale, self.guidance.cfg_grad)

    @torch.no_grad()
    def diagnose(self, latents: torch.Tensor, chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode latents (B, C, h, w), or (B, C, t, h, w) of videos, and find what is broken, without a graph.

        Args:
            latents: final latents.
            chunk: pictures per call of the VAE and the detector; None: all at once.

        Returns:
            Pictures (B, 3, H, W) in [0, 1] and their confidence maps (B, 1, H, W); videos have T frames before H.
        """
        parts = latents.split(chunk or len(latents))
        pictures = torch.cat([self.family.decode(part).float().clamp(0, 1) for part in parts])
        maps = [
            confidence_of(self.detector, part, frames_per_call=self.frames_per_call)
            for part in pictures.split(chunk or len(pictures))
        ]
        return pictures, torch.cat(maps)

    def logits(self, pictures: torch.Tensor) -> torch.Tensor:
        """The detector's logits (B, 1, h, w) of pictures (B, 3, H, W), (B, 1, T, h, w) of videos; differentiable."""
        return by_frame(self.detector, pictures, self.frames_per_call)
