"""Every measure of a detector on labelled pictures, with bootstrap intervals, per category and per generator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from diffdoctor._pictures import to_images
from diffdoctor.detector.archive import SkipCounts
from diffdoctor.detector.shards import BrokenSample
from diffdoctor.evaluate.components import ComponentAP
from diffdoctor.evaluate.pixel import (
    FLAG_SHARE,
    auroc_of,
    average_precision_of,
    flagged_share,
    from_counts,
    map_distances,
    picture_counts,
    pixel_measures,
)


@dataclasses.dataclass
class Diagnosed:
    """Labelled pictures with the detector's maps, all of one size.

    Attributes:
        confidence: (N, H, W) float32 in [0, 1].
        masks: (N, H, W) float32 in [0, 1].
        categories, generators: (N,) lists of str.
        indices: (N,) the pictures' places in the data.
        skipped: what was left out, by reason.
    """

    confidence: np.ndarray
    masks: np.ndarray
    categories: list[str]
    generators: list[str]
    indices: np.ndarray | None = None
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)


def batches(
    data,
    batch_size: int,
    *,
    chosen: Sequence[int] | None = None,
    strict: bool = False,
    counts: SkipCounts | None = None,
) -> Iterator[list[dict]]:
    """The data's samples in order, in lists of up to `batch_size` pictures of one size.

    Args:
        data: `DetectorData`.
        batch_size: pictures in a list.
        chosen: indices of the samples; None: all.
        strict: raise `BrokenSample` at a broken one instead of leaving it out and counting it.
        counts: filled with what was left out.
    """
    counts = SkipCounts() if counts is None else counts
    batch: list[dict] = []
    for index in range(len(data)) if chosen is None else chosen:
        try:
            sample = {**data[index], "index": index}
        except BrokenSample as error:
            counts.add(error.reason, error.where, strict)
            continue
        if batch and (len(batch) == batch_size or sample["picture"].shape != batch[0]["picture"].shape):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


@torch.no_grad()
def diagnose_data(
    detector,
    data,
    *,
    batch_size: int = 64,
    size: int | None = None,
    chosen: Sequence[int] | None = None,
    strict: bool = False,
) -> Diagnosed:
    """The detector's map of every picture.

    Args:
        detector: a `Detector` (or a module with its `confidence`).
        data: `DetectorData`.
        batch_size: pictures at a time.
        size: side in pixels to which maps and masks are brought where pictures differ in size; None: they must agree.
        chosen: indices of the pictures; None: all.
        strict: raise at a broken picture instead of leaving it out and counting it.

    Raises:
        ValueError: the pictures differ in size, or there are none.
    """
    from diffdoctor.detector.samples import as_mask, resize_pair

    device = next(detector.parameters()).device
    maps, masks, categories, generators, indices = [], [], [], [], []
    counts = SkipCounts()
    for batch in batches(data, batch_size, chosen=chosen, strict=strict, counts=counts):
        pairs = [(s["picture"], as_mask(s["mask"])) for s in batch]
        if size is not None:
            pairs = [resize_pair(*pair, size) if pair[1].shape != (size, size) else pair for pair in pairs]
        images = to_images([p for p, _ in pairs], device)
        maps.append(detector.confidence(images)[:, 0].float().cpu().numpy())
        masks.append(np.stack([m for _, m in pairs]))
        categories += [str(s.get("category") or "") for s in batch]
        generators += [str(s.get("generator") or "") for s in batch]
        indices += [s["index"] for s in batch]
    if not maps and counts.total:
        side = size or 1
        maps, masks = [np.zeros((0, side, side), np.float32)], [np.zeros((0, side, side), np.float32)]
    if len({m.shape[1:] for m in maps}) != 1:
        raise ValueError("data: expected pictures of one size, or size= to bring them to one; got several or none")
    places = np.array(indices)
    return Diagnosed(np.concatenate(maps), np.concatenate(masks), categories, generators, places, counts.reasons)


def quick_measures(detector, data, *, size: int | None = None, strict: bool = False) -> dict[str, float]:
    """iou, map50, false_positive_rate and hit_rate of a detector on a small set, for watching a training run."""
    found = diagnose_data(detector, data, size=size, strict=strict)
    damaged = (found.masks >= 0.5).any(axis=(1, 2))
    flags = flagged_share(found.confidence) >= FLAG_SHARE
    return {
        "iou": from_counts(picture_counts(found.confidence, found.masks))["iou"],
        "map50": ComponentAP(found.confidence, found.masks).map50,
        "false_positive_rate": float(flags[~damaged].mean()) if (~damaged).any() else math.nan,
        "hit_rate": float(flags[damaged].mean()) if damaged.any() else math.nan,
    }


def evaluate_maps(
    confidence, mask, *, bootstrap: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, float | list[float] | int]:
    """All measures of confidence maps against masks, with bootstrap intervals over pictures.

    Args:
        confidence: (N, H, W) in [0, 1].
        mask: (N, H, W) in [0, 1]; a picture is damaged where any pixel is >= 0.5.
        bootstrap: resamplings of the set; 0 gives no intervals.
        level: of the percentile intervals.
        seed: of the resampling.

    Returns:
        pictures, damaged (counts); map50; iou, f1, precision, recall, auprc, mse, mse_empty, mse_nonempty, kld, cc, sim
        (pixels); auroc (of the largest confidence), average_precision, false_positive_rate, hit_rate (pictures, the
        latter two by the flagged rule). For all but auprc and the counts, `<name>_interval`: [low, high].
        NaN where a set has no picture of the kind a measure is about.
    """
    confidence, mask = np.asarray(confidence), np.asarray(mask)
    parts = _PerPicture(confidence, mask)
    everything = np.arange(len(confidence))
    result: dict = {"pictures": len(confidence), "damaged": int(parts.damaged.sum())}
    result |= pixel_measures(confidence, mask) | parts.measures(everything)
    result["map50"] = parts.ap.map50
    if bootstrap:
        rng = np.random.default_rng(seed)
        draws = [parts.measures(rng.integers(len(everything), size=len(everything))) for _ in range(bootstrap)]
        tail = (1 - level) / 2
        for name in draws[0]:
            values = np.array([draw[name] for draw in draws])
            values = values[~np.isnan(values)]
            bounds = np.quantile(values, [tail, 1 - tail]).tolist() if values.size else [math.nan, math.nan]
            result[f"{name}_interval"] = bounds
    return result


class _PerPicture:
    """What each picture adds to the measures, so that a resampled set costs sums instead of maps."""

    def __init__(self, confidence: np.ndarray, mask: np.ndarray):
        self.counts = picture_counts(confidence, mask)
        self.distances = map_distances(confidence, mask)
        self.damaged = (mask >= 0.5).any(axis=(1, 2))
        self.empty = ~(mask > 0).any(axis=(1, 2))
        self.flags = flagged_share(confidence) >= FLAG_SHARE
        self.peak = confidence.reshape(len(confidence), -1).max(axis=1)
        self.ap = ComponentAP(confidence, mask)

    def measures(self, chosen: np.ndarray) -> dict[str, float]:
        damaged, empty, flags = self.damaged[chosen], self.empty[chosen], self.flags[chosen]
        mse = self.distances["mse"][chosen]
        return {
            "map50": self.ap.of(chosen),
            **from_counts(self.counts[chosen]),
            "mse": _mean(mse),
            "mse_empty": _mean(mse[empty]),
            "mse_nonempty": _mean(mse[~empty]),
            **{name: _mean(self.distances[name][chosen]) for name in ("kld", "cc", "sim")},
            "auroc": auroc_of(self.peak[chosen], damaged),
            "average_precision": average_precision_of(self.peak[chosen], damaged),
            "false_positive_rate": _mean(flags[~damaged]),
            "hit_rate": _mean(flags[damaged]),
        }


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return float(values.mean()) if values.size else math.nan


def evaluate_detector(
    detector, data, *, batch_size: int = 64, size: int | None = None, bootstrap: int = 1000, seed: int = 0
) -> dict:
    """All measures of a detector on labelled pictures.

    Args:
        detector: a `Detector`.
        data: `DetectorData`.
        batch_size: pictures at a time.
        size: side in pixels to which maps and masks are brought where pictures differ in size.
        bootstrap, seed: see `evaluate_maps`.

    Returns:
        `overall`, `per_category` and `per_generator` (by name), each as `evaluate_maps` returns, and `categories`:
        the statistics of `detector.balance.category_statistics` over the clean pictures.
    """
    found = diagnose_data(detector, data, batch_size=batch_size, size=size)
    return measure(found, bootstrap=bootstrap, seed=seed)


def measure(found: Diagnosed, *, bootstrap: int = 1000, seed: int = 0) -> dict:
    """`evaluate_detector`'s result for maps that are there already."""
    from diffdoctor.detector.balance import category_statistics

    def of(chosen):
        return evaluate_maps(found.confidence[chosen], found.masks[chosen], bootstrap=bootstrap, seed=seed)

    def by(names):
        names = np.asarray(names, dtype=object)
        return {str(name): of(names == name) for name in sorted(set(names))}

    clean = ~(found.masks >= 0.5).any(axis=(1, 2))
    names = [name for name, keep in zip(found.categories, clean, strict=True) if keep]
    maps = found.confidence[clean]
    statistics = category_statistics(names, maps.mean(axis=(1, 2)), flagged_share(maps) >= FLAG_SHARE) if names else []
    return {
        "overall": of(np.ones(len(clean), bool)),
        "per_category": by(found.categories),
        "per_generator": by(found.generators),
        "categories": [dataclasses.asdict(entry) for entry in statistics],
    }
