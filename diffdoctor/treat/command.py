"""`diffdoctor treat`: a treatment of a pipeline on disk, by a detector on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffdoctor.data.prompts import read_prompt_file
from diffdoctor.runs.errors import UserError, expected, missing_extra
from diffdoctor.runs.functions import function_from_file
from diffdoctor.runs.progress import quiet_loaders
from diffdoctor.runs.summary import print_doubts
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.loading import DTYPES, load_pipeline, replace_scheduler
from diffdoctor.treat.quantization import check_format

if TYPE_CHECKING:
    from diffdoctor.data.sources import Source

logger = logging.getLogger(__name__)


@dataclass
class TreatFiles:
    """What `diffdoctor treat` reads and writes.

    Attributes:
        pipeline: folder of a diffusers pipeline, or its id on the Hugging Face hub.
        detector: folder of a detector, its id on the hub, the file of the published checkpoint, FILE.py:FUNCTION or a
            URL; the last two have no gradient, and serve the methods grpo, nft and weighted.
        prompts: text file with one prompt per line, or .jsonl or .parquet with `prompt`; blank ones are left out.
        offline: the pipeline's own training pictures with prompts: a folder of shards, or of pictures with captions;
            where several frames are drawn, also of videos with captions, whose first num_frames are taken; needed
            unless offline_weight is 0, or the method is nft or grpo.
        output: folder for lora/, treat.json, config.yaml, samples/, logs/ and checkpoints; the same command resumes
            there.
        monitor: a second detector that watches for reward hacking; None: none. Never the judge of the evaluation.
        lora: folder, file or hub id of a LoRA to begin with, which is tuned on with its own rank, alpha and modules;
            the result contains it. None: a new one.
        reward: FILE.py:FUNCTION for method grpo: from pictures (B, 3, H, W) in [0, 1] and their prompts to B numbers,
            higher for better pictures; the file's code is run. None: the maps alone.
        webui: write the LoRA for ComfyUI and A1111 too, to lora-webui.safetensors in the output folder.
        scheduler: class of a diffusers scheduler to use in place of the pipeline's own; None: its own.
        dtype: fp32, bf16 or fp16: what the denoiser and the text encoders are loaded in; the VAE is loaded in fp32.
            Large pipelines need bf16, with precision bf16.
        quantize: int8, fp8 (torchao), bnb8 or bnb4 (bitsandbytes, on a GPU): how the denoiser's frozen linear layers
            are held, which leaves the LoRA and its file as they are; None: as dtype says.
        device: such as cpu or cuda:1; None: the fastest there is.
    """

    pipeline: str | None = None
    detector: str | None = None
    prompts: str | None = None
    offline: str | None = None
    output: str | None = None
    monitor: str | None = None
    lora: str | None = None
    reward: str | None = None
    webui: bool = False
    scheduler: str | None = None
    dtype: str = "fp32"
    quantize: str | None = None
    device: str | None = None


# in this order, so that the files come first in the help
@dataclass
class TreatCommandConfig(TreatConfig, TreatFiles):
    """Options of `diffdoctor treat`: what it reads and writes, then those of `diffdoctor.treat.TreatConfig`."""

    # the command has no more use for them
    text_encoders: str = "free"

    def __post_init__(self):
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise UserError(expected("dtype", f"one of {', '.join(DTYPES)}", repr(self.dtype)))
        check_format(self.quantize)
        if self.quantize is not None and self.resident_blocks is not None:
            raise UserError(expected("resident_blocks", "None with --quantize", self.resident_blocks))
        for field in fields(TreatFiles):
            if getattr(self, field.name) == "":
                raise UserError(expected(f"--{field.name}", "a name or a path", "an empty one; leave it out instead"))


def run_treat(config: TreatCommandConfig) -> int:
    """Load everything, treat, and say where the LoRA is.

    Raises:
        UserError: what is missing or cannot be read, in one line.
        DoubtfulResult: with `strict`, nothing was flagged.
    """
    for name in ("pipeline", "detector", "prompts", "output"):
        if getattr(config, name) is None:
            raise UserError(expected(f"--{name}", "a value", "none"))
    try:
        import diffusers  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise missing_extra(error.name or "diffusers", "stages") from None
    from diffdoctor.detector.models.load import open_detector
    from diffdoctor.training.processes import Processes
    from diffdoctor.treat.families import family_of
    from diffdoctor.treat.train import treat

    quiet_loaders()
    prompts = [prompt.text for prompt in read_prompt_file(config.prompts)]
    detector = open_detector(config.detector)
    monitor = None if config.monitor is None else open_detector(config.monitor)
    reward = None if config.reward is None else function_from_file(config.reward)[0]
    processes = Processes(config.device)
    # a VAE in half precision overflows in some families
    loading = {"dtype": config.dtype, "vae": "fp32", "quantize": config.quantize, "device": processes.device}
    pipeline = load_pipeline("pipeline", config.pipeline, **loading)
    replace_scheduler(pipeline, config.scheduler)
    offline = None
    if config.offline is not None:
        offline = OfflineFolder(config.offline, family_of(pipeline).frame_count(config.num_frames), config.output)
    options = {f.name: getattr(config, f.name) for f in fields(TreatConfig)}
    result = treat(
        pipeline,
        detector,
        prompts,
        TreatConfig(**options),
        offline=offline,
        monitor=monitor,
        output_dir=Path(config.output),
        settings=_with_absolute_paths(asdict(config)),
        lora=config.lora,
        reward=reward,
        webui=config.webui,
        device=config.device,
    )
    if not processes.is_main:
        return 0
    first, best = result.measurements[0], next(m for m in result.measurements if m.step == result.best_step)
    if result.stopped:
        print(f"stopped after {len(result.history)} steps: {result.stopped}")
    print(
        f"flagged area {first.flagged_area:.4f} -> {best.flagged_area:.4f}, "
        f"mean confidence {first.mean_confidence:.4f} -> {best.mean_confidence:.4f} (step {result.best_step})"
    )
    second = ", load_into_transformer_2=True" if result.denoiser == "low" else ""
    print(f"pipeline.load_lora_weights({str(result.lora_dir)!r}{second})")
    print_doubts(result.doubts, strict=config.strict)
    return 0


def _with_absolute_paths(settings: dict) -> dict:
    """For `config.yaml`, which may be read from another working folder; what is no path here is the hub's id."""
    paths = ("pipeline", "detector", "monitor", "prompts", "offline", "lora", "output")
    found = {name: Path(settings[name]).absolute() for name in paths if settings[name] is not None}
    return settings | {name: str(path) for name, path in found.items() if path.exists() or name == "output"}


class OfflineFolder:
    """The pairs in a folder, read anew at each iteration; the first one says what was left out.

    Args:
        folder: of shards, or of pictures with captions, or of videos with captions.
        frames: of a video that are taken, its first ones; 1: there are pictures alone.
        output: folder of the treatment, which must be another; None: not known.
    """

    def __init__(self, folder: str, frames: int = 1, output: str | None = None):
        from diffdoctor.data.sources import find_sources, refuse_output_among
        from diffdoctor.data.tar import SkipCounts

        self.folder, self.frames, self._counts = folder, frames, SkipCounts()
        self._sources = find_sources([folder], self._counts, videos=frames > 1)
        refuse_output_among(output, self._sources)
        self._is_known = False

    def __iter__(self) -> Iterator[dict]:
        read = without = 0
        for source in self._sources:
            for sample in self._read(source):
                read, without = read + 1, without + (not sample["prompt"].strip())
                yield sample
        if not self._is_known:
            self._is_known = True
            self._tell(read, without)

    def chosen(self, names: set[str]) -> Iterator[dict]:
        """The pairs of these names, and others of the shards in which they may be."""
        for source in self._sources:
            if source.is_shard or source.name in names:
                yield from self._read(source)

    def _read(self, source: Source) -> Iterator[dict]:
        from diffdoctor.data.sources import read_source

        if source.is_video:
            samples = self._clip(source)
        else:
            samples = read_source(source, counts=self._counts, masks="ignored")
        for sample in samples:
            yield {name: sample[name] for name in ("picture", "name")} | {"prompt": str(sample.get("prompt") or "")}

    @property
    def facts(self) -> Callable[[], Iterator[bytes]] | None:
        """What gives the bytes of each video's file with its caption, so that it is decoded once; None: all are
        pictures."""
        return self._facts if any(source.is_video for source in self._sources) else None

    def _facts(self) -> Iterator[bytes]:
        from diffdoctor.data.sources import caption_of
        from diffdoctor.data.tar import SkipCounts

        yield repr(self.frames).encode()
        for source in self._sources:
            caption = caption_of(source, False, SkipCounts()) if source.is_video else ""
            yield repr((source.name, source.path.stat().st_size, caption)).encode()
            with open(source.path, "rb") as file:
                while block := file.read(2**20):
                    yield block

    def _clip(self, source: Source) -> Iterator[dict]:
        """A video's first frames (T, H, W, 3), or nothing where it has too few or cannot be read."""
        from diffdoctor.data.codec import UnreadablePicture
        from diffdoctor.data.sources import caption_of
        from diffdoctor.data.text import readable
        from diffdoctor.data.video import open_video, sampled

        try:
            with open_video(source.path) as video:
                frames = list(sampled(video.frames, count=self.frames))
        except UnreadablePicture as error:
            self._counts.add(error.reason, readable(source.path), detail=error.detail)
            return
        if len(frames) < self.frames:
            self._counts.add(f"a video of fewer than {self.frames} frames", readable(source.path))
            return
        prompt = caption_of(source, False, self._counts)
        yield {"picture": np.stack(frames), "name": source.name, "prompt": prompt}

    def _tell(self, read: int, without: int) -> None:
        name, left_out = f"--offline {self.folder}", ""
        if self._counts.total:
            left_out = f" (left out: {self._counts.sentence()})"
        if not read:
            raise UserError(expected(name, "pictures that can be read", f"none{left_out}"))
        if left_out:
            logger.warning("%s: %d pictures%s", name, read, left_out)
        if without == read:
            raise UserError(expected(name, "a `prompt` with every picture", f"none with all {without}"))
        if without:
            logger.warning("%s: %d of %d pictures have no prompt", name, without, read)
