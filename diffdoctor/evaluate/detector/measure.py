"""Every measure of a detector on labelled pictures, with bootstrap intervals, per category and per generator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from diffdoctor.data.pictures import to_images
from diffdoctor.data.shards import BrokenSample
from diffdoctor.data.tar import SkipCounts
from diffdoctor.measures.pixels import FLAG_SHARE, average_precision
from diffdoctor.measures.statistics import PictureStatistics


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


def diagnosed_batches(
    detector,
    data,
    *,
    batch_size: int = 64,
    size: int | None = None,
    chosen: Sequence[int] | None = None,
    strict: bool = False,
    counts: SkipCounts | None = None,
) -> Iterator[Diagnosed]:
    """The detector's maps batch by batch, so that memory holds one; see `diagnose_data`.

    Args:
        counts: filled with what was left out (`skipped` of each batch is empty).
    """
    from diffdoctor.detector.samples import as_mask, resize_pair

    device = next(detector.parameters()).device
    for batch in batches(data, batch_size, chosen=chosen, strict=strict, counts=counts):
        pairs = [(s["picture"], as_mask(s["mask"])) for s in batch]
        if size is not None:
            pairs = [resize_pair(*pair, size) if pair[1].shape != (size, size) else pair for pair in pairs]
        images = to_images([p for p, _ in pairs], device)
        with torch.no_grad():
            confidence = detector.confidence(images)[:, 0].float().cpu().numpy()
        names = ([str(s.get(name) or "") for s in batch] for name in ("category", "generator"))
        yield Diagnosed(confidence, np.stack([m for _, m in pairs]), *names, np.array([s["index"] for s in batch]))


def diagnose_data(
    detector,
    data,
    *,
    batch_size: int = 64,
    size: int | None = None,
    chosen: Sequence[int] | None = None,
    strict: bool = False,
) -> Diagnosed:
    """The detector's map of every picture, all in memory.

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
    counts = SkipCounts()
    options = {"batch_size": batch_size, "size": size, "chosen": chosen, "strict": strict, "counts": counts}
    parts = list(diagnosed_batches(detector, data, **options))
    if not parts and counts.total:
        empty = np.zeros((0, size or 1, size or 1), np.float32)
        return Diagnosed(empty, empty, [], [], np.array([], int), counts.reasons)
    if len({part.confidence.shape[1:] for part in parts}) != 1:
        raise ValueError("data: expected pictures of one size, or size= to bring them to one; got several or none")
    return Diagnosed(
        np.concatenate([part.confidence for part in parts]),
        np.concatenate([part.masks for part in parts]),
        [name for part in parts for name in part.categories],
        [name for part in parts for name in part.generators],
        np.concatenate([part.indices for part in parts]),
        counts.reasons,
    )


def quick_measures(detector, data, *, size: int | None = None, strict: bool = False) -> dict[str, float]:
    """iou, map50, false_positive_rate and hit_rate of a detector on a set, for watching a training run."""
    parts = diagnosed_batches(detector, data, size=size, strict=strict)
    parts = [PictureStatistics.of(part.confidence, part.masks) for part in parts]
    names = ("iou", "map50", "false_positive_rate", "hit_rate")
    if not parts:
        return dict.fromkeys(names, math.nan)
    found = PictureStatistics.joined(parts)
    measured = found.measures(np.arange(len(found)))
    return {name: measured[name] for name in names}


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
        latter two by the flagged rule). For all but the counts, `<name>_interval`: [low, high]; that of auprc is drawn
        from 128 levels of confidence and laid around the exact value. NaN where a set has no picture of the kind a
        measure is about.
    """
    confidence, mask = np.asarray(confidence), np.asarray(mask)
    found = PictureStatistics.of(confidence, mask)
    auprc = average_precision(confidence, mask)
    return found.with_intervals(np.arange(len(found)), auprc, bootstrap=bootstrap, level=level, seed=seed)


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
    statistics = PictureStatistics.of(found.confidence, found.masks)

    def auprc(column, name, chosen):
        return average_precision(found.confidence[chosen], found.masks[chosen])

    return measure_statistics(statistics, found.categories, found.generators, auprc, bootstrap=bootstrap, seed=seed)


def measure_statistics(
    statistics: PictureStatistics,
    categories: Sequence[str],
    generators: Sequence[str],
    auprc: Callable[[str, str, np.ndarray], float],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """`evaluate_detector`'s result from the pictures' statistics.

    Args:
        statistics: of N pictures.
        categories, generators: (N,) their names.
        auprc: function from ("", ""), ("category", name) or ("generator", name) and the indices (n,) of these pictures
            to the AUPRC of their pixels.
        bootstrap, seed: see `evaluate_maps`.
    """
    from diffdoctor.detector.balance import category_statistics

    def of(column, name, chosen):
        return statistics.with_intervals(chosen, auprc(column, name, chosen), bootstrap=bootstrap, seed=seed)

    def by(column, names):
        names = np.asarray(names, dtype=object)
        return {str(name): of(column, name, np.flatnonzero(names == name)) for name in sorted(set(names))}

    clean = np.flatnonzero(~statistics.columns["damaged"])
    share, mean = (statistics.columns[name][clean] for name in ("share", "mean"))
    names = [categories[index] for index in clean]
    table = category_statistics(names, mean, share >= FLAG_SHARE) if names else []
    return {
        "overall": of("", "", np.arange(len(statistics))),
        "per_category": by("category", categories),
        "per_generator": by("generator", generators),
        "categories": [dataclasses.asdict(entry) for entry in table],
    }
