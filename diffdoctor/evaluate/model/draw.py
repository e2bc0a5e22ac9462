"""The pipelines of an evaluation: LoRA, guiding, and what the generated pictures depend on."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from diffdoctor.evaluate.model.config import EvaluateModelConfig
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import stamp
from diffdoctor.treat.text_to_image import call_options

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


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
        "quantize": config.quantize,
        "picture_type": config.picture_type,
    }
