"""A second small pipeline of another kind: FLUX's classes, a transformer on packed tokens trained by flow matching.

It draws the same 16 x 16 pictures as the demo's Stable Diffusion pipeline, from the same autoencoder's latents, so that
a treatment can be compared on both. `build_flow_pipeline` makes it untrained, `train_flow` trains its transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from diffdoctor.demo.pipeline import (
    Trained,
    build_text_encoder,
    build_tokenizer,
    encode_pairs,
    fit,
    refuse_long_prompts,
)
from diffdoctor.ops.target import Target
from diffdoctor.ops.weighted_loss import weighted_loss
from diffdoctor.runs.errors import expected
from diffdoctor.training.seeds import seeded
from diffdoctor.treat.families import family_of

MAX_SEQUENCE_LENGTH = 8
"""Tokens of a prompt for T5: FLUX's own 512 would be 32 times the tokens of a picture."""


def build_t5_tokenizer(texts: Sequence[str], *, max_length: int = MAX_SEQUENCE_LENGTH):
    """A `T5Tokenizer` over the words of texts and single characters.

    Args:
        texts: strings whose words become pieces.
        max_length: tokens per prompt, the end included.
    """
    from transformers import T5Tokenizer

    words = sorted({word for text in texts for word in text.split()})
    characters = sorted({character for text in texts for character in text if not character.isspace()})
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [("▁" + word, -1.0) for word in words]
    pieces += [(piece, -10.0) for piece in ["▁", *characters] if "▁" + piece not in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def build_flow_pipeline(prompts: Sequence[str], vae, *, seed: int = 0, width: int = 128, layers: int = 3, single=3):
    """An untrained `FluxPipeline` on the latents of a trained autoencoder.

    `FluxTransformer2DModel` without a guidance input (as FLUX schnell), frozen random CLIP and T5 text encoders,
    `FlowMatchEulerDiscreteScheduler` without a shift: ten steps have the sigmas 1, 0.9, …, 0.1.

    Args:
        prompts: every prompt that the pipeline will be trained on.
        vae: an `AutoencoderKL` with 4 latent channels of about unit deviation; its weights are copied.
        seed: of the initial weights; the global random state is left as it was.
        width: of the transformer's tokens, a multiple of 32.
        layers: how many double-stream blocks.
        single: how many single-stream blocks.

    Raises:
        ValueError: another width.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    if width % 32:
        raise ValueError(expected("width", "a multiple of 32", width))
    clip, t5 = build_tokenizer(prompts, max_length=MAX_SEQUENCE_LENGTH), build_t5_tokenizer(prompts)
    with seeded(seed):
        # FluxPipeline asks for a shift, StableDiffusionPipeline has none
        own_vae = AutoencoderKL.from_config(vae.config, shift_factor=0.0)
        own_vae.load_state_dict(vae.state_dict())
        text_encoder = build_text_encoder(clip)
        text_encoder_2 = T5EncoderModel(
            T5Config(vocab_size=len(t5), d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, dropout_rate=0.0)
        )
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * own_vae.config.latent_channels,
            num_layers=layers,
            num_single_layers=single,
            attention_head_dim=32,
            num_attention_heads=width // 32,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=(8, 12, 12),
            guidance_embeds=False,
        )
        _start_as_identity(transformer)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=own_vae.eval().requires_grad_(False),
        text_encoder=text_encoder.eval().requires_grad_(False),
        tokenizer=clip,
        text_encoder_2=text_encoder_2.eval().requires_grad_(False),
        tokenizer_2=t5,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train_flow(
    pipeline,
    pictures: np.ndarray,
    prompts: Sequence[str],
    *,
    steps: int = 3000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    ema_decay: float = 0.99,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train pipeline.transformer on (pictures, prompts) in place with the flow matching loss, times uniform.

    Args:
        pipeline: from `build_flow_pipeline`.
        pictures: uint8 (N, H, W, 3).
        prompts: N strings.
        steps: of AdamW.
        batch_size: pairs of a step.
        learning_rate: the peak; after a warm-up it falls along a cosine.
        ema_decay: of the running average of the weights, which is what stays in the pipeline; 0 switches it off.
        seed: of batches, times and noise.
        on_step: called with (step, loss), for a progress bar.
    """
    latents, names, rows = encode_pairs(pipeline, pictures, prompts)
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        refuse_long_prompts(tokenizer, names)
    family = family_of(pipeline)
    family.max_sequence_length = MAX_SEQUENCE_LENGTH
    height, width = pictures.shape[1:3]
    conditioning = family.encode_prompts(
        names, guidance_scale=1.0, height=height, width=width, device=torch.device("cpu")
    )
    transformer = pipeline.transformer.requires_grad_(True).train()
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step(step: int) -> torch.Tensor:
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *latents.shape[1:], generator=generator)
        sigmas = torch.rand(batch_size, generator=generator)
        noisy = torch.lerp(latents[index], noise, sigmas.view(-1, 1, 1, 1))
        prediction = family.denoise(noisy, 1000 * sigmas, conditioning.rows(rows[index]).positive)
        return weighted_loss(prediction, Target.flow(latents[index], noise))

    trained = fit(transformer, loss_of_step, steps, learning_rate, ema_decay, on_step)
    transformer.eval().requires_grad_(False)
    return trained


def _start_as_identity(transformer) -> None:
    """Zero the modulations and the last projection, as such transformers start; diffusers leaves them random."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and (name.endswith(".linear") or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
