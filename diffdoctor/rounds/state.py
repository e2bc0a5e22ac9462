"""Where the rounds of a folder stand: its ledger, the round that is being made, and its detector."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffdoctor.annotate.project import Project
from diffdoctor.rounds.config import RoundConfig
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.ledger import Ledger
from diffdoctor.runs.record import as_json, differences

LEDGER, LABELS, DETECTOR, STATUS = "ledger.jsonl", "labels", "detector", "status.html"
STAGES = ("diagnose", "select", "annotate", "export", "accept", "train", "evaluate", "decide")
BEGUN, DONE = "begun", "done"


class Waits(Exception):
    """A stage that people have to do; the message says what is missing and what to run."""


class Rounds:
    """The rounds of a folder.

    Args:
        config: the options.
    """

    def __init__(self, config: RoundConfig):
        self.config, self.output = config, Path(config.output)
        self.ledger = Ledger(self.output / LEDGER)

    @property
    def project(self) -> Project:
        """The annotation project; made by the first round's `select`."""
        return Project(self.output / LABELS)

    def entry(self, number: int, stage: str, state: str = DONE) -> dict[str, Any] | None:
        """The ledger's newest entry of a round's stage; None: there is none of this state."""
        found = [e for e in self.ledger.entries() if (e["round"], e["stage"], e["state"]) == (number, stage, state)]
        return found[-1] if found else None

    def outputs(self, number: int, stage: str) -> dict[str, Any]:
        """What a stage that is done has left."""
        entry = self.entry(number, stage)
        return {} if entry is None else entry["outputs"]

    def decisions(self) -> list[dict[str, Any]]:
        """What each round that is finished decided, in order."""
        return [e["outputs"] for e in self.ledger.entries() if e["stage"] == STAGES[-1] and e["state"] == DONE]

    def detector(self, number: int) -> str:
        """The detector that a round begins with."""
        adopted = [each["detector"] for each in self.decisions()[: number - 1] if each["adopted"]]
        return adopted[-1] if adopted else self.config.detector

    def next(self) -> int | None:
        """The number of the round to go on with; None: all that are wanted are done, or no better detector comes."""
        decided = self.decisions()
        last = decided[-self.config.patience :]
        is_stuck = len(last) == self.config.patience and not any(each["adopted"] for each in last)
        return None if len(decided) >= self.config.rounds or is_stuck else len(decided) + 1

    def run(
        self,
        number: int,
        stage: str,
        inputs: dict[str, Any],
        make: Callable[[], dict[str, Any]],
        is_bound: Callable[[], bool] = lambda: False,
    ) -> None:
        """Do a round's stage, unless it is done.

        Args:
            number: of the round.
            stage: its name.
            inputs: the options on which it depends.
            make: does it, going on with what it began before a kill, and returns its outputs, `line` (in words) among
                them.
            is_bound: whether what it left when it was begun holds for those inputs alone, and `make` does not see that.

        Raises:
            Waits: of `make`.
            UserError: the stage is bound to other inputs; or of `make`.
        """
        if self.entry(number, stage) is not None:
            return
        inputs, begun = as_json(inputs), self.entry(number, stage, BEGUN)
        other = [] if begun is None else differences(begun["inputs"], inputs)
        if other and is_bound():
            what = f"{stage} of round {number} was begun with another {', '.join(other)}"
            raise UserError(f"{self.output}: {what}; put that back, or choose another output folder")
        if other or begun is None:
            self.ledger.append({"round": number, "stage": stage, "state": BEGUN, "inputs": inputs, "at": _now()})
        started = time.perf_counter()
        outputs = make()
        seconds = time.perf_counter() - started
        entry = {"round": number, "stage": stage, "state": DONE, "seconds": round(seconds, 3), "outputs": outputs}
        self.ledger.append(entry | {"at": _now()})


@dataclasses.dataclass
class Round:
    """The round that is being made.

    Attributes:
        rounds: all of them.
        number: from 1.
    """

    rounds: Rounds
    number: int

    @property
    def config(self) -> RoundConfig:
        """The options."""
        return self.rounds.config

    @property
    def project(self) -> Project:
        """The annotation project."""
        return self.rounds.project

    @property
    def detector(self) -> str:
        """The detector that the round begins with."""
        return self.rounds.detector(self.number)

    def path(self, name: str, number: int | None = None) -> Path:
        """A folder or file of this round, or of another one."""
        return self.rounds.output / f"round-{number or self.number:02d}" / name

    def outputs(self, stage: str) -> dict[str, Any]:
        """What an earlier stage of the round has left."""
        return self.rounds.outputs(self.number, stage)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
