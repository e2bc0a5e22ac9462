"""Pictures from prompts and seeds, by any text-to-image pipeline of diffusers: loading, options, drawing."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.progress import progress as show_progress
from diffdoctor.treat.families.registry import find_family
from diffdoctor.treat.loading import load_pipeline, replace_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


class DrawingConfig(Protocol):
    """The options of a command that draws; None leaves one to the pipeline."""

    scheduler: str | None
    dtype: str
    quantize: str | None
    sampling_steps: int | None
    guidance_scale: float | None
    guidance_scale_2: float | None
    negative_prompt: str | None
    height: int | None
    width: int | None
    num_frames: int | None
    max_sequence_length: int | None


def open_pipeline(
    option: str, source: str, config: DrawingConfig, device: torch.device | None = None
) -> DiffusionPipeline:
    """Load a text-to-image pipeline of diffusers, with the scheduler of the options.

    Args:
        option: that gives the pipeline, for errors.
        source: a folder or a hub id.
        config: the options.
        device: see `load_pipeline`.

    Returns:
        The pipeline, on the CPU.

    Raises:
        UserError: there is none, it cannot be loaded, or it does not take the options.
    """
    pipeline = load_pipeline(option, source, dtype=config.dtype, quantize=config.quantize, device=device)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" not in parameters or "generator" not in parameters:
        raise UserError(expected(f"--{option} {source}", "a text-to-image pipeline", type(pipeline).__name__))
    replace_scheduler(pipeline, config.scheduler)
    family = find_family(pipeline)
    takes_negative = "true_cfg_scale" not in parameters if family is None else family.takes_negative_prompt
    for name in pipeline_options(pipeline, config):
        if name not in parameters or (name == "negative_prompt" and not takes_negative):
            raise UserError(f"--{name}: {type(pipeline).__name__} does not take this option")
    if family is not None:
        family.frame_count(config.num_frames)
    if config.negative_prompt and config.guidance_scale is not None:
        least = 0 if family is not None and family.uses_negative(1.0) else 1
        if config.guidance_scale <= least:
            what = f"a guidance_scale above {least} with it, since {config.guidance_scale} makes no negative prediction"
            raise UserError(expected("--negative_prompt", what, repr(config.negative_prompt)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_options(config: DrawingConfig) -> dict[str, int | float | str]:
    """The arguments of the pipeline's call; options that are not given are left to the pipeline."""
    names = {"sampling_steps": "num_inference_steps"}
    wanted = ("sampling_steps", "guidance_scale", "guidance_scale_2", "negative_prompt", "height", "width")
    wanted = (*wanted, "num_frames", "max_sequence_length")
    values = {names.get(name, name): getattr(config, name) for name in wanted}
    return {name: value for name, value in values.items() if value is not None}


def pipeline_options(pipeline: DiffusionPipeline, config: DrawingConfig) -> dict[str, int | float | str | bool]:
    """`call_options` under the names of this pipeline's call, and what it needs beside them to draw as `treat` does."""
    options, family = call_options(config), find_family(pipeline)
    if family is None:
        return options
    if "guidance_scale" in options:
        options[family.guidance_argument] = options.pop("guidance_scale")
    return {**family.drawing_options(config.guidance_scale), **options}


@contextlib.contextmanager
def without_safety_checker(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Inside, the pipeline's own call blacks no picture out: a black square would be measured as a sound picture."""
    checker = getattr(pipeline, "safety_checker", None)
    if checker is None:
        yield
        return
    # Past the pipeline's own setter, which forgets in its configuration what stood there.
    object.__setattr__(pipeline, "safety_checker", None)
    try:
        yield
    finally:
        object.__setattr__(pipeline, "safety_checker", checker)


def _refuse_blackened(drawn) -> None:
    """Refuse a batch of which a pipeline's own filter, one that cannot be switched off, replaced pictures."""
    flags = getattr(drawn, "nsfw_content_detected", None) or getattr(drawn, "nsfw_detected", None) or []
    if any(flags):
        what = "pictures as they were drawn"
        raise UserError(expected("pipeline", what, f"{sum(map(bool, flags))} of {len(flags)} that its filter replaced"))


def draw_pictures(
    pipeline: DiffusionPipeline, prompts: Iterable[str], seeds: Iterable[int], *, batch_size: int = 100, **call_options
) -> Iterator[torch.Tensor]:
    """Generate one picture per prompt, each from its own seed, batch by batch.

    Args:
        pipeline: a diffusers text-to-image pipeline.
        prompts: N prompts.
        seeds: N integers; picture i starts from the latents of a generator on the CPU seeded with `seeds[i]`.
        batch_size: pictures at a time.
        **call_options: of the pipeline's call: `num_inference_steps`, `guidance_scale`, …

    Yields:
        uint8 (B, 3, H, W) on the CPU; (B, 3, T, H, W) of videos of more than one frame.

    Raises:
        ValueError: `prompts` and `seeds` differ in length.
        UserError: a picture is not finite, or was blacked out by the pipeline.
    """
    prompts, seeds = list(prompts), [int(seed) for seed in seeds]
    if len(prompts) != len(seeds):
        raise ValueError(expected("prompts, seeds", "the same length", f"{len(prompts)} and {len(seeds)}"))
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        logger.warning(
            "%s: its safety checker is switched off, which would black pictures out", type(pipeline).__name__
        )
    for start in range(0, len(prompts), batch_size):
        chosen = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[chosen]]
        options = dict(call_options)
        if isinstance(options.get("negative_prompt"), str):
            # Some pipelines do not repeat one for all pictures.
            options["negative_prompt"] = [options["negative_prompt"]] * len(generators)
        # Not around the whole loop: between batches the caller's grad mode and pipeline would be changed.
        with torch.no_grad(), without_safety_checker(pipeline):
            drawn = pipeline(prompt=prompts[chosen], generator=generators, output_type="pt", **options)
        _refuse_blackened(drawn)
        images = _pictures_of(drawn).float()
        finite = images.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            seed = seeds[start + int((~finite).nonzero()[0])]
            raise UserError(
                f"the pipeline generates values that are not finite (seed {seed}): load a VAE that overflows in fp16 "
                "in fp32 or bf16"
            )
        yield (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _pictures_of(drawn) -> torch.Tensor:
    """What a pipeline's call gives, as pictures (B, 3, H, W) or videos (B, 3, T, H, W) of more than one frame."""
    if not hasattr(drawn, "frames"):
        return drawn.images
    frames = drawn.frames.transpose(1, 2)
    return frames.squeeze(2) if frames.shape[2] == 1 else frames


def sample_pictures(
    pipeline: DiffusionPipeline,
    prompts: Iterable[str],
    seeds: Iterable[int],
    *,
    batch_size: int = 100,
    progress: bool = True,
    desc: str = "sampling",
    **call_options,
) -> torch.Tensor:
    """Generate one picture per prompt, each from its own seed, so that a picture does not depend on its batch.

    Args:
        pipeline: a diffusers text-to-image pipeline.
        prompts: N prompts.
        seeds: N integers; picture i starts from the latents of a generator on the CPU seeded with `seeds[i]`.
        batch_size: pictures at a time.
        progress: show a bar, or plain lines where there is no terminal.
        desc: label of the bar.
        **call_options: of the pipeline's call: `num_inference_steps`, `guidance_scale`, …

    Returns:
        uint8 (N, 3, H, W) on the CPU; (N, 3, T, H, W) of videos of more than one frame.

    Raises:
        ValueError: `prompts` and `seeds` differ in length.
        UserError: a picture is not finite.
    """
    prompts, pictures = list(prompts), []
    with show_progress(len(prompts), desc=desc, unit="picture", enabled=progress) as bar:
        for batch in draw_pictures(pipeline, prompts, seeds, batch_size=batch_size, **call_options):
            pictures.append(batch)
            bar.update(len(batch))
    return torch.cat(pictures)
