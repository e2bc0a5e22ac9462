"""Wan: one or two transformers on videos, UMT5, flow matching. A picture is a video of one frame."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from diffdoctor.maps.frames import causal_frames
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.treat.families.base import TRANSFORMER_TARGETS, Family
from diffdoctor.treat.families.conditioning import Conditioning
from diffdoctor.treat.families.frames import VideoAutoencoder
from diffdoctor.treat.families.registry import register_family

_NAMES = {"high": "transformer", "low": "transformer_2"}
# Sides that the pipeline's own call insists on.
_SIDES = 16


@register_family
class WanFamily(VideoAutoencoder, Family):
    """Serves `WanPipeline` from text: latents (B, C, t, h, w), and (B, C, h, w) where one frame is drawn.

    Of Wan 2.2's two transformers one predicts at high noise and one at low; `choose_denoiser` says which is tuned.
    """

    pipeline_classes = ("WanPipeline",)
    denoiser_name = "transformer"
    takes_negative_prompt = True
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": TRANSFORMER_TARGETS["attention"],
        "feed_forward": ("ffn.net.0.proj", "ffn.net.2"),
    }

    def __init__(self, pipeline):
        super().__init__(pipeline)
        if pipeline.transformer is None:
            self.denoiser_name = _NAMES["low"]

    @property
    def denoisers(self):
        found = (getattr(self.pipeline, name, None) for name in _NAMES.values())
        return [denoiser for denoiser in found if denoiser is not None]

    def choose_denoiser(self, which):
        if len(self.denoisers) < 2:
            return super().choose_denoiser(which)
        if which not in _NAMES:
            what = "high or low, since the pipeline has two and one is tuned at a time"
            raise UserError(expected("denoiser", what, "none" if which is None else repr(which)))
        self.denoiser_name = _NAMES[which]
        return None

    def trains_at(self, timestep):
        return self._name_at(timestep) == self.denoiser_name

    def _name_at(self, timestep: float) -> str:
        low = self._boundary is not None and timestep < self._boundary
        return _NAMES["low" if low else "high"]

    @property
    def _boundary(self) -> float | None:
        """The time at which the low-noise transformer takes over."""
        ratio = self.pipeline.config.boundary_ratio
        return None if ratio is None else ratio * self.pipeline.scheduler.config.num_train_timesteps

    def scale_at(self, timesteps, guidance_scale):
        if self.guidance_scale_2 is None or self._boundary is None:
            return guidance_scale
        scales = torch.where(timesteps < self._boundary, self.guidance_scale_2, guidance_scale)
        return scales.view(-1, *(1,) * (3 if self.num_frames == 1 else 4))

    @property
    def latents_dtype(self):
        return torch.promote_types(self.denoiser_dtype, torch.float32)

    @torch.no_grad()
    def encode_prompts(self, prompts, *, guidance_scale, height, width, device) -> Conditioning:
        prompts = list(prompts)
        embeds, negative = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=self.uses_negative(guidance_scale),
            device=device,
            **self.sequence_options(),
            **self.negative_options(len(prompts)),
        )
        return Conditioning(
            {"encoder_hidden_states": embeds}, None if negative is None else {"encoder_hidden_states": negative}
        )

    def denoise(self, latents, timesteps, inputs):
        if self._boundary is None:
            return self._denoise(_NAMES["high"], latents, timesteps, inputs)
        # the host must know whom to ask
        names = [self._name_at(timestep) for timestep in timesteps.tolist()]
        if len(set(names)) == 1:
            return self._denoise(names[0], latents, timesteps, inputs)
        found = torch.empty_like(latents)
        for name in set(names):
            rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=latents.device)
            part = {key: value[rows] for key, value in inputs.items()}
            found = found.index_copy(0, rows, self._denoise(name, latents[rows], timesteps[rows], part))
        return found

    def _denoise(self, name: str, latents, timesteps, inputs) -> torch.Tensor:
        videos = self.to_pipeline(latents)
        if self.pipeline.config.expand_timesteps:
            # a time for every token, as Wan 2.2's model of 5 B takes it
            frames, height, width = videos.shape[2:]
            timesteps = timesteps[:, None].expand(-1, frames * -(-height // 2) * -(-width // 2))
        prediction = getattr(self.pipeline, name)(
            hidden_states=videos, timestep=timesteps, return_dict=False, **inputs
        )[0]
        return prediction.reshape(latents.shape)

    def from_pipeline(self, latents, height, width):
        return latents.squeeze(2)

    def to_pipeline(self, latents):
        return latents.unsqueeze(2) if latents.ndim == 4 else latents

    def frame_count(self, num_frames):
        count = self.call_default("num_frames") if num_frames is None else num_frames
        if (count - 1) % self._frames_per_latent:
            what = f"1 more than a multiple of {self._frames_per_latent}"
            raise UserError(expected("num_frames", what, count))
        return count

    def maps_for_latents(self, maps):
        return causal_frames(maps, self._frames_per_latent) if maps.ndim == 5 else maps

    def latent_shape(self, height, width):
        scale, frames = self.pipeline.vae_scale_factor_spatial, (self.num_frames - 1) // self._frames_per_latent + 1
        channels, size = self.denoiser.config.in_channels, (height // scale, width // scale)
        return (channels, *size) if frames == 1 else (channels, frames, *size)

    def default_size(self):
        return self.call_default("height"), self.call_default("width")

    def size_multiple(self):
        patch = self.denoiser.config.patch_size
        return math.lcm(_SIDES, self.pipeline.vae_scale_factor_spatial * math.lcm(*patch[1:]))

    @property
    def _frames_per_latent(self) -> int:
        return self.pipeline.vae_scale_factor_temporal
