"""`diffdoctor sample`: a set of shards drawn from prompts and seeds, in units that any engine does."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, ClassVar

import torch

from diffdoctor.data.prompts import Prompt, read_prompt_file
from diffdoctor.engine.attempt import Attempt
from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.sets import IDENTITIES, RESULTS, UnitFiles, make_set
from diffdoctor.engine.store_run import run_folder
from diffdoctor.engine.units import Place, Plan, Unit, Worker, check_unchanged
from diffdoctor.runs.errors import UserError, check_least, expected
from diffdoctor.runs.files import atomic_write_json, stamp
from diffdoctor.runs.hub import local_path
from diffdoctor.runs.progress import quiet_loaders
from diffdoctor.runs.record import METRICS, versions
from diffdoctor.runs.summary import print_summary
from diffdoctor.training.devices import open_device_at
from diffdoctor.training.processes import process_state
from diffdoctor.treat.autoguidance import autoguided, check_scale, scale_identity
from diffdoctor.treat.loading import DTYPES, load_lora
from diffdoctor.treat.prompts import check_prompts
from diffdoctor.treat.quantization import check_format
from diffdoctor.treat.text_to_image import call_options, draw_pictures, open_pipeline, pipeline_options

# Of the words in a key: a prompt's number, and a seed.
_LARGEST_SEED = 2**63 - 1


@dataclasses.dataclass
class SampleConfig:
    """Options of `diffdoctor sample`.

    Attributes:
        pipeline: folder of a diffusers text-to-image pipeline, or its id on the Hugging Face hub.
        prompts: text file with a prompt per line, or .jsonl or .parquet with `prompt` and perhaps `category`.
        output: the folder to make: shards without labels, manifest.parquet, config.yaml, metrics.json. The same command
            resumes after the last finished unit.
        seeds: the first and the last seed; every prompt is drawn once with each of them.
        lora: folder, file or hub id of a LoRA for the pipeline.
        autoguidance: how far predictions are taken from the pipeline's own through the LoRA's, see
            `diffdoctor.autoguide`, in one and a half times the time; null: they are the LoRA's.
        generator: what the pictures' generator is called in the set; null: the pipeline's name.
        sampling_steps: denoising steps; null: the pipeline's own default.
        guidance_scale: null: the pipeline's own default.
        guidance_scale_2: of a second denoiser (Wan 2.2's, at low noise); null: guidance_scale.
        negative_prompt: what the negative prediction of classifier-free guidance is told; null: nothing.
        height: of the pictures, in pixels; null: the pipeline's own.
        width: as height.
        num_frames: of a video, each frame of which becomes a picture of the set; null: the pipeline's own, 1 where it
            draws pictures.
        max_sequence_length: of T5 prompts (SD3, FLUX), in tokens; null: the pipeline's own.
        scheduler: class of a diffusers scheduler in place of the pipeline's own; null: its own.
        dtype: fp32, bf16 or fp16: what the pipeline is loaded in.
        quantize: int8, fp8, bnb8 or bnb4: how the denoiser's linear layers are held; null: as dtype says.
        batch_size: pictures that are drawn at a time.
        shard_size: pictures, or videos, in a shard, which is a unit of work.
        picture_type: png (exact), webp (lossless) or jpg (quality 95).
        strict: stop at a prompt that is longer than the pipeline's limit instead of cutting it.
        device: such as cpu or cuda:1; null: the fastest there is, for several workers one each.
        engine: where the work is done.
    """

    pipeline: str | None = None
    prompts: str | None = None
    output: str | None = None
    seeds: tuple[int, int] = (0, 0)
    lora: str | None = None
    autoguidance: float | None = None
    generator: str | None = None
    sampling_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    max_sequence_length: int | None = None
    scheduler: str | None = None
    dtype: str = "fp32"
    quantize: str | None = None
    batch_size: int = 16
    shard_size: int = 256
    picture_type: str = "png"
    strict: bool = False
    device: str | None = None
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)

    def __post_init__(self):
        check_least(self, batch_size=1, shard_size=1, sampling_steps=1)
        check_least(self, height=1, width=1, num_frames=1, max_sequence_length=1)
        check_format(self.quantize)
        check_scale(self.autoguidance, self.lora)
        if not 0 <= self.seeds[0] <= self.seeds[1] <= _LARGEST_SEED:
            raise UserError(expected("seeds", "the first and the last seed, from 0", " ".join(map(str, self.seeds))))
        for name, allowed in (("dtype", tuple(DTYPES)), ("picture_type", ("png", "webp", "jpg"))):
            if getattr(self, name) not in allowed:
                raise UserError(expected(name, f"one of {', '.join(allowed)}", repr(getattr(self, name))))


def run_sample(config: SampleConfig) -> dict:
    """Run `diffdoctor sample`.

    Returns:
        What metrics.json holds; nothing on other than the main process.

    Raises:
        UserError: an option or a file does not fit or cannot be read, or a picture is not finite.
    """
    state = process_state(config.device)
    prompts = read_prompt_file(config.prompts)
    plan, spec = _plan(config, len(prompts)), SampleWorkerSpec(config, _digest(prompts))
    identity, results = _identity(spec, plan), dict.fromkeys(RESULTS)
    with run_folder(config.output, "sample", identity, results, main=state.is_main_process) as folder:
        if (made := make_set(folder, plan, spec, config, state=state, desc="sample")) is None:
            return {}
        report, found = made
        metrics = {
            "pictures": found.records,
            "prompts": len(prompts),
            "units": report.units,
            "failed_units": report.failed,
            "versions": versions(),
        }
        atomic_write_json(folder.path / METRICS, metrics)
        print_summary(f"{found.records} pictures: {folder.place}{report.given_up}")
        return metrics


def _digest(prompts: list[Prompt]) -> str:
    return hashlib.sha256(repr([(prompt.text, prompt.category) for prompt in prompts]).encode()).hexdigest()


def _identity(spec: SampleWorkerSpec, plan: Plan) -> dict[str, Any]:
    """All that the pictures depend on, by name."""
    config = spec.config
    return scale_identity(config.autoguidance) | {
        "pipeline": [config.pipeline, stamp(config.pipeline)],
        "lora": [config.lora, stamp(config.lora)],
        "prompts": spec.prompts,
        "seeds": config.seeds,
        "generator": config.generator,
        "sampling": call_options(config),
        "scheduler": config.scheduler,
        "dtype": config.dtype,
        "quantize": config.quantize,
        "batch_size": config.batch_size,
        "picture_type": config.picture_type,
        "plan": plan.digest(),
    }


def _plan(config: SampleConfig, prompts: int) -> Plan:
    """All prompts with the first seed, then all with the next: a shard has many prompts."""
    return Plan.of_ranges(prompts * (config.seeds[1] - config.seeds[0] + 1), config.shard_size)


@dataclasses.dataclass(frozen=True)
class SampleWorkerSpec:
    """How a worker is made that draws the pictures of a unit.

    Attributes:
        config: the command's options.
        prompts: digest of the prompts with which the run began.
    """

    uses_accelerator: ClassVar[bool] = True

    config: SampleConfig
    prompts: str

    def build(self, place: Place) -> Worker:
        """Load the pipeline and the prompts.

        Raises:
            UserError: one is not there or does not fit, or the prompts are others than those with which the run began.
        """
        quiet_loaders()
        config, prompts = self.config, read_prompt_file(self.config.prompts)
        check_unchanged(f"--prompts {config.prompts}: other prompts", _digest(prompts), self.prompts)
        device = open_device_at(config.device, place.number)
        pipeline = open_pipeline("pipeline", config.pipeline, config, device)
        texts = [prompt.text for prompt in prompts]
        check_prompts(pipeline, texts, strict=config.strict, max_sequence_length=config.max_sequence_length)
        if config.lora:
            load_lora(pipeline, config.lora)
        pipeline.to(device)
        return _SampleWorker(config, prompts, pipeline)


class _SampleWorker:
    def __init__(self, config: SampleConfig, prompts: list[Prompt], pipeline):
        self.config, self.prompts, self.pipeline = config, prompts, pipeline
        self.generator = config.generator or local_path(config.pipeline).name

    def __call__(self, unit: Unit, attempt: Attempt) -> dict[str, Any]:
        numbers = range(unit.first, unit.first + unit.count)
        places = [divmod(number, len(self.prompts)) for number in numbers]
        texts = [self.prompts[row].text for _, row in places]
        seeds = [self.config.seeds[0] + round for round, _ in places]
        options = {"batch_size": self.config.batch_size, **pipeline_options(self.pipeline, self.config)}
        pictures = (picture for batch in draw_pictures(self.pipeline, texts, seeds, **options) for picture in batch)
        kind, scale = self.config.picture_type, self.config.autoguidance
        with UnitFiles(unit, attempt, kind, IDENTITIES) as files, autoguided(self.pipeline, scale):
            try:
                for picture, seed, (_, row) in zip(pictures, seeds, places, strict=True):
                    frames = [(picture, "")]
                    if picture.ndim == 4:
                        frames = [(frame, f"-{i:04d}") for i, frame in enumerate(picture.unbind(1))]
                    for frame, number in frames:
                        files.add(self._sample(frame, seed, row, number), labelled=False)
            except torch.OutOfMemoryError as error:
                raise UserError(f"out of memory: give a smaller --batch_size than {self.config.batch_size}") from error
            except ValueError as error:
                # Raised by the pipeline itself, most often for a size that it cannot generate.
                raise error if isinstance(error, UserError) else UserError(str(error)) from error
        return files.result()

    def _sample(self, picture: torch.Tensor, seed: int, row: int, frame: str) -> dict[str, Any]:
        """A sample of the set; its key begins with its prompt's number, so that a split keeps prompts together."""
        return {
            "picture": picture.permute(1, 2, 0).contiguous().numpy(),
            "key": f"{row:06d}-{seed:06d}{frame}",
            "prompt": self.prompts[row].text,
            "category": self.prompts[row].category,
            "generator": self.generator,
            "seed": seed,
        }
