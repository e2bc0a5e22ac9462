"""Stable Diffusion 1.x and 2.x: a U-Net with cross attention, one CLIP text encoder."""

from __future__ import annotations

import torch

from diffdoctor.treat.families.base import Family
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.registry import register_family


@register_family
class StableDiffusionFamily(Family):
    """Serves `StableDiffusionPipeline`."""

    pipeline_classes = ("StableDiffusionPipeline",)
    takes_negative_prompt = True

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        negative = self.uses_negative(guidance_scale)
        embeds, negative_embeds = self.pipeline.encode_prompt(
            list(prompts), device, 1, negative, **self.negative_options(len(prompts))
        )
        return Conditioning(
            {"encoder_hidden_states": embeds},
            {"encoder_hidden_states": negative_embeds} if negative else None,
        )

    def denoise(self, latents, timesteps, inputs):
        return self.denoiser(latents, timesteps, return_dict=False, **inputs)[0]
