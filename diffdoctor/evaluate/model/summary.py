"""From what is known of each picture to the figures of a treatment."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from diffdoctor.measures.features import blocks, frechet_distance_of_blocks, within_class_variance
from diffdoctor.measures.pixels import is_flagged
from diffdoctor.measures.rates import paired_bootstrap, paired_mean, wilson_interval


@dataclass
class PictureMeasures:
    """What is known of each of N pictures; None where it was not asked for.

    Attributes:
        judge, detector: (N,) float32, the share of a picture's pixels at a confidence of 0.5 or more.
        features: (N, D), a tensor, or rows on the disk that are read when they are indexed.
        clip_score: (N,), 100 times the cosine between picture and prompt, at least 0.
        right: (N,) bool, whether a classifier sees what the prompt asked for.
    """

    judge: torch.Tensor | None = None
    detector: torch.Tensor | None = None
    features: object | None = None
    clip_score: torch.Tensor | None = None
    right: torch.Tensor | None = None


def artifact_rates(before, after) -> dict:
    """Shares of flagged pictures before and after, with Wilson intervals and the paired change.

    Args:
        before, after: (N,) bool tensors of the same pictures.
    """
    result = {}
    for name, flags in (("before", before), ("after", after)):
        count = int(flags.sum())
        result[name] = count / len(flags)
        result[f"{name}_interval"] = list(wilson_interval(count, len(flags)))
    return {**result, **paired_bootstrap(before.numpy(), after.numpy())}


def summarise(before: PictureMeasures, after: PictureMeasures, labels, *, real=None, damaged=None, seed: int = 0):
    """The figures of a treatment.

    Args:
        before, after: of the same prompts, seeds and latents; `judge` and `detector` are needed.
        labels: (N,) integers, what each prompt asked for.
        real: `PictureMeasures` of real clean pictures, or None: FID's reference; its floor is the distance of two
            random halves. Where its `judge` and `detector` are known, their rates on it are false alarms.
        damaged: `PictureMeasures` of the real pictures with damage, or None: FID's ceiling, the detectors' hits.
        seed: of the split of `real` into halves, and of the resampling.

    Returns:
        Nested numbers: `artifact_rate`, `flagged_area`, `pictures`, and as far as known `fid`, `variance`,
        `clip_score`, `accuracy`. Everything under docs/evaluate.md's names.
    """
    flags = {
        name: (is_flagged(getattr(before, name)), is_flagged(getattr(after, name))) for name in ("judge", "detector")
    }
    metrics: dict = {"artifact_rate": {name: artifact_rates(*pair) for name, pair in flags.items()}}
    for kind, measures in (("real", real), ("damaged", damaged)):
        for name in flags:
            shares = getattr(measures, name, None)
            if shares is not None and len(shares):
                count = int(is_flagged(shares).sum())
                metrics["artifact_rate"][name][kind] = count / len(shares)
                metrics["artifact_rate"][name][f"{kind}_interval"] = list(wilson_interval(count, len(shares)))
    metrics["flagged_area"] = {
        name: {"before": float(getattr(before, name).mean()), "after": float(getattr(after, name).mean())}
        for name in flags
    }
    metrics["pictures"] = len(labels)
    if real is not None and real.features is not None:
        metrics["fid"] = _distances(before, after, real, damaged, seed)
    if before.features is not None:
        repeated = bool((labels.unique(return_counts=True)[1] > 1).any())
        metrics["variance"] = {
            name: within_class_variance(side.features, labels) if repeated else None
            for name, side in (("before", before), ("after", after))
        }
    clean = ~flags["judge"][0]
    if before.clip_score is not None:
        metrics["clip_score"] = _clip_scores(before.clip_score, after.clip_score, clean, seed)
    if before.right is not None:
        metrics["accuracy"] = _accuracy(before.right, after.right, clean)
    return metrics


def summarise_groups(before: PictureMeasures, after: PictureMeasures, groups: list[str]) -> dict:
    """Rates, and scores where they are known, of each group of pictures by name.

    Args:
        before, after: as in `summarise`.
        groups: N names, such as the prompts' categories.
    """
    names = np.asarray(groups, dtype=object)
    result = {}
    for group in sorted(set(groups)):
        chosen = torch.from_numpy(names == group)

        def part(measures, chosen=chosen):
            fields = ("judge", "detector", "clip_score", "right")
            values = {name: getattr(measures, name) for name in fields}
            return PictureMeasures(**{k: None if v is None else v[chosen] for k, v in values.items()})

        result[group] = summarise(part(before), part(after), torch.zeros(int(chosen.sum()), dtype=torch.long))
    return result


def _distances(before, after, real, damaged, seed):
    order = torch.randperm(len(real.features), generator=torch.Generator().manual_seed(seed))
    half = len(order) // 2

    def distance(side):
        return frechet_distance_of_blocks(blocks(real.features), blocks(side.features))

    result = {"before": distance(before), "after": distance(after)}
    # In the order of the files, so that features on the disk are read from front to back.
    halves = order[:half].sort().values, order[half:].sort().values
    result["floor"] = math.nan
    if half >= 2:
        result["floor"] = frechet_distance_of_blocks(*(blocks(real.features, part) for part in halves))
    if damaged is not None and damaged.features is not None:
        result["ceiling"] = distance(damaged)
    return result


def _clip_scores(before, after, clean, seed):
    result = paired_mean(before.numpy(), after.numpy(), seed=seed)
    if clean.any():
        kept = paired_mean(before[clean].numpy(), after[clean].numpy(), seed=seed)
        result |= {f"clean_{name}": value for name, value in kept.items()}
    return result


def _accuracy(before, after, clean):
    result = {}
    for name, right in (("before", before), ("after", after)):
        result[name] = float(right.float().mean())
        result[f"{name}_interval"] = list(wilson_interval(int(right.sum()), len(right)))
    if clean.any():
        result["clean_before"] = float(before[clean].float().mean())
        result["clean_after"] = float(after[clean].float().mean())
    return result
