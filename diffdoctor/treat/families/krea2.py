"""Krea 2: a single-stream transformer on packed tokens, several of the text encoder's layers, guidance from 0."""

from __future__ import annotations

from typing import ClassVar

import torch

from diffdoctor.ops.layout import Packed
from diffdoctor.treat.families.base import dynamic_shift
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.frames import VideoAutoencoder
from diffdoctor.treat.families.guidance import GuidanceFromZero
from diffdoctor.treat.families.packed import PackedFamily, grid_ids
from diffdoctor.treat.families.registry import register_family


@register_family
class Krea2Family(GuidanceFromZero, VideoAutoencoder, PackedFamily):
    """Serves `Krea2Pipeline`, distilled (guidance_scale 0) or not."""

    pipeline_classes = ("Krea2Pipeline",)
    takes_negative_prompt = True
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_gate", "to_out.0"),
        "feed_forward": ("ff.gate", "ff.up", "ff.down"),
    }

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.token_side = pipeline.patch_size

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        def encoded(texts):
            embeds, mask = self.pipeline.encode_prompt(texts, device, **self.sequence_options())
            return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}

        prompts = list(prompts)
        negative = encoded([self.negative_prompt or ""] * len(prompts)) if self.uses_negative(guidance_scale) else None
        return Conditioning(encoded(prompts), negative)

    def time_of(self, timesteps):
        return self.pipeline.scheduler.config.num_train_timesteps * torch.as_tensor(timesteps).float()

    def denoise(self, latents, timesteps, inputs):
        layout = Packed(*latents.shape[2:], patch_size=self.token_side)
        text, side = inputs["encoder_hidden_states"], self.token_side
        places = grid_ids(layout.height // side, layout.width // side, latents)
        tokens = self.denoiser(
            hidden_states=layout.pack(latents),
            encoder_hidden_states=text,
            timestep=timesteps.to(latents.dtype) / self.pipeline.scheduler.config.num_train_timesteps,
            # the text stands at the origin, whatever its length
            position_ids=torch.cat([places.new_zeros(text.shape[1], 3), places]),
            encoder_attention_mask=inputs.get("encoder_hidden_states_mask"),
            return_dict=False,
        )[0]
        return layout.unpack(tokens)

    def shift(self, tokens, steps):
        if self.pipeline.config.is_distilled:
            return 1.15
        return dynamic_shift(self.pipeline.scheduler.config, tokens, max_shift=1.15, max_tokens=6400)

    def default_size(self):
        return 1024, 1024

    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.token_side
