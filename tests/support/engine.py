"""A worker that says in a file what it did, and misbehaves where it is told to."""

import dataclasses
import errno
import os
import signal
import time
from pathlib import Path
from typing import ClassVar

from diffdoctor.engine.units import Plan, Unit, unit_name
from diffdoctor.runs.errors import UserError


def plan_of(count, **faults):
    """A plan of so many units; `faults` are {fault: numbers of the units that have it}."""
    found = {number: fault for fault, numbers in faults.items() for number in numbers}
    details = ({"fault": found[number]} if number in found else {} for number in range(count))
    return Plan([Unit(unit_name(number), count=3, details=each) for number, each in enumerate(details)])


@dataclasses.dataclass(frozen=True)
class Spec:
    """Of a worker that writes one file for each unit, and appends a line to `folder`/tried for each attempt."""

    uses_accelerator: ClassVar[bool] = True

    folder: str
    seconds: float = 0.0

    def build(self, place):
        return self

    def __call__(self, unit, attempt):
        before = self.tries(unit.id)
        with open(Path(self.folder) / "tried", "a") as file:
            file.write(f"{unit.id}\n")
        attempt.path(f"made-{unit.id}.txt").write_text(f"{unit.id} by somebody")
        fault = unit.details.get("fault")
        if fault == "poison" or (fault == "once" and not before):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "raises":
            raise RuntimeError("an odd unit")
        if fault == "refuses":
            raise UserError("this cannot be done")
        if fault == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(3600 if fault == "hangs" else self.seconds)
        return {"records": unit.count}

    def tries(self, unit):
        """How often a unit was tried."""
        file = Path(self.folder) / "tried"
        return file.read_text().split().count(unit) if file.exists() else 0


def check(plan, output, report, commits, failed=()):
    """Every unit that is not given up counts once, and nothing else lies there."""
    done = [unit.id for unit in plan if unit.id not in failed]
    assert [commit["unit"] for commit in commits] == done
    assert (report.units, report.done, sorted(report.failed)) == (len(plan), len(done), sorted(failed))
    assert {path.name for path in output.glob("made-*")} == {f"made-{unit}.txt" for unit in done}
    assert not list((output / ".attempts").iterdir())
    assert sum(commit["records"] for commit in commits) == 3 * len(done)
