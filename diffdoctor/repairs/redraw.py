"""Redrawing the inside of masks: by an inpainting pipeline of diffusers, or by noise and resumed sampling."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from diffdoctor.repairs.config import RepairOptions
from diffdoctor.runs.errors import UserError, expected, first_line
from diffdoctor.treat.autoguidance import refuse_autoguided
from diffdoctor.treat.families import Conditioning, Family, family_of
from diffdoctor.treat.rollout import picture_generators, redraw_inside
from diffdoctor.treat.sampling import Guidance, Sampling
from diffdoctor.treat.schedulers import Sampler

# As of diffusers 0.42 it asks its transformer's configuration for an entry that no Chroma has.
_BROKEN = ("ChromaInpaintPipeline",)


@dataclass(frozen=True)
class Redraw:
    """One part of a picture that a model is asked to redraw.

    Attributes:
        picture: (h, w, 3) float32 in [0, 1], at the model's size.
        mask: (h, w) bool, what to redraw.
        prompt: what the picture shows.
        seed: of the noise.
        strength: share of the sampling that is done again, in (0, 1].
    """

    picture: np.ndarray
    mask: np.ndarray
    prompt: str
    seed: int
    strength: float


@dataclass(frozen=True)
class Redrawn:
    """What came of it.

    Attributes:
        picture: (h, w, 3) float32 in [0, 1]; None where there is nothing to be used.
        fault: why there is nothing; "": there is.
    """

    picture: np.ndarray | None
    fault: str = ""


class ResumeRedrawer:
    """Noise and resumed sampling, for any pipeline that `treat` serves.

    Args:
        pipeline: a loaded pipeline.
        options: `sampling_steps`, `guidance_scale`, `negative_prompt`, `max_sequence_length`.

    Raises:
        UserError: no family serves the pipeline, or its scheduler's steps cannot be resumed.
    """

    method = "resume"

    def __init__(self, pipeline, options: RepairOptions):
        self.family: Family = family_of(pipeline)
        self.family.negative_prompt = options.negative_prompt
        self.family.max_sequence_length = options.max_sequence_length
        if options.negative_prompt is not None and not self.family.takes_negative_prompt:
            what = "none, since this pipeline takes none"
            raise UserError(expected("negative_prompt", what, repr(options.negative_prompt)))
        self.steps = options.sampling_steps or self.family.call_default("num_inference_steps")
        scale = options.guidance_scale
        self.guidance = Guidance(self.family.call_default(self.family.guidance_argument) if scale is None else scale)
        self.size = self.family.picture_size(options.height, options.width)
        self.multiple = self.family.size_multiple()
        self._sampler = functools.lru_cache(maxsize=32)(self._new_sampler)
        self._sampler(self.size)

    def _new_sampler(self, size: tuple[int, int]) -> Sampler:
        scheduler, family = self.family.pipeline.scheduler, self.family
        return Sampler(scheduler, device=self.device, timestep_options=family.timestep_options(self.steps, *size))

    @property
    def pipeline(self):
        """The pipeline."""
        return self.family.pipeline

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return self.family.device

    def to(self, device: torch.device) -> None:
        """Move the pipeline."""
        self.family.pipeline.to(device)
        self._sampler.cache_clear()

    @torch.no_grad()
    def __call__(self, jobs: Sequence[Redraw]) -> list[Redrawn]:
        """Redraw parts of one size and strength."""
        pictures, masks = stacked(jobs, self.device)
        size = tuple(pictures.shape[2:])
        sampler = self._sampler(size)
        sampling = Sampling(self.family, sampler, self.guidance)
        conditioning = self._conditioning([job.prompt for job in jobs], size)
        clean = self.family.encode(pictures).float()
        region = F.adaptive_max_pool2d(masks, clean.shape[2:])
        generators = picture_generators([job.seed for job in jobs])
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(clean.device)
        first = min(int((1 - jobs[0].strength) * len(sampler)), len(sampler) - 1)

        def predict(latents: torch.Tensor, step: int) -> torch.Tensor:
            return sampling.predict(sampler.model_input(latents, step), step, conditioning)

        latents = redraw_inside(sampler, predict, clean, region, noise, first)
        return _results(self.family.decode(latents), [False] * len(jobs))

    def _conditioning(self, prompts: list[str], size: tuple[int, int]) -> Conditioning:
        distinct = list(dict.fromkeys(prompts))
        encoded = self.family.encode_prompts(
            distinct, guidance_scale=self.guidance.scale, height=size[0], width=size[1], device=self.device
        )
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        return encoded.rows(torch.tensor([rows[prompt] for prompt in prompts])).trimmed()


class InpaintRedrawer:
    """An inpainting pipeline of diffusers.

    Args:
        pipeline: whose call takes `image` and `mask_image`.
        options: as for `ResumeRedrawer`; those that are None are left to the pipeline.

    Raises:
        UserError: the pipeline does not take an option.
    """

    method = "inpaint"

    def __init__(self, pipeline, options: RepairOptions):
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        parameters = inspect.signature(type(pipeline).__call__).parameters
        self.parameters = set(parameters)
        # Qwen-Image's call guides against a negative prompt alone; its guidance_scale is for distilled models
        is_qwen, negative = type(pipeline).__name__.startswith("QwenImage"), options.negative_prompt
        guidance = "true_cfg_scale" if is_qwen else "guidance_scale"
        if is_qwen and negative is None and (options.guidance_scale is None or options.guidance_scale > 1):
            negative = " "
        given = {
            "num_inference_steps": options.sampling_steps,
            guidance: options.guidance_scale,
            "negative_prompt": negative,
            "max_sequence_length": options.max_sequence_length,
        }
        self.options = {name: value for name, value in given.items() if value is not None}
        if unknown := sorted(set(self.options) - self.parameters):
            raise UserError(f"{unknown[0]}: {type(pipeline).__name__} does not take this option")
        self.steps = options.sampling_steps or parameters["num_inference_steps"].default
        self.size, self.multiple = _size_of(pipeline, options)

    def to(self, device: torch.device) -> None:
        """Move the pipeline."""
        self.pipeline.to(device)

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return self.pipeline._execution_device

    @torch.no_grad()
    def __call__(self, jobs: Sequence[Redraw]) -> list[Redrawn]:
        """Redraw parts of one size and strength."""
        pictures, masks = stacked(jobs, "cpu")
        options = dict(self.options)
        if isinstance(options.get("negative_prompt"), str):
            options["negative_prompt"] = [options["negative_prompt"]] * len(jobs)
        if "strength" in self.parameters:
            # one step at least, which these pipelines round down
            options["strength"] = min(1.0, max(jobs[0].strength, 1.001 / self.steps))
        try:
            result = self.pipeline(
                prompt=[job.prompt for job in jobs],
                image=pictures,
                mask_image=masks,
                height=pictures.shape[2],
                width=pictures.shape[3],
                generator=picture_generators([job.seed for job in jobs]),
                output_type="pt",
                **options,
            )
        except ValueError as error:
            # Raised by the pipeline itself, most often for weights or a size that it cannot redraw.
            raise UserError(f"{type(self.pipeline).__name__}: {first_line(error)}") from error
        flags = getattr(result, "nsfw_content_detected", None) or [False] * len(jobs)
        images = result.images
        if tuple(images.shape[2:]) != tuple(pictures.shape[2:]):
            images = F.interpolate(images.float(), pictures.shape[2:], mode="bicubic", antialias=True)
        return _results(images, flags)


Redrawer = ResumeRedrawer | InpaintRedrawer


def open_redrawer(pipeline, options: RepairOptions) -> Redrawer:
    """What redraws with a pipeline, by the method of the options.

    With "auto" it is diffusers' inpainting pipeline for the model, where there is one that takes its parts, and else
    noise and resumed sampling.

    Args:
        pipeline: a loaded text-to-image or inpainting pipeline.
        options: of the repair.

    Raises:
        UserError: the method does not serve the pipeline, an option does not fit, or the pipeline is autoguided.
    """
    refuse_autoguided(pipeline, "repair")
    if options.method == "resume":
        return ResumeRedrawer(pipeline, options)
    try:
        inpainting = inpainting_pipeline(pipeline)
    except UserError:
        if options.method == "inpaint":
            raise
        inpainting = None
    if inpainting is not None:
        return InpaintRedrawer(inpainting, options)
    if options.method == "inpaint":
        what = "a pipeline for which diffusers has an inpainting one"
        raise UserError(expected("method inpaint", what, f"{type(pipeline).__name__}: try resume"))
    try:
        return ResumeRedrawer(pipeline, options)
    except UserError as error:
        raise UserError(f"diffusers has no inpainting pipeline for {type(pipeline).__name__}, and {error}") from error


def inpainting_pipeline(pipeline):
    """diffusers' inpainting pipeline with the same components, a pipeline that is one itself, or None.

    Raises:
        UserError: it cannot be made of these components.
    """
    if _inpaints(type(pipeline)):
        return pipeline
    kind = _inpainting_class(type(pipeline))
    if kind is None:
        return None
    modules, settings = kind._get_signature_keys(kind)
    parts = {name: part for name, part in pipeline.components.items() if name in modules}
    given = {name: value for name, value in pipeline.config.items() if name in settings}
    try:
        # not from_pipe, which would convert the weights to fp32
        return kind(**parts, **given)
    except Exception as error:  # each pipeline's constructor raises its own
        raise UserError(f"{kind.__name__}: cannot be made of this pipeline ({first_line(error)})") from error


def _inpainting_class(kind: type) -> type | None:
    import diffusers

    found = None
    # what AutoPipelineForInpainting knows, without making it
    with contextlib.suppress(ImportError, ValueError):
        from diffusers.pipelines.auto_pipeline import AUTO_INPAINT_PIPELINES_MAPPING, _get_task_class

        found = _get_task_class(AUTO_INPAINT_PIPELINES_MAPPING, kind.__name__)
    if found is None:  # one that it does not know yet, such as FLUX.2's
        found = getattr(diffusers, kind.__name__.replace("Pipeline", "InpaintPipeline"), None)
    if getattr(found, "__name__", None) in _BROKEN:
        return None
    return found if isinstance(found, type) and _inpaints(found) else None


def _inpaints(kind: type) -> bool:
    """Whether a pipeline's class takes a picture, a mask and a prompt."""
    return {"prompt", "image", "mask_image", "generator"} <= set(inspect.signature(kind.__call__).parameters)


def _size_of(pipeline, options: RepairOptions) -> tuple[tuple[int, int], int]:
    """(height, width) of a pipeline's pictures by default or as the options say, and what they are multiples of."""
    scale = getattr(pipeline, "vae_scale_factor", 8)
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    # transformers take latents in patches of two; pipelines with U-Nets refuse what is no multiple of 8
    multiple = math.lcm(8, scale if getattr(pipeline, "unet", None) is not None else 2 * scale)
    config = getattr(denoiser, "config", None)
    side = getattr(pipeline, "default_sample_size", None) or getattr(config, "sample_size", None) or 128
    sides = (side, side) if isinstance(side, int) else tuple(side)
    height, width = (given or own * scale for given, own in zip((options.height, options.width), sides, strict=True))
    if height % multiple or width % multiple:
        raise UserError(expected("height, width", f"multiples of {multiple} pixels", f"{height} x {width}"))
    return (height, width), multiple


def stacked(jobs: Sequence[Redraw], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, h, w) in [0, 1] and masks (B, 1, h, w), fp32."""
    pictures = torch.from_numpy(np.stack([job.picture for job in jobs])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([job.mask for job in jobs]))[:, None].float()
    return pictures.to(device), masks.to(device)


def _results(images: torch.Tensor, flags: Sequence[bool]) -> list[Redrawn]:
    found = []
    for image, flag in zip(images.float().cpu(), flags, strict=True):
        if flag:
            found.append(Redrawn(None, "the pipeline's safety checker blacked it out"))
        elif not image.isfinite().all():
            found.append(Redrawn(None, "the model gave values that are not finite"))
        else:
            found.append(Redrawn(image.clamp(0, 1).permute(1, 2, 0).numpy()))
    return found
