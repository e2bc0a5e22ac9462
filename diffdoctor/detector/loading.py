"""How a training step's pictures are loaded: planned samples of an indexed set, or a stream of resampled shards."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from diffdoctor.data.shards import BrokenSample
from diffdoctor.data.stream import ShardStream
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.config import AugmentConfig
from diffdoctor.detector.samples import DetectorData, StepSamples, training_pair
from diffdoctor.runs.errors import UserError, expected


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The steps that a process takes, and its slots in each.

    Attributes:
        start: the first step.
        stop: the step after the last.
        process: index of the process.
        slots: the process's pictures in a step.
        micro_batches: in a step, each with as many of the slots.
        segment: steps after which a stream is started anew, so that a run resumes there at once; 0: never.
    """

    start: int
    stop: int
    process: int
    slots: int
    micro_batches: int
    segment: int = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The (step, slot) keys of each micro-batch."""
        size, first = self.slots // self.micro_batches, self.process * self.slots
        for step in range(self.start, self.stop):
            for begin in range(first, first + self.slots, size):
                yield [(step, slot) for slot in range(begin, begin + size)]


class _SkipBroken:
    """A set in which a broken sample is replaced by the next readable one, and recorded as skipped."""

    def __init__(self, data: DetectorData, strict: bool):
        self.data, self.strict, self.skipped = data, strict, {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self.data)):
            try:
                return self.data[(index + offset) % len(self.data)]
            except BrokenSample as error:
                if self.strict or offset == len(self.data) - 1:
                    raise
                self.skipped[error.where] = error.reason
        raise AssertionError("unreachable: the last sample returns or raises")


class PlannedSamples(torch.utils.data.Dataset):
    """`StepSamples` whose broken pictures are replaced: (picture, mask, {where: reason} of the skipped ones).

    A `UserError` is returned, not raised: a DataLoader's worker would bury it in a traceback.

    Args:
        data: the labelled pictures.
        strict: raise at a broken picture instead of replacing it.
        **options: of `StepSamples`.
    """

    def __init__(self, data: DetectorData, strict: bool = False, **options):
        self.data = _SkipBroken(data, strict)
        self.samples = StepSamples(self.data, **options)

    def __getitem__(self, key: tuple[int, int]):
        try:
            picture, mask = self.samples[key]
        except UserError as error:
            return error
        skipped, self.data.skipped = self.data.skipped, {}
        return picture, mask, skipped

    def __len__(self) -> int:
        return len(self.data)


class ResampledSamples(torch.utils.data.IterableDataset):
    """The micro-batches of steps from an endless stream of shards, drawn with replacement.

    Worker w of W makes every W-th micro-batch. Its contents are a function of the seed, the process, the number of
    workers and its index within its segment of steps, so that a run resumes to the same bits; in the middle of a
    segment it reads again what was used of it. Another number of processes or workers sees other pictures.

    Args:
        stream: the shards.
        plan: the steps.
        config: augmentation.
        size: side in pixels that every picture is resized to; None: they must agree.
    """

    def __init__(self, stream: ShardStream, plan: StepPlan, config: AugmentConfig, size: int | None):
        self.stream, self.plan, self.config, self.size = stream, plan, config, size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict] | UserError]:
        worker = torch.utils.data.get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        plan = self.plan
        stop, length = plan.stop * plan.micro_batches, (plan.segment or plan.stop) * plan.micro_batches
        number = plan.start * plan.micro_batches + index
        while number < stop:
            segment = number // length
            worker_index = plan.process * workers + (number - segment * length) % workers
            counts = SkipCounts()
            # What was used of this segment before an interruption in the middle of it.
            used = (number - segment * length) // workers * (plan.slots // plan.micro_batches)
            samples = itertools.islice(self.stream.worker_stream(worker_index, segment, counts), used, None)
            while number < min((segment + 1) * length, stop):
                try:
                    micro_batch = self._micro_batch(samples, number, counts)
                except UserError as error:
                    yield error
                    return
                yield micro_batch
                number += workers

    def _micro_batch(self, samples: Iterator[dict[str, Any]], number: int, counts: SkipCounts):
        made = []
        for slot in range(self.plan.slots // self.plan.micro_batches):
            rng = np.random.default_rng([self.stream.seed, 13, number, self.plan.process, slot])
            made.append((*training_pair(next(samples), self.size, self.config, rng), {}))
        picture, mask, _ = made[0]
        made[0] = picture, mask, {example: reason for reason, example in counts.examples.items()}
        return collate(made)


def collate(samples: list) -> tuple[torch.Tensor, torch.Tensor, dict] | UserError:
    """Stack the samples of a micro-batch.

    Args:
        samples: what `PlannedSamples` gives.

    Returns:
        Pictures (B, 3, H, W) uint8, masks (B, 1, H, W) float32, and {where: reason} of the skipped pictures; or an
        error to raise.
    """
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    shapes = sorted({tuple(picture.shape[1:]) for picture, _, _ in samples})
    if len(shapes) > 1:
        return UserError(expected("size", "a side in pixels", f"None for pictures of sizes {shapes[0]}, {shapes[1]}"))
    pictures, masks, skipped = zip(*samples, strict=True)
    return torch.stack(pictures), torch.stack(masks), {where: why for each in skipped for where, why in each.items()}
