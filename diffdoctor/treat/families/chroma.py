"""Chroma: FLUX's tokens and autoencoder, T5 alone with a mask, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffdoctor.ops.layout import Packed
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.flux import FluxFamily
from diffdoctor.treat.families.packed import PATCH, grid_ids
from diffdoctor.treat.families.registry import register_family


@register_family
class ChromaFamily(FluxFamily):
    """Serves `ChromaPipeline`."""

    pipeline_classes = ("ChromaPipeline",)
    embedded_guidance = False
    leaves_flow_sigmas = False
    takes_negative_prompt = True

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        prompts = list(prompts)
        negative = self.uses_negative(guidance_scale)
        embeds, _, mask, negative_embeds, _, negative_mask = self.pipeline.encode_prompt(
            prompt=prompts,
            device=device,
            do_classifier_free_guidance=negative,
            **self.sequence_options(),
            **self.negative_options(len(prompts)),
        )

        # a one at every real token, and no bool: the pipeline's call adds it to the attention's scores
        def inputs(hidden, mask):
            return {"encoder_hidden_states": hidden, "text_bias": mask}

        return Conditioning(inputs(embeds, mask), inputs(negative_embeds, negative_mask) if negative else None)

    def denoise(self, latents, timesteps, inputs):
        layout = Packed(*latents.shape[2:], patch_size=PATCH)
        text, tokens = inputs["encoder_hidden_states"], layout.pack(latents)
        mask = torch.cat([inputs["text_bias"], tokens.new_ones(tokens.shape[:2])], 1)
        with _mask_under_checkpointing(self.denoiser, mask):
            tokens = self.denoiser(
                hidden_states=tokens,
                encoder_hidden_states=text,
                timestep=timesteps.to(latents.dtype) / 1000,
                txt_ids=latents.new_zeros(text.shape[1], 3),
                img_ids=grid_ids(layout.height // PATCH, layout.width // PATCH, latents),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return layout.unpack(tokens)


@contextmanager
def _mask_under_checkpointing(denoiser, mask: torch.Tensor) -> Iterator[None]:
    """Hands the mask to the single-stream blocks too, which diffusers calls without it where it checkpoints them."""
    inner = getattr(denoiser, "_gradient_checkpointing_func", None)
    if inner is None:
        yield
        return
    blocks = set(denoiser.single_transformer_blocks)

    def call(block, *args):
        # hidden states, time embedding, rotary embedding
        return inner(block, *args, mask) if block in blocks and len(args) == 3 else inner(block, *args)

    denoiser._gradient_checkpointing_func = call
    try:
        yield
    finally:
        denoiser._gradient_checkpointing_func = inner
