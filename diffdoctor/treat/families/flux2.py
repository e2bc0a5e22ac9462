"""FLUX.2: a transformer on packed tokens of patches whose channels are standardised, flow matching."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from diffdoctor.ops.layout import Packed
from diffdoctor.treat.families.base import TRANSFORMER_TARGETS
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.packed import PATCH, PackedFamily
from diffdoctor.treat.families.registry import register_family


class _Flux2Family(PackedFamily):
    """What klein and dev share.

    Latents are what the pipeline adds noise to: (B, 4 C, h/2, w/2) of the autoencoder's (B, C, h, w), its patches of
    2 x 2 as channels, standardised by the autoencoder's own statistics.
    """

    token_side = 1
    leaves_flow_sigmas = True
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        # attention and feed-forward of a single-stream block are one matrix on the way in and one on the way out
        "attention": (*TRANSFORMER_TARGETS["attention"], "attn.to_qkv_mlp_proj", "attn.to_out"),
        "feed_forward": ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    }

    def encoded(self, texts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        """The denoiser's inputs of N texts."""
        embeds, _ = self.pipeline.encode_prompt(texts, device, **self.sequence_options())
        return {"encoder_hidden_states": embeds}

    def denoise(self, latents, timesteps, inputs):
        layout = Packed(*latents.shape[2:], patch_size=1)
        tokens = self.denoiser(
            hidden_states=layout.pack(latents),
            timestep=timesteps.to(latents.dtype) / 1000,
            txt_ids=_ids(latents, length=inputs["encoder_hidden_states"].shape[1]),
            img_ids=_ids(latents, height=layout.height, width=layout.width),
            return_dict=False,
            **{"guidance": None, **inputs},
        )[0]
        return layout.unpack(tokens)

    def shift(self, tokens, steps):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(image_seq_len=tokens, num_steps=steps)

    def latent_affine(self):
        statistics = self.vae.bn
        deviation = (statistics.running_var + self.vae.config.batch_norm_eps).sqrt()
        return 1 / deviation.view(1, -1, 1, 1), statistics.running_mean.view(1, -1, 1, 1)

    def vae_decode(self, encoded):
        return super().vae_decode(F.pixel_shuffle(encoded, PATCH))

    def vae_encode(self, pictures):
        return F.pixel_unshuffle(super().vae_encode(pictures), PATCH)


@register_family
class Flux2KleinFamily(_Flux2Family):
    """Serves `Flux2KleinPipeline`, distilled or not."""

    pipeline_classes = ("Flux2KleinPipeline",)

    def uses_negative(self, guidance_scale):
        return guidance_scale > 1 and not self.pipeline.config.is_distilled

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        prompts = list(prompts)
        negative = self.encoded([""] * len(prompts), device) if self.uses_negative(guidance_scale) else None
        return Conditioning(self.encoded(prompts, device), negative)


@register_family
class Flux2Family(_Flux2Family):
    """Serves `Flux2Pipeline` (dev), whose guidance is an input of the denoiser."""

    pipeline_classes = ("Flux2Pipeline",)
    embedded_guidance = True

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        prompts = list(prompts)
        guidance = torch.full((len(prompts),), guidance_scale, dtype=torch.float32, device=device)
        return Conditioning({**self.encoded(prompts, device), "guidance": guidance})


def _ids(like: torch.Tensor, *, height: int = 1, width: int = 1, length: int = 1) -> torch.Tensor:
    """The place of every token, (B, height * width * length, 4): time, row, column, place in the text."""
    axes = [torch.arange(size, device=like.device) for size in (1, height, width, length)]
    return torch.cartesian_prod(*axes).expand(len(like), -1, -1)
