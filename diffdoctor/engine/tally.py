"""Units that wait, are being done, and have killed whoever did them: the same rules for processes and for actors."""

from __future__ import annotations

import collections
import errno
from collections.abc import Iterable

from diffdoctor.engine.commits import Commits
from diffdoctor.engine.units import Unit
from diffdoctor.runs.errors import UserError

# What no other worker could do better: no room on the disk, none that may be written to.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Workers that died in a row before they were ready: something is wrong with all of them.
_UNFIT = 3


def ends_run(error: BaseException) -> bool:
    """Whether an error in a unit is none of the unit's: bad input, or a disk that is full."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in _FULL)


class Tally:
    """What is left of a run.

    Args:
        commits: of the run.
        units: that are neither committed nor given up.
        retries: deaths while a unit was being done, after which it is given up.
        show: a bar of units.

    Attributes:
        waiting: units that nobody does at the moment.
        deaths: of workers, while they did something.
    """

    def __init__(self, commits: Commits, units: Iterable[Unit], retries: int, show):
        self.commits, self.retries, self.show = commits, retries, show
        self.waiting: collections.deque[Unit] = collections.deque(units)
        self.deaths, self._of_unit, self._unfit = 0, collections.Counter(), 0

    def done(self) -> None:
        """A unit is committed, by whomever."""
        self.show.update(1)

    def ready(self) -> None:
        """A worker is built."""
        self._unfit = 0

    def died(self, unit: Unit, reason: str, log: str = "") -> None:
        """A worker died while it did this unit, which is tried again or given up."""
        self.deaths += 1
        self._of_unit[unit.id] += 1
        if self.commits.is_done(unit.id):  # it died after the commit
            self.done()
        elif self._of_unit[unit.id] >= self.retries:
            self.commits.fail(unit.id, f"{reason}, {self.retries} times", log)
            self.show.update(1)
        else:
            self.waiting.append(unit)

    def never_ready(self, reason: str, log: str = "") -> None:
        """A worker died before it was built.

        Raises:
            UserError: so have others before it, and none was ready since.
        """
        self._unfit += 1
        if self._unfit >= _UNFIT:
            last = f" ({log.strip().splitlines()[-1]})" if log.strip() else ""
            raise UserError(f"engine: {_UNFIT} workers in a row died before they were ready: {reason}{last}")
