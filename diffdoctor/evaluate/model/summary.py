"""The measures of a treatment, from those of each picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffdoctor.measures.features import FeatureRows, blocks, frechet_distance_of_blocks, within_class_variance
from diffdoctor.measures.kernel_distance import cubic, gaussian, kernel_distances
from diffdoctor.measures.manifold import Manifold
from diffdoctor.measures.pixels import is_flagged
from diffdoctor.measures.rates import paired_bootstrap, paired_mean, wilson_interval

# Rows that are compared each with each; of larger sets so many are drawn.
MOST_ROWS = 10_000
# Neighbours of the manifolds of precision and recall.
NEIGHBOURS = 3


@dataclass
class PictureMeasures:
    """The measures of each of N pictures; None where one was not taken.

    Attributes:
        judge: (N,) float32, the share of a picture's pixels that the judge flags, in [0, 1].
        detector: (N,) float32, the share that the detector flags.
        features: (N, D), a tensor, or rows on the disk that are read when they are indexed.
        clip_score: (N,), 100 times the cosine between picture and prompt, at least 0.
        preference: (N,), how much people would like the picture of its prompt, on the scale of a model.
        answers: (N, Q) float32, the probability of yes to each of its prompt's questions; NaN behind the last.
        vqa: (N,) float32, their geometric mean.
        right: (N,) bool, whether a classifier finds the prompt's label.
    """

    judge: torch.Tensor | None = None
    detector: torch.Tensor | None = None
    features: FeatureRows | None = None
    clip_score: torch.Tensor | None = None
    preference: torch.Tensor | None = None
    right: torch.Tensor | None = None
    answers: torch.Tensor | None = None
    vqa: torch.Tensor | None = None


def artifact_rates(before: torch.Tensor, after: torch.Tensor) -> dict[str, float | list[float] | None]:
    """Shares of flagged pictures before and after, with Wilson intervals and the paired change.

    Args:
        before: (N,) bool, whether each picture is flagged before the treatment.
        after: (N,) bool, the same pictures after it.

    Returns:
        `before`, `after`, their `_interval`s, and the fields of `measures.rates.paired_bootstrap`.
    """
    result = {}
    for name, flags in (("before", before), ("after", after)):
        count = int(flags.sum())
        result[name] = count / len(flags)
        result[f"{name}_interval"] = list(wilson_interval(count, len(flags)))
    return {**result, **paired_bootstrap(before.numpy(), after.numpy())}


def summarise(
    before: PictureMeasures,
    after: PictureMeasures,
    labels: torch.Tensor,
    *,
    real: PictureMeasures | None = None,
    damaged: PictureMeasures | None = None,
    fid: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """The measures of a treatment.

    Args:
        before: pictures of the untreated pipeline; `judge` and `detector` are required.
        after: pictures of the treated pipeline, of the same prompts, seeds and latents.
        labels: (N,) integers, the class that each prompt names.
        real: real clean pictures, FID's reference, whose floor is the distance of two random halves; the flagged ones
            among them are the detectors' false alarms. None: no FID.
        damaged: the real pictures with damage, FID's ceiling; the flagged ones among them are the detectors' hits.
        fid: whether there are enough pictures for FID, more than features.
        seed: of the split of `real` into halves, of the resampling, and of the rows drawn of more than 10,000.

    Returns:
        Nested numbers under the names of docs/evaluate.md: `artifact_rate`, `flagged_area`, `pictures`, and those of
        `fid`, `kid`, `mmd`, `precision`, `recall`, `variance`, `clip_score`, `preference`, `vqa` and `accuracy` whose
        inputs were measured.
    """
    flags = {
        name: (is_flagged(getattr(before, name)), is_flagged(getattr(after, name))) for name in ("judge", "detector")
    }
    metrics: dict = {"artifact_rate": {name: artifact_rates(*pair) for name, pair in flags.items()}}
    for reference, measures in (("real", real), ("damaged", damaged)):
        for name in flags:
            shares = getattr(measures, name, None)
            if shares is not None and len(shares):
                count = int(is_flagged(shares).sum())
                metrics["artifact_rate"][name][reference] = count / len(shares)
                metrics["artifact_rate"][name][f"{reference}_interval"] = list(wilson_interval(count, len(shares)))
    metrics["flagged_area"] = {
        name: {"before": float(getattr(before, name).mean()), "after": float(getattr(after, name).mean())}
        for name in flags
    }
    metrics["pictures"] = len(labels)
    if real is not None and real.features is not None:
        if fid:
            metrics["fid"] = _distances(before, after, real, damaged, seed)
        if min(len(real.features), len(before.features)) > NEIGHBOURS:
            metrics |= _of_few(before, after, real, damaged, seed)
    if before.features is not None:
        repeated = bool((labels.unique(return_counts=True)[1] > 1).any())
        metrics["variance"] = {
            name: within_class_variance(side.features, labels) if repeated else None
            for name, side in (("before", before), ("after", after))
        }
    clean = ~flags["judge"][0]
    for name in ("clip_score", "preference", "vqa"):
        if getattr(before, name) is not None:
            metrics[name] = _scores(getattr(before, name), getattr(after, name), clean, seed)
    if before.right is not None:
        metrics["accuracy"] = _accuracy(before.right, after.right, clean)
    return metrics


def summarise_groups(before: PictureMeasures, after: PictureMeasures, groups: list[str]) -> dict[str, dict]:
    """The measures of each group of pictures, without FID and variance.

    Args:
        before: as in `summarise`.
        after: as in `summarise`.
        groups: N names, such as the prompts' categories.

    Returns:
        What `summarise` returns, by name of the group.
    """
    names = np.asarray(groups, dtype=object)
    result = {}
    for group in sorted(set(groups)):
        chosen = torch.from_numpy(names == group)

        def select(measures, chosen=chosen):
            fields = ("judge", "detector", "clip_score", "preference", "vqa", "right")
            values = {name: getattr(measures, name) for name in fields}
            return PictureMeasures(**{k: None if v is None else v[chosen] for k, v in values.items()})

        result[group] = summarise(select(before), select(after), torch.zeros(int(chosen.sum()), dtype=torch.long))
    return result


def _distances(
    before: PictureMeasures, after: PictureMeasures, real: PictureMeasures, damaged: PictureMeasures | None, seed: int
) -> dict[str, float]:
    order = torch.randperm(len(real.features), generator=torch.Generator().manual_seed(seed))
    middle = len(order) // 2

    def distance(side):
        return frechet_distance_of_blocks(blocks(real.features), blocks(side.features))

    result = {"before": distance(before), "after": distance(after)}
    # Sorted, so that features on the disk are read in order.
    halves = order[:middle].sort().values, order[middle:].sort().values
    result["floor"] = math.nan
    if middle >= 2:
        result["floor"] = frechet_distance_of_blocks(*(blocks(real.features, half) for half in halves))
    if damaged is not None and damaged.features is not None:
        result["ceiling"] = distance(damaged)
    return result


def _of_few(
    before: PictureMeasures, after: PictureMeasures, real: PictureMeasures, damaged: PictureMeasures | None, seed: int
) -> dict[str, dict]:
    """The measures against the real pictures that a few hundred suffice for."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count):
        return torch.randperm(count, generator=generator)[:MOST_ROWS].sort().values

    pairs = drawn(len(before.features))
    reference, one, other = real.features[drawn(len(real.features))], before.features[pairs], after.features[pairs]
    broken = None
    if damaged is not None and damaged.features is not None and len(damaged.features) > NEIGHBOURS:
        broken = damaged.features[drawn(len(damaged.features))]
    result: dict[str, dict] = {}
    for name, kernel in (("kid", cubic), ("mmd", gaussian)):
        result[name] = kernel_distances(reference, one, other, kernel, damaged=broken)
    manifold = Manifold(reference, NEIGHBOURS)
    result |= {"precision": {}, "recall": {}}
    for when, features in (("before", one), ("after", other)):
        for name, inside in (
            ("precision", manifold.contains(features)),
            ("recall", Manifold(features, NEIGHBOURS).contains(reference)),
        ):
            result[name][when] = float(inside.double().mean())
            result[name][f"{when}_interval"] = list(wilson_interval(int(inside.sum()), len(inside)))
    return result


def _scores(before: torch.Tensor, after: torch.Tensor, clean: torch.Tensor, seed: int) -> dict:
    result = paired_mean(before.numpy(), after.numpy(), seed=seed)
    if clean.any():
        of_clean = paired_mean(before[clean].numpy(), after[clean].numpy(), seed=seed)
        result |= {f"clean_{name}": value for name, value in of_clean.items()}
    return result


def _accuracy(before: torch.Tensor, after: torch.Tensor, clean: torch.Tensor) -> dict:
    result = {}
    for name, right in (("before", before), ("after", after)):
        result[name] = float(right.float().mean())
        result[f"{name}_interval"] = list(wilson_interval(int(right.sum()), len(right)))
    if clean.any():
        result["clean_before"] = float(before[clean].float().mean())
        result["clean_after"] = float(after[clean].float().mean())
    return result
