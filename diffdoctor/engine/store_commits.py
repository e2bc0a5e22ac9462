"""Commits in a store, where nothing can be renamed: an attempt's files are put under names of its own, then named.

    shard-000123.0a1b2c3d.tar, parts/000123.0a1b2c3d.parquet    what an attempt wrote, put whole; nobody reads it before
    commits/000123.json                                         its commit, created exclusively
    failed/000123.json                                          as in a folder

The manifest, which comes last, names the files that count; what attempts left that do not is deleted at the end, that
of units that were given up by a run of a day later.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from diffdoctor.data.store_cache import cache_folder, made_folder
from diffdoctor.data.store_path import StorePath
from diffdoctor.engine.attempt import ATTEMPTS, Attempt
from diffdoctor.engine.commits import COMMITS, FAILED, PLAN, Commits
from diffdoctor.engine.units import Plan, Unit
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import reading

# Seconds after which what an attempt has put is not committed any more: hours of uploading, and a clock that is wrong.
_ABANDONED = 24 * 3600
# An attempt's file: the unit's id and the attempt's token.
_ATTEMPTED = re.compile(r"(?:[a-z]+[-/])?(\d{6,})\.([0-9a-f]{8})\.[a-z.]+")


class StoreAttempt(Attempt):
    """An attempt whose files lie in a folder of this machine until they are put into the store.

    Args:
        output: place of the run.
        unit: the unit's id.
    """

    def __init__(self, output: StorePath, unit: str):
        self.folder = tempfile.TemporaryDirectory(prefix=f"{_prefix(output)}{unit}-", dir=made_folder())
        super().__init__(Path(self.folder.name), unit)
        self.place, self.sent = output, []

    def name(self, name: str) -> str:
        """What a file of the unit is called in the store."""
        return attempted(name, self.token)

    def path(self, name: str) -> Path:
        """Where to write a file of the unit."""
        stored = self.name(name)
        self.files[stored] = self.output / PurePosixPath(stored).name
        return self.files[stored]

    def put(self) -> None:
        """Put all files into the store."""
        for name, path in self.files.items():
            self.sent.append(self.place / name)
            self.place.store.put(path, self.sent[-1].url)
        self.folder.cleanup()

    def remove(self) -> None:
        """Delete what was written, here and in the store."""
        self.folder.cleanup()
        for path in self.sent:
            path.store.delete(path.url)


def _prefix(output: StorePath) -> str:
    return f"attempt-{hashlib.sha256(output.url.encode()).hexdigest()[:16]}-"


def attempted(name: str, token: str) -> str:
    """The name of an attempt's file in a store: with the attempt's token before the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{folder}{slash}{stem}.{token}.{ending}"


class StoreCommits(Commits):
    """The state of a run's units in a store.

    Args:
        output: place of the run.
    """

    output: StorePath

    def __init__(self, output: StorePath):
        self.output, self._sizes, self._counting = output, None, {}

    @property
    def _store(self):
        return self.output.store

    def begin(self) -> None:
        """Refuse a store in which two processes can create one object.

        Raises:
            UserError: it is such a one, or cannot be written.
        """
        probe = self.output / ATTEMPTS / f"probe.{secrets.token_hex(4)}"
        try:
            if not self._store.create(probe.url, b"first") or self._store.create(probe.url, b"second"):
                raise UserError(expected(self.output, "a store that creates an object exclusively", "another"))
        finally:
            self._store.delete(probe.url)
        self._clear_here("")

    def write_plan(self, plan: Plan) -> None:
        """Write down what is to be done."""
        with tempfile.TemporaryDirectory() as folder:
            plan.write(Path(folder) / PLAN)
            self._store.put(Path(folder) / PLAN, (self.output / PLAN).url)

    def remove_plan(self) -> None:
        """Forget it."""
        self._store.delete((self.output / PLAN).url)

    def done(self) -> set[str]:
        """The ids of the units that are committed."""
        return self._ids(COMMITS)

    def failed(self) -> set[str]:
        """The ids of the units that were given up, and are not committed."""
        return self._ids(FAILED) - self.done()

    def _ids(self, folder: str) -> set[str]:
        names = self._store.listing((self.output / folder).url)
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def missing(self, plan: Plan) -> list[Unit]:
        """The units that are neither committed nor given up, in order."""
        settled = self.done() | self._ids(FAILED)
        return [unit for unit in plan if unit.id not in settled]

    def read(self, unit: str) -> dict[str, Any]:
        """A unit's commit.

        Raises:
            UserError: it is damaged.
        """
        return self._json(COMMITS, unit)

    def _json(self, folder: str, unit: str) -> dict[str, Any]:
        path = self.output / folder / f"{unit}.json"
        with reading(path):
            return json.loads(path.read_text())

    def fail(self, unit: str, reason: str, log: str = "") -> None:
        """Give a unit up, see `Commits.fail`."""
        text = strict_json.dumps({"unit": unit, "reason": reason, "log": log})
        self._store.write((self.output / FAILED / f"{unit}.json").url, text.encode())

    def reasons(self) -> dict[str, str]:
        """{id: reason} of the units that were given up."""
        return {unit: self._json(FAILED, unit)["reason"] for unit in sorted(self.failed())}

    def retry_failed(self) -> None:
        """Let the units that were given up be tried again."""
        for unit in self._ids(FAILED):
            self._store.delete((self.output / FAILED / f"{unit}.json").url)

    def _begun(self, unit: str) -> Attempt:
        return StoreAttempt(self.output, unit)

    def _secure(self, attempt: StoreAttempt) -> bool:
        try:
            attempt.put()
        except UserError:
            # Another run has settled the unit, and deleted what it found of this attempt.
            if self.is_done(attempt.unit):
                return False
            raise
        return True

    def _create(self, name: str, data: bytes) -> bool:
        return self._store.create((self.output / name).url, data)

    def file(self, commit: dict[str, Any], name: str) -> StorePath:
        """A file of a committed unit, by the name that its worker gave it."""
        return self.output / attempted(name, commit["attempt"])

    def settle(self, unit: str) -> dict[str, Any]:
        """Check the objects of a committed unit.

        Returns:
            The commit.

        Raises:
            UserError: an object is not there, or has not the size that was committed.
        """
        commit = self.read(unit)
        self._counting[unit] = commit["attempt"]
        if self._sizes is None:
            self._sizes = self._listed()
        for file in commit["files"]:
            self._check_size(unit, file, self._sizes.get(file["name"]))
        return commit

    def _listed(self) -> dict[str, int]:
        """Sizes of the files that attempts have put, by name."""
        found = self._store.listing(self.output.url, deep=True)
        return {name: size for name, (size, _) in found.items() if _ATTEMPTED.fullmatch(name)}

    def discard(self, unit: str) -> None:
        """Delete what a dead worker of this machine was writing; what it has put goes at the end."""
        self._clear_here(f"{unit}-")

    def _clear_here(self, unit: str) -> None:
        for left in cache_folder().glob(f"{_prefix(self.output)}{unit}*"):
            shutil.rmtree(left, ignore_errors=True)

    def clear_attempts(self, before: float) -> None:
        """Delete the files of attempts that do not count.

        Those at settled units, and those at units that were given up a day before `before`, by when no machine can
        still be about to commit what it has put.
        """
        given_up = self.failed()
        for name in self._listed():
            unit, token = _ATTEMPTED.fullmatch(name).groups()
            if self._counting.get(unit, token) != token or (
                unit in given_up and self._is_older(name, before - _ABANDONED) and not self.is_done(unit)
            ):
                self._store.delete((self.output / name).url)

    def _is_older(self, name: str, moment: float) -> bool:
        try:
            written = self._store.written_at((self.output / name).url)
        except FileNotFoundError:  # whoever put it has deleted it
            return False
        return written is not None and written < moment
