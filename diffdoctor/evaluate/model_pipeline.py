"""Pipelines of an evaluation: loaded, checked, treated, and what the pictures depend on."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import warnings
from pathlib import Path

import torch

from diffdoctor._errors import UserError, missing_extra
from diffdoctor.evaluate.model_options import EvaluateModelConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(option: str, source: str, config: EvaluateModelConfig):
    """A text-to-image pipeline of diffusers, on the CPU, with the scheduler that is asked for.

    Raises:
        UserError: if there is none, it cannot be loaded, or it is of another kind.
    """
    try:
        import diffusers
    except ImportError:
        raise missing_extra("diffusers", "stages") from None
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local and not Path(source).is_dir():
        raise UserError(f"--{option} {source}: no such folder")
    try:
        with warnings.catch_warnings():
            # diffusers 0.42 calls the option `dtype`, those before know `torch_dtype` alone.
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = diffusers.DiffusionPipeline.from_pretrained(source, torch_dtype=_DTYPES[config.precision])
    except Exception as error:  # each component's loader raises its own
        raise UserError(f"--{option} {source}: cannot be loaded ({first_line(error)})") from error
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" not in parameters or "generator" not in parameters:
        raise UserError(f"--{option} {source}: a text-to-image pipeline was expected, got {type(pipeline).__name__}")
    if config.scheduler:
        scheduler = getattr(diffusers, config.scheduler, None)
        if scheduler is None or not hasattr(scheduler, "from_config"):
            raise UserError(f"--scheduler {config.scheduler}: a diffusers scheduler such as DDIMScheduler was expected")
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
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
    from diffdoctor.treat.guide import guide

    options = {"height": config.height, "width": config.width, **config.guide_options}
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


def picture_settings(config: EvaluateModelConfig, prompts: list[str], detector_digest: str) -> dict:
    """All that the drawn pictures depend on, as JSON values, but for their number."""
    settings = {
        "pipeline": [config.pipeline, stamp(config.pipeline)],
        "lora": [config.lora, stamp(config.lora)],
        "treated": [config.treated, stamp(config.treated)],
        "guide": [config.guide, config.guide_options, detector_digest if config.guide else ""],
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "seed": config.seed,
        "sampling": call_options(config),
        "scheduler": config.scheduler,
        "precision": config.precision,
        "picture_type": config.picture_type,
    }
    # Through JSON and back, so that what is compared with a file is what a file gives.
    return json.loads(json.dumps(settings, default=str))


def stamp(source: str) -> str:
    """A name for the present state of a file or folder: names, sizes and times of its files; "" where it is neither."""
    path = Path(source)
    if not source or not path.exists():
        return ""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    facts = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def weights_digest(module: torch.nn.Module) -> str:
    """A hash of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def same_weights(one: torch.nn.Module, other: torch.nn.Module, tolerance: float = 0.01) -> bool:
    """Whether two networks are one: all parameters alike but for rounding, such as a copy stored in bf16.

    Args:
        tolerance: largest norm of the difference, as a share of the norm of `other`'s parameters.
    """
    ours, theirs = ([p.detach() for p in network.parameters()] for network in (one, other))
    if [p.shape for p in ours] != [p.shape for p in theirs]:
        return False
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return apart <= tolerance**2 * sum(float(b.double().square().sum()) for b in theirs)


def first_line(error: Exception) -> str:
    """An exception's message, cut to its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
