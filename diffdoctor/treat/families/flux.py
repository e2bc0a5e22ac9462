"""FLUX: a transformer on packed tokens, flow matching, guidance as an input (dev) or not at all (schnell)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from diffdoctor.ops.layout import Packed
from diffdoctor.treat.families.base import TRANSFORMER_TARGETS, Family, dynamic_shift
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.registry import register_family

PATCH = 2


@register_family
class FluxFamily(Family):
    """Serves `FluxPipeline`. Latents are unpacked everywhere but inside `denoise`."""

    pipeline_classes = ("FluxPipeline",)
    denoiser_name = "transformer"
    embedded_guidance = True
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": TRANSFORMER_TARGETS["attention"],
        "feed_forward": (*TRANSFORMER_TARGETS["feed_forward"], "proj_mlp", "proj_out"),
    }

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        prompts = list(prompts)
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=device, **self.sequence_options()
        )
        inputs = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if self.denoiser.config.guidance_embeds:
            inputs["guidance"] = torch.full((len(prompts),), guidance_scale, dtype=torch.float32, device=device)
        return Conditioning(inputs)

    def denoise(self, latents, timesteps, inputs):
        layout = Packed(*latents.shape[2:], patch_size=PATCH)
        tokens = self.denoiser(
            hidden_states=layout.pack(latents),
            timestep=timesteps.to(latents.dtype) / 1000,
            txt_ids=latents.new_zeros(inputs["encoder_hidden_states"].shape[1], 3),
            img_ids=_grid_ids(layout.height // PATCH, layout.width // PATCH, latents),
            return_dict=False,
            **inputs,
        )[0]
        return layout.unpack(tokens)

    def from_pipeline(self, latents, height, width):
        _, h, w = self.latent_shape(height, width)
        return Packed(h, w, patch_size=PATCH).unpack(latents)

    def to_pipeline(self, latents):
        return Packed(*latents.shape[2:], patch_size=PATCH).pack(latents)

    def latent_shape(self, height, width):
        scale = self.pipeline.vae_scale_factor
        return self.denoiser.config.in_channels // PATCH**2, height // scale, width // scale

    def default_size(self):
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * PATCH

    def timestep_options(self, steps, height, width):
        _, h, w = self.latent_shape(height, width)
        config = self.pipeline.scheduler.config
        options = {"mu": dynamic_shift(config, (h // PATCH) * (w // PATCH), max_shift=1.15)}
        if config.get("use_flow_sigmas"):
            return {**options, "num_inference_steps": steps}
        return {**options, "sigmas": np.linspace(1.0, 1 / steps, steps)}

    def latent_affine(self):
        return float(self.vae.config.scaling_factor), float(self.vae.config.shift_factor or 0.0)


def _grid_ids(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    ids = like.new_zeros(height, width, 3)
    ids[..., 1] = torch.arange(height, device=like.device)[:, None]
    ids[..., 2] = torch.arange(width, device=like.device)[None, :]
    return ids.view(height * width, 3)
