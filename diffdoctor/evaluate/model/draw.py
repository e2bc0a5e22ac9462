"""The pipelines of an evaluation: loaded, checked, treated and drawn from; what the pictures depend on."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import torch

from diffdoctor.evaluate.model.config import EvaluateModelConfig
from diffdoctor.runs.errors import UserError, first_line
from diffdoctor.runs.progress import progress as show_progress
from diffdoctor.treat.loading import load_pipeline, replace_scheduler


def open_pipeline(option: str, source: str, config: EvaluateModelConfig):
    """A text-to-image pipeline of diffusers, on the CPU, with the scheduler that is asked for.

    Raises:
        UserError: if there is none, it cannot be loaded, or it is of another kind.
    """
    pipeline = load_pipeline(option, source, dtype=config.dtype)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" not in parameters or "generator" not in parameters:
        raise UserError(f"--{option} {source}: a text-to-image pipeline was expected, got {type(pipeline).__name__}")
    replace_scheduler(pipeline, config.scheduler)
    for name in call_options(config):
        if name not in parameters:
            raise UserError(f"--{name}: {type(pipeline).__name__} does not take it")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_options(config: EvaluateModelConfig) -> dict:
    """What is handed to the pipeline's own call; what is not asked for is left to it."""
    names = {"sampling_steps": "num_inference_steps"}
    wanted = ("sampling_steps", "guidance_scale", "height", "width", "max_sequence_length")
    values = {names.get(name, name): getattr(config, name) for name in wanted}
    return {name: value for name, value in values.items() if value is not None and (value or name == "guidance_scale")}


def add_lora(pipeline, source: str) -> None:
    """Load a LoRA into a pipeline, all of it.

    Raises:
        UserError: if there is none, or any of it finds no place in the pipeline.
    """
    path = Path(source)
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise UserError(f"--lora {source}: no such file or folder")
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"--lora: {type(pipeline).__name__} takes none")
    place = {"weight_name": path.name} if path.is_file() else {}
    try:
        state = pipeline.lora_state_dict(str(path.parent if path.is_file() else source), **place)
        state = state[0] if isinstance(state, tuple) else state
        pipeline.load_lora_weights(str(path.parent if path.is_file() else source), **place)
    except Exception as error:  # diffusers, peft and safetensors raise their own
        raise UserError(f"--lora {source}: does not fit this pipeline ({first_line(error)})") from error
    wanted = sum(".lora_B" in name or "lora_up" in name or "lora.up" in name for name in state)
    found = _lora_layers(pipeline)
    # diffusers says no more than a warning about what it could not place, and draws untreated pictures.
    if wanted == 0 or found < wanted:
        raise UserError(
            f"--lora {source}: does not fit this pipeline: {found} of its {wanted} matrices found their place"
        )


def remove_lora(pipeline) -> None:
    """Make the pipeline as it was before `add_lora`."""
    pipeline.unload_lora_weights()


def _lora_layers(pipeline) -> int:
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return sum(
        len(layer.active_adapters) for part in modules for layer in part.modules() if isinstance(layer, BaseTunerLayer)
    )


@contextlib.contextmanager
def guided(pipeline, detector, config: EvaluateModelConfig):
    """`diffdoctor.guide` where it is asked for, else nothing."""
    if not config.guide:
        yield
        return
    from diffdoctor.treat.guided_sampling import guide

    options = {"height": config.height or None, "width": config.width or None, **config.guide_options}
    known = set(inspect.signature(guide).parameters) - {"pipeline", "detector"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(f"--guide_options: no option {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(guide(pipeline, detector, **options))
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, UserError) else UserError(f"--guide_options: {error}") from error
        yield


def draw_pictures(pipeline, prompts, seeds, *, batch_size=100, **call_options) -> Iterator[torch.Tensor]:
    """Draw one picture per prompt, each from its own seed, and yield them batch by batch.

    Args and errors as `sample_pictures`; yields uint8 (B, 3, H, W) on the CPU.

    Raises:
        UserError: if a picture is not finite.
    """
    prompts, seeds = list(prompts), [int(seed) for seed in seeds]
    if len(prompts) != len(seeds):
        raise ValueError(f"prompts and seeds must have the same length, got {len(prompts)} and {len(seeds)}")
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[part]]
        # Not around the whole loop: between batches the caller's grad mode would be changed.
        with torch.no_grad():
            images = pipeline(prompts[part], generator=generators, output_type="pt", **call_options).images.float()
        finite = images.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            seed = seeds[start + int((~finite).nonzero()[0])]
            raise UserError(
                f"the pipeline draws values that are not finite (seed {seed}): a VAE that overflows in fp16 needs "
                "to be loaded in fp32 or bf16"
            )
        yield (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def sample_pictures(pipeline, prompts, seeds, *, batch_size=100, progress=True, desc="sampling", **call_options):
    """Draw one picture per prompt, each from its own seed, so that a picture does not depend on its batch.

    Args:
        pipeline: a diffusers text-to-image pipeline.
        prompts: N prompts.
        seeds: N integers; picture i starts from the latents of a generator on the CPU seeded with `seeds[i]`.
        batch_size: pictures at a time.
        progress: show a bar, or plain lines where there is no terminal.
        call_options: handed to the pipeline: `num_inference_steps`, `guidance_scale`, …

    Returns:
        uint8 (N, 3, H, W) on the CPU.

    Raises:
        ValueError: if `prompts` and `seeds` do not have the same length, or (`UserError`) a picture is not finite.
    """
    prompts, pictures = list(prompts), []
    with show_progress(len(prompts), desc=desc, unit="picture", enabled=progress) as bar:
        for batch in draw_pictures(pipeline, prompts, seeds, batch_size=batch_size, **call_options):
            pictures.append(batch)
            bar.update(len(batch))
    return torch.cat(pictures)


def picture_identity(config: EvaluateModelConfig, prompts: list[str], detector_digest: str) -> dict:
    """All that the drawn pictures depend on, by name, but for their number."""
    return {
        "pipeline": [config.pipeline, stamp(config.pipeline)],
        "lora": [config.lora, stamp(config.lora)],
        "treated": [config.treated, stamp(config.treated)],
        "guide": [config.guide, config.guide_options, detector_digest if config.guide else ""],
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "seed": config.seed,
        "sampling": call_options(config),
        "scheduler": config.scheduler,
        "dtype": config.dtype,
        "picture_type": config.picture_type,
    }


def stamp(source: str) -> str:
    """A name for the present state of a file or folder: names, sizes and times of its files; "" where it is neither."""
    path = Path(source)
    if not source or not path.exists():
        return ""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    facts = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
