"""The output folder of a run: whose results lie there, one process at a time, what was asked and what came of it.

    run.json       {"run": its kind, "identity": what the results depend on}; there before the first result
    config.yaml    what was asked
    metrics.json   what came of it

How far the run is stands in the folder too, as `Checkpoints`, `Units` or a `Journal`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected, missing_extra
from diffdoctor.runs.files import (
    atomic_write_json,
    atomic_write_text,
    clear_leftovers,
    is_leftover,
    leftovers,
    reading,
    refuse_file,
    refuse_foreign,
)
from diffdoctor.runs.lock import FolderLock, make_folder

RUN, CONFIG, METRICS = "run.json", "config.yaml", "metrics.json"
# Also as `Path` writes it.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+]+:/")
_FOREIGN = "choose another output folder, or move it away"


def refuse_url(output: object) -> None:
    """Refuse to write into a store.

    Raises:
        UserError: the output is a URL; says which commands take one.
    """
    if _URL.match(str(output)):
        writers = "`diagnose --write shards`, `sample`, `inject --engine` and `set join`"
        raise UserError(expected("output", f"a folder ({writers} alone write to object stores)", output))


def as_json(value: Any) -> Any:
    """A value as a file of JSON gives it back: tuples as lists, what JSON does not know as text."""
    return json.loads(strict_json.dumps(value, default=str))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file that a run wrote.

    Raises:
        UserError: it is damaged.
    """
    with reading(path):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"{type(value).__name__} instead of an object")
        return value


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between two identities: the names, with both values where these are short.

    A name that is missing is one of the value None.
    """
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    return [
        f"{name} (expected {theirs[name]}, got {ours[name]})"
        if all(name in identity and _is_short(identity[name]) for identity in (theirs, ours))
        else name
        for name in names
    ]


def _is_short(value: Any) -> bool:
    return not isinstance(value, (dict, list)) and len(str(value)) <= 32


class RunFolder:
    """The output folder of one run, told from other runs' by an identity; before `begin` nothing there is changed.

    While it is open, which it is as a context, other processes are refused.

    Args:
        path: need not exist.
        kind: of run, such as the command's name.
        identity: what the results depend on, by name, as JSON values; results made with others are refused. What
            changes no result is left out of it.
        results: the files and folders that the run writes, as names or patterns; for folders that are replaced as a
            whole, the patterns of what belongs in them, None for all others.
        exclusive: refuse a folder that holds anything at all where no run.json says that it is a run's of this kind.
        advice: what to do where the results are those of another run of this kind.
        main: whether this is the process that writes, of several that share the work.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        identity: dict[str, Any],
        results: Mapping[str, Sequence[str] | None],
        *,
        exclusive: bool = False,
        advice: str = "choose another output folder or remove it",
        main: bool = True,
    ):
        refuse_url(path)
        self.path, self.kind, self.identity, self.results = Path(path), kind, as_json(identity), dict(results)
        self.exclusive, self.advice, self.main = exclusive, advice, main
        self._lock, self._is_open, self._seen = FolderLock(self.path), False, None

    def open(self) -> None:
        """Keep the folder to this process from now on, or from when it is there.

        Raises:
            UserError: another process is at work there.
        """
        if self.main:
            self._is_open = True
            self._lock.acquire()

    def close(self) -> None:
        """Let others have the folder."""
        self._is_open = False
        self._lock.release()

    @property
    def place(self) -> Any:
        """Where the work is committed: the folder itself."""
        return self.path

    def __enter__(self) -> RunFolder:
        self.open()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def check(self, *, overwrite: bool = False) -> bool:
        """Refuse what another run or somebody else left here; changes nothing.

        Args:
            overwrite: let other runs' results of this kind pass, to be deleted by `begin`.

        Returns:
            Whether this run began here before, and resumes.

        Raises:
            UserError: names what lies there and what differs.
        """
        refuse_file(self.path)
        for name, files in self.results.items():
            if files is not None:
                refuse_foreign(self.path / name, files)
        found, record = self._present(), self._record()
        if record is None:
            if self.exclusive and self.path.is_dir() and {*self.path.iterdir()} - {*leftovers(self.path, RUN)}:
                raise UserError(f"{self.path}: holds something else than a run of {self.kind}; {_FOREIGN}")
            if found:
                raise UserError(f"{self.path}: holds {found} of another run (no {RUN} says of which); {_FOREIGN}")
        other = self._differences(record)
        if other and found and not overwrite:
            raise UserError(f"{self.path}: holds {found} of a run with another {', '.join(other)}; {self.advice}")
        self._seen = record, found
        return self._is_ours(record)

    def begin(self, config: Any = None, *, overwrite: bool = False, alone: bool = True) -> list[str]:
        """Make the folder this run's, when all else has been checked: on the main process alone.

        What was checked is checked again, since another process may have been here before this one had the lock. What
        a kill left half-written is removed, and with `overwrite` other runs' results of this kind.

        Args:
            config: written as config.yaml: a dataclass or a dict; None: nothing is.
            overwrite: see `check`.
            alone: whether no other process works for this run; only then is anything removed as left by a kill.

        Returns:
            What differed in the run whose results were deleted; empty where nothing was.

        Raises:
            UserError: see `check`; or the folder cannot be written, or another process is at work there.
        """
        seen = self._seen
        make_folder(self.path)
        if self._is_open:
            self._lock.acquire()
        resumes = self.check(overwrite=overwrite)
        if seen is not None and self._seen != seen:
            raise UserError(f"{self.path}: another process has been at work there meanwhile; run this again to resume")
        if alone:
            clear_leftovers(self.path, RUN)
        deleted: list[str] = []
        if (record := self._record()) is not None:
            if alone:
                self._clear_leftovers()
            if not resumes and self._present():
                deleted = self._differences(record)
                self.discard()
        if not resumes:
            self._write(self.identity)
        if config is not None:
            write_config(self.path, config)
        return deleted

    def finished(self) -> dict[str, Any] | None:
        """What metrics.json says of this very run; None where there is none.

        Raises:
            UserError: it is damaged.
        """
        metrics = self.path / METRICS
        if not self._is_ours(self._record()) or not metrics.is_file():
            return None
        return read_json(metrics)

    def discard(self) -> None:
        """Delete the results; a kill leaves a folder of which is known that nothing in it counts."""
        self._write(None)
        for path in [path for name in (*self.results, METRICS) for path in self.path.glob(name)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def remove(self) -> None:
        """Delete all that the run wrote, and the folder unless it holds something else."""
        if self._record() is None:
            return
        self._clear_leftovers()
        self.discard()
        # run.json last: without it the folder would be somebody else's.
        for name in (CONFIG, RUN):
            (self.path / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _present(self) -> str:
        """The results that lie there, as words."""
        found = [name for name in self.results if any(map(_holds_anything, self._paths(name)))]
        return " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))

    def _paths(self, name: str) -> list[Path]:
        # What a kill kept from its name, between the two renames of its replacement, is there too.
        hidden = [entry / name for entry in leftovers(self.path, name)]
        return [*self.path.glob(name), *filter(Path.exists, hidden)]

    def _clear_leftovers(self) -> None:
        clear_leftovers(self.path)
        for name in self.results:
            if not (self.path / name).is_symlink():
                clear_leftovers(self.path / name, deep=True)

    def _record(self) -> dict[str, Any] | None:
        """What run.json says, if a run of this kind has been here; another's or somebody else's is refused."""
        try:
            found = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            found = None
        is_record = isinstance(found, dict) and isinstance(found.get("identity", ""), (dict, type(None)))
        if is_record and found.get("run") == self.kind:
            return found
        what = f"a run of {found['run']}, not" if is_record and "run" in found else "something else than"
        raise UserError(f"{self.path}: holds {what} a run of {self.kind} ({RUN}); {_FOREIGN}")

    def _differences(self, record: dict[str, Any] | None) -> list[str]:
        # Where the results were deleted, or are being deleted, nothing says of which run they are.
        return [] if not record or record["identity"] is None else differences(record["identity"], self.identity)

    def _is_ours(self, record: dict[str, Any] | None) -> bool:
        return bool(record) and record["identity"] is not None and not self._differences(record)

    def _write(self, identity: dict[str, Any] | None) -> None:
        atomic_write_json(self.path / RUN, {"run": self.kind, "identity": identity})


def _holds_anything(path: Path) -> bool:
    if not path.is_dir():
        return True
    with os.scandir(path) as entries:
        return any(not is_leftover(entry.name) for entry in entries)


def kind_of_run(folder: str | Path) -> str | None:
    """The kind of the run whose output a folder is, by its run.json; None where there is none of this program's.

    Args:
        folder: a path, or what reads as one does.
    """
    folder = Path(folder) if isinstance(folder, str) else folder
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except UserError:  # of a store that cannot be reached
        raise
    except (OSError, ValueError, RecursionError):
        return None
    is_record = isinstance(found, dict) and isinstance(found.get("run"), str) and "identity" in found
    return found["run"] if is_record else None


def write_config(folder: Path, config: Any) -> None:
    """What a run was asked, a dataclass or a dict, as `config.yaml`."""
    try:
        import yaml
    except ImportError:
        raise missing_extra("pyyaml", "stages") from None
    values = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    atomic_write_text(Path(folder) / CONFIG, yaml.safe_dump(as_json(values), sort_keys=False))


def versions() -> dict[str, str]:
    """What a run was made with, for its metrics.json."""
    result = {"python": platform.python_version()}
    for name in ("diffdoctor", "torch", "numpy", "scipy", "transformers", "accelerate", "pillow"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result
