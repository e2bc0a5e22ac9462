"""Tensors of many rows that are made once: in memory while they fit, and in files beyond that."""

from __future__ import annotations

import bisect
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from diffdoctor.runs.files import atomic_path
from diffdoctor.treat.families.conditioning import padded

Rows = dict[str, torch.Tensor]


class RowStore:
    """Named tensors of N rows each, added some rows at a time and then taken by number.

    Once they take more than `limit` bytes they are written to files, one for each addition, and what is taken is read
    from there. What an interrupted run wrote is not made again. Rows of unequal length come with zeros behind them.

    Args:
        name: of the files, such as "prompts".
        limit: bytes of memory.
        folder: of the files; None: a temporary one, which goes when the store does.
        part: (number, count) of the processes that share the folder: of the additions that are written, each makes
            every count-th one. All of them add the same.
    """

    def __init__(self, name: str, limit: float, folder: Path | None = None, part: tuple[int, int] = (0, 1)):
        self.name, self.limit, self.part = name, limit, part if folder is not None else (0, 1)
        self._folder = folder
        self._starts: list[int] = []
        self._count = self._bytes = 0
        self._kept: list[Rows] | None = []

    def __len__(self) -> int:
        return self._count

    @property
    def in_files(self) -> bool:
        """Whether the rows are in files."""
        return self._kept is None

    def add(self, count: int, make: Callable[[], Rows]) -> None:
        """Add rows.

        Args:
            count: how many.
            make: gives them by name, each (count, ...). Not called where a file holds them.
        """
        start = self._count
        self._starts.append(start)
        self._count += count
        if self._kept is not None and self._folder is not None and self._path(start).is_file():
            self._to_files()
        if self._kept is None:
            self._write(start, make)
            return
        rows = make()
        self._kept.append(rows)
        self._bytes += sum(value.numel() * value.element_size() for value in rows.values())
        if self._bytes > self.limit:
            self._to_files()

    def take(self, index: torch.Tensor) -> Rows:
        """The rows (M, ...) at index (M,), by name: on the device where they were made, or the CPU if in files."""
        numbers = index.tolist()
        parts: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            parts.setdefault(bisect.bisect_right(self._starts, number) - 1, []).append(place)
        found: dict[str, list] = {}
        for part, places in parts.items():
            start = self._starts[part]
            rows = [numbers[place] - start for place in places]
            # not joined once and for all: for a moment that would take the memory twice
            taken = self._read(start, rows) if self._kept is None else _chosen(self._kept[part], rows)
            for name, value in taken.items():
                values = found.setdefault(name, [None] * len(numbers))
                for place, row in zip(places, value, strict=True):
                    values[place] = row
        return {name: torch.stack(padded(values, dim=0)) for name, values in found.items()}

    def _to_files(self) -> None:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="diffdoctor-")
            self._folder = Path(self._temporary.name)
        kept, self._kept = self._kept, None
        for start, rows in zip(self._starts, kept, strict=False):
            self._write(start, lambda rows=rows: rows)

    def _write(self, start: int, make: Callable[[], Rows]) -> None:
        from safetensors.torch import save_file

        number, count = self.part
        path = self._path(start)
        if bisect.bisect_left(self._starts, start) % count != number or path.is_file():
            return
        rows = {name: _shared(value.cpu()) for name, value in make().items()}
        with atomic_path(path) as temporary:
            save_file(rows, temporary)

    def _read(self, start: int, rows: Sequence[int]) -> Rows:
        from safetensors import safe_open

        # opened for each reading: the pages of an open file would count as this process's memory
        with safe_open(self._path(start), "pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                single = part.get_shape()[0] == 1
                found[name] = torch.stack([part[0 if single else row] for row in rows])
            return found

    def _path(self, start: int) -> Path:
        return self._folder / f"{self.name}-{start:09d}.safetensors"


def _chosen(rows: Rows, index: Sequence[int]) -> Rows:
    return {name: value[torch.tensor(index, device=value.device)] for name, value in rows.items()}


def _shared(value: torch.Tensor) -> torch.Tensor:
    """One row where all are equal, as those of a negative prompt are."""
    same = len(value) > 1 and bool((value == value[:1]).all())
    # a copy: safetensors refuses two names of one memory, such as the sizes of both predictions of SDXL
    return (value[:1] if same else value).clone(memory_format=torch.contiguous_format)
