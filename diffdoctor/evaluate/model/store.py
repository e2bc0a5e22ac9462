"""An evaluation on the disk: the generated pictures and their measures, from which an interrupted one resumes.

output/
  run.json                              what the pictures depend on
  pictures/before/00000000.png …        by index; a picture's prompt and seed are functions of its index
  pictures/before/00000000-0000.png …   the frames of a video; the first, which is written last, says that all are there
  measures/run.json                     what the measures depend on beside the pictures
  pictures.parquet                      every score of every picture
  measures/before/00000000-00000128.npz and .features.npy, likewise after, real, damaged
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from diffdoctor.data.codec import decode, encode_picture
from diffdoctor.evaluate.model.summary import PictureMeasures
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import reading
from diffdoctor.runs.record import RunFolder
from diffdoctor.runs.units import Units

PICTURES, MEASURES = "pictures", "measures"
# Every score of every picture.
TABLE = "pictures.parquet"
SIDES = ("before", "after", "real", "damaged")
# What a unit's file holds beside one entry per picture.
_ABOUT_UNIT = ("has_features", "skipped")


class PictureFiles:
    """The generated pictures before or after, one file each; of videos a file a frame.

    Args:
        folder: of the files.
        picture_type: png or webp, both exact.
    """

    def __init__(self, folder: Path, picture_type: str = "png"):
        self.folder, self.picture_type = folder, picture_type
        self.units = Units(folder, f".{picture_type}")

    def path(self, index: int) -> Path:
        """The file of the picture of this index, or of the first frame of the video."""
        picture, frame = self.units.path(f"{index:08d}"), self.units.path(_frame_name(index, 0))
        return frame if frame.is_file() else picture

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Those of the indices whose picture is not there yet."""
        return [index for index in indices if not self.path(index).is_file()]

    def save(self, index: int, picture: torch.Tensor) -> None:
        """Write one picture, uint8 (3, H, W), or video, (3, T, H, W), completely or not at all."""
        frames = [(f"{index:08d}", picture)]
        if picture.ndim == 4:
            frames = [(_frame_name(index, number), frame) for number, frame in enumerate(picture.unbind(1))]
        # the first frame last: its presence says that all are there
        for name, frame in reversed(frames):
            with self.units.writing(name) as file:
                file.write(encode_picture(frame.permute(1, 2, 0).contiguous().numpy(), self.picture_type))

    def load(self, indices: Sequence[int]) -> torch.Tensor:
        """Read the pictures of these indices, uint8 (B, 3, H, W), or videos, (B, 3, T, H, W).

        Raises:
            UserError: one is broken, or they differ in size.
        """
        pictures = []
        for index in indices:
            path = self.path(index)
            if path == self.units.path(_frame_name(index, 0)):
                paths = (self.units.path(_frame_name(index, number)) for number in itertools.count())
                frames = itertools.takewhile(Path.is_file, paths)
                pictures.append(np.stack([_decoded(frame) for frame in frames]))
            else:
                pictures.append(_decoded(path))
            if pictures[-1].shape != pictures[0].shape:
                raise UserError(f"{path}: not of the size of the other pictures; delete it, and it is generated again")
        return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).contiguous()


def _frame_name(index: int, frame: int) -> str:
    return f"{index:08d}-{frame:04d}"


def _decoded(path: Path) -> np.ndarray:
    try:
        return decode(path.read_bytes(), "RGB")
    except ValueError as error:
        raise UserError(f"{path}: broken ({error}); delete it, and it is generated again") from None


class FeatureFiles:
    """Rows of features on the disk; indexing with a tensor of indices reads only those rows.

    Args:
        paths: .npy files of (·, D) float32, in order.
        counts: number of rows in each.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]):
        self.paths = list(paths)
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        # A memory map keeps its file open, so their number is bounded.
        self._open = functools.lru_cache(maxsize=128)(self._mapped)

    def _mapped(self, number: int) -> np.ndarray:
        with reading(self.paths[number]):
            return np.load(self.paths[number], mmap_mode="r")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        indices = indices.numpy()
        files = np.searchsorted(self.starts, indices, side="right") - 1
        rows = None
        for number in np.unique(files):
            inside = files == number
            found = self._open(int(number))[indices[inside] - self.starts[number]]
            if rows is None:
                rows = np.empty((len(indices), found.shape[1]), found.dtype)
            rows[inside] = found
        return torch.from_numpy(rows)


class MeasureFiles:
    """The measures of one set of pictures, in units of some pictures.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path):
        self.units = Units(folder, ".npz")

    def is_done(self, unit: str) -> bool:
        """Whether the unit of this name is stored, its features too."""
        if not self.units.is_done(unit):
            return False
        with self._opened(unit) as file:
            return "has_features" not in file.files or self.units.path(unit, ".features.npy").is_file()

    def save(self, unit: str, values: dict[str, np.ndarray], skipped: dict[str, int] | None = None) -> None:
        """Write one unit's values.

        Args:
            unit: its name.
            values: arrays of one entry per picture; `features` go to a file of their own.
            skipped: {reason: count} of the pictures that could not be read.
        """
        values = dict(values)
        features = values.pop("features", None)
        if features is not None:
            with self.units.writing(unit, ".features.npy") as file:
                np.save(file, features)
            values["has_features"] = np.array(True)
        if skipped:
            values["skipped"] = np.array(strict_json.dumps(skipped))
        with self.units.writing(unit) as file:
            np.savez(file, **values)

    def load(self, units: Sequence[str]) -> PictureMeasures:
        """All units' values, in their order; the features stay on the disk."""
        parts = []
        for unit in units:
            with self._opened(unit) as file:
                parts.append({name: file[name] for name in file.files if name not in _ABOUT_UNIT})
        joined = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        paths = [self.units.path(unit, ".features.npy") for unit in units]
        if paths[0].is_file():
            joined["features"] = FeatureFiles(paths, [len(part["judge"]) for part in parts])
        return PictureMeasures(**joined)

    def skipped(self) -> dict[str, int]:
        """{reason: count} of the pictures of all units that could not be read."""
        counts: collections.Counter[str] = collections.Counter()
        for unit in self.units.done():
            with self._opened(unit) as file:
                if "skipped" in file.files:
                    counts.update(json.loads(str(file["skipped"])))
        return dict(sorted(counts.items()))

    @contextlib.contextmanager
    def _opened(self, unit: str) -> Iterator[np.lib.npyio.NpzFile]:
        path = self.units.path(unit)
        with reading(path), np.load(path) as file:
            yield file

    def load_all(self) -> PictureMeasures | None:
        """The values of all units that have a picture, ordered by name; None where there is no picture at all."""
        units = []
        for unit in self.units.done():
            with self._opened(unit) as file:
                if "judge" in file.files:
                    units.append(unit)
        return self.load(units) if units else None


class EvaluationFolder(RunFolder):
    """The folder of one evaluation; pictures of another identity are refused, measures of another identity deleted.

    Args:
        output: where it is, or is to be made.
        identity: what the pictures depend on.
        picture_type: png or webp.
        main: whether this is the process that writes the records.
    """

    def __init__(self, output: Path, identity: dict, picture_type: str = "png", *, main: bool = True):
        advice = "choose another folder or give --overwrite true"
        results = dict.fromkeys((PICTURES, MEASURES, TABLE))
        super().__init__(output, "evaluate model", identity, results, exclusive=True, advice=advice, main=main)
        self.picture_type = picture_type

    def pictures(self, side: str) -> PictureFiles:
        """The pictures of "before" or "after"."""
        return PictureFiles(self.path / PICTURES / side, self.picture_type)

    def measures(self, side: str) -> MeasureFiles:
        """The measures of "before", "after", "real" or "damaged"."""
        return MeasureFiles(self.path / MEASURES / side)

    def begin_measures(self, identity: dict) -> None:
        """Delete measures of another identity; `identity` is all they depend on beside the pictures."""
        RunFolder(self.path / MEASURES, "measures", identity, dict.fromkeys(SIDES)).begin(overwrite=True)

    def discard_if_empty(self) -> None:
        """Delete the folder if it has no picture."""
        if not (self.path / PICTURES).is_dir():
            self.remove()
