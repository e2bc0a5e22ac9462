"""Units done by the processes that `accelerate launch` or torchrun started: each has its share, by number.

Nobody waits for a process that may be dead. Each says every few seconds that it lives; the main one does what those
have left that no longer do.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from diffdoctor.engine.attempt import ATTEMPTS
from diffdoctor.engine.tally import Tally
from diffdoctor.engine.units import Place, Plan, WorkerSpec

BEAT, SILENT = 2.0, 30.0  # seconds


def run(plan: Plan, tally: Tally, spec: WorkerSpec, number: int, count: int) -> None:
    """Do this process's share of the units, and on the main process what dead ones have left.

    Args:
        plan: whose units are shared out, those that are done too, so that a process resumes with its own.
        tally: with the units that are missing.
        spec: of the worker.
        number: of this process, from 0, the main one.
        count: of all processes.
    """
    commits, place = tally.commits, Place(number, count)
    shares = {unit.id: index % count for index, unit in enumerate(plan)}
    with _Life(commits.output, number, count) as life:
        worker = spec.build(place) if tally.waiting else None
        left = []
        for unit in tally.waiting:
            if shares[unit.id] != number:
                left.append(unit)
                continue
            commits.attempt(unit, worker, f"rank {number}")
            tally.done()
        while number == 0 and left:
            waiting = [unit for unit in left if not commits.is_done(unit.id)]
            tally.show.update(len(left) - len(waiting))
            left = waiting
            orphan = next((unit for unit in left if not life.is_heard(shares[unit.id])), None)
            if orphan is not None:
                commits.attempt(orphan, worker, "in place of a dead process")
            elif left:
                time.sleep(0.1)


class _Life:
    """This process's sign of life, a file whose time is renewed; a context."""

    def __init__(self, output: Path, number: int, count: int):
        self.files = [output / ATTEMPTS / f"rank.{rank}" for rank in range(count)]
        self.number, self._ended, self._began = number, threading.Event(), time.monotonic()
        self._heard: dict[int, tuple[float, float]] = {}

    def _beat(self) -> None:
        while True:
            with suppress(OSError):
                self.files[self.number].touch()
                os.utime(self.files[self.number])
            if self._ended.wait(BEAT):
                return

    def is_heard(self, rank: int) -> bool:
        """Whether a process has given a sign of life lately, by this machine's clock alone."""
        try:
            beat = self.files[rank].stat().st_mtime
        except FileNotFoundError:
            beat = 0.0
        last, at = self._heard.get(rank, (None, self._began))
        if beat != last:
            at = self._began if last is None and not beat else time.monotonic()
            self._heard[rank] = beat, at
        return time.monotonic() - at < SILENT

    def __enter__(self) -> _Life:
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        # One that has done its share is not missed: nothing of it is left.
        self.files[self.number].unlink(missing_ok=True)
