"""What the treatment needs to know of a kind of pipeline: how to encode prompts, denoise, decode and encode.

A family works on latents (B, C, h, w) throughout, (B, C, t, h, w) where it draws videos; one whose denoiser takes
packed tokens packs and unpacks inside `denoise`, so that roll-out, replay and confidence maps never see the packing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import ClassVar

import torch

from diffdoctor.reference.modulate_gradient import scale_gradient
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.treat.families.conditioning import Conditioning, in_dtype

TRANSFORMER_TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
}
"""`lora_targets` of diffusers' joint transformers."""


class Family:
    """One kind of diffusers pipeline. Subclasses fill in the class attributes, `encode_prompts` and `denoise`.

    Args:
        pipeline: a loaded pipeline whose class is named in `pipeline_classes`.
    """

    pipeline_classes: tuple[str, ...] = ()
    """Names of the diffusers classes that this family serves."""
    denoiser_name = "unet"
    """The pipeline's component that LoRA is added to."""
    guidance_argument = "guidance_scale"
    """The name under which the pipeline's call takes the guidance scale."""
    embedded_guidance = False
    """Whether guidance_scale is an input of the denoiser rather than a second, negative prediction."""
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "convolution": ("conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"),
    }
    """Group name -> ends of module names."""
    takes_negative_prompt = False
    """Whether `encode_prompts` encodes `negative_prompt` where a negative prediction is used."""
    denoiser_takes_lists = False
    """Whether the denoiser's batched inputs and its output are lists of one entry a picture."""
    text_encoder_names: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    """The pipeline's components that encode prompts; those that a pipeline lacks are left out."""

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.autocast_dtype: torch.dtype | None = None
        # a 0-dim tensor: what gradients are multiplied by inside the denoiser, and only there
        self.gradient_scale: torch.Tensor | None = None
        # whether the denoiser's weights are spread over processes, which must then call it equally often
        self.is_sharded = False
        self.max_sequence_length: int | None = None
        # of what is drawn, from `frame_count`
        self.num_frames = 1
        # what the negative prediction is told; None: the pipeline's own, an empty text
        self.negative_prompt: str | None = None
        # of a second denoiser; None: that of the first
        self.guidance_scale_2: float | None = None

    @property
    def denoiser(self) -> torch.nn.Module:
        """The network that predicts, and that LoRA is added to."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def denoisers(self) -> list[torch.nn.Module]:
        """All networks that predict; more than the denoiser where others take some of the times."""
        return [self.denoiser]

    def choose_denoiser(self, which: str | None) -> None:
        """Say which of several networks that predict LoRA is added to: that at high or low noise; None: its own.

        Raises:
            UserError: if there is only one.
        """
        if which is not None:
            what = f"none, since {type(self.pipeline).__name__} has one alone here"
            raise UserError(expected("denoiser", what, repr(which)))

    def trains_at(self, timestep: float) -> bool:
        """Whether the denoiser that LoRA is added to predicts at this time, as the scheduler counts it."""
        return True

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes; its weights may wait elsewhere, for offloading hooks to bring them."""
        return self.pipeline._execution_device

    @property
    def denoiser_dtype(self) -> torch.dtype:
        """The dtype in which the denoiser takes latents."""
        # not the first weight's: a few stay in fp32 by diffusers' will, and quantized ones are no numbers
        return self.denoiser.dtype

    @property
    def latents_dtype(self) -> torch.dtype:
        """The dtype in which the pipeline's own loop holds latents."""
        return self.denoiser_dtype

    @property
    def vae(self) -> torch.nn.Module:
        """The network between pictures and latents."""
        return self.pipeline.vae

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """The networks that encode prompts, as far as the pipeline has them."""
        found = (getattr(self.pipeline, name, None) for name in self.text_encoder_names)
        return [encoder for encoder in found if encoder is not None]

    def uses_negative(self, guidance_scale: float) -> bool:
        """Whether a negative prediction is needed at this guidance scale."""
        return guidance_scale > 1 and not self.embedded_guidance

    def drawing_options(self, guidance_scale: float | None) -> dict:
        """Keyword arguments that the pipeline's own call needs beside the user's, to draw what a roll-out draws.

        Args:
            guidance_scale: under which it is to draw; None: its own.
        """
        return {}

    def scale_at(self, timesteps: torch.Tensor, guidance_scale: float) -> float | torch.Tensor:
        """The guidance scale at times (B,): a number, or (B, 1, 1, 1, 1) where it depends on them."""
        return guidance_scale

    def combine(self, positive: torch.Tensor, negative: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """The guided prediction (B, C, h, w) of a positive and a negative one; differentiable."""
        return negative + guidance_scale * (positive - negative)

    def recombine(self, first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the pipeline's own loop makes of its two predictions, in the order in which it makes them.

        Args:
            first: (B, ...), as the loop holds predictions.
            second: as first.
            weight: (B, 1, ...), from `weight_of`.
        """
        return first + weight * (second - first)

    def weight_of(self, first: torch.Tensor, second: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """The weight (B, 1, ...) with which `recombine` gives this prediction (B, ...), by least squares; fp32."""
        return least_squares(prediction - first, second - first)

    def to_denoiser(self, latents: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Latents (B, ...) of the pipeline's own loop as its denoiser takes them."""
        return latents

    def from_denoiser(self, output: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        """The denoiser's output as the pipeline's own loop goes on with it, (B, ...)."""
        return output

    def encode_prompts(
        self, prompts: Sequence[str], *, guidance_scale: float, height: int, width: int, device: torch.device
    ) -> Conditioning:
        """Embeddings of prompts, without gradient.

        Args:
            prompts: N strings.
            guidance_scale: says whether negative embeddings are needed; FLUX-dev's denoiser takes it as an input.
            height: of the pictures, in pixels.
            width: as height.
            device: of the embeddings.
        """
        raise NotImplementedError

    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The denoiser's output (B, C, h, w).

        Args:
            latents: (B, C, h, w), scaled as the scheduler does it, in the denoiser's dtype.
            timesteps: (B,).
            inputs: from `Conditioning`, of B prompts.
        """
        raise NotImplementedError

    def time_of(self, timesteps: torch.Tensor | float) -> torch.Tensor | float:
        """What the scheduler calls the times that its pipeline gives the denoiser."""
        return timesteps

    def run_denoiser(self, latents, timesteps, inputs) -> torch.Tensor:
        """`denoise` in the denoiser's dtype, under autocast where `autocast_dtype` is set; in the latents' dtype again.

        With `gradient_scale` S a gradient is multiplied by S on its way into the denoiser and divided by S where it
        leaves through the latents, so that the parameters' gradients alone come out S times too large.
        """
        dtype = self.denoiser_dtype
        given = latents if self.gradient_scale is None else scale_gradient(latents, 1 / self.gradient_scale)
        inputs = in_dtype(inputs, dtype)
        autocast = nullcontext()
        if self.autocast_dtype is not None:
            autocast = torch.autocast(latents.device.type, dtype=self.autocast_dtype)
        with autocast:
            prediction = self.denoise(given.to(dtype), timesteps, inputs).to(latents.dtype)
        return prediction if self.gradient_scale is None else scale_gradient(prediction, self.gradient_scale)

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        cfg_grad: str = "both",
    ) -> torch.Tensor:
        """The guided prediction (B, C, h, w), as the pipeline's own call makes it.

        Args:
            latents: (B, C, h, w), already through the scheduler's `scale_model_input`.
            timestep: 0-dim, the step's time.
            conditioning: of B prompts.
            guidance_scale: of `combine`, where the family uses a negative prediction.
            cfg_grad: "both", or "cond" to keep the negative prediction out of the graph.
        """
        timesteps = timestep.expand(len(latents))
        if not self.uses_negative(guidance_scale):
            return self.run_denoiser(latents, timesteps, conditioning.positive)
        if cfg_grad == "cond" and torch.is_grad_enabled():
            with torch.no_grad():
                negative = self.run_denoiser(latents, timesteps, conditioning.negative)
            positive = self.run_denoiser(latents, timesteps, conditioning.positive)
        else:
            both = self.run_denoiser(
                torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), conditioning.both()
            )
            negative, positive = both.chunk(2)
        return self.combine(positive, negative, self.scale_at(timesteps, guidance_scale))

    def frame_count(self, num_frames: int | None) -> int:
        """How many frames are drawn where so many are asked for; None: the pipeline's own number, 1 for pictures.

        Raises:
            UserError: if the pipeline does not draw so many.
        """
        if num_frames not in (None, 1):
            what = f"1, since {type(self.pipeline).__name__} draws pictures"
            raise UserError(expected("num_frames", what, num_frames))
        return 1

    def maps_for_latents(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps of pictures (B, 1, H, W) or videos (B, 1, T, H, W) as the operations on their latents take them.

        The operations resample them to the latents' grid, in time as in space.
        """
        return maps

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w) of a picture of height x width pixels, (C, t, h, w) of a video of `num_frames` of them."""
        scale = self.pipeline.vae_scale_factor
        return self.vae.config.latent_channels, height // scale, width // scale

    def from_pipeline(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Latents as the pipeline's own loop holds them, for pictures of height x width pixels, as (B, C, h, w)."""
        return latents

    def to_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `from_pipeline`."""
        return latents

    def picture_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, the pipeline's own default where None.

        Raises:
            UserError: if the size is not a multiple of what the pipeline needs, or too small to measure a sharpness.
        """
        if height is None or width is None:
            own = self.default_size()
            height, width = own[0] if height is None else height, own[1] if width is None else width
        multiple = self.size_multiple()
        least = multiple * math.ceil(3 / multiple)
        if height % multiple or width % multiple or min(height, width) < least:
            what = f"multiples of {multiple} pixels, {least} at least"
            raise UserError(expected("height, width", what, f"{height} x {width}"))
        return height, width

    def default_size(self) -> tuple[int, int]:
        """The pipeline's own picture size in pixels."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    def size_multiple(self) -> int:
        """Height and width are multiples of this many pixels."""
        return max(self.pipeline.vae_scale_factor, 1)

    def timestep_options(self, steps: int, height: int, width: int) -> dict:
        """Keyword arguments of the scheduler's `set_timesteps` beside the device."""
        return {"num_inference_steps": steps}

    def sequence_options(self) -> dict:
        """Keyword arguments of `encode_prompt` that set the long text encoder's length in tokens."""
        name = "max_sequence_length"
        length = self.call_default(name) if self.max_sequence_length is None else self.max_sequence_length
        return {} if length is None else {name: length}

    def call_default(self, name: str):
        """The default of an argument of the pipeline's own call, None where it has no such argument."""
        found = inspect.signature(type(self.pipeline).__call__).parameters.get(name)
        return None if found is None else found.default

    def negative_options(self, count: int) -> dict:
        """Keyword arguments of `encode_prompt` that give `count` prompts the negative one."""
        return {} if self.negative_prompt is None else {"negative_prompt": [self.negative_prompt] * count}

    def latent_affine(self) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """(scale, shift) with latents = scale * (encoded - shift)."""
        return float(self.vae.config.scaling_factor), 0.0

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W), black at 0 and white at 1, not clamped, of latents (B, C, h, w); differentiable.

        Videos (B, 3, T, H, W) of latents (B, C, t, h, w).
        """
        scale, shift = _as_for(latents, self.latent_affine())
        dtype = next(self.vae.parameters()).dtype
        return self.vae_decode((latents / scale + shift).to(dtype)) / 2 + 0.5

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in [0, 1], of videos likewise: the posterior's mode."""
        scale, shift = _as_for(pictures, self.latent_affine())
        dtype = next(self.vae.parameters()).dtype
        return (self.vae_encode((pictures * 2 - 1).to(dtype)) - shift) * scale

    def vae_decode(self, encoded: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of what the autoencoder encodes, (B, C, h, w)."""
        return self.vae.decode(encoded, return_dict=False)[0]

    def vae_encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """The inverse of `vae_decode`: the posterior's mode."""
        return self.vae.encode(pictures).latent_dist.mode()


def _as_for(values: torch.Tensor, affine: tuple) -> tuple:
    """(scale, shift), those of them that are (1, C, 1, 1) on the values' device, (1, C, 1, 1, 1) for frames."""
    # the autoencoder that they were read from may wait on the CPU for an offloading hook
    on_device = (v.to(values.device) if isinstance(v, torch.Tensor) else v for v in affine)
    return tuple(v.unsqueeze(2) if values.ndim == 5 and isinstance(v, torch.Tensor) else v for v in on_device)


def least_squares(value: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """The w (B, 1, ...) for which w * along is nearest to value, both (B, ...)."""
    value, along = value.flatten(1).float(), along.float()
    weight = (value * along.flatten(1)).sum(1) / along.flatten(1).square().sum(1).clamp_min(1e-30)
    return weight.view(-1, *(1,) * (along.ndim - 1))


def dynamic_shift(config, tokens: int, *, max_shift: float, max_tokens: int = 4096) -> float:
    """The shift parameter mu of flow matching schedulers, linear in the number of picture tokens.

    The constants are diffusers' own (`calculate_shift` of its pipelines) where the scheduler's config has none.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", max_tokens)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    return base + (tokens - low) * (top - base) / (high - low)
