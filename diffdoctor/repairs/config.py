"""The options of a repair, and those of `diffdoctor repair`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from diffdoctor.runs.errors import UserError, check_least, expected
from diffdoctor.treat.loading import DTYPES
from diffdoctor.treat.quantization import check_format

METHODS = ("auto", "inpaint", "resume")


@dataclass
class RepairOptions:
    """How pictures are repaired.

    Attributes:
        prompt: what the pictures show, in place of the prompts that come with them; [PROMPT] in it stands for a
            picture's own. null: its own, from a text file beside it, the folder's metadata, the shard, or the
            `parameters` or `prompt` that A1111 and ComfyUI write into their files; nothing where there is none.
        negative_prompt: what the negative prediction of classifier-free guidance is told; null: nothing.
        method: inpaint: diffusers' inpainting pipeline for the model; resume: noise and resumed sampling, for pipelines
            that `treat` serves; auto: inpaint where there is such a pipeline, else resume.
        strength: share of the sampling that the first try does again, in (0, 1].
        last_strength: of the last try; those between rise evenly: what a weak one cannot mend was decided earlier.
        tries: seeds for each region at most; the best that is better is kept, and none after one without an artifact.
        threshold: confidence from which a pixel is flagged, in (0, 1].
        grow: pixels around flagged ones that are redrawn with them; null: a 64th of the picture's shorter side.
        feather: pixels over which the new part fades into the old, inside the redrawn part; null: as grow.
        context: the model sees this many times a region's box.
        regions: in a picture at most, the largest first.
        min_area: share of the picture's pixels that a region has flagged at least; smaller ones are left.
        max_area: likewise at most; larger ones are left.
        sampling_steps: null: the pipeline's own default.
        guidance_scale: null: the pipeline's own default.
        max_sequence_length: of T5 prompts (SD3, FLUX), in tokens; null: the pipeline's own.
        height: that the model works at, in pixels; null: its own.
        width: as height.
        seed: of the noise; a picture's depends on this, its name, the region and the try.
        tile: side in pixels of the tiles in which the detector is shown larger pictures; null: whole.
        overlap: share of a tile that it has in common with the next, in [0, 0.5].
        batch_size: pictures that are worked on together.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    method: str = "auto"
    strength: float = 0.6
    last_strength: float = 1.0
    tries: int = 4
    threshold: float = 0.5
    grow: int | None = None
    feather: int | None = None
    context: float = 2.5
    regions: int = 8
    min_area: float = 0.0
    max_area: float = 1.0
    sampling_steps: int | None = None
    guidance_scale: float | None = None
    max_sequence_length: int | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    tile: int | None = None
    overlap: float = 0.25
    batch_size: int = 4

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(expected("method", f"one of {', '.join(METHODS)}", repr(self.method)))
        check_least(self, tries=1, regions=1, batch_size=1, grow=0, feather=0, context=1, seed=0, tile=16)
        check_least(self, sampling_steps=1, height=1, width=1, max_sequence_length=1)
        for name in ("strength", "last_strength", "threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(expected(name, "a number in (0, 1]", getattr(self, name)))
        if not 0 <= self.overlap <= 0.5:
            raise UserError(expected("overlap", "a share in [0, 0.5]", self.overlap))
        if not 0 <= self.min_area <= self.max_area <= 1:
            got = f"{self.min_area} and {self.max_area}"
            raise UserError(expected("min_area, max_area", "shares in [0, 1], the first not above the second", got))

    def strength_of(self, attempt: int) -> float:
        """The strength of a try, from 0."""
        share = attempt / (self.tries - 1) if self.tries > 1 else 0.0
        return self.strength + share * (self.last_strength - self.strength)

    def prompt_for(self, own: str | None) -> str:
        """The prompt of a picture whose own is this."""
        own = own or ""
        return own if self.prompt is None else self.prompt.replace("[PROMPT]", own)


@dataclass
class RepairFiles:
    """What `diffdoctor repair` reads and writes.

    Attributes:
        pictures: files, folders, patterns, shards.
        pipeline: folder of a diffusers pipeline, text-to-image or inpainting, or its id on the Hugging Face hub.
        detector: the detector's folder or hub id, the published checkpoint's .bin file, FILE.py:FUNCTION or a URL.
        output: the folder to make: pictures, maps, masks, before_after.html, repair.jsonl, metrics.json. Run again, it
            resumes with the pictures that are not there yet or whose files were replaced.
        lora: folder, file or hub id of a LoRA for the pipeline; null: none.
        scheduler: class of a diffusers scheduler in place of the pipeline's own; null: its own.
        dtype: fp32, bf16 or fp16: what the pipeline is loaded in; the detector is in fp32.
        quantize: int8, fp8, bnb8 or bnb4: how the denoiser's linear layers are held; null: as dtype says.
        gallery: number of pictures on the page, the most changed first; 0: no page.
        device: such as cpu or cuda:1; null: the fastest there is.
        strict: stop at the first picture that cannot be repaired instead of skipping and counting it.
    """

    pictures: list[str]
    pipeline: str
    detector: str
    output: str
    lora: str | None = None
    scheduler: str | None = None
    dtype: str = "fp32"
    quantize: str | None = None
    gallery: int = 200
    device: str | None = None
    strict: bool = False


# in this order, so that the files come first in the help
@dataclass
class RepairConfig(RepairOptions, RepairFiles):
    """Options of `diffdoctor repair`: what it reads and writes, then how pictures are repaired."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, gallery=0)
        if self.dtype not in DTYPES:
            raise UserError(expected("dtype", f"one of {', '.join(DTYPES)}", repr(self.dtype)))
        check_format(self.quantize)
        for field in fields(RepairFiles):
            if getattr(self, field.name) == "":
                raise UserError(expected(f"--{field.name}", "a name or a path", "an empty one; leave it out instead"))

    def options(self) -> RepairOptions:
        """How pictures are repaired."""
        return RepairOptions(**{field.name: getattr(self, field.name) for field in fields(RepairOptions)})
