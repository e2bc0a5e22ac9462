"""The pipelines of an evaluation: LoRA, guiding, and what the generated pictures depend on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from diffdoctor.data.prompts import read_prompt_file
from diffdoctor.detector.models.load import open_detector
from diffdoctor.engine.units import Place, Unit, Worker, check_unchanged
from diffdoctor.evaluate.model.config import EvaluateModelConfig
from diffdoctor.evaluate.model.store import PictureFiles
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import stamp
from diffdoctor.runs.progress import quiet_loaders
from diffdoctor.training.devices import open_device_at
from diffdoctor.treat.autoguidance import autoguided, scale_identity
from diffdoctor.treat.loading import load_lora
from diffdoctor.treat.text_to_image import call_options, draw_pictures, open_pipeline, pipeline_options

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffdoctor.engine.attempt import Attempt


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


def draw_into(
    files: PictureFiles,
    pipeline: DiffusionPipeline,
    detector: torch.nn.Module | None,
    config: EvaluateModelConfig,
    indices: Sequence[int],
    texts: Sequence[str],
    *,
    treated: bool,
) -> Iterator[int]:
    """Draw pictures and write each to its file, in batches; yields the number of each batch's.

    Args:
        files: of the pictures.
        pipeline: that draws them.
        detector: that guides it; None: it is not guided.
        config: the command's options.
        indices: of the pictures.
        texts: their prompts.
        treated: whether the pipeline is the treated one, which alone may be extrapolated.

    Raises:
        UserError: the pipeline cannot draw this, or there is not enough memory.
    """
    seeds, left = [config.seed + index for index in indices], iter(indices)
    drawing = {"batch_size": config.batch_size, **pipeline_options(pipeline, config)}
    guiding = guided(pipeline, detector, dataclasses.replace(config, guide=detector is not None))
    with autoguided(pipeline, config.autoguidance if treated else None), guiding:
        try:
            for batch in draw_pictures(pipeline, list(texts), seeds, **drawing):
                for index, picture in zip(itertools.islice(left, len(batch)), batch, strict=True):
                    files.save(index, picture)
                yield len(batch)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory: give a smaller --batch_size than {config.batch_size}") from error
        except ValueError as error:
            # Raised by the pipeline itself, most often for a size that it cannot generate.
            raise error if isinstance(error, UserError) else UserError(str(error)) from error


def prompts_digest(texts: Sequence[str]) -> str:
    """A hash of the prompts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class DrawWorkerSpec:
    """How a worker is made that draws the pictures of a unit.

    Attributes:
        config: the command's options, from `completed`.
        side: before or after.
        folder: of the pictures.
        prompts: digest of the prompts with which the command began.
    """

    uses_accelerator: ClassVar[bool] = True

    config: EvaluateModelConfig
    side: str
    folder: str
    prompts: str

    def build(self, place: Place) -> Worker:
        """Load the side's pipeline, and the detector where it is guided.

        Raises:
            UserError: one is not there or does not fit, or the prompts are others than those with which the run began.
        """
        quiet_loaders()
        config, treated = self.config, self.side == "after"
        texts = [prompt.text for prompt in read_prompt_file(config.prompts)]
        check_unchanged(f"--prompts {config.prompts}: other prompts", prompts_digest(texts), self.prompts)
        name = "treated" if treated and config.treated else "pipeline"
        device = open_device_at(config.device, place.number)
        pipeline = open_pipeline(name, getattr(config, name), config, device)
        if treated and config.lora:
            load_lora(pipeline, config.lora)
        pipeline.to(device)
        detector = open_detector(config.detector).to(device) if config.guide and treated else None
        files = PictureFiles(Path(self.folder), config.picture_type)

        def draw(unit: Unit, attempt: Attempt) -> dict[str, Any]:
            missing = files.missing(range(unit.first, unit.first + unit.count))
            prompts = [texts[index % len(texts)] for index in missing]
            drawn = draw_into(files, pipeline, detector, config, missing, prompts, treated=treated) if missing else ()
            return {"records": sum(drawn)}

        return draw


def picture_identity(config: EvaluateModelConfig, prompts: list[str], detector_digest: str) -> dict:
    """All that the generated pictures depend on, by name, except for their number."""
    return scale_identity(config.autoguidance) | {
        "pipeline": [config.pipeline, stamp(config.pipeline)],
        "lora": [config.lora, stamp(config.lora)],
        "treated": [config.treated, stamp(config.treated)],
        "guide": [config.guide, config.guide_options, detector_digest if config.guide else None],
        "prompts": prompts_digest(prompts),
        "seed": config.seed,
        "sampling": call_options(config),
        "scheduler": config.scheduler,
        "dtype": config.dtype,
        "quantize": config.quantize,
        "picture_type": config.picture_type,
    }
