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

    @property
    def embedded_guidance(self):
        # of a U-Net that is a latent consistency model; one with an LCM or TCD LoRA is guided as before
        return self.denoiser.config.get("time_cond_proj_dim") is not None

    def guidance_inputs(self, count: int, guidance_scale: float, device: torch.device) -> dict[str, torch.Tensor]:
        """The denoiser's further input (count, D) where it takes the guidance scale."""
        if not self.embedded_guidance:
            return {}
        scales = torch.full((count,), guidance_scale - 1)
        size = self.denoiser.config.time_cond_proj_dim
        return {"timestep_cond": self.pipeline.get_guidance_scale_embedding(scales, embedding_dim=size).to(device)}

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        negative = self.uses_negative(guidance_scale)
        embeds, negative_embeds = self.pipeline.encode_prompt(
            list(prompts), device, 1, negative, **self.negative_options(len(prompts))
        )
        return Conditioning(
            {"encoder_hidden_states": embeds, **self.guidance_inputs(len(prompts), guidance_scale, device)},
            {"encoder_hidden_states": negative_embeds} if negative else None,
        )

    def denoise(self, latents, timesteps, inputs):
        return self.denoiser(latents, timesteps, return_dict=False, **inputs)[0]
