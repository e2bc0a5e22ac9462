"""Z-Image: a transformer on lists of pictures and prompts of unequal length, guidance counted from 0."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from diffdoctor.treat.families.base import TRANSFORMER_TARGETS, Family, dynamic_shift
from diffdoctor.treat.families.conditioning import Conditioning, lengths
from diffdoctor.treat.families.guidance import GuidanceFromZero
from diffdoctor.treat.families.registry import register_family

_PATCH = 2


@register_family
class ZImageFamily(GuidanceFromZero, Family):
    """Serves `ZImagePipeline`, distilled (Turbo, guidance_scale 0) or not."""

    pipeline_classes = ("ZImagePipeline",)
    denoiser_name = "transformer"
    takes_negative_prompt = True
    denoiser_takes_lists = True
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": TRANSFORMER_TARGETS["attention"],
        "feed_forward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    }

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        prompts = list(prompts)
        negative = self.uses_negative(guidance_scale)
        rows, negative_rows = self.pipeline.encode_prompt(
            list(prompts),
            device,
            do_classifier_free_guidance=negative,
            **self.sequence_options(),
            **self.negative_options(len(prompts)),
        )
        return Conditioning(_inputs(rows), _inputs(negative_rows) if negative else None)

    def time_of(self, timesteps):
        return 1000 - 1000 * timesteps

    def denoise(self, latents, timesteps, inputs):
        prompts = [row[:length] for row, length in zip(inputs["cap_feats"], lengths(inputs, "cap_feats"), strict=True)]
        output = self.denoiser(self.to_denoiser(latents), (1000 - timesteps) / 1000, prompts, return_dict=False)[0]
        return self.from_denoiser(output)

    def to_denoiser(self, latents):
        return list(latents.unsqueeze(2).unbind())

    def from_denoiser(self, output):
        return -torch.stack(list(output)).squeeze(2)

    def default_size(self):
        return 1024, 1024

    def size_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * _PATCH

    def timestep_options(self, steps, height, width):
        _, h, w = self.latent_shape(height, width)
        shift = dynamic_shift(self.pipeline.scheduler.config, (h // _PATCH) * (w // _PATCH), max_shift=1.15)
        return {"mu": shift, "sigmas": np.linspace(1.0, 1 / steps, steps)}

    def latent_affine(self):
        return float(self.vae.config.scaling_factor), float(self.vae.config.shift_factor)


def _inputs(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Features (L_i, D) of every prompt as one tensor, and which of its entries are real."""
    real = [row.new_ones(len(row), dtype=torch.bool) for row in rows]
    return {"cap_feats": pad_sequence(rows, batch_first=True), "cap_feats_mask": pad_sequence(real, batch_first=True)}
