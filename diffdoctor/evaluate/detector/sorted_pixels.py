"""Sorted chunks of pixels on the disk, from which the exact AUPRC of a set is computed (see `measures.curves`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffdoctor.measures.curves import encode

# Held until they are sorted and written: 4 bytes each.
PIXELS_IN_CHUNK = 2**22


@dataclasses.dataclass(frozen=True)
class SortedChunk:
    """Sorted codes in a file; a slice of it is mapped, not read.

    Attributes:
        path: of the file.
        begin: index of the first code in the file.
        end: index after the last code.
    """

    path: Path
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        # Mapped for each slice, so that no number of chunks runs out of file descriptors.
        return np.memmap(self.path, np.uint32, "r", 4 * (self.begin + start), (stop - start,))


class ChunkWriter:
    """Sorts and writes the pixels of all pictures, of each category and of each generator, into one file.

    Args:
        file: open for writing in binary mode.

    Attributes:
        written: (group, begin, end) of each sorted chunk in the file; a group is ("", ""), ("category", name) or
            ("generator", name).
    """

    def __init__(self, file: BinaryIO):
        self.file, self.written, self.end = file, [], 0
        self.pictures: list[tuple[np.ndarray, str, str]] = []  # a picture's codes, its category and generator
        self.pixels = 0

    def add(self, confidence: np.ndarray, masks: np.ndarray, categories: list[str], generators: list[str]) -> None:
        """Add the pixels of N pictures.

        Args:
            confidence: (N, H, W) float32 in [0, 1].
            masks: (N, H, W) in [0, 1].
            categories: N names.
            generators: N names.
        """
        self.pictures += zip(map(encode, confidence, masks), categories, generators, strict=True)
        self.pixels += confidence.size
        if self.pixels >= PIXELS_IN_CHUNK:
            self.flush()

    def flush(self) -> None:
        """Write a chunk of each group of the pictures that were added since the last one."""
        groups = {("", ""): self.pictures}
        for name, column in (("category", 1), ("generator", 2)):
            for picture in self.pictures:
                groups.setdefault((name, picture[column]), []).append(picture)
        whole = None
        for group, pictures in groups.items():
            if not pictures:
                continue
            if whole is None or len(pictures) < len(self.pictures):
                codes = np.sort(np.concatenate([picture[0] for picture in pictures]))
                self.file.write(codes.tobytes())
                chunk = self.end, self.end + len(codes)
                whole, self.end = whole or chunk, chunk[1]
            else:
                # The only category is the whole set, whose chunk is written already.
                chunk = whole
            self.written.append((group, *chunk))
        self.pictures, self.pixels = [], 0
