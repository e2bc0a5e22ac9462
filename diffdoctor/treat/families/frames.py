"""Autoencoders of videos: (B, C, t, h, w), with a mean and a deviation for every channel; a picture is one frame."""

from __future__ import annotations

import torch


class VideoAutoencoder:
    """Of a `Family` whose autoencoder takes videos (`AutoencoderKLWan`, `AutoencoderKLQwenImage` and their kin).

    Pictures and their latents have no dimension of frames outside of it.
    """

    def latent_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, shift) with latents = scale * (encoded - shift), each (1, C, 1, 1)."""
        vae = self.vae

        def by_channel(values):
            return torch.tensor(values, dtype=vae.dtype, device=vae.device).view(1, -1, 1, 1)

        return 1 / by_channel(vae.config.latents_std), by_channel(vae.config.latents_mean)

    def vae_decode(self, encoded: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of what the autoencoder encodes, (B, C, h, w); videos of (B, C, t, h, w)."""
        if encoded.ndim == 5:
            return super().vae_decode(encoded)
        return super().vae_decode(encoded.unsqueeze(2)).squeeze(2)

    def vae_encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """The inverse of `vae_decode`: the posterior's mode."""
        if pictures.ndim == 5:
            return super().vae_encode(pictures)
        return super().vae_encode(pictures.unsqueeze(2)).squeeze(2)
