"""Confidence maps of pictures, and of labelled sets batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from diffdoctor.data.codec import SizeCheck
from diffdoctor.data.pictures import as_mask, resize_pair, to_images
from diffdoctor.data.shards import BrokenSample
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.confidence import confidence_of
from diffdoctor.detector.samples import DetectorData
from diffdoctor.measures.components import components
from diffdoctor.measures.pixels import flagged_share, is_flagged, uncertainty
from diffdoctor.runs.errors import expected
from diffdoctor.training.devices import device_of

TOO_LARGE = "a picture that is too large to be diagnosed whole (give tile)"
_BATCH_PIXELS = 2**26


def diagnose_pictures(
    detector: nn.Module,
    pictures: torch.Tensor,
    *,
    batch_size: int = 250,
    name: str = "detector",
    frames_per_call: int | None = None,
) -> torch.Tensor:
    """The confidence maps of pictures.

    Args:
        detector: a `Detector`, or a module with its `confidence`.
        pictures: (N, 3, H, W) uint8, or videos (N, 3, T, H, W).
        batch_size: pictures at a time.
        name: what the detector is here, for an error: detector or judge.
        frames_per_call: frames of videos at a time; None: all of a batch.

    Returns:
        (N, 1, H, W) float32 in [0, 1] on the CPU, (N, 1, T, H, W) of videos.

    Raises:
        UserError: a map has NaN or other values that are no confidences.
    """
    device = device_of(detector)
    parts = (to_images(part, device) for part in pictures.split(batch_size))
    options = {"name": name, "frames_per_call": frames_per_call}
    return torch.cat([confidence_of(detector, part, **options).float().cpu() for part in parts])


def describe_map(name: str, confidence: np.ndarray) -> dict:
    """One picture's diagnosis, as JSON values.

    Args:
        name: of the picture.
        confidence: (H, W) in [0, 1].

    Returns:
        name, height, width, max and mean (of the confidence), uncertainty, flagged_share, flagged, components (box,
        area, score).
    """
    share = float(flagged_share(confidence[None])[0])
    return {
        "name": name,
        "height": confidence.shape[0],
        "width": confidence.shape[1],
        "max": float(confidence.max()),
        "mean": float(confidence.mean()),
        "uncertainty": float(uncertainty(confidence[None])[0]),
        "flagged_share": share,
        "flagged": bool(is_flagged(share)),
        "components": [
            {"box": list(found.box), "area": found.area, "score": found.score} for found in components(confidence)
        ],
    }


@dataclasses.dataclass
class Diagnosed:
    """Labelled pictures with the detector's maps, all of one size.

    Attributes:
        confidence: (N, H, W) float32 in [0, 1].
        masks: (N, H, W) float32 in [0, 1].
        categories: N names.
        generators: N names.
        kinds: N names of what was done to the picture, see `damage.injection.Injected`; "" where it is not known.
        indices: (N,) the pictures' indices in the data.
        skipped: {reason: count} of the pictures that were skipped.
        ignore: (N, H, W) bool, where it is not decided what is broken; None: nowhere.
    """

    confidence: np.ndarray
    masks: np.ndarray
    categories: list[str]
    generators: list[str]
    kinds: list[str]
    indices: np.ndarray | None = None
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    ignore: np.ndarray | None = None


def batches(
    data: DetectorData,
    batch_size: int,
    *,
    chosen: Sequence[int] | None = None,
    strict: bool = False,
    counts: SkipCounts | None = None,
) -> Iterator[list[dict]]:
    """The data's samples in order, in lists of up to `batch_size` pictures of one size.

    Args:
        data: the labelled pictures.
        batch_size: pictures in a list.
        chosen: indices of the samples; None: all.
        strict: raise `BrokenSample` at a broken sample instead of skipping and counting it.
        counts: filled with what was skipped.

    Returns:
        Lists of samples, each with its `index` in the data.
    """
    counts = SkipCounts() if counts is None else counts

    def readable() -> Iterator[dict]:
        for index in range(len(data)) if chosen is None else chosen:
            try:
                sample = {**data[index], "index": index}
            except BrokenSample as error:
                counts.add(error.reason, error.where, strict, error.detail)
                continue
            yield sample

    return in_batches(readable(), batch_size)


def in_batches(samples: Iterable[dict], batch_size: int) -> Iterator[list[dict]]:
    """Split samples, in order, into lists of up to `batch_size` whose pictures have one size.

    Large pictures make shorter lists, of up to 64 megapixels together.

    Args:
        samples: dicts with `picture` (H, W, 3).
        batch_size: samples in a list.
    """
    batch: list[dict] = []
    for sample in samples:
        shape = sample["picture"].shape
        full = len(batch) >= min(batch_size, max(1, _BATCH_PIXELS // (shape[0] * shape[1])))
        if batch and (full or shape != batch[0]["picture"].shape):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def takes(detector: nn.Module, height: int, width: int, tile: int | None = None) -> bool:
    """Whether a detector takes pictures of this size; one that is no `Detector` takes what it is given."""
    return getattr(detector, "takes", lambda *_: True)(height, width, tile)


def size_check(detector: nn.Module, tile: int | None = None) -> SizeCheck:
    """What refuses pictures that are too large for a detector before they are decoded, see `codec.decode`."""
    return lambda height, width: None if takes(detector, height, width, tile) else TOO_LARGE


def is_taken(detector: nn.Module, sample: dict, where: str, strict: bool, counts: SkipCounts) -> bool:
    """Whether a picture is small enough for the detector; counts one that is not.

    Args:
        detector: a `Detector`, or a module with its `confidence`, which takes what it is given.
        sample: with `picture` (H, W, 3).
        where: its name.
        strict: raise `UserError` instead of counting.
        counts: filled with what is not taken.
    """
    if takes(detector, *sample["picture"].shape[:2]):
        return True
    counts.add(TOO_LARGE, where, strict)
    return False


def diagnosed_batches(
    detector: nn.Module,
    data: DetectorData,
    *,
    batch_size: int = 64,
    size: int | None = None,
    chosen: Sequence[int] | None = None,
    strict: bool = False,
    counts: SkipCounts | None = None,
) -> Iterator[Diagnosed]:
    """The detector's maps batch by batch, so that memory holds one batch.

    Args:
        detector: a `Detector`, or a module with its `confidence`.
        data: the labelled pictures.
        batch_size: pictures at a time.
        size: side in pixels to which maps and masks are resized; None keeps their sizes.
        chosen: indices of the pictures; None: all.
        strict: raise at a broken picture instead of skipping and counting it.
        counts: filled with what was skipped; `skipped` of each batch is empty.

    Yields:
        The maps of up to `batch_size` pictures of one size.

    Raises:
        UserError: a map has NaN or other values that are no confidences.
    """
    device = device_of(detector)
    counts = SkipCounts() if counts is None else counts
    for whole in batches(data, batch_size, chosen=chosen, strict=strict, counts=counts):
        if not (batch := [s for s in whole if size or is_taken(detector, s, str(s.get("key")), strict, counts)]):
            continue
        pictures, masks = zip(*(resize_pair(s["picture"], as_mask(s["mask"]), size) for s in batch), strict=True)
        images = to_images(pictures, device)
        confidence = confidence_of(detector, images)[:, 0].float().cpu().numpy()
        names = ([str(s.get(name) or "") for s in batch] for name in ("category", "generator", "kind"))
        indices, ignore = np.array([s["index"] for s in batch]), _undecided(batch, masks, size)
        yield Diagnosed(confidence, np.stack(masks), *names, indices, ignore=ignore)


def _undecided(batch: list[dict], masks: Sequence[np.ndarray], size: int | None) -> np.ndarray | None:
    """Where it is not decided what is broken, of the size of the masks; None: nowhere."""
    if all(sample.get("ignore") is None for sample in batch):
        return None
    planes = [
        np.zeros(mask.shape, np.float32)
        if sample.get("ignore") is None
        else resize_pair(sample["picture"], as_mask(sample["ignore"]), size)[1]
        for sample, mask in zip(batch, masks, strict=True)
    ]
    return np.stack(planes) > 0


def diagnose_data(
    detector: nn.Module,
    data: DetectorData,
    *,
    batch_size: int = 64,
    size: int | None = None,
    chosen: Sequence[int] | None = None,
    strict: bool = False,
) -> Diagnosed:
    """The detector's map of every picture, all in memory.

    Args:
        detector: a `Detector`, or a module with its `confidence`.
        data: the labelled pictures.
        batch_size: pictures at a time.
        size: side in pixels to which maps and masks are resized; None: the pictures must agree in size.
        chosen: indices of the pictures; None: all.
        strict: raise at a broken picture instead of skipping and counting it.

    Raises:
        ValueError: the pictures differ in size, or there are none.
    """
    counts = SkipCounts()
    options = {"batch_size": batch_size, "size": size, "chosen": chosen, "strict": strict, "counts": counts}
    parts = list(diagnosed_batches(detector, data, **options))
    if not parts and counts.total:
        empty = np.zeros((0, size or 1, size or 1), np.float32)
        return Diagnosed(empty, empty, [], [], [], np.array([], int), counts.reasons)
    if len({part.confidence.shape[1:] for part in parts}) != 1:
        raise ValueError(expected("data", "pictures of one size, or size= to resize them", "several sizes or none"))
    undecided = None
    if any(part.ignore is not None for part in parts):
        planes = [np.zeros(part.masks.shape, bool) if part.ignore is None else part.ignore for part in parts]
        undecided = np.concatenate(planes)
    return Diagnosed(
        np.concatenate([part.confidence for part in parts]),
        np.concatenate([part.masks for part in parts]),
        [name for part in parts for name in part.categories],
        [name for part in parts for name in part.generators],
        [name for part in parts for name in part.kinds],
        np.concatenate([part.indices for part in parts]),
        counts.reasons,
        undecided,
    )
