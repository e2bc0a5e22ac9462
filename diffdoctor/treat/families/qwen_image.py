"""Qwen-Image: a transformer on packed tokens, prompts of unequal length, guidance that keeps every token's norm."""

from __future__ import annotations

from typing import ClassVar

import torch

from diffdoctor.ops.layout import Packed
from diffdoctor.treat.families.base import TRANSFORMER_TARGETS, least_squares
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.frames import VideoAutoencoder
from diffdoctor.treat.families.packed import PATCH, PackedFamily
from diffdoctor.treat.families.registry import register_family

# The negative prompt where there is none.
_NOTHING = " "


@register_family
class QwenImageFamily(VideoAutoencoder, PackedFamily):
    """Serves `QwenImagePipeline`; the guidance scale is its call's `true_cfg_scale`.

    Its call guides only where it is given a negative prompt. Here one of a single space, which the model was published
    with, stands in where there is none.
    """

    pipeline_classes = ("QwenImagePipeline",)
    takes_negative_prompt = True
    guidance_argument = "true_cfg_scale"
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": TRANSFORMER_TARGETS["attention"],
        "feed_forward": ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    }

    def drawing_options(self, guidance_scale):
        return {"negative_prompt": _NOTHING} if guidance_scale is None or self.uses_negative(guidance_scale) else {}

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        def encoded(texts):
            embeds, mask = self.pipeline.encode_prompt(texts, device, **self.sequence_options())
            mask = embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}

        prompts = list(prompts)
        told = _NOTHING if self.negative_prompt is None else self.negative_prompt
        negative = encoded([told] * len(prompts)) if self.uses_negative(guidance_scale) else None
        return Conditioning(encoded(prompts), negative)

    def denoise(self, latents, timesteps, inputs):
        layout = Packed(*latents.shape[2:], patch_size=PATCH)
        tokens = self.denoiser(
            hidden_states=layout.pack(latents),
            timestep=timesteps.to(latents.dtype) / 1000,
            img_shapes=[[(1, layout.height // PATCH, layout.width // PATCH)]] * len(latents),
            return_dict=False,
            **inputs,
        )[0]
        return layout.unpack(tokens)

    def combine(self, positive, negative, guidance_scale):
        layout = Packed(*positive.shape[2:], patch_size=PATCH)
        guided = layout.pack(super().combine(positive, negative, guidance_scale))
        return layout.unpack(_with_norms_of(layout.pack(positive), guided))

    def recombine(self, first, second, weight):
        return _with_norms_of(first, super().recombine(first, second, weight))

    def weight_of(self, first, second, prediction):
        # the prediction lies in the direction of first + w (second - first): across it nothing is left
        along = torch.nn.functional.normalize(prediction.float(), dim=-1)

        def across(value):
            value = value.float()
            return value - (value * along).sum(-1, keepdim=True) * along

        return least_squares(-across(first), across(second - first))


def _with_norms_of(tokens: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The other tokens (B, N, C), each as long as the token in its place."""
    return other * (tokens.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True))
