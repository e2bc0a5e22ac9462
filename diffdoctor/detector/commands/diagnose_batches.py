"""The pictures of a diagnosis in batches, and their maps, whatever becomes of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import numpy as np
import torch

from diffdoctor.data.pictures import to_images
from diffdoctor.data.source_index import absolute_path
from diffdoctor.data.sources import Source, read_source
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.commands.diagnose_config import DiagnoseConfig
from diffdoctor.detector.confidence import confidence_of
from diffdoctor.detector.models.base import Detector
from diffdoctor.detector.predict import in_batches, size_check
from diffdoctor.runs.errors import first_line
from diffdoctor.training.devices import device_of

logger = logging.getLogger(__name__)


def diagnosis_batches(
    unit: list[Source], config: DiagnoseConfig, detector: Detector, counts: SkipCounts, stamps: dict
) -> Iterator[list[dict]]:
    """The pictures of a unit that the detector takes, in batches of one size."""
    check = size_check(detector, config.tile)
    options = {"strict": config.strict, "counts": counts, "masks": "ignored", "check": check, "placed": True}

    def samples() -> Iterator[dict]:
        for source in unit:
            known = {"path": absolute_path(source), "stamp": stamps[source.name]}
            for sample in read_source(source, **options):
                yield sample | known

    return in_batches(samples(), config.batch_size)


def confidences(
    detector: Detector, batch: list[dict], config: DiagnoseConfig, counts: SkipCounts
) -> Iterator[tuple[dict, np.ndarray, dict]]:
    """The samples with their maps (H, W), and {"disagreement": of the mirrored one's} if that is asked for.

    Where a batch fails, its pictures are diagnosed one by one, and those that fail counted.
    """
    try:
        maps, disagreements = picture_maps(detector, [sample["picture"] for sample in batch], config)
    except torch.AcceleratorError:
        raise  # what this process has on the GPU is lost, with any picture
    except (MemoryError, RuntimeError) as error:
        if len(batch) == 1:
            reason = "a picture on which the detector failed"
            counts.add(reason, batch[0]["name"], config.strict, first_line(error))
            return
        if isinstance(error, torch.OutOfMemoryError):
            _warn_of_memory(len(batch))
        maps = None
    if maps is None:
        for sample in batch:
            yield from confidences(detector, [sample], config, counts)
        return
    yield from zip(batch, maps, disagreements, strict=True)


@functools.cache  # once for each size
def _warn_of_memory(size: int) -> None:
    logger.warning("out of memory for %d pictures at a time, now one by one: a smaller --batch_size is faster", size)


def picture_maps(
    detector: Detector, pictures: list[np.ndarray], config: DiagnoseConfig
) -> tuple[np.ndarray, list[dict]]:
    """Maps (B, H, W) of pictures (H, W, 3) uint8 of one size, and {"disagreement": …} of each where asked for."""
    images = to_images(pictures, device_of(detector))
    options = {"tile": config.tile, "overlap": config.overlap}
    maps = confidence_of(detector, images, **options)[:, 0]
    if not config.mirrored:
        return maps.cpu().numpy(), [{}] * len(pictures)
    mirrored = confidence_of(detector, images.flip(-1), **options)[:, 0].flip(-1)
    means = (maps - mirrored).abs().float().mean(dim=(1, 2)).tolist()
    return maps.cpu().numpy(), [{"disagreement": mean} for mean in means]
