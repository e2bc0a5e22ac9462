"""Labelled pictures streamed from shards in random order, by many workers; memory holds a buffer, whatever the set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffdoctor.data.shards import BrokenSample, decode_sample, shard_paths
from diffdoctor.data.tar import SkipCounts, read_groups
from diffdoctor.runs.errors import UserError


class ShardStream(torch.utils.data.IterableDataset):
    """The samples of shards in random order, each a dict as `shards.read_shards` yields it.

    The shards are shared among processes and DataLoader workers. Within one of these, samples come from a shuffled
    buffer that holds them as the bytes of their files. A pass gives every sample once. Resampled, there is no end: each
    worker draws shards with replacement and begins each at a random place, so that samples are equally likely although
    no pass is ever whole.

    Args:
        source: a folder of shards, one shard, or a list of these.
        buffer: samples to shuffle among; 1 keeps the order within a shard.
        resampled: draw shards without end.
        seed: of the order.
        epoch: number of the pass; another one has another order.
        process: (index, number) of this process among those that share the shards.
        strict: raise `UserError` at what is broken instead of leaving it out and counting.

    Attributes:
        paths: the shards.
        counts: what was left out, where no workers are used (each worker has its own).
    """

    def __init__(
        self,
        source: str | Path | Iterable[str | Path],
        *,
        buffer: int = 1000,
        resampled: bool = False,
        seed: int = 0,
        epoch: int = 0,
        process: tuple[int, int] = (0, 1),
        strict: bool = False,
    ):
        if buffer < 1:
            raise ValueError(f"buffer: expected >= 1 samples, got {buffer}")
        if not 0 <= process[0] < process[1]:
            raise ValueError(f"process: expected (index, number) with index < number, got {process}")
        self.paths = shard_paths(source)
        self.buffer, self.resampled, self.seed, self.epoch = buffer, resampled, seed, epoch
        self.process, self.strict, self.counts = process, strict, SkipCounts()

    def fingerprint(self) -> str:
        """A hash of the shards' names and sizes, and of how each begins (64 KiB)."""
        digest = hashlib.sha256()
        for path in self.paths:
            with open(path, "rb") as file:
                start = file.read(2**16)
            digest.update(repr((path.name, path.stat().st_size)).encode() + start)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        index, number = (worker.id, worker.num_workers) if worker else (0, 1)
        lane, lanes = self.process[0] * number + index, self.process[1] * number
        if self.resampled:
            yield from self.lane(lane, self.epoch, self.counts)
            return
        order = np.random.default_rng([self.seed, 10, self.epoch]).permutation(len(self.paths))[lane::lanes]
        rng = np.random.default_rng([self.seed, 11, self.epoch, lane])
        yield from self._decoded(_shuffled(self._one_pass(order), self.buffer, rng), self.counts)

    def lane(self, lane: int, part: int, counts: SkipCounts) -> Iterator[dict[str, Any]]:
        """An endless stream of its own for each (lane, part) of the seed, see the class; fills `counts`."""
        rng = np.random.default_rng([self.seed, 12, part, lane])
        return self._decoded(_shuffled(self._endless(rng, counts), self.buffer, rng), counts)

    def _one_pass(self, order):
        for index in order:
            for key, members in read_groups(self.paths[index], self.strict, self.counts):
                yield self.paths[index], key, members

    def _endless(self, rng, counts):
        barren = 0
        while True:
            path, start = self.paths[rng.integers(len(self.paths))], rng.uniform()
            barren += 1
            for key, members in read_groups(path, self.strict, counts, start):
                barren = 0
                yield path, key, members
            if barren > 100 + 10 * len(self.paths):
                raise UserError(f"{path.parent}: no samples in these {len(self.paths)} shards")

    def _decoded(self, groups, counts):
        broken = 0
        for path, key, members in groups:
            try:
                sample = decode_sample(members, f"{path.name}:{key}")
            except BrokenSample as error:
                counts.add(error.reason, error.where, self.strict)
                broken += 1
                if self.resampled and broken > 100 + 10 * self.buffer:
                    raise UserError(f"{path.parent}: no sample that is whole ({error})") from None
                continue
            broken = 0
            yield {**sample, "key": key, "shard": path.name}


def _shuffled(items: Iterable, size: int, rng: np.random.Generator) -> Iterator:
    """The items in random order, as far as a buffer of `size` items can mix them."""
    held: list = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        place = int(rng.integers(size + 1))
        if place == size:
            yield item
        else:
            yield held[place]
            held[place] = item
    for place in rng.permutation(len(held)):
        yield held[place]
