"""Stable Diffusion 3: a multimodal transformer on unpacked latents, flow matching, three text encoders."""

from __future__ import annotations

from typing import ClassVar

import torch

from diffdoctor.treat.families.base import TRANSFORMER_TARGETS, Family, dynamic_shift
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.registry import register_family


@register_family
class StableDiffusion3Family(Family):
    """Serves `StableDiffusion3Pipeline`."""

    pipeline_classes = ("StableDiffusion3Pipeline",)
    denoiser_name = "transformer"
    takes_negative_prompt = True
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = TRANSFORMER_TARGETS

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        prompts = list(prompts)
        negative = self.uses_negative(guidance_scale)
        embeds, negative_embeds, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=negative,
            **self.sequence_options(),
            **self.negative_options(len(prompts)),
        )

        def inputs(hidden, pooled):
            return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

        return Conditioning(inputs(embeds, pooled), inputs(negative_embeds, negative_pooled) if negative else None)

    def denoise(self, latents, timesteps, inputs):
        return self.denoiser(hidden_states=latents, timestep=timesteps, return_dict=False, **inputs)[0]

    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.denoiser.config.patch_size

    def timestep_options(self, steps, height, width):
        options = {"num_inference_steps": steps}
        scheduler = self.pipeline.scheduler
        if scheduler.config.get("use_dynamic_shifting"):
            _, h, w = self.latent_shape(height, width)
            patch = self.denoiser.config.patch_size
            options["mu"] = dynamic_shift(scheduler.config, (h // patch) * (w // patch), max_shift=1.16)
        return options

    def latent_affine(self):
        return float(self.vae.config.scaling_factor), float(self.vae.config.shift_factor or 0.0)
