"""Stable Diffusion XL: a U-Net with pooled text embeddings and picture sizes as extra inputs."""

from __future__ import annotations

import torch

from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.registry import register_family
from diffdoctor.treat.families.stable_diffusion import StableDiffusionFamily


@register_family
class SDXLFamily(StableDiffusionFamily):
    """Serves `StableDiffusionXLPipeline`."""

    pipeline_classes = ("StableDiffusionXLPipeline",)

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        prompts = list(prompts)
        negative = self.uses_negative(guidance_scale)
        embeds, negative_embeds, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=prompts,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=negative,
            **self.negative_options(len(prompts)),
        )
        # original size, crop and target size, as the pipeline's own call has them by default
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=embeds.dtype, device=device)
        sizes = sizes.expand(len(prompts), -1).contiguous()

        def inputs(hidden, pooled):
            return {"encoder_hidden_states": hidden, "text_embeds": pooled, "time_ids": sizes}

        positive = {**inputs(embeds, pooled), **self.guidance_inputs(len(prompts), guidance_scale, device)}
        return Conditioning(positive, inputs(negative_embeds, negative_pooled) if negative else None)

    def denoise(self, latents, timesteps, inputs):
        return self.denoiser(
            latents,
            timesteps,
            encoder_hidden_states=inputs["encoder_hidden_states"],
            timestep_cond=inputs.get("timestep_cond"),
            added_cond_kwargs={"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]},
            return_dict=False,
        )[0]

    def latent_affine(self):
        config = self.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            dtype, device = self.vae.dtype, self.vae.device
            mean = torch.tensor(config.latents_mean, dtype=dtype, device=device).view(1, -1, 1, 1)
            std = torch.tensor(config.latents_std, dtype=dtype, device=device).view(1, -1, 1, 1)
            return config.scaling_factor / std, mean
        return super().latent_affine()
