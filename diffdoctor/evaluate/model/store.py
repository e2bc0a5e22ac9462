"""An evaluation on disk: pictures as they are drawn, and what is known of each, so that no second is spent twice.

output/
  run.json                              what the pictures and the measures depend on
  pictures/before/00000000.png …        by number; a picture's prompt and seed follow from its number
  measures/before/00000000-00000128.npz and .features.npy, likewise after, real, damaged
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffdoctor.data.codec import decode, encode_picture
from diffdoctor.evaluate.model.summary import PictureMeasures
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_path, atomic_write_bytes, atomic_write_json, clear_leftovers

RUN = "run.json"


class PictureFiles:
    """The drawn pictures of one side, one file each.

    Args:
        folder: where they are.
        picture_type: png or webp, both exact.
    """

    def __init__(self, folder: Path, picture_type: str = "png"):
        self.folder, self.picture_type = folder, picture_type

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.{self.picture_type}"

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Those that are not there yet."""
        return [number for number in numbers if not self.path(number).is_file()]

    def save(self, number: int, picture: torch.Tensor) -> None:
        """Write one picture, uint8 (3, H, W), whole or not at all."""
        data = encode_picture(picture.permute(1, 2, 0).contiguous().numpy(), self.picture_type)
        atomic_write_bytes(self.path(number), data)

    def load(self, numbers: Sequence[int]) -> torch.Tensor:
        """Pictures, uint8 (B, 3, H, W).

        Raises:
            UserError: if one is broken, or they differ in size.
        """
        pictures = []
        for number in numbers:
            path = self.path(number)
            try:
                pictures.append(decode(path.read_bytes(), "RGB"))
            except ValueError as error:
                raise UserError(f"{path}: broken ({error}); delete it, and it is drawn again") from None
            if pictures[-1].shape != pictures[0].shape:
                raise UserError(f"{path}: not of the size of the other pictures; delete it, and it is drawn again")
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


class FeatureFiles:
    """Rows of features on the disk: indexing with a tensor of numbers reads those rows alone.

    Args:
        paths: .npy files of (·, D) float32, in order.
        counts: rows in each.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]):
        self.paths = list(paths)
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        # A mapping holds a file open; their number is bounded.
        self._open = functools.lru_cache(maxsize=128)(lambda place: np.load(self.paths[place], mmap_mode="r"))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, numbers: torch.Tensor) -> torch.Tensor:
        numbers = numbers.numpy()
        places = np.searchsorted(self.starts, numbers, side="right") - 1
        rows = None
        for place in np.unique(places):
            here = places == place
            part = self._open(int(place))[numbers[here] - self.starts[place]]
            if rows is None:
                rows = np.empty((len(numbers), part.shape[1]), part.dtype)
            rows[here] = part
        return torch.from_numpy(rows)


class MeasureFiles:
    """What is known of the pictures of one side, in units of some pictures.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def done(self, unit: str) -> bool:
        return (self.folder / f"{unit}.npz").is_file()

    def save(self, unit: str, values: dict[str, np.ndarray]) -> None:
        """Write one unit's values, arrays of one entry per picture; `features` go to a file of their own."""
        values = dict(values)
        features = values.pop("features", None)
        if features is not None:
            with atomic_path(self.folder / f"{unit}.features.npy") as path, open(path, "wb") as file:
                np.save(file, features)
        # Last: its presence says that the unit is complete.
        with atomic_path(self.folder / f"{unit}.npz") as path, open(path, "wb") as file:
            np.savez(file, **values)

    def load(self, units: Sequence[str]) -> PictureMeasures:
        """All units' values, in their order; the features stay on the disk."""
        parts = []
        for unit in units:
            with np.load(self.folder / f"{unit}.npz") as file:
                parts.append({name: file[name] for name in file.files})
        joined = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        paths = [self.folder / f"{unit}.features.npy" for unit in units]
        if paths[0].is_file():
            joined["features"] = FeatureFiles(paths, [len(part["judge"]) for part in parts])
        return PictureMeasures(**joined)

    def load_all(self) -> PictureMeasures | None:
        """The values of all units that have a picture, ordered by name; None where there is no picture at all."""
        units = []
        for path in sorted(self.folder.glob("*.npz")):
            with np.load(path) as file:
                if "judge" in file.files:
                    units.append(path.stem)
        return self.load(units) if units else None


class EvaluationFolder:
    """The folder of one evaluation.

    Args:
        output: where it is, or is to be made.
        picture_type: png or webp.
    """

    def __init__(self, output: Path, picture_type: str = "png"):
        self.output, self.picture_type = output, picture_type

    def pictures(self, side: str) -> PictureFiles:
        """The pictures of "before" or "after"."""
        return PictureFiles(self.output / "pictures" / side, self.picture_type)

    def measures(self, side: str) -> MeasureFiles:
        """The measures of "before", "after", "real" or "damaged"."""
        return MeasureFiles(self.output / "measures" / side)

    def check(self, pictures: dict, overwrite: bool) -> None:
        """Refuse a folder whose pictures were drawn otherwise, unless they are to be replaced.

        Args:
            pictures: what the pictures depend on, as JSON values.
            overwrite: whether pictures drawn otherwise may be deleted.

        Raises:
            UserError: if there are such pictures, or the folder holds something else, which is never replaced.
        """
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output {self.output}: is a file; choose another folder")
        theirs = self._read().get("pictures")
        if theirs is None:
            if self.output.is_dir() and any(not _begun(entry) for entry in self.output.iterdir()):
                raise UserError(f"--output {self.output}: holds something else; choose another folder")
            return
        other = sorted(name for name in {*theirs, *pictures} if theirs.get(name) != pictures.get(name))
        if other and not overwrite:
            raise UserError(
                f"--output {self.output}: holds pictures that were drawn with another {', '.join(other)}: choose "
                "another folder or give --overwrite true"
            )

    def prepare(self, pictures: dict, measures: dict) -> None:
        """Delete what was made with other settings, and note the present ones; `check` comes first."""
        clear_leftovers(self.output, RUN)
        found = self._read()
        if found.get("pictures") != pictures:
            shutil.rmtree(self.output / "pictures", ignore_errors=True)
        if found.get("pictures") != pictures or found.get("measures") != measures:
            shutil.rmtree(self.output / "measures", ignore_errors=True)
        atomic_write_json(self.output / RUN, {"pictures": pictures, "measures": measures})

    def discard_if_empty(self) -> None:
        """Take the folder away again when not a single picture came of it."""
        if not (self.output / "pictures").is_dir():
            # run.json last: without it the folder would be something else's.
            for name in ("config.yaml", RUN):
                (self.output / name).unlink(missing_ok=True)
            if self.output.is_dir() and not any(self.output.iterdir()):
                self.output.rmdir()

    def _read(self) -> dict:
        try:
            found = json.loads((self.output / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("pictures"), dict) else {}


def _begun(entry: Path) -> bool:
    """Whether this is the run.json of an evaluation that was killed while it wrote it first."""
    return entry.name.startswith(f".{RUN}.")
