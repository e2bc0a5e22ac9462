"""A small but real text-to-image pipeline: diffusers and transformers classes throughout, trained here from nothing.

`build_pipeline` makes the untrained pipeline, `train_autoencoder` and `train_base` train its two halves on
(pictures, prompts), and the result is saved with `save_pretrained` and loaded with `DiffusionPipeline.from_pretrained`
like any other. It draws 16 x 16 RGB pictures from 8 x 8 latents with 1.0 M denoiser parameters, so that the whole demo
fits a few CPU minutes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffdoctor.ops.target import Target
from diffdoctor.ops.weighted_loss import weighted_loss
from diffdoctor.runs.errors import expected
from diffdoctor.training.ema import RunningAverage
from diffdoctor.training.schedule import warmup_cosine
from diffdoctor.training.seeds import seeded

_BYTE_COUNT = 256


def build_tokenizer(texts: Sequence[str], *, max_length: int = 8):
    """A `CLIPTokenizer` whose byte-pair merges were learnt from texts; any other text still encodes, byte by byte.

    Args:
        texts: strings to learn whole words from.
        max_length: tokens per prompt, start and end included.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if len(alphabet) != _BYTE_COUNT:
        raise RuntimeError(expected("tokenizers", f"a byte alphabet of {_BYTE_COUNT} symbols", len(alphabet)))
    learner.train_from_iterator(
        sorted(set(texts)),
        trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *(left + right for left, right in merges)]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def build_text_encoder(tokenizer):
    """A random CLIP text encoder of width 64 for a tokenizer's words, with weights from the global random state."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # CLIP's own 0.02 leaves the prompts of a random encoder almost parallel
            initializer_factor=8.0,
        )
    )


def build_pipeline(prompts: Sequence[str], *, picture_size: int | tuple[int, int] = 16, seed: int = 0):
    """An untrained `StableDiffusionPipeline` for pictures of picture_size pixels.

    Denoiser `UNet2DConditionModel` (32, 64); `AutoencoderKL` (16, 32) with 4 latent channels at half the picture's
    size; a frozen two-layer CLIP text encoder with random weights (distinct prompts get distinct embeddings, which is
    all a closed set of prompts needs); DDIM with v-prediction, zero terminal SNR and trailing timesteps.

    Args:
        prompts: every prompt that the pipeline will be trained on; the tokenizer learns its words from them.
        picture_size: (height, width) in pixels, multiples of 4, or one side of a square.
        seed: of the initial weights; the global random state is left as it was.

    Raises:
        ValueError: another picture_size.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    height, width = size = (picture_size, picture_size) if isinstance(picture_size, int) else tuple(picture_size)
    if min(size) < 8 or height % 4 or width % 4:
        raise ValueError(expected("picture_size", "multiples of 4, at least 8", picture_size))
    tokenizer = build_tokenizer(prompts)
    with seeded(seed):
        text_encoder = build_text_encoder(tokenizer)
        unet = UNet2DConditionModel(
            sample_size=height // 2 if height == width else (height // 2, width // 2),
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=64,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            latent_channels=4,
            # wider groups normalise away the brightness and colour of small damage
            norm_num_groups=4,
            mid_block_add_attention=False,
            sample_size=max(size),
            scaling_factor=1.0,
        )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval().requires_grad_(False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass
class Trained:
    """What a training function returns.

    Attributes:
        losses: of every step.
        seconds: wall time.
    """

    losses: list[float]
    seconds: float


def train_autoencoder(
    pipeline,
    pictures: np.ndarray,
    *,
    steps: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 8e-3,
    kl_weight: float = 1e-6,
    chroma_weight: float = 5.0,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train pipeline.vae on pictures in place, and give its latents zero mean and unit deviation.

    Latent statistics are folded into the 1 x 1 convolutions beside the latents, because `StableDiffusionPipeline`
    knows a scaling factor only, no shift.

    Args:
        pipeline: from `build_pipeline`.
        pictures: uint8 (N, H, W, 3).
        steps: of AdamW.
        batch_size: pictures of a step.
        learning_rate: the peak; after a warm-up it falls along a cosine.
        kl_weight: of the KL term per latent element, beside the mean squared error of a pixel in [-1, 1].
        chroma_weight: of the squared error of a pixel's colour (the pixel less its mean channel), added to that. Colour
            is rare in these pictures: with 0 its damage comes back grey from a training this short.
        seed: of the batches and the latent noise.
        on_step: called with (step, loss), for a progress bar.
    """
    images = _as_images(pictures)
    vae = pipeline.vae.requires_grad_(True).train()
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step(step: int) -> torch.Tensor:
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl() / posterior.mean[0].numel()
        error = decoded - batch
        chroma = error - error.mean(1, keepdim=True)
        return error.square().mean() + chroma_weight * chroma.square().mean() + kl_weight * kl.mean()

    trained = fit(vae, loss_of_step, steps, learning_rate, on_step=on_step)
    vae.eval().requires_grad_(False)
    _fold_latent_statistics(vae, encode_latents(pipeline, pictures))
    return trained


def train_base(
    pipeline,
    pictures: np.ndarray,
    prompts: Sequence[str],
    *,
    steps: int = 1500,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    ema_decay: float = 0.99,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train pipeline.unet on (pictures, prompts) in place with the velocity loss.

    Args:
        pipeline: from `build_pipeline`.
        pictures: uint8 (N, H, W, 3); `train_autoencoder` comes first.
        prompts: N strings.
        steps: of AdamW.
        batch_size: pairs of a step.
        learning_rate: the peak; after a warm-up it falls along a cosine.
        ema_decay: of the running average of the weights, which is what stays in the pipeline; 0 switches it off.
        seed: of batches, timesteps and noise.
        on_step: called with (step, loss), for a progress bar.
    """
    latents, names, rows = encode_pairs(pipeline, pictures, prompts)
    embeddings = _embed(pipeline, names)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod
    # a base that was trained before is frozen
    unet = pipeline.unet.requires_grad_(True).train()
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step(step: int) -> torch.Tensor:
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *latents.shape[1:], generator=generator)
        timesteps = torch.randint(len(alphas_cumprod), (batch_size,), generator=generator)
        noisy = pipeline.scheduler.add_noise(latents[index], noise, timesteps)
        prediction = unet(noisy, timesteps, embeddings[rows[index]]).sample
        return weighted_loss(prediction, Target.velocity(latents[index], noise, alphas_cumprod[timesteps]))

    trained = fit(unet, loss_of_step, steps, learning_rate, ema_decay, on_step)
    unet.eval().requires_grad_(False)
    return trained


def encode_pairs(
    pipeline, pictures: np.ndarray, prompts: Sequence[str]
) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """What a denoiser is trained on.

    Args:
        pipeline: whose autoencoder is taken.
        pictures: uint8 (N, H, W, 3).
        prompts: N strings.

    Returns:
        (latents (N, 4, h, w), the distinct prompts, (N,) the row of each picture's prompt among them).

    Raises:
        ValueError: not as many prompts as pictures.
    """
    if len(pictures) != len(prompts):
        raise ValueError(expected("prompts", f"one per picture ({len(pictures)})", len(prompts)))
    row_of = {prompt: row for row, prompt in enumerate(sorted(set(prompts)))}
    rows = torch.tensor([row_of[prompt] for prompt in prompts])
    return encode_latents(pipeline, pictures), list(row_of), rows


@torch.no_grad()
def encode_latents(pipeline, pictures: np.ndarray, batch_size: int = 256) -> torch.Tensor:
    """The autoencoder's mean latents of uint8 pictures (N, H, W, 3), scaled as the denoiser sees them: (N, 4, h, w)."""
    images = _as_images(pictures)
    parts = [pipeline.vae.encode(part).latent_dist.mean for part in images.split(batch_size)]
    return torch.cat(parts) * pipeline.vae.config.scaling_factor


def _as_images(pictures: np.ndarray) -> torch.Tensor:
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ValueError(expected("pictures", "uint8 (N, H, W, 3)", f"{pictures.dtype} {pictures.shape}"))
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def refuse_long_prompts(tokenizer, prompts: Sequence[str]) -> None:
    """Refuse prompts that a tokenizer would cut.

    Args:
        tokenizer: with its limit in `model_max_length`.
        prompts: of which each counts with its start and end.

    Raises:
        ValueError: one is longer than the limit; the message names the words that are in no vocabulary.
    """
    limit = tokenizer.model_max_length
    for prompt in dict.fromkeys(prompts):
        length = len(tokenizer(prompt, truncation=False).input_ids)
        if length > limit:
            unknown = [word for word in dict.fromkeys(prompt.split()) if len(tokenizer.tokenize(word)) > 1]
            words = f"; not in the vocabulary, so read in pieces: {', '.join(unknown)}" if unknown else ""
            raise ValueError(expected("prompts", f"at most {limit} tokens", f"{length} in {prompt!r}{words}"))


@torch.no_grad()
def _embed(pipeline, prompts: Sequence[str]) -> torch.Tensor:
    tokenizer = pipeline.tokenizer
    refuse_long_prompts(tokenizer, prompts)
    tokens = tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids)[0]


def fit(model, loss_of_step, steps: int, learning_rate: float, ema_decay: float = 0.0, on_step=None) -> Trained:
    """Train a model in place by AdamW with warm-up, cosine decay and gradients clipped to norm 1.

    Args:
        model: a module; its running average is what stays in it when ema_decay is above 0.
        loss_of_step: from the step's number to its loss.
        steps: of the optimizer.
        learning_rate: the peak.
        ema_decay: of the running average of the weights; 0: none.
        on_step: called with (step, loss).
    """
    started = time.perf_counter()
    parameters = list(model.parameters())
    average = RunningAverage(parameters, ema_decay)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-2)
    warmup_steps = max(1, min(50, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, steps))
    losses = []
    for step in range(steps):
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update(step)
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    average.keep()
    return Trained(losses, time.perf_counter() - started)


@torch.no_grad()
def _fold_latent_statistics(vae, latents: torch.Tensor) -> None:
    mean = latents.mean((0, 2, 3))
    scale = 1 / latents.std((0, 2, 3)).clamp_min(1e-3)
    channels = len(mean)
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    # rows 0..channels-1 of quant_conv give the posterior's mean, the rest its log-variance
    quant.weight[:channels] *= scale[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) * scale
    quant.bias[channels:] += 2 * scale.log()
    post_quant.bias += (post_quant.weight[:, :, 0, 0] * mean).sum(1)
    post_quant.weight /= scale[None, :, None, None]
