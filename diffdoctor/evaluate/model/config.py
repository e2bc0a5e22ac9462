"""The options of `diffdoctor evaluate model`, and those of them that a treatment's folder supplies."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any

from diffdoctor.engine.options import EngineConfig
from diffdoctor.runs.errors import UserError, check_least, expected, missing_extra
from diffdoctor.treat.autoguidance import check_scale
from diffdoctor.treat.loading import DTYPES
from diffdoctor.treat.quantization import check_format

_SAMPLING = (
    *("sampling_steps", "guidance_scale", "negative_prompt", "height", "width", "num_frames"),
    *("guidance_scale_2", "max_sequence_length", "scheduler"),
)
# Options that `treat` writes into its config.yaml under the same names.
_OF_TREATMENT = ("pipeline", "detector", "prompts", "frames_per_call", *_SAMPLING)

_MAX_SETTINGS = 1 << 18  # characters


@dataclasses.dataclass
class EvaluateModelConfig:
    """Options of `diffdoctor evaluate model`.

    Attributes:
        treatment: folder that `diffdoctor treat` made; its LoRA is evaluated, and pipeline, detector, prompts,
            sampling_steps, guidance_scale, guidance_scale_2, negative_prompt, height, width, num_frames,
            frames_per_call, max_sequence_length and scheduler are those of the treatment where they are not given here.
        pipeline: folder of the untreated diffusers pipeline, or its id on the Hugging Face hub; required without
            treatment, like detector and prompts.
        lora: folder or file of a LoRA for that pipeline: the treated pipeline is the two together.
        treated: folder or hub id of the treated pipeline, in place of a LoRA.
        autoguidance: how far predictions of the treated side are taken from the pipeline's own through the LoRA's, see
            `diffdoctor.autoguide`, in one and a half times the time; null: they are the LoRA's.
        guide: sample the treated side under `diffdoctor.guide` with the detector.
        guide_options: options of `diffdoctor.guide` by name, such as {"strength": 0.3}.
        detector: folder or hub id of the detector that steered the treatment.
        judge: folder or hub id of a detector that had no part in it; the same weights are refused.
        prompts: text file with a prompt per line, or .jsonl or .parquet with `prompt` and perhaps `category` (gets a
            table) and `label` (which the classifier must find; without labels each prompt is a class of the variance).
        pictures: number of pictures before and after each; the prompts take turns.
        seed: picture i starts from the latents of seed + i, before and after alike.
        sampling_steps: denoising steps; null: the treatment's, else the pipeline's own default.
        guidance_scale: null: the treatment's, else the pipeline's own default.
        guidance_scale_2: of a second denoiser (Wan 2.2's, at low noise); null: the treatment's, else guidance_scale.
        negative_prompt: what the negative prediction of classifier-free guidance is told; null: the treatment's, else
            nothing.
        height: of the pictures, in pixels; null: the treatment's, else the pipeline's own.
        width: as height.
        num_frames: of a video; null: the treatment's, else the pipeline's own, 1 where it draws pictures. The detectors
            see every frame, all other measures the middle one.
        frames_per_call: frames of videos that a detector is given at a time; null: the treatment's, else all.
        max_sequence_length: of T5 prompts (SD3, FLUX), in tokens; null: the treatment's, else the pipeline's own.
        scheduler: class of a diffusers scheduler in place of the pipeline's own; null: the treatment's, else its own.
        dtype: fp32, bf16 or fp16: what the pipelines are loaded in; detectors and measures are in fp32.
        quantize: int8, fp8, bnb8 or bnb4: how the denoisers' linear layers are held; null: as dtype says.
        real: files, folders, patterns or shards of real clean pictures, with which the generated ones are compared
            (FID, KID, MMD, precision, recall); damaged ones in labelled shards are left out. None: no such comparison.
        damaged: the same of damaged pictures, FID's ceiling; none: the real ones are damaged as by `inject`.
        features: feature network of these measures and of the variance: auto, inception (or inception-64, -192, -768),
            clip, pixels, none, a folder or hub id of a vision model of transformers such as facebook/dinov2-base, or a
            TorchScript file from pictures (B, 3, H, W) in [0, 1] to features (B, D). auto: inception where its weights
            are on this machine, else clip where --clip is given, else pixels.
        clip: folder or hub id of a CLIP model of transformers, for the prompts' CLIP score; null: none.
        preference: folder or hub id of a CLIP model of transformers that was tuned on people's choices, such as
            yuvalkirstain/PickScore_v1, for the preference score; null: none.
        preference_processor: the same of its processor, where the model's own files have none, such as
            laion/CLIP-ViT-H-14-laion2B-s32B-b79K for PickScore; null: the model's own.
        vqa: folder or hub id of a model of transformers that takes pictures and text and gives text (such as LLaVA),
            which is asked whether a picture shows what its prompt asks for; null: none.
        questions: .jsonl file with `prompt` and `questions`, to each of which yes is the right answer, for vqa; null:
            they are made of the prompt's words.
        classifier: folder or hub id of an image classification model of transformers, or a TorchScript file
            from pictures to logits, that must find the prompts' labels; null: none.
        batch_size: pictures that are generated, and measured, at a time.
        picture_type: of the generated pictures' files: png or webp, both exact.
        examples: pictures shown of each kind in the report.
        output: the folder to make: report.html, metrics.json, pictures.parquet, config.yaml, pictures, measures. The
            same command resumes after an interruption; with more pictures it generates those that are missing.
        overwrite: replace pictures in the output folder that were generated with other options.
        strict: stop at the first broken real picture instead of skipping and counting it, and end with exit code 3
            where the judge or the detector is blind.
        device: such as cpu or cuda:1; null: the fastest there is, for several workers one each.
        engine: where the pictures are drawn; they are measured in this process, or by a launcher's processes.
    """

    treatment: str | None = None
    pipeline: str | None = None
    lora: str | None = None
    treated: str | None = None
    autoguidance: float | None = None
    guide: bool = False
    guide_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    detector: str | None = None
    judge: str | None = None
    prompts: str | None = None
    pictures: int = 1000
    seed: int = 0
    sampling_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    frames_per_call: int | None = None
    max_sequence_length: int | None = None
    scheduler: str | None = None
    dtype: str = "fp32"
    quantize: str | None = None
    real: list[str] = dataclasses.field(default_factory=list)
    damaged: list[str] = dataclasses.field(default_factory=list)
    features: str = "auto"
    clip: str | None = None
    preference: str | None = None
    preference_processor: str | None = None
    vqa: str | None = None
    questions: str | None = None
    classifier: str | None = None
    batch_size: int = 16
    picture_type: str = "png"
    examples: int = 12
    output: str | None = None
    overwrite: bool = False
    strict: bool = False
    device: str | None = None
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)

    def __post_init__(self):
        check_least(self, pictures=1, batch_size=1, examples=0, seed=0)
        check_least(self, sampling_steps=1, height=1, width=1, num_frames=1, frames_per_call=1, max_sequence_length=1)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) == "":
                raise UserError(expected(f"--{field.name}", "a name or a path", "an empty one; leave it out instead"))
        check_format(self.quantize)
        for name, allowed in (("dtype", tuple(DTYPES)), ("picture_type", ("png", "webp"))):
            if getattr(self, name) not in allowed:
                raise UserError(expected(name, f"one of {', '.join(allowed)}", repr(getattr(self, name))))


def completed(config: EvaluateModelConfig) -> EvaluateModelConfig:
    """The options, completed by those of the treatment's folder.

    Raises:
        UserError: the folder is not a treatment's, options contradict each other, or a required one is missing.
    """
    if config.treatment:
        config = dataclasses.replace(config, **_from_treatment(config))
    elif config.lora:
        _warn_of_other_sampling(config)
    for name in ("pipeline", "detector", "judge", "prompts", "output"):
        if getattr(config, name) is None:
            raise UserError(expected(f"--{name}", "a value", "none"))
    if config.lora and config.treated:
        raise UserError(expected("--lora, --treated", "one of them", "both"))
    if not (config.lora or config.treated or config.guide):
        options = "--treatment, --lora, --treated, --guide"
        raise UserError(expected(options, "one of them, the treatment to be evaluated", "none"))
    check_scale(config.autoguidance, config.lora)
    if config.preference_processor and not config.preference:
        raise UserError(expected("--preference_processor", "--preference with it", "none"))
    if config.questions and not config.vqa:
        raise UserError(expected("--questions", "--vqa with it", "none"))
    if config.guide_options and not config.guide:
        raise UserError(expected("--guide_options", "--guide true with it", "--guide false"))
    return config


def _from_treatment(config: EvaluateModelConfig) -> dict:
    folder = Path(config.treatment)
    settings = read_settings(folder)
    if settings is None:
        what = "a folder that `diffdoctor treat` made"
        raise UserError(expected(f"--treatment {folder}", what, "one without a config.yaml"))
    hints = typing.get_type_hints(EvaluateModelConfig)
    for name in _OF_TREATMENT:
        if not _fits(settings.get(name), hints[name]):
            what = f"{name} as `diffdoctor treat` writes it"
            value = settings[name]
            got = repr(value)[:80] if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
            raise UserError(expected(folder / "config.yaml", what, got))
    values = {
        name: settings[name]
        for name in _OF_TREATMENT
        if getattr(config, name) is None and settings.get(name) is not None
    }
    if not (config.lora or config.treated):
        if not (folder / "lora").is_dir():
            raise UserError(expected(f"--treatment {folder}", "a finished treatment", "one without a lora"))
        values["lora"] = str(folder / "lora")
    return values


def _fits(value: object, kind: object) -> bool:
    """Whether a value from a YAML file is of an option's type, a union of plain ones."""
    kinds = typing.get_args(kind)
    return not isinstance(value, bool) and isinstance(value, (*kinds, *((int,) if float in kinds else ())))


def read_settings(folder: Path) -> dict | None:
    """The contents of a run's config.yaml; None where there is none that can be read."""
    try:
        import yaml
    except ImportError:
        raise missing_extra("pyyaml", "stages") from None
    try:
        with open(folder / "config.yaml", encoding="utf-8") as file:
            text = file.read(_MAX_SETTINGS + 1)
        settings = yaml.safe_load(text) if len(text) <= _MAX_SETTINGS else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return settings if isinstance(settings, dict) else None


def _warn_of_other_sampling(config: EvaluateModelConfig) -> None:
    """Print a notice where a LoRA is sampled with other options than those it was tuned with, seldom on purpose."""
    folder = Path(config.lora).parent
    settings = read_settings(folder) if (folder / "treat.json").is_file() else None
    if settings is None:
        return
    hints = typing.get_type_hints(EvaluateModelConfig)
    other = [
        name
        for name in _SAMPLING
        if settings.get(name) != getattr(config, name) and _fits(settings.get(name), hints[name])
    ]
    if other:
        tuned_with = json.dumps({name: settings.get(name) for name in other})
        advice = f"give --treatment {folder} to sample with the same options"
        print(f"notice: the LoRA was tuned with {tuned_with}; {advice}", file=sys.stderr)
