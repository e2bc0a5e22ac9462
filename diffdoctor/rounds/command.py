"""`diffdoctor round run | status`: diagnose, ask people, train, measure, decide; again."""

from __future__ import annotations

import dataclasses
import sys

from diffdoctor.detector.models.base import Detector
from diffdoctor.detector.models.load import open_detector
from diffdoctor.rounds.config import RoundConfig
from diffdoctor.rounds.report import status_text, summary, write_status
from diffdoctor.rounds.stages import STAGE
from diffdoctor.rounds.state import DETECTOR, LEDGER, STAGES, Round, Rounds, Waits
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.record import RunFolder
from diffdoctor.runs.summary import print_summary
from diffdoctor.training.processes import process_state


def run_round(config: RoundConfig) -> int:
    """Run `diffdoctor round run`: all that can be done without people, up to as many rounds as are wanted.

    Killed at any moment, it goes on where it was; a stage that is done is never done again.

    Returns:
        0, also where people have to go on.

    Raises:
        UserError: an option or a file does not fit or cannot be read.
    """
    if (processes := process_state("cpu").num_processes) > 1:
        raise UserError(expected("round run", "one process", processes))
    rounds = Rounds(config)
    identity = {"detector": config.detector, "seed": config.seed}
    with RunFolder(config.output, "round", identity, {LEDGER: None, DETECTOR: None}) as folder:
        folder.check()
        if config.architecture is None and not isinstance(open_detector(config.detector), Detector):
            raise UserError(expected("architecture", "one to train, for a detector that is a program", "none"))
        folder.begin(config)
        while (number := rounds.next()) is not None:
            this = Round(rounds, number)
            try:
                for stage in STAGES:
                    _run(this, stage)
            except Waits as waits:
                write_status(rounds)
                print_summary(str(waits))
                return 0
        print_summary(f"{summary(rounds)}: {write_status(rounds)}")
    return 0


def _run(this: Round, stage: str) -> None:
    entry, values = STAGE[stage], dataclasses.asdict(this.config)
    inputs = {name: values[name] for name in entry.inputs}
    if this.rounds.entry(this.number, stage) is None:
        print(f"round {this.number}: {stage}", file=sys.stderr, flush=True)
        this.rounds.run(this.number, stage, inputs, lambda: entry.run(this), lambda: entry.is_bound(this))


def run_round_status(config: RoundConfig) -> int:
    """Run `diffdoctor round status`: print a table of the stages, and write status.html.

    Raises:
        UserError: no round was begun there.
    """
    rounds = Rounds(config)
    if not rounds.ledger.path.is_file():
        raise UserError(expected(config.output, "the output folder of `diffdoctor round run`", f"no {LEDGER}"))
    print(status_text(rounds))
    print(f"{summary(rounds)}: {write_status(rounds)}")
    return 0
