"""A training set of pictures with their maps, and batches that depend on the seed and the step alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from diffdoctor.maps.check import check_maps
from diffdoctor.maps.clips import ClipTransform, middle_map
from diffdoctor.maps.files import MapLike, Record
from diffdoctor.maps.geometry import PairedTransform
from diffdoctor.runs.errors import expected

_CHECKED = 256  # maps that are checked when a set is opened


class MapDataset(Dataset):
    """Pictures with captions and confidence maps, placed alike.

    Item (epoch, i) is a function of (seed, epoch, i), whatever the worker. `StepBatches` asks for such keys. An
    ordinary sampler asks for i alone: its epoch is then the number of times that i was asked for before, counted over
    all workers, so that every epoch has crops and flips of its own. `set_epoch(k)` says which one the next is: call it
    before each epoch for a run that resumes with the same crops, or whose loader is left before its end.

    Args:
        records: `read_folder(...)`'s or `read_clips(...)`'s result, `ShardRecords(...)`, or any sequence of `Record`.
        transform: resizes, crops and flips each pair: a `ClipTransform` for videos.
        seed: of crops and flips.
        missing: how a picture without a map is treated: "zeros" (clean everywhere) or "error".
        invert: maps say what is sound, as a segmenter's of a background may: 1 - map is used. A picture without a map
            stays clean.
        check: check up to 256 maps, evenly spaced, and emit a `MapWarning` for each probable mistake.

    Raises:
        ValueError: no records, an unknown `missing`, or with "error" a picture without a map.
    """

    def __init__(
        self,
        records: Sequence[Record],
        transform: PairedTransform,
        *,
        seed: int = 0,
        missing: str = "zeros",
        invert: bool = False,
        check: bool = True,
    ):
        if not len(records):
            raise ValueError(expected("records", "at least one", "none"))
        if missing not in ("zeros", "error"):
            raise ValueError(expected("missing", "'zeros' or 'error'", repr(missing)))
        self.records, self.transform, self.seed, self.invert = records, transform, seed, invert
        # Shared with the workers, also with those that live on and do not see what happens to this object.
        self._first_epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._asked = torch.zeros(len(records), dtype=torch.int32).share_memory_()
        if missing == "error":
            for record in self.records:
                if record.confidence is None:
                    raise ValueError(expected("records", "a map for every picture", f"none for {_name(record)}"))
        if check:
            step = max(1, -(-len(self.records) // _CHECKED))
            check_maps(self._map_to_check(index) for index in range(0, len(records), step)).warn()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """What `PairedTransform` returns, and `caption` and `name`, the file or else the index.

        Args:
            key: an index, or (epoch, index).
        """
        if isinstance(key, tuple):
            epoch, index = key
            record = self.records[index]
        else:
            index, record = key, self.records[key]
            epoch = int(self._first_epoch + self._asked[index])
            self._asked[index] += 1
        rng = np.random.default_rng([self.seed, epoch, index])
        sample = self.transform(record.picture, self._map_of(record), rng)
        return {**sample, "caption": record.caption, "name": _name(record, index)}

    def _map_of(self, record: Record) -> MapLike | None:
        inverted = self.invert and record.confidence is not None
        return 1 - self.transform.read_map(record.confidence) if inverted else record.confidence

    def _map_to_check(self, index: int) -> MapLike | None:
        found = self._map_of(self.records[index])
        is_moving = found is not None and isinstance(self.transform, ClipTransform)
        return middle_map(self.transform.read_map(found)) if is_moving else found

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next item of each index, where a sampler asks for indices alone; workers see it too.

        Args:
            epoch: from 0; the items after `set_epoch(k)` are those of (k, index).

        Raises:
            ValueError: it is negative.
        """
        if epoch < 0:
            raise ValueError(expected("epoch", ">= 0", epoch))
        self._first_epoch.fill_(epoch)
        self._asked.zero_()

    def bucket_of(self, index: int) -> int:
        """Index of the picture's bucket; of a picture file, only the header is read."""
        if len(self.transform.buckets) == 1:
            return 0
        return self.transform.bucket(*self.transform.size_of(self.records[index].picture))


class StepBatches(Sampler):
    """Batches of (epoch, index) keys in which all pictures have one size; use it as a `batch_sampler`.

    Batch k is a function of (seed, k): a run that resumes with `start=k` gets the same batches as without the
    interruption, and processes split one sequence. Do not let Accelerate shard it a second time.

    Args:
        data: the set.
        batch_size: pictures in a batch.
        batches: number of this process's batches from the beginning of the run to its end.
        start: index of the first batch that is returned.
        seed: of the shuffles.
        last: a bucket's incomplete batch of an epoch is filled up with pictures of the bucket ("fill"), returned as it
            is ("short": processes then have unequal batches) or left out ("drop").
        process_index: this process gets the batches process_index, process_index + num_processes, ...
        num_processes: number of processes that split the batches.

    Raises:
        ValueError: an option is out of range, or no bucket fills a batch.
    """

    def __init__(
        self,
        data: MapDataset,
        batch_size: int,
        batches: int,
        *,
        start: int = 0,
        seed: int = 0,
        last: str = "fill",
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if batch_size < 1:
            raise ValueError(expected("batch_size", ">= 1", batch_size))
        if last not in ("fill", "short", "drop"):
            raise ValueError(expected("last", "'fill', 'short' or 'drop'", repr(last)))
        if not 0 <= process_index < num_processes:
            raise ValueError(expected("process_index", f"0..{num_processes - 1}", process_index))
        self.batch_size, self.last, self.seed = batch_size, last, seed
        self.start, self.batches = start, batches
        self.process_index, self.num_processes = process_index, num_processes
        buckets: dict[int, list[int]] = {}
        for index in range(len(data)):
            buckets.setdefault(data.bucket_of(index), []).append(index)
        self._buckets = [np.asarray(indices) for _, indices in sorted(buckets.items())]
        self._per_epoch = sum(self._batches_of(len(indices)) for indices in self._buckets)
        if not self._per_epoch:
            largest = max(map(len, self._buckets), default=0)
            raise ValueError(expected("batch_size", f"<= {largest} with last='drop', the largest bucket", batch_size))

    def _batches_of(self, count: int) -> int:
        return count // self.batch_size if self.last == "drop" else -(-count // self.batch_size)

    def __len__(self) -> int:
        return max(0, self.batches - self.start)

    def _epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        for indices in self._buckets:
            order = rng.permutation(indices)
            count = self._batches_of(len(indices))
            if self.last == "fill":
                order = np.resize(order, count * self.batch_size)  # repeats from its beginning
            for number in range(count):
                chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
                batches.append([(epoch, int(index)) for index in chosen])
        return [batches[i] for i in rng.permutation(len(batches))]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current, batches = -1, []
        for number in range(self.start, self.batches):
            epoch, offset = divmod(number * self.num_processes + self.process_index, self._per_epoch)
            if epoch != current:
                current, batches = epoch, self._epoch(epoch)
            yield batches[offset]


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack items of a `MapDataset`: tensors on a new first axis, `caption` and `name` as lists."""
    stacked: dict[str, Any] = {}
    for name, value in samples[0].items():
        column = [sample[name] for sample in samples]
        if isinstance(value, torch.Tensor):
            stacked[name] = torch.stack(column)
        else:
            stacked[name] = torch.tensor(column) if isinstance(value, bool) else column
    return stacked


def _name(record: Record, index: int | None = None) -> str:
    other = "one picture" if index is None else f"{index:06d}"
    return str(record.picture) if isinstance(record.picture, (str, os.PathLike)) else other
