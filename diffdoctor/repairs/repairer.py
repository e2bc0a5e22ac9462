"""Repairing pictures: what is flagged is redrawn, and kept only where the detector then finds less."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffdoctor.data.codec import UnreadablePicture
from diffdoctor.data.pictures import to_images
from diffdoctor.detector.confidence import confidence_of
from diffdoctor.detector.external import as_detector
from diffdoctor.detector.models.load import open_detector
from diffdoctor.measures.components import components
from diffdoctor.repairs.blend import mask_at, matched, resized, seam_energy
from diffdoctor.repairs.config import RepairOptions
from diffdoctor.repairs.metadata import prompt_of
from diffdoctor.repairs.pictures import Picture, as_picture
from diffdoctor.repairs.redraw import Redraw, Redrawer, Redrawn, open_redrawer
from diffdoctor.repairs.regions import Region, crop_around, feathered, find_regions
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_write_bytes
from diffdoctor.runs.progress import progress as show_progress
from diffdoctor.training.devices import device_of
from diffdoctor.training.processes import seed_of
from diffdoctor.treat.loading import load_pipeline

if TYPE_CHECKING:
    from PIL import Image

NOT_BETTER, ELSEWHERE = "the region is not better", "the picture is worse elsewhere"
NOT_BEST, OUTSIDE = "another try is better", "pixels outside the mask changed"


@dataclass(frozen=True)
class Job:
    """A picture to repair.

    Attributes:
        picture: as it is stored.
        prompt: what it shows.
        key: of its seeds.
    """

    picture: Picture
    prompt: str
    key: int


@dataclass
class Try:
    """One redrawing of a region.

    Attributes:
        seed: of the noise.
        strength: see `RepairOptions`.
        score: mean confidence over the region afterwards; None where nothing was drawn.
        why_not: why it was not kept; "": it was.
    """

    seed: int
    strength: float
    score: float | None
    why_not: str = ""


@dataclass
class RegionOutcome:
    """What became of a region.

    Attributes:
        box: (x, y, width, height) of what could change, in pixels.
        area: flagged pixels.
        score_before: mean confidence over what could change, before.
        score_after: and after; the same where no try was kept.
        tries: in their order.
    """

    box: tuple[int, int, int, int]
    area: int
    score_before: float
    score_after: float
    tries: list[Try] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether a try was kept."""
        return any(not attempt.why_not for attempt in self.tries)


@dataclass
class Repaired:
    """A picture after the repair.

    Attributes:
        picture: as it is stored now; outside `mask` no bit of a pixel differs from the original.
        original: as it was.
        mask: (H, W) bool, where regions were redrawn and kept.
        before: (H, W) float32, the detector's map of the original.
        after: (H, W) float32, of the repaired picture.
        regions: what was found, the largest first.
        prompt: with which was redrawn.
    """

    picture: Picture
    original: Picture
    mask: np.ndarray
    before: np.ndarray
    after: np.ndarray
    regions: list[RegionOutcome]
    prompt: str

    @property
    def changed(self) -> bool:
        """Whether anything was kept."""
        return bool(self.mask.any())

    @property
    def pixels(self) -> np.ndarray:
        """The repaired pixels, upright, of the original's mode and depth."""
        return self.picture.pixels

    @property
    def image(self) -> Image.Image:
        """The repaired picture as an image of Pillow's."""
        return self.picture.to_image()

    def save(self, path) -> None:
        """Write the picture as PNG with the original's metadata, ICC profile and alpha, whole or not at all."""
        atomic_write_bytes(path, self.picture.png())

    def changed_outside(self) -> int:
        """The number of pixels outside the mask that differ from the original: 0."""
        return _changed_outside(self.original, self.picture, self.mask)

    def seam(self) -> tuple[float, float, int]:
        """The gradient energy along the mask's rim before and after, and the pairs of pixels; see `seam_energy`."""
        energy, pairs = seam_energy(self.original.rgb(), self.mask)
        return energy, seam_energy(self.picture.rgb(), self.mask)[0], pairs


@dataclass(frozen=True)
class _Diagnose:
    picture: np.ndarray


Steps = Generator[Any, Any, Any]


class Repairer:
    """Repairs several pictures at a time; what it asks of model and detector for all of them is asked together.

    Args:
        redrawer: of the model.
        detector: a `Detector`, or a module with its `confidence`.
        options: of the repair.
    """

    def __init__(self, redrawer: Redrawer, detector: nn.Module, options: RepairOptions):
        self.redrawer, self.detector, self.options = redrawer, detector, options

    def __call__(self, jobs: Sequence[Job]) -> list[Repaired]:
        """Repair pictures; the last bits of a result may depend on what is repaired with it, and on nothing else.

        Raises:
            UserError: a map has values that are no confidences.
        """
        return _drive([self._repair(job) for job in jobs], self._diagnose, self.redrawer)

    def _diagnose(self, requests: Sequence[_Diagnose]) -> list[np.ndarray]:
        options = self.options
        tiles = {} if options.tile is None else {"tile": options.tile, "overlap": options.overlap}
        images = to_images([request.picture for request in requests], device_of(self.detector))
        maps = confidence_of(self.detector, images, **tiles).float()
        if maps.shape[2:] != images.shape[2:]:  # of a module of one's own
            maps = F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)
        return list(maps[:, 0].cpu().numpy())

    def _repair(self, job: Job) -> Steps:
        options, picture = self.options, job.picture
        before = confidence = yield _Diagnose(picture.rgb())
        least = max(1, round(min(picture.size) / 64))
        grow = least if options.grow is None else options.grow
        feather = grow if options.feather is None else options.feather
        found = find_regions(
            before,
            threshold=options.threshold,
            grow=grow,
            count=options.regions,
            min_area=options.min_area,
            max_area=options.max_area,
        )
        mask, outcomes = np.zeros(picture.size, bool), []
        for number, region in enumerate(found):
            seeds = (seed_of(options.seed, job.key, number, attempt) for attempt in range(options.tries))
            picture, confidence, outcome = yield from self._redraw(
                job.prompt, picture, confidence, region, seeds, (max(grow, least), feather)
            )
            outcomes.append(outcome)
            if outcome.kept:
                mask |= region.mask
        return Repaired(picture, job.picture, mask, before, confidence, outcomes, job.prompt)

    def _redraw(self, prompt, picture: Picture, confidence, region: Region, seeds, rims: tuple[int, int]) -> Steps:
        """The picture with the best redrawing of a region, its map, and what became of the region."""
        rim, feather = rims
        crop = crop_around(
            region.box,
            picture.size,
            context=self.options.context,
            size=self.redrawer.size,
            multiple=self.redrawer.multiple,
        )
        part = picture.rgb()[crop.place].astype(np.float32) / 255
        inside, weight = region.mask[crop.place], feathered(region.mask, feather)[crop.place]
        shown, shown_mask = resized(part, crop.size), mask_at(inside, crop.size)
        # of the map as it is now: another region's redrawing may have changed it here
        outcome = RegionOutcome(region.box, region.area, *[float(confidence[region.mask].mean())] * 2)
        best, best_try = (picture, confidence), None
        for attempt, seed in enumerate(seeds):
            strength = self.options.strength_of(attempt)
            drawn: Redrawn = yield Redraw(shown, shown_mask, prompt, seed, strength)
            if drawn.picture is None:
                outcome.tries.append(Try(seed, strength, None, drawn.fault))
                continue
            new = matched(resized(drawn.picture, (crop.height, crop.width)), part, inside, rim)
            candidate = picture.blended(new, weight, crop.place)
            again = yield _Diagnose(candidate.rgb())
            score = float(again[region.mask].mean())
            this = Try(seed, strength, score, _why_not(picture, candidate, confidence, again, region, outcome))
            outcome.tries.append(this)
            if this.why_not:
                continue
            if best_try is not None:
                best_try.why_not = NOT_BEST
            best, best_try, outcome.score_after = (candidate, again), this, score
            if not components(np.where(region.mask, again, 0), self.options.threshold):
                break
        return (*best, outcome)


def _why_not(
    picture: Picture, candidate: Picture, before: np.ndarray, after: np.ndarray, region: Region, outcome: RegionOutcome
) -> str:
    """Why a redrawn region is not to be kept; "": it is the best so far."""
    if _changed_outside(picture, candidate, region.mask):
        return OUTSIDE
    score = float(after[region.mask].mean())
    if not score < outcome.score_before:
        return NOT_BETTER
    if not after.mean() < before.mean():
        return ELSEWHERE
    return "" if score < outcome.score_after else NOT_BEST


def _changed_outside(one: Picture, other: Picture, mask: np.ndarray) -> int:
    differs = one.pixels != other.pixels
    return int((differs if differs.ndim == 2 else differs.any(-1))[~mask].sum())


def _drive(tasks: list[Steps], diagnose: Callable, redraw: Callable) -> list:
    """Run generators that ask for diagnoses and redrawings; requests that can be answered together are.

    All diagnoses that are asked for are made before anything is redrawn, so that the requests to the model meet.
    """
    waiting: dict[int, Any] = {}
    results: list[Any] = [None] * len(tasks)

    def go_on(index: int, answer: Any) -> None:
        try:
            waiting[index] = tasks[index].send(answer)
        except StopIteration as stop:
            results[index] = stop.value

    for index in range(len(tasks)):
        go_on(index, None)
    while waiting:
        groups: dict[tuple, list[int]] = {}
        for index in sorted(waiting):
            groups.setdefault(_kind_of(waiting[index]), []).append(index)
        kind, chosen = min(groups.items())
        requests = [waiting.pop(index) for index in chosen]
        for index, answer in zip(chosen, (redraw if kind[0] else diagnose)(requests), strict=True):
            go_on(index, answer)
    return results


def _kind_of(request: Any) -> tuple:
    # diagnoses sort before redrawings
    redraws = isinstance(request, Redraw)
    return (redraws, request.picture.shape, request.strength if redraws else 0.0)


def repair(
    pictures: Sequence[Any],
    pipeline: Any,
    detector: Any,
    options: RepairOptions | None = None,
    *,
    prompts: str | Sequence[str | None] | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> list[Repaired]:
    """Mend finished pictures: what a detector flags is redrawn, and kept only where the detector then finds less.

        repaired = diffdoctor.repair(["photo.png"], pipeline, detector, prompts="a hand that waves")
        repaired[0].save("mended.png")

    Args:
        pictures: arrays (H, W, 3) uint8, images of Pillow's (RGB, RGBA, L, LA, P, I;16) or paths of files.
        pipeline: a loaded diffusers pipeline, text-to-image or inpainting; or its folder or hub id.
        detector: a detector, or any function from pictures (B, 3, H, W) in [0, 1] to maps (B, 1, h, w) in [0, 1]; or
            what the command line takes for one.
        options: of the repair; None: the defaults.
        prompts: what the pictures show: one text for all, or one each, None for those whose metadata say it. None: all
            metadata.
        device: where pipeline and detector are moved; None: they stay where they are.
        progress: show a bar, or plain lines where there is no terminal.

    Returns:
        A `Repaired` for each picture, with the picture, the maps before and after, and what became of each region.

    Raises:
        UserError: the pipeline cannot redraw, an option does not fit, or a picture cannot be read.
        ValueError: an array that is no picture; not as many prompts as pictures.
        TypeError: pictures, prompts or the detector are of a wrong type.
    """
    options = RepairOptions() if options is None else options
    if isinstance(pictures, (str, bytes)) or not isinstance(pictures, (Sequence, np.ndarray)):
        raise TypeError(expected("pictures", "a list of pictures", type(pictures).__name__))
    opened = [_opened(number, picture) for number, picture in enumerate(pictures)]
    given = [prompts] * len(opened) if prompts is None or isinstance(prompts, str) else list(prompts)
    if len(given) != len(opened):
        raise ValueError(expected("prompts", f"one per picture ({len(opened)})", len(given)))
    if wrong := [text for text in given if not isinstance(text, (str, type(None)))]:
        raise TypeError(expected("prompts", "texts", type(wrong[0]).__name__))
    detector = open_detector(detector) if isinstance(detector, str) else as_detector(detector)
    pipeline = load_pipeline("pipeline", pipeline) if isinstance(pipeline, str) else pipeline
    redrawer = open_redrawer(pipeline, options)
    if device is not None:
        redrawer.to(torch.device(device))
        detector.to(device)
    repairer, results = Repairer(redrawer, detector, options), []
    jobs = [
        Job(picture, options.prompt_for(prompt_of(picture) if prompt is None else prompt), number)
        for number, (picture, prompt) in enumerate(zip(opened, given, strict=True))
    ]
    with show_progress(len(jobs), desc="repair", unit="picture", enabled=progress) as bar:
        for start in range(0, len(jobs), options.batch_size):
            results += repairer(jobs[start : start + options.batch_size])
            bar.update(len(results) - start)
    return results


def _opened(number: int, picture: Any) -> Picture:
    try:
        return as_picture(picture)
    except UnreadablePicture as error:
        where = f" ({picture})" if isinstance(picture, (str, os.PathLike)) else ""
        raise UserError(f"pictures[{number}]{where}: {error}") from error


def key_of(name: str) -> int:
    """The key of a picture's seeds, from its name."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass"))
