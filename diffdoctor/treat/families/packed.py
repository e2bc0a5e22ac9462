"""What FLUX and its kin share: a transformer on packed tokens, and a schedule shifted by the picture's size."""

from __future__ import annotations

import numpy as np
import torch

from diffdoctor.ops.layout import Packed
from diffdoctor.treat.families.base import Family, dynamic_shift

PATCH = 2
"""Of the autoencoder's latents, a side of one token."""


class PackedFamily(Family):
    """A family whose pipeline's loop holds tokens; subclasses add what differs."""

    denoiser_name = "transformer"
    token_side: int = PATCH
    """Of the latents (B, C, h, w), a side of one token."""
    leaves_flow_sigmas = False
    """Whether the pipeline's call leaves the noise levels to a scheduler that has `use_flow_sigmas`."""

    def shift(self, tokens: int, steps: int) -> float:
        """The schedule's shift parameter mu, of a picture of this many tokens."""
        return dynamic_shift(self.pipeline.scheduler.config, tokens, max_shift=1.15)

    def latent_shape(self, height, width):
        multiple = self.size_multiple() // self.token_side
        return self.denoiser.config.in_channels // self.token_side**2, height // multiple, width // multiple

    def from_pipeline(self, latents, height, width):
        _, h, w = self.latent_shape(height, width)
        return Packed(h, w, patch_size=self.token_side).unpack(latents)

    def to_pipeline(self, latents):
        return Packed(*latents.shape[2:], patch_size=self.token_side).pack(latents)

    def time_of(self, timesteps):
        return 1000 * torch.as_tensor(timesteps).float()

    def default_size(self):
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * PATCH

    def timestep_options(self, steps, height, width):
        _, h, w = self.latent_shape(height, width)
        options = {"mu": self.shift((h // self.token_side) * (w // self.token_side), steps)}
        if self.leaves_flow_sigmas and self.pipeline.scheduler.config.get("use_flow_sigmas"):
            return {**options, "num_inference_steps": steps}
        return {**options, "sigmas": np.linspace(1.0, 1 / steps, steps)}


def grid_ids(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """The place of every token, (height * width, 3): 0, row and column."""
    ids = like.new_zeros(height, width, 3)
    ids[..., 1] = torch.arange(height, device=like.device)[:, None]
    ids[..., 2] = torch.arange(width, device=like.device)[None, :]
    return ids.view(height * width, 3)
