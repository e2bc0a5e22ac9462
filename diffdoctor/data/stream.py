"""Labelled pictures streamed from shards in random order by any number of workers, through a buffer of fixed size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from diffdoctor.data.manifest import is_label_set
from diffdoctor.data.shards import BrokenSample, decode_sample, shard_paths
from diffdoctor.data.store_path import Location
from diffdoctor.data.tar import SkipCounts, read_groups
from diffdoctor.runs.errors import UserError, expected


class ShardStream(torch.utils.data.IterableDataset):
    """The samples of shards in random order, each a dict as `shards.read_shards` yields it.

    The shards are split among processes and DataLoader workers. Each of these shuffles its samples in a buffer that
    holds them as the bytes of their files. A pass gives every sample once. A resampled stream has no end: each worker
    draws shards with replacement and starts each at a random byte, so that samples are equally likely although no pass
    is ever complete.

    Args:
        source: a folder of shards, one shard, or a list of these.
        buffer: samples to shuffle among; 1 keeps the order within a shard.
        resampled: draw shards with replacement, without end.
        seed: of the order.
        epoch: index of the pass; each has its own order.
        process: (index, count) of this process among those that split the shards.
        strict: raise `UserError` at a broken sample instead of skipping and counting it.

    Attributes:
        paths: the shards.
        counts: what was skipped, where no workers are used (each worker has its own).

    Raises:
        ValueError: `buffer` or `process` is out of range.
        UserError: no shards there.
    """

    def __init__(
        self,
        source: str | Location | Iterable[str | Location],
        *,
        buffer: int = 1000,
        resampled: bool = False,
        seed: int = 0,
        epoch: int = 0,
        process: tuple[int, int] = (0, 1),
        strict: bool = False,
    ):
        if buffer < 1:
            raise ValueError(expected("buffer", ">= 1 samples", buffer))
        if not 0 <= process[0] < process[1]:
            raise ValueError(expected("process", "(index, count) with 0 <= index < count", process))
        self.paths = shard_paths(source)
        for folder in sorted({path.parent for path in self.paths}):
            if is_label_set(folder):
                what = "shards that hold their pictures"
                raise UserError(expected(folder, what, "a label set, whose pictures are elsewhere"))
        self.buffer, self.resampled, self.seed, self.epoch = buffer, resampled, seed, epoch
        self.process, self.strict, self.counts = process, strict, SkipCounts()

    def fingerprint(self) -> str:
        """A hash of the shards' names and sizes, and of the first 64 KiB of each."""
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                start = file.read(2**16)
            digest.update(repr((path.name, path.stat().st_size)).encode() + start)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        worker_index, workers = self.process[0] * count + index, self.process[1] * count
        if self.resampled:
            yield from self.worker_stream(worker_index, self.epoch, self.counts)
            return
        order = np.random.default_rng([self.seed, 10, self.epoch]).permutation(len(self.paths))[worker_index::workers]
        rng = np.random.default_rng([self.seed, 11, self.epoch, worker_index])
        yield from self._decoded(_shuffled(self._one_pass(order), self.buffer, rng), self.counts)

    def worker_stream(self, worker_index: int, segment: int, counts: SkipCounts) -> Iterator[dict[str, Any]]:
        """The resampled stream of one worker, a function of the seed, the worker and the segment.

        Args:
            worker_index: of the worker among those of all processes.
            segment: index of the range of steps for which the stream is started anew.
            counts: filled with what was skipped.

        Yields:
            Samples without end, see `shards.read_shards`.
        """
        rng = np.random.default_rng([self.seed, 12, segment, worker_index])
        return self._decoded(_shuffled(self._endless(rng, counts), self.buffer, rng), counts)

    def _one_pass(self, order):
        for index in order:
            for key, members in read_groups(self.paths[index], self.strict, self.counts):
                yield self.paths[index], key, members

    def _endless(self, rng, counts):
        empty_reads = 0
        while True:
            path, start = self.paths[rng.integers(len(self.paths))], rng.uniform()
            empty_reads += 1
            for key, members in read_groups(path, self.strict, counts, start):
                empty_reads = 0
                yield path, key, members
            if empty_reads > 100 + 10 * len(self.paths):
                raise UserError(f"{path.parent}: no samples in these {len(self.paths)} shards")

    def _decoded(self, groups, counts):
        broken = 0
        for path, key, members in groups:
            try:
                sample = decode_sample(members, f"{path.name}:{key}")
            except BrokenSample as error:
                counts.add(error.reason, error.where, self.strict, error.detail)
                broken += 1
                if self.resampled and broken > 100 + 10 * self.buffer:
                    raise UserError(f"{path.parent}: no complete sample ({error})") from None
                continue
            broken = 0
            yield {**sample, "key": key, "shard": path.name}


def _shuffled(items: Iterable, size: int, rng: np.random.Generator) -> Iterator:
    """The items, shuffled in a buffer of `size` items."""
    buffer: list = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        index = int(rng.integers(size + 1))
        if index == size:
            yield item
        else:
            yield buffer[index]
            buffer[index] = item
    for index in rng.permutation(len(buffer)):
        yield buffer[index]
