"""A run's training state on disk: whole checkpoints only, the last few kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from diffdoctor.runs import strict_json
from diffdoctor.runs.files import atomic_dir, clear_leftovers, delete_dir, reading

_NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """The checkpoints of one run in one folder; only one process writes there.

    Args:
        folder: where they go, as `step-00000100` and so on.
        keep: how many of the last to keep, at least 1.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        self.folder, self.keep = folder, max(1, keep)

    def all(self) -> list[Path]:
        """The complete checkpoints, the latest last."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))

    def save(self, step: int, state: dict[str, Any], record: dict[str, Any] | None = None) -> None:
        """Write a checkpoint; it appears under its name only when it is complete.

        Args:
            step: steps done.
            state: tensors and plain values.
            record: JSON values, kept in a file that a resumed run writes to the same bytes; a pickle's depend on which
                values are one object.
        """
        with atomic_dir(self.folder / f"step-{step:08d}") as temporary:
            try:
                torch.save(state, temporary / "state.pt")
            except torch.AcceleratorError:
                raise
            except RuntimeError as error:
                # What torch makes of an error of the file system.
                raise OSError(f"{self.folder}: a checkpoint could not be written; is the disk full?") from error
            if record is not None:
                (temporary / "record.json").write_text(strict_json.dumps(record), encoding="utf-8")
        self.tidy()

    def tidy(self) -> None:
        """Delete all but the last few, and what a kill left half-written or half-deleted."""
        clear_leftovers(self.folder)
        for old in self.all()[: -self.keep]:
            delete_dir(old)

    def load(self) -> dict[str, Any] | None:
        """State and record of the last complete checkpoint in one, tensors on the CPU; None where there is none.

        An optimizer takes its moments from there to its parameters' device and leaves the number of its steps, which
        it would read from a GPU at every step, for every parameter.

        Raises:
            UserError: the checkpoint is damaged.
        """
        found = self.all()
        if not found:
            return None
        path, record = found[-1], found[-1] / "record.json"
        with reading(path, "remove this folder to resume from the one before, or to start again"):
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            return state | json.loads(record.read_text(encoding="utf-8")) if record.is_file() else state

    def keep_last(self) -> None:
        """Delete all but the last, when the run is done."""
        self.keep = 1
        self.tidy()
