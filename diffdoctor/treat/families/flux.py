"""FLUX: a transformer on packed tokens, flow matching, guidance as an input (dev) or not at all (schnell)."""

from __future__ import annotations

from typing import ClassVar

import torch

from diffdoctor.ops.layout import Packed
from diffdoctor.treat.families.base import TRANSFORMER_TARGETS
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.packed import PATCH, PackedFamily, grid_ids
from diffdoctor.treat.families.registry import register_family


@register_family
class FluxFamily(PackedFamily):
    """Serves `FluxPipeline`. Latents are unpacked everywhere but inside `denoise`."""

    pipeline_classes = ("FluxPipeline",)
    embedded_guidance = True
    leaves_flow_sigmas = True
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
            img_ids=grid_ids(layout.height // PATCH, layout.width // PATCH, latents),
            return_dict=False,
            **inputs,
        )[0]
        return layout.unpack(tokens)

    def latent_affine(self):
        return float(self.vae.config.scaling_factor), float(self.vae.config.shift_factor or 0.0)
