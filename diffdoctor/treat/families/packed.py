"""What FLUX and FLUX.2 share: a transformer on packed tokens, and a schedule shifted by the picture's size."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from diffdoctor.ops.layout import Packed
from diffdoctor.treat.families.base import Family

PATCH = 2
"""Of the autoencoder's latents, a side of one token."""


class PackedFamily(Family):
    """A family whose pipeline's loop holds tokens; subclasses add `shift`, and all else that differs."""

    denoiser_name = "transformer"
    token_side: ClassVar[int]
    """Of the latents (B, C, h, w), a side of one token."""

    def shift(self, tokens: int, steps: int) -> float:
        """The schedule's shift parameter mu, of a picture of this many tokens."""
        raise NotImplementedError

    def from_pipeline(self, latents, height, width):
        _, h, w = self.latent_shape(height, width)
        return Packed(h, w, patch_size=self.token_side).unpack(latents)

    def to_pipeline(self, latents):
        return Packed(*latents.shape[2:], patch_size=self.token_side).pack(latents)

    def default_size(self):
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * PATCH

    def timestep_options(self, steps, height, width):
        _, h, w = self.latent_shape(height, width)
        options = {"mu": self.shift((h // self.token_side) * (w // self.token_side), steps)}
        if self.pipeline.scheduler.config.get("use_flow_sigmas"):
            return {**options, "num_inference_steps": steps}
        return {**options, "sigmas": np.linspace(1.0, 1 / steps, steps)}
