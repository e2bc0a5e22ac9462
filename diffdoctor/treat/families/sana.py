"""SANA: a transformer with linear attention on latents of 32 pixels, Gemma with an instruction, flow matching."""

from __future__ import annotations

from typing import ClassVar

import torch

from diffdoctor.treat.families.base import TRANSFORMER_TARGETS, Family
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.registry import register_family


@register_family
class SanaFamily(Family):
    """Serves `SanaPipeline`. Pictures are of the size that is asked for: nothing is mapped to the nearest bin."""

    pipeline_classes = ("SanaPipeline",)
    denoiser_name = "transformer"
    takes_negative_prompt = True
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": TRANSFORMER_TARGETS["attention"],
        "feed_forward": ("ff.conv_inverted", "ff.conv_point"),
    }

    def drawing_options(self, guidance_scale):
        return {"use_resolution_binning": False}

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        prompts = list(prompts)
        negative = self.uses_negative(guidance_scale)
        # what the pipeline's call tells the text encoder before every prompt
        instruction = self.call_default("complex_human_instruction")
        embeds, mask, negative_embeds, negative_mask = self.pipeline.encode_prompt(
            prompts,
            negative,
            device=device,
            complex_human_instruction=instruction,
            **self.sequence_options(),
            **self.negative_options(len(prompts)),
        )

        def inputs(hidden, mask):
            return {"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask.bool()}

        return Conditioning(inputs(embeds, mask), inputs(negative_embeds, negative_mask) if negative else None)

    def time_of(self, timesteps):
        return timesteps / self.denoiser.config.timestep_scale

    def denoise(self, latents, timesteps, inputs):
        prediction = self.denoiser(
            latents,
            encoder_hidden_states=inputs["encoder_hidden_states"],
            encoder_attention_mask=inputs.get("encoder_hidden_states_mask"),
            timestep=timesteps * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        return self.from_denoiser(prediction)

    def from_denoiser(self, output):
        # some were trained to predict a variance too, which no scheduler reads
        return output[:, : self.denoiser.config.in_channels]

    def vae_encode(self, pictures):
        return self.vae.encode(pictures).latent
