"""Which units are done: a file each, created exclusively, so that of several attempts at a unit one counts.

    .attempts/000123.<8 hex digits>.NAME    a file of an attempt; nobody reads it before its commit
    commits/000123.json                     the only truth: which attempt, its files with sizes and hashes, its results
    failed/000123.json                      given up after too many deaths, and why

An attempt's files take their own names when the run is finished.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffdoctor.engine.attempt import ATTEMPTS, Attempt, place_of
from diffdoctor.engine.units import Plan, Unit, Worker
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected, first_line
from diffdoctor.runs.files import atomic_write_json, create_exclusively, is_leftover, naming, sync_folder
from diffdoctor.runs.lock import make_folder
from diffdoctor.runs.record import read_json

COMMITS, FAILED, PLAN = "commits", "failed", "plan.parquet"
# What an engine's run puts into its output folder, beside what its workers write.
RESULTS = (ATTEMPTS, COMMITS, FAILED, PLAN)


class Commits:
    """The state of a run's units on the disk.

    Args:
        output: folder of the run.
    """

    def __init__(self, output: Path):
        self.output = Path(output)

    def begin(self) -> None:
        """Make the folders, and refuse a file system on which two processes can create one file.

        Raises:
            UserError: it is such a one, or a folder cannot be made.
        """
        for name in (ATTEMPTS, COMMITS, FAILED):
            make_folder(self.output / name)
        probe = self.output / ATTEMPTS / f"probe.{secrets.token_hex(4)}"
        try:
            if not create_exclusively(probe, b"") or create_exclusively(probe, b""):
                raise UserError(f"{self.output}: its file system lets two processes create one file; choose another")
        except OSError as error:
            what = "a file system on which a file can be created exclusively (with hard links)"
            raise UserError(expected(self.output, what, error.strerror or first_line(error))) from None
        finally:
            probe.unlink(missing_ok=True)

    def write_plan(self, plan: Plan) -> None:
        """Write down what is to be done."""
        plan.write(self.output / PLAN)

    def remove_plan(self) -> None:
        """Forget it."""
        (self.output / PLAN).unlink(missing_ok=True)

    def done(self) -> set[str]:
        """The ids of the units that are committed."""
        return _ids(self.output / COMMITS)

    def failed(self) -> set[str]:
        """The ids of the units that were given up, and are not committed."""
        return _ids(self.output / FAILED) - self.done()

    def is_done(self, unit: str) -> bool:
        """Whether a unit is committed."""
        return (self.output / COMMITS / f"{unit}.json").is_file()

    def missing(self, plan: Plan) -> list[Unit]:
        """The units that are neither committed nor given up, in order."""
        settled = self.done() | _ids(self.output / FAILED)
        return [unit for unit in plan if unit.id not in settled]

    def read(self, unit: str) -> dict[str, Any]:
        """A unit's commit.

        Raises:
            UserError: it is damaged.
        """
        return read_json(self.output / COMMITS / f"{unit}.json")

    def fail(self, unit: str, reason: str, log: str = "") -> None:
        """Give a unit up.

        Args:
            unit: its id.
            reason: why, in a line.
            log: the last lines that its worker wrote.
        """
        atomic_write_json(self.output / FAILED / f"{unit}.json", {"unit": unit, "reason": reason, "log": log})

    def reasons(self) -> dict[str, str]:
        """{id: reason} of the units that were given up."""
        return {unit: read_json(self.output / FAILED / f"{unit}.json")["reason"] for unit in sorted(self.failed())}

    def retry_failed(self) -> None:
        """Let the units that were given up be tried again."""
        for unit in _ids(self.output / FAILED):
            (self.output / FAILED / f"{unit}.json").unlink(missing_ok=True)

    def attempt(self, unit: Unit, worker: Worker, who: str = "") -> bool:
        """Do a unit, and commit what came of it.

        Args:
            unit: the unit.
            worker: what does it.
            who: added to the name of the process in the commit.

        Returns:
            Whether this attempt is the one that counts; the files of any other are deleted.
        """
        if self.is_done(unit.id):
            return False
        attempt, started = self._begun(unit.id), time.monotonic()
        try:
            with naming(attempt.output):
                result = worker(unit, attempt)
            done_by = f"{socket.gethostname()}:{os.getpid()}{f' {who}' if who else ''}"
            facts = {"worker": done_by, "seconds": time.monotonic() - started}
            won = self._commit(attempt, {"records": 0, "skipped": {}, **result, **facts})
        except BaseException:
            # An interruption may come right after the commit, which then counts.
            if not (self.is_done(unit.id) and self.read(unit.id)["attempt"] == attempt.token):
                attempt.remove()
            raise
        if not won:
            attempt.remove()
        return won

    def file(self, commit: dict[str, Any], name: str) -> Path:
        """A file of a settled unit, by the name that its worker gave it."""
        return self.output / name

    def _begun(self, unit: str) -> Attempt:
        return Attempt(self.output, unit)

    def _commit(self, attempt: Attempt, result: dict[str, Any]) -> bool:
        files = [{"name": name, **_described(path)} for name, path in attempt.files.items()]
        if not self._secure(attempt):
            return False
        commit = {"unit": attempt.unit, "attempt": attempt.token, "files": files, **result}
        return self._create(f"{COMMITS}/{attempt.unit}.json", (strict_json.dumps(commit) + "\n").encode())

    def _secure(self, attempt: Attempt) -> bool:
        """Let an attempt's files outlive a crash; False: the unit was settled meanwhile."""
        if attempt.files:
            sync_folder(self.output / ATTEMPTS)
        return True

    def _create(self, name: str, data: bytes) -> bool:
        """Whether this process, and no other, makes a file of the run."""
        return create_exclusively(self.output / name, data)

    def _check_size(self, unit: str, file: dict[str, Any], size: int | None) -> None:
        """Refuse a unit's file that has not the size that was committed; None: that is not there."""
        if size != file["bytes"]:
            got = "none" if size is None else f"{size:,} bytes"
            what = expected(self.output / file["name"], f"{file['bytes']:,} bytes", got)
            again = self.output / COMMITS / f"{unit}.json"
            raise UserError(f"{what}; remove {again}, and the same command makes it again")

    def settle(self, unit: str) -> dict[str, Any]:
        """Give the files of a committed unit their own names.

        Returns:
            The commit.

        Raises:
            UserError: a file is not there, or has not the size that was committed.
        """
        commit = self.read(unit)
        for file in commit["files"]:
            path = self.output / file["name"]
            written = place_of(self.output, unit, commit["attempt"], file["name"])
            if written.is_file():
                path.parent.mkdir(exist_ok=True)
                os.replace(written, path)
            self._check_size(unit, file, path.stat().st_size if path.is_file() else None)
        return commit

    def discard(self, unit: str) -> None:
        """Delete the files of all attempts at a unit that is not committed: whoever wrote them is dead."""
        with os.scandir(self.output / ATTEMPTS) as entries:
            written = [entry.path for entry in entries if entry.name.startswith(f"{unit}.")]
        if not self.is_done(unit):
            for path in written:
                Path(path).unlink(missing_ok=True)

    def clear_attempts(self, before: float) -> None:
        """Delete the files of attempts that do not count: of committed units, and what is older than `before`.

        What is younger may be the work of a process that outlived its run; it will find its unit settled.
        """
        done = self.done()
        with os.scandir(self.output / ATTEMPTS) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.name.partition(".")[0] in done or entry.stat().st_mtime < before:
                        os.unlink(entry.path)


def _described(path: Path) -> dict[str, Any]:
    """Size and hash of a file, which is on the disk when this returns."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb+") as file:
        while block := file.read(2**20):
            digest.update(block)
            size += len(block)
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _ids(folder: Path) -> set[str]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return {e.name.removesuffix(".json") for e in entries if e.name.endswith(".json") and not is_leftover(e.name)}
    return set()
