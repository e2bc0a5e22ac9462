"""A run's training state on disk: whole checkpoints only, the last few kept, those of another run refused."""

import json
import re
from pathlib import Path

import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_dir, clear_leftovers, delete_dir

_NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """The checkpoints of one run in one folder; only one process writes there.

    Args:
        folder: where they go, as `step-00000100` and so on.
        settings: what the run is, as JSON values.
        keep: how many of the last to keep, at least 1.
        refusal: what is said of a checkpoint of another run; `{}` stands for the names of the settings that differ.
    """

    def __init__(self, folder: Path, settings: dict, *, keep: int = 2, refusal: str):
        self.folder, self.keep, self.refusal = folder, max(1, keep), refusal
        # Through JSON and back, so that tuples compare equal to the lists that a file gives.
        self.settings = json.loads(json.dumps(settings, default=str))

    def all(self) -> list[Path]:
        """The complete checkpoints, the latest last."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))

    def save(self, step: int, state: dict, record: dict | None = None) -> None:
        """Write a checkpoint; it appears under its name only when it is complete.

        Args:
            step: steps done.
            state: tensors and plain values.
            record: JSON values that are kept beside it, to be read without torch.
        """
        with atomic_dir(self.folder / f"step-{step:08d}") as temporary:
            try:
                torch.save(state, temporary / "state.pt")
            except RuntimeError as error:
                # What torch makes of an error of the file system.
                raise OSError(f"{self.folder}: a checkpoint could not be written; is the disk full?") from error
            account = {"settings": self.settings, "record": record or {}}
            (temporary / "run.json").write_text(json.dumps(account), encoding="utf-8")
        self.tidy()

    def tidy(self) -> None:
        """Delete all but the last few, and what a kill left half-written or half-deleted."""
        clear_leftovers(self.folder)
        for old in self.all()[: -self.keep]:
            delete_dir(old)

    def load(self, device="cpu") -> tuple[dict, dict] | None:
        """State and record of the last complete checkpoint, tensors on `device`; None where there is none.

        Raises:
            UserError: if it belongs to a run with other settings.
        """
        found = self.all()
        if not found:
            return None
        account = json.loads((found[-1] / "run.json").read_text(encoding="utf-8"))
        theirs = account["settings"]
        other = sorted(name for name in {*theirs, *self.settings} if theirs.get(name) != self.settings.get(name))
        if other:
            raise UserError(f"{self.folder}: {self.refusal.format(', '.join(other))}")
        return torch.load(found[-1] / "state.pt", map_location=device, weights_only=True), account["record"]

    def keep_last(self) -> None:
        """Delete all but the last, when the run is done."""
        self.keep = 1
        self.tidy()
