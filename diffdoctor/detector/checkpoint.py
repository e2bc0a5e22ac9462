"""A detector's training state on disk: whole checkpoints only, the last few kept."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch

from diffdoctor._errors import UserError
from diffdoctor._io import atomic_dir

_NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: where they go, as `step-00000100` and so on.
        described: what the run is, as JSON values; a checkpoint of another run is refused.
        keep: how many of the last to keep.
    """

    def __init__(self, folder: Path, described: dict, keep: int):
        self.folder, self.keep = folder, max(1, keep)
        # Through JSON and back, so that tuples compare equal to the lists that a file gives.
        self.described = json.loads(json.dumps(described, default=str))

    def all(self) -> list[Path]:
        """The complete checkpoints, the latest last."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name))

    def save(self, run) -> None:
        """Write the state of a `train._Run`; it appears under its name only when it is complete."""
        if self.folder.is_dir():
            # What a kill left behind half-written; only one process writes here.
            for left in self.folder.glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)
        with atomic_dir(self.folder / f"step-{run.step:08d}") as temporary:
            torch.save(
                {
                    "model": run.detector.state_dict(),
                    "optimizer": run.optimizer.state_dict(),
                    "ema": run.ema,
                },
                temporary / "state.pt",
            )
            meta = {"step": run.step, "run": self.described, "history": run.history, "validations": run.validations}
            (temporary / "run.json").write_text(json.dumps(meta))
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, run) -> bool:
        """Bring a `train._Run` to the last complete checkpoint; False where there is none."""
        found = self.all()
        if not found:
            return False
        meta = json.loads((found[-1] / "run.json").read_text())
        different = sorted(
            key for key in {*meta["run"], *self.described} if meta["run"].get(key) != self.described.get(key)
        )
        if different:
            raise UserError(
                f"{self.folder}: holds checkpoints of a run with other settings ({', '.join(different)}); "
                "choose another output folder or remove it"
            )
        state = torch.load(found[-1] / "state.pt", map_location=run.accelerator.device, weights_only=True)
        run.detector.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.ema = state["ema"]
        run.step, run.history, run.validations = meta["step"], meta["history"], meta["validations"]
        return True
