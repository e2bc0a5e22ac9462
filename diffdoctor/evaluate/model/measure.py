"""What is measured of pictures: the detectors' flagged shares, features, CLIP scores, the classifier's word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffdoctor.data.manifest import MANIFEST, read_manifest
from diffdoctor.data.pictures import cover_crop, to_images
from diffdoctor.data.sources import Source, find_sources, read_source
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.damage.injection import MIN_SIDE, NoVisibleDamage, inject
from diffdoctor.detector.predict import diagnose_pictures
from diffdoctor.evaluate.model.networks import extract_features
from diffdoctor.evaluate.model.summary import PictureMeasures, summarise
from diffdoctor.measures.pixels import flagged_share
from diffdoctor.runs.errors import UserError

# Pictures whose measures share a file; what an interruption costs at most.
UNIT = 128


@dataclass
class Measurer:
    """Everything that is asked of a picture.

    Args:
        judge, detector: detectors.
        features: a `FeatureNetwork`, or None.
        clip: a `Clip`, or None.
        classifier: a `Classifier`, or None.
    """

    judge: torch.nn.Module
    detector: torch.nn.Module
    features: object | None = None
    clip: object | None = None
    classifier: object | None = None

    def to(self, device: torch.device) -> Measurer:
        """Move all networks."""
        for part in (self.judge, self.detector, self.features, self.clip, self.classifier):
            if part is not None:
                part.to(device)
        return self

    def measure(self, pictures: torch.Tensor, prompts: Sequence[str] = (), places=None) -> dict[str, np.ndarray]:
        """What `PictureMeasures` holds, of uint8 pictures (B, 3, H, W) on the CPU.

        Args:
            prompts: what they were drawn from, B; none: no CLIP score.
            places: (B,), which of the classifier's logits stands for what was asked for; None: no classification.
        """
        device = next(self.judge.parameters()).device
        there = pictures.to(device)
        values = {
            name: flagged_share(diagnose_pictures(detector, there)).numpy()
            for name, detector in (("judge", self.judge), ("detector", self.detector))
        }
        if self.features is not None:
            values["features"] = self.features(there).numpy()
        if self.clip is not None and len(prompts):
            values["clip_score"] = self.clip.scores(there, list(prompts)).numpy()
        if self.classifier is not None and places is not None:
            values["right"] = self.classifier.right(there, places).numpy()
        return values


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The values of several batches as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


@dataclass(frozen=True)
class RealUnit:
    """Some real pictures that are measured together.

    Attributes:
        name: of the unit's file.
        sources: picture files, or one shard.
    """

    name: str
    sources: tuple[Source, ...]


def real_units(places: Sequence[str]) -> list[RealUnit]:
    """Real pictures in units: a shard each, and files by the hundred or so."""
    sources = find_sources(places)
    files = [source for source in sources if not source.is_shard]
    groups = [tuple(files[start : start + UNIT]) for start in range(0, len(files), UNIT)]
    groups += [(source,) for source in sources if source.is_shard]
    return [RealUnit(f"{number:08d}", group) for number, group in enumerate(groups)]


def count_real(units: Sequence[RealUnit], *, damaged: bool = False) -> int | None:
    """How many pictures the units hold, or None where only reading them all would tell."""
    total, folders = 0, {}
    for unit in units:
        for source in unit.sources:
            if not source.is_shard:
                total += 1
                continue
            folder = source.path.parent
            if not (folder / MANIFEST).is_file():
                return None
            if folder not in folders:
                folders[folder] = read_manifest(folder)
            manifest = folders[folder]
            total += sum(
                shard == source.path.name and (mask > 0) == damaged
                for shard, mask in zip(manifest["shard"], manifest["mask_max"], strict=True)
            )
    return total


def read_unit(unit: RealUnit, size: tuple[int, int], counts: SkipCounts, *, damaged: bool) -> Iterator[np.ndarray]:
    """The unit's pictures (H, W, 3) uint8 at the size of the drawn ones.

    Args:
        size: (H, W).
        counts: filled with what could not be read.
        damaged: of labelled pictures, those with a mask; else those without one, and without a benign change either.
    """
    for source in unit.sources:
        for sample in read_source(source, counts=counts):
            if source.is_shard:
                spoilt = bool(np.any(sample["mask"]))
                if spoilt != damaged or (not damaged and sample.get("kind")):
                    continue
            yield cover_crop(sample["picture"], size)


def spoil(pictures: list[np.ndarray], seed: int, unit: int, start: int) -> list[np.ndarray]:
    """Damaged versions of clean pictures, drawn as `diffdoctor inject` does; where none can be seen, none is made.

    Args:
        pictures: (H, W, 3) uint8.
        seed, unit, start: a picture's damage depends on these and on its place in the list.
    """
    if min(pictures[0].shape[:2]) < MIN_SIDE:
        raise UserError(f"real: pictures of at least {MIN_SIDE} pixels were expected, to damage them for FID's ceiling")
    result = []
    for place, picture in enumerate(pictures, start=start):
        try:
            result.append(inject(picture, np.random.default_rng([seed, unit, place])).picture)
        except NoVisibleDamage:
            continue
    return result


@dataclass
class Comparison:
    """The measures of a treatment and what a report shows of it.

    Attributes:
        metrics: nested numbers under the names of docs/demo.md.
        judge_before, judge_after: (N, 1, H, W) confidence maps of the judge.
        severity_before, severity_after: (N,) share of the pixels at confidence 0.5 or more, by the judge.
    """

    metrics: dict
    judge_before: torch.Tensor
    judge_after: torch.Tensor

    @property
    def severity_before(self):
        return flagged_share(self.judge_before)

    @property
    def severity_after(self):
        return flagged_share(self.judge_after)


def _correct(classify, pictures, labels, batch_size=256):
    with torch.no_grad():
        guesses = torch.cat([classify(to_images(part)).argmax(dim=1).cpu() for part in pictures.split(batch_size)])
    return guesses == labels


def compare_pictures(before, after, labels, *, detector, judge, features, real, damaged=None, classify=None, seed=0):
    """Measure a treatment on pictures of the same prompts, seeds and latents.

    Args:
        before, after: uint8 (N, 3, H, W).
        labels: (N,) integers, what each prompt asked for.
        detector: the detector that steered the treatment.
        judge: a detector that had no part in it.
        features: callable from float pictures (B, 3, H, W) in [0, 1] to features (B, D), for FID and variance.
        real: uint8 (M, 3, H, W), real clean pictures: FID's reference; its floor is the distance of two random halves.
        damaged: uint8 (M, 3, H, W), the real pictures with damage: FID's ceiling; left out when None.
        classify: callable from float pictures to logits over the labels; the accuracy is left out when None.
        seed: of the split of `real` into halves.

    Returns:
        A `Comparison`.
    """
    maps, sides = [], []
    for pictures in (before, after):
        maps.append(diagnose_pictures(judge, pictures))
        sides.append(
            PictureMeasures(
                judge=flagged_share(maps[-1]),
                detector=flagged_share(diagnose_pictures(detector, pictures)),
                features=extract_features(features, pictures),
                right=None if classify is None else _correct(classify, pictures, labels),
            )
        )
    reference = PictureMeasures(features=extract_features(features, real))
    spoilt = None if damaged is None else PictureMeasures(features=extract_features(features, damaged))
    return Comparison(summarise(*sides, labels, real=reference, damaged=spoilt, seed=seed), *maps)
