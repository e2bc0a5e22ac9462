"""The pipelines of an evaluation: loading, checks, LoRA, generating pictures, and what these depend on."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from diffdoctor.evaluate.model.config import EvaluateModelConfig
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import stamp
from diffdoctor.runs.progress import progress as show_progress
from diffdoctor.treat.loading import load_pipeline, replace_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


def open_pipeline(option: str, source: str, config: EvaluateModelConfig) -> DiffusionPipeline:
    """Load a text-to-image pipeline of diffusers, with the scheduler of the options.

    Args:
        option: that gives the pipeline, for errors.
        source: a folder or a hub id.
        config: the options.

    Returns:
        The pipeline, on the CPU.

    Raises:
        UserError: there is none, it cannot be loaded, or it does not take the options.
    """
    pipeline = load_pipeline(option, source, dtype=config.dtype)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" not in parameters or "generator" not in parameters:
        raise UserError(expected(f"--{option} {source}", "a text-to-image pipeline", type(pipeline).__name__))
    replace_scheduler(pipeline, config.scheduler)
    if config.negative_prompt and config.guidance_scale is not None and config.guidance_scale <= 1:
        what = f"a guidance_scale above 1 with it, since {config.guidance_scale} makes no negative prediction"
        raise UserError(expected("--negative_prompt", what, repr(config.negative_prompt)))
    for name in call_options(config):
        if name not in parameters or (name == "negative_prompt" and "true_cfg_scale" in parameters):
            raise UserError(f"--{name}: {type(pipeline).__name__} does not take this option")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_options(config: EvaluateModelConfig) -> dict[str, int | float | str]:
    """The arguments of the pipeline's call; options that are not given are left to the pipeline."""
    names = {"sampling_steps": "num_inference_steps"}
    wanted = ("sampling_steps", "guidance_scale", "negative_prompt", "height", "width", "max_sequence_length")
    values = {names.get(name, name): getattr(config, name) for name in wanted}
    return {name: value for name, value in values.items() if value is not None}


def remove_lora(pipeline: DiffusionPipeline) -> None:
    """Undo `treat.loading.load_lora`."""
    pipeline.unload_lora_weights()


@contextlib.contextmanager
def guided(
    pipeline: DiffusionPipeline, detector: torch.nn.Module | None, config: EvaluateModelConfig
) -> Iterator[None]:
    """Sample under `diffdoctor.guide` inside the context where the options ask for it, else do nothing.

    Raises:
        UserError: an option of `diffdoctor.guide` is unknown or out of range.
    """
    if not config.guide:
        yield
        return
    from diffdoctor.treat.guided_sampling import guide

    options = {"height": config.height, "width": config.width, **config.guide_options}
    known = set(inspect.signature(guide).parameters) - {"pipeline", "detector"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(expected("--guide_options", f"some of {', '.join(sorted(known))}", ", ".join(unknown)))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(guide(pipeline, detector, **options))
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, UserError) else UserError(f"--guide_options: {error}") from error
        yield


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
        uint8 (B, 3, H, W) on the CPU.

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
        images = drawn.images.float()
        finite = images.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            seed = seeds[start + int((~finite).nonzero()[0])]
            raise UserError(
                f"the pipeline generates values that are not finite (seed {seed}): load a VAE that overflows in fp16 "
                "in fp32 or bf16"
            )
        yield (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


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
        uint8 (N, 3, H, W) on the CPU.

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


def picture_identity(config: EvaluateModelConfig, prompts: list[str], detector_digest: str) -> dict:
    """All that the generated pictures depend on, by name, except for their number."""
    return {
        "pipeline": [config.pipeline, stamp(config.pipeline)],
        "lora": [config.lora, stamp(config.lora)],
        "treated": [config.treated, stamp(config.treated)],
        "guide": [config.guide, config.guide_options, detector_digest if config.guide else None],
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "seed": config.seed,
        "sampling": call_options(config),
        "scheduler": config.scheduler,
        "dtype": config.dtype,
        "picture_type": config.picture_type,
    }
