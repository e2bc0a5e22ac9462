"""A training's output folder: what the run is, whose results lie there, and the checkpoints it goes on from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from torch import nn

from diffdoctor.data.stream import ShardStream
from diffdoctor.detector.models.base import CONFIG_NAME, WEIGHTS_NAME, Detector
from diffdoctor.detector.samples import fingerprint_of
from diffdoctor.runs.checkpoints import Checkpoints
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_write_json, clear_leftovers, refuse_foreign

RESULTS = ("detector", "best")
_ADVICE = "choose another output folder or remove it"


def refuse_foreign_results(folder: str | Path) -> None:
    """Refuse an output folder in which saving the results would replace anything but a detector's files.

    Raises:
        UserError: `folder/detector` or `folder/best` holds something else.
    """
    for name in RESULTS:
        refuse_foreign(Path(folder) / name, (CONFIG_NAME, WEIGHTS_NAME))


def describe(config, data, detector: nn.Module, validation, processes: int) -> dict:
    """What a training's result depends on, by name, as JSON values.

    Args:
        config: a `DetectorTrainingConfig`.
        data, validation: sets, or for `data` a `ShardStream`; see `samples.fingerprint_of`.
        detector: the network to train.
        processes: that share the work.
    """
    # A picture that turns up broken makes no other run, and neither do workers, unless they draw the stream.
    described = dataclasses.asdict(config) | {"detector": type(detector).__name__}
    if isinstance(detector, Detector):
        described |= dataclasses.asdict(detector.preprocess_config) | {"network": detector.config_dict()}
    if isinstance(data, ShardStream):
        described |= {"shards": len(data.paths), "buffer": data.buffer, "processes": processes}
    else:
        described |= {"pictures": len(data)}
        del described["workers"]
    del described["strict"]
    described["data"] = fingerprint_of(data)
    described["validation"] = None if validation is None else fingerprint_of(validation)
    return described


class RunFolder:
    """The output folder of one training; before `begin` nothing there is changed but for what a kill left half-written.

    `checkpoints/run.json` says from the start on what the run is, so that the results that lie there can be told from
    another run's before there is a checkpoint.

    Args:
        folder: need not exist.
        described: what the run is, as `describe` gives it.
        keep: checkpoints to keep.
        main: whether this is the process that writes.

    Raises:
        UserError: saving the results would replace what is none.
    """

    def __init__(self, folder: Path, described: dict, *, keep: int, main: bool):
        self.folder, self.main = folder, main
        if main:
            clear_leftovers(folder)
        refuse_foreign_results(folder)
        self.checkpoints = Checkpoints(
            folder / "checkpoints",
            described,
            keep=keep,
            refusal=f"holds checkpoints of a run with other settings ({{}}); {_ADVICE}",
        )
        self.record = self.checkpoints.folder / "run.json"

    def load(self, device) -> tuple[dict, dict] | None:
        """State and record of the last complete checkpoint, tensors on `device`; None where there is none.

        Raises:
            UserError: the checkpoint, or without one a result that lies there, is another run's.
        """
        found = self.checkpoints.load(device)
        if found is None:
            self._refuse_others_results()
        return found

    def _refuse_others_results(self) -> None:
        ours = self.checkpoints.settings
        there = [name for name in RESULTS if (self.folder / name).exists()]
        try:
            theirs = json.loads(self.record.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            theirs = None
        if not there or theirs == ours:
            return
        other = "another run"
        if isinstance(theirs, dict):
            names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
            other = f"a run with other settings ({', '.join(names)})"
        raise UserError(f"{self.folder}: holds {' and '.join(there)} of {other}; {_ADVICE}")

    def begin(self) -> None:
        """Say what the run is, and delete what is left over; called when all checks have passed."""
        if self.main:
            self.checkpoints.tidy()
            atomic_write_json(self.record, self.checkpoints.settings)

    def save(self, step: int, state: dict, record: dict) -> None:
        """Write a checkpoint; see `Checkpoints.save`."""
        self.checkpoints.save(step, state, record)
