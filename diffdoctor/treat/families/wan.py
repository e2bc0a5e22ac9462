"""Wan: a transformer on videos, UMT5, flow matching. A picture is a video of one frame."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from diffdoctor.maps.frames import causal_frames
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.treat.families.base import TRANSFORMER_TARGETS, Family
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.frames import VideoAutoencoder
from diffdoctor.treat.families.registry import register_family

# Sides that the pipeline's own call insists on.
_SIDES = 16


@register_family
class WanFamily(VideoAutoencoder, Family):
    """Serves `WanPipeline` from text: latents (B, C, t, h, w), and (B, C, h, w) where one frame is drawn."""

    pipeline_classes = ("WanPipeline",)
    denoiser_name = "transformer"
    takes_negative_prompt = True
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": TRANSFORMER_TARGETS["attention"],
        "feed_forward": ("ffn.net.0.proj", "ffn.net.2"),
    }

    @property
    def denoiser_dtype(self):
        # its modulation and its norms stay in fp32
        return self.denoiser.patch_embedding.weight.dtype

    @property
    def latents_dtype(self):
        return torch.promote_types(self.denoiser_dtype, torch.float32)

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        prompts = list(prompts)
        embeds, negative = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=self.uses_negative(guidance_scale),
            device=device,
            **self.sequence_options(),
            **self.negative_options(len(prompts)),
        )
        return Conditioning(
            {"encoder_hidden_states": embeds}, None if negative is None else {"encoder_hidden_states": negative}
        )

    def denoise(self, latents, timesteps, inputs):
        prediction = self.denoiser(
            hidden_states=self.to_pipeline(latents), timestep=timesteps, return_dict=False, **inputs
        )[0]
        return prediction.reshape(latents.shape)

    def from_pipeline(self, latents, height, width):
        return latents.squeeze(2)

    def to_pipeline(self, latents):
        return latents.unsqueeze(2) if latents.ndim == 4 else latents

    def frame_count(self, num_frames):
        count = self.call_default("num_frames") if num_frames is None else num_frames
        if (count - 1) % self._frames_per_latent:
            what = f"1 more than a multiple of {self._frames_per_latent}"
            raise UserError(expected("num_frames", what, count))
        return count

    def maps_for_latents(self, maps):
        return causal_frames(maps, self._frames_per_latent) if maps.ndim == 5 else maps

    def latent_shape(self, height, width):
        scale, frames = self.pipeline.vae_scale_factor_spatial, (self.num_frames - 1) // self._frames_per_latent + 1
        channels, size = self.denoiser.config.in_channels, (height // scale, width // scale)
        return (channels, *size) if frames == 1 else (channels, frames, *size)

    def default_size(self):
        return self.call_default("height"), self.call_default("width")

    def size_multiple(self):
        patch = self.denoiser.config.patch_size
        return math.lcm(_SIDES, self.pipeline.vae_scale_factor_spatial * math.lcm(*patch[1:]))

    @property
    def _frames_per_latent(self) -> int:
        return self.pipeline.vae_scale_factor_temporal
