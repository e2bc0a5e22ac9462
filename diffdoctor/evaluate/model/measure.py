"""The measures of each picture: flagged shares, features, CLIP scores, the classifier's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffdoctor.data.manifest import MANIFEST, read_manifest
from diffdoctor.data.pictures import cover_crop, to_images
from diffdoctor.data.sources import Source, find_sources, read_source, refuse_output_among
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.damage.injection import MIN_SIDE, NoVisibleDamage, inject
from diffdoctor.detector.predict import diagnose_pictures
from diffdoctor.evaluate.model.networks import Classifier, Clip, FeatureNetwork, Preference, extract_features
from diffdoctor.evaluate.model.questions import Questioner, picture_scores
from diffdoctor.evaluate.model.summary import PictureMeasures, summarise
from diffdoctor.measures.pixels import flagged_share
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.training.devices import device_of

# Pictures whose measures are stored as one unit; an interruption loses at most so many.
UNIT = 128


@dataclass
class Measurer:
    """The networks that measure pictures.

    Attributes:
        judge: a detector that had no part in the treatment.
        detector: the detector that steered it.
        features: for FID and variance; None: neither.
        clip: for the CLIP score; None: none.
        preference: for the preference score; None: none.
        classifier: for the accuracy; None: none.
        questioner: for the questions; None: none.
        question_count: most that a prompt has.
        frames_per_call: frames of videos that a detector is given at a time; None: all.
    """

    judge: torch.nn.Module
    detector: torch.nn.Module
    features: FeatureNetwork | None = None
    clip: Clip | None = None
    preference: Preference | None = None
    classifier: Classifier | None = None
    frames_per_call: int | None = None
    questioner: Questioner | None = None
    question_count: int = 0

    def to(self, device: torch.device) -> Measurer:
        """Move all networks."""
        texts = self.clip, self.preference, self.questioner
        for network in (self.judge, self.detector, self.features, *texts, self.classifier):
            if network is not None:
                network.to(device)
        return self

    def measure(
        self, pictures: torch.Tensor, prompts: Sequence[str] = (), class_indices: torch.Tensor | None = None
    ) -> dict[str, np.ndarray]:
        """Measure pictures.

        Args:
            pictures: uint8 (B, 3, H, W) on the CPU, or videos (B, 3, T, H, W): the detectors see every frame, the other
                networks the middle one.
            prompts: B, from which they were generated; none: no CLIP and no preference score.
            class_indices: (B,) index of the logit that the classifier should find largest; None: no classification.

        Returns:
            The fields of `PictureMeasures` by name, arrays of B entries.

        Raises:
            UserError: a network gives what is not finite.
        """
        device = device_of(self.judge)
        pictures = pictures.to(device)
        values = {
            name: flagged_share(
                diagnose_pictures(detector, pictures, name=name, frames_per_call=self.frames_per_call)
            ).numpy()
            for name, detector in (("judge", self.judge), ("detector", self.detector))
        }
        if pictures.ndim == 5:
            pictures = pictures[:, :, pictures.shape[2] // 2]
        if self.features is not None:
            values["features"] = self.features(pictures).numpy()
        if self.clip is not None and len(prompts):
            values["clip_score"] = self.clip.scores(pictures, list(prompts)).numpy()
        if self.preference is not None and len(prompts):
            values["preference"] = self.preference.scores(pictures, list(prompts)).numpy()
        if self.questioner is not None and len(prompts):
            answers = self.questioner.scores(pictures, prompts, self.question_count)
            values |= {"answers": answers.numpy(), "vqa": picture_scores(answers).numpy()}
        if self.classifier is not None and class_indices is not None:
            values["right"] = self.classifier.right(pictures, class_indices).numpy()
        for name in ("features", "clip_score", "preference", "vqa"):
            option = "clip" if name == "clip_score" else name
            if name in values and not np.isfinite(values[name]).all():
                raise UserError(expected(f"--{option}", f"a network whose {name} are finite", "NaN or infinity"))
        return values


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate the values of several batches."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


@dataclass(frozen=True)
class RealUnit:
    """Real pictures that are measured and stored together.

    Attributes:
        name: of the unit's file.
        sources: picture files, or one shard.
    """

    name: str
    sources: tuple[Source, ...]


def real_units(paths: Sequence[str], counts: SkipCounts | None = None, output: str | None = None) -> list[RealUnit]:
    """Real pictures in units: a shard each, and files in groups of `UNIT`.

    Args:
        paths: files, folders, patterns and shards; none: no units.
        counts: filled with what was left out.
        output: folder of the results, which may hold none of them; None: not known.

    Raises:
        UserError: see `data.sources.find_sources` and `data.sources.refuse_output_among`.
    """
    sources = find_sources(paths, counts) if paths else []
    refuse_output_among(output, sources)
    files = [source for source in sources if not source.is_shard]
    groups = [tuple(files[start : start + UNIT]) for start in range(0, len(files), UNIT)]
    groups += [(source,) for source in sources if source.is_shard]
    return [RealUnit(f"{number:08d}", group) for number, group in enumerate(groups)]


def count_real(units: Sequence[RealUnit], *, damaged: bool = False) -> int | None:
    """The number of pictures in the units, or None where it is not known without reading them all.

    Args:
        units: the pictures.
        damaged: of labelled pictures, count those with a mask instead of those without.
    """
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


def read_unit(
    unit: RealUnit, size: tuple[int, int], counts: SkipCounts, *, damaged: bool, strict: bool = False
) -> Iterator[np.ndarray]:
    """Read a unit's pictures at the size of the generated ones.

    Args:
        unit: the pictures.
        size: (H, W) in pixels.
        counts: filled with what could not be read.
        damaged: of labelled pictures, those with a mask; else those without one, without a benign change, and without a
            part that is not decided.
        strict: raise at a broken picture instead of skipping and counting it.

    Yields:
        (H, W, 3) uint8.
    """
    for source in unit.sources:
        for sample in read_source(source, strict=strict, counts=counts):
            if source.is_shard:
                has_damage = bool(np.any(sample["mask"]))
                if has_damage != damaged or (not damaged and (sample.get("kind") or np.any(sample.get("ignore", 0)))):
                    continue
            yield cover_crop(sample["picture"], size)


def damage_pictures(pictures: list[np.ndarray], seed: int, unit: int, start: int) -> list[np.ndarray]:
    """Damage clean pictures as `diffdoctor inject` does, leaving out those on which no damage is visible.

    Picture i's damage is a function of (seed, unit, start + i).

    Args:
        pictures: (H, W, 3) uint8.
        seed: of the evaluation.
        unit: index of the pictures' unit.
        start: index of the first picture in its unit.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: the pictures are too small to be damaged.
    """
    if min(pictures[0].shape[:2]) < MIN_SIDE:
        what = f"pictures of at least {MIN_SIDE} pixels, to damage them for FID's ceiling"
        raise UserError(expected("real", what, pictures[0].shape[:2]))
    result = []
    for index, picture in enumerate(pictures, start=start):
        try:
            result.append(inject(picture, np.random.default_rng([seed, unit, index])).picture)
        except NoVisibleDamage:
            continue
    return result


@dataclass
class Comparison:
    """The measures of a treatment, and the judge's maps for a report.

    Attributes:
        metrics: nested numbers under the names of docs/demo.md.
        judge_before: (N, 1, H, W) the judge's confidence maps before the treatment.
        judge_after: (N, 1, H, W) the same after it.
    """

    metrics: dict
    judge_before: torch.Tensor
    judge_after: torch.Tensor

    @property
    def severity_before(self) -> torch.Tensor:
        """(N,) the share of a picture's pixels that the judge flags before the treatment."""
        return flagged_share(self.judge_before)

    @property
    def severity_after(self) -> torch.Tensor:
        """(N,) the share of a picture's pixels that the judge flags after the treatment."""
        return flagged_share(self.judge_after)


def _correct(
    classify: Callable[[torch.Tensor], torch.Tensor],
    pictures: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int = 256,
) -> torch.Tensor:
    with torch.no_grad():
        guesses = torch.cat([classify(to_images(batch)).argmax(dim=1).cpu() for batch in pictures.split(batch_size)])
    return guesses == labels


def compare_pictures(
    before: torch.Tensor,
    after: torch.Tensor,
    labels: torch.Tensor,
    *,
    detector: torch.nn.Module,
    judge: torch.nn.Module,
    features: Callable[[torch.Tensor], torch.Tensor],
    real: torch.Tensor,
    damaged: torch.Tensor | None = None,
    classify: Callable[[torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
) -> Comparison:
    """Measure a treatment on pictures of the same prompts, seeds and latents.

    Args:
        before: uint8 (N, 3, H, W), pictures of the untreated pipeline.
        after: uint8 (N, 3, H, W), pictures of the treated pipeline.
        labels: (N,) integers, the class that each prompt names.
        detector: the detector that steered the treatment.
        judge: a detector that had no part in it.
        features: callable from float pictures (B, 3, H, W) in [0, 1] to features (B, D), for FID and variance.
        real: uint8 (M, 3, H, W), real clean pictures: FID's reference; its floor is the distance of two random halves.
        damaged: uint8 (M, 3, H, W), the real pictures with damage: FID's ceiling; None: no ceiling.
        classify: callable from float pictures to logits over the labels; None: no accuracy.
        seed: of the split of `real` into halves.

    Returns:
        The measures and the judge's maps.
    """
    maps, sides = [], []
    for pictures in (before, after):
        maps.append(diagnose_pictures(judge, pictures, name="judge"))
        sides.append(
            PictureMeasures(
                judge=flagged_share(maps[-1]),
                detector=flagged_share(diagnose_pictures(detector, pictures)),
                features=extract_features(features, pictures),
                right=None if classify is None else _correct(classify, pictures, labels),
            )
        )
    reference = PictureMeasures(features=extract_features(features, real))
    reference_damaged = None if damaged is None else PictureMeasures(features=extract_features(features, damaged))
    return Comparison(summarise(*sides, labels, real=reference, damaged=reference_damaged, seed=seed), *maps)
