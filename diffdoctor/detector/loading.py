"""Where the parts of a training step come from: planned places of a set, or a stream of resampled shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from diffdoctor.data.pictures import as_mask, resize_pair
from diffdoctor.data.shards import BrokenSample
from diffdoctor.data.stream import ShardStream
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.config import AugmentConfig
from diffdoctor.detector.samples import StepSamples, augment
from diffdoctor.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The steps that a process takes, and its places in each.

    Attributes:
        start, stop: the first step and the one after the last.
        process: index of the process.
        share: its pictures in a step.
        parts: lists that they come in.
        segment: steps after which a stream begins anew, so that a run can go on from there; 0: never.
    """

    start: int
    stop: int
    process: int
    share: int
    parts: int
    segment: int = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Lists of (step, place), as they are asked for."""
        size, first = self.share // self.parts, self.process * self.share
        for step in range(self.start, self.stop):
            for begin in range(first, first + self.share, size):
                yield [(step, place) for place in range(begin, begin + size)]


class _Mended:
    """A set in which a broken sample is replaced by the next whole one, and noted."""

    def __init__(self, data, strict: bool):
        self.data, self.strict, self.noted = data, strict, {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self.data)):
            try:
                return self.data[(index + offset) % len(self.data)]
            except BrokenSample as error:
                if self.strict or offset == len(self.data) - 1:
                    raise
                self.noted[error.where] = error.reason
        raise AssertionError("unreachable: the last sample returns or raises")


class PlannedSamples(torch.utils.data.Dataset):
    """`StepSamples` whose broken pictures are replaced: (picture, mask, {place: reason} of the broken ones).

    A `UserError` is returned, not raised: a DataLoader's worker would bury it in a traceback.

    Args:
        data: the labelled pictures.
        strict: raise at a broken one instead.
        **options: of `StepSamples`.
    """

    def __init__(self, data, strict: bool = False, **options):
        self.data = _Mended(data, strict)
        self.samples = StepSamples(self.data, **options)

    def __getitem__(self, key: tuple[int, int]):
        try:
            picture, mask = self.samples[key]
        except UserError as error:
            return error
        noted, self.data.noted = self.data.noted, {}
        return picture, mask, noted

    def __len__(self) -> int:
        return len(self.data)


class ResampledSamples(torch.utils.data.IterableDataset):
    """The parts of steps from an endless stream of shards, drawn with replacement.

    Worker w of W makes every W-th part. What a part holds is a function of the seed, of the process, of the number of
    workers, and of the place within its segment of steps, so that a run that goes on at the beginning of a segment
    goes on to the same bits. Another number of processes or workers sees other pictures.

    Args:
        stream: the shards.
        plan: the steps.
        config: augmentation.
        size: side in pixels that every picture is resized to; None: they must agree.
    """

    def __init__(self, stream: ShardStream, plan: StepPlan, config: AugmentConfig, size: int | None):
        self.stream, self.plan, self.config, self.size = stream, plan, config, size

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        plan = self.plan
        segment = (plan.segment or plan.stop) * plan.parts
        number = plan.start * plan.parts + index
        while number < plan.stop * plan.parts:
            part, end = number // segment, min((number // segment + 1) * segment, plan.stop * plan.parts)
            lane = plan.process * workers + (number - part * segment) % workers
            counts = SkipCounts()
            samples = self.stream.lane(lane, part, counts)
            while number < end:
                try:
                    made = self._part(samples, number, counts)
                except UserError as error:
                    yield error
                    return
                yield made
                number += workers

    def _part(self, samples, number: int, counts: SkipCounts):
        pairs = []
        for place in range(self.plan.share // self.plan.parts):
            sample = next(samples)
            picture, mask = sample["picture"], as_mask(sample["mask"])
            if self.size is not None and picture.shape[:2] != (self.size, self.size):
                picture, mask = resize_pair(picture, mask, self.size)
            rng = np.random.default_rng([self.stream.seed, 13, number, self.plan.process, place])
            pairs.append((*augment(picture, mask, self.config, rng), {}))
        noted = {example: reason for reason, example in counts.examples.items()}
        picture, mask, _ = pairs[0]
        pairs[0] = (picture, mask, noted)
        return collate(
            [
                (torch.from_numpy(np.array(p.transpose(2, 0, 1))), torch.from_numpy(np.array(m[None], np.float32)), n)
                for p, m, n in pairs
            ]
        )


def collate(samples: list) -> tuple[torch.Tensor, torch.Tensor, dict] | UserError:
    """Pictures (B, 3, H, W) uint8, masks (B, 1, H, W) float32, and what was broken; or an error to raise.

    Args:
        samples: what `PlannedSamples` gives.
    """
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    shapes = sorted({tuple(picture.shape[1:]) for picture, _, _ in samples})
    if len(shapes) > 1:
        return UserError(f"size: expected a side in pixels, since pictures differ in size ({shapes[0]}, {shapes[1]})")
    noted = {where: reason for _, _, broken in samples for where, reason in broken.items()}
    return torch.stack([p for p, _, _ in samples]), torch.stack([m for _, m, _ in samples]), noted
