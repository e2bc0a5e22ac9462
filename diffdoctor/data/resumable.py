"""A set of shards that is made in a hidden folder beside its own, shard by shard, and goes on after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.data.manifest import MANIFEST, ManifestWriter
from diffdoctor.data.shard_writer import ShardFile, in_shards, shard_name
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_path, atomic_write_json, clear_leftovers, replace_dir

# A record of the maker's state: JSON values and arrays.
State = tuple[dict[str, Any], dict[str, np.ndarray]]


def work_folder(folder: Path) -> Path:
    """Where a set that is to be `folder` is made."""
    return folder.parent / f".{folder.name}.partial"


def clear_finished(folder: Path) -> None:
    """Remove what a run left that was killed right after it had given the set its name."""
    if not (work_folder(folder) / "set").exists():
        shutil.rmtree(work_folder(folder), ignore_errors=True)


class ResumableSet:
    """Shards in the making.

    In the hidden folder stand `set`, which becomes the folder; `rows`, the manifest's rows shard by shard; and
    `state.npz`, which says how many shards are done and what the maker needs to go on after them. The state is replaced
    when a shard and its rows are on the disk, so that what it does not know of is written again.

    Args:
        folder: of the finished set.
        made_from: what the set is a function of, as a text; a begun set that was made from something else is dropped.
        shard_size, picture_type: see `shard_writer.write_shards`.

    Attributes:
        done: shards that are complete.
        state: what was recorded after the last of them; None where there is none.
        begun_otherwise: a set made from something else was dropped.
    """

    def __init__(self, folder: Path, made_from: str, *, shard_size: int, picture_type: str):
        self.folder, self.made_from = folder, made_from
        self.shard_size, self.picture_type = shard_size, picture_type
        self.work = work_folder(folder)
        self.done, self.state, self.begun_otherwise = 0, None, False
        clear_leftovers(self.work, deep=True)
        self._load()

    def _load(self) -> None:
        try:
            with np.load(self.work / "state.npz", allow_pickle=False) as file:
                arrays = dict(file)
            account = json.loads(str(arrays.pop("account")))
        except FileNotFoundError:
            account = {}
        whole = (self.work / "set").is_dir()
        if whole and account.get("made_from") == self.made_from:
            self.done, self.state = account["done"], (account["state"], arrays)
        else:
            self.begun_otherwise = whole and bool(account)
            # What is in it, not the folder: whoever makes the set may hold a lock on that.
            for entry in self.work.iterdir() if self.work.is_dir() else ():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def write(self, samples: Iterator[dict[str, Any]], record: Callable[[], State]) -> None:
        """Write the shards that are not there yet.

        Args:
            samples: what comes after the last complete shard; see `shard_writer.write_shards`.
            record: called when a shard's last sample is written; returns the state after it.

        Raises:
            UserError: a sample is not as it should be.
        """
        (self.work / "set").mkdir(parents=True, exist_ok=True)
        try:
            for number, inside in in_shards(samples, self.shard_size, self.done):
                self._write_shard(number, inside)
                account, arrays = record()
                account = {"made_from": self.made_from, "done": number + 1, "state": account}
                with atomic_path(self.work / "state.npz") as temporary, open(temporary, "wb") as file:
                    np.savez(file, account=np.array(json.dumps(account)), **arrays)
                self.done = number + 1
        except BaseException as error:
            if not self.done:
                self.drop()
            if isinstance(error, ValueError) and not isinstance(error, UserError):
                raise UserError(str(error)) from error
            raise

    def _write_shard(self, number: int, samples: Iterator[dict[str, Any]]) -> None:
        rows, name = [], shard_name(number)
        with atomic_path(self.work / "set" / name) as temporary, ShardFile(temporary, name, self.picture_type) as shard:
            for sample in samples:
                rows.append(shard.add(sample, number * self.shard_size + len(rows)))
        atomic_write_json(self.work / "rows" / f"{number:06d}.json", rows)

    def finish(self, add: Callable[[Path], None]) -> None:
        """Write the manifest and give the set its name; a folder that has it is replaced.

        Args:
            add: called with the folder before, to put further files into it.
        """
        place = self.work / "set"
        place.mkdir(parents=True, exist_ok=True)
        with atomic_path(place / MANIFEST) as temporary:
            manifest = ManifestWriter(temporary, min(self.shard_size, 1000))
            try:
                for number in range(self.done):
                    for row in json.loads((self.work / "rows" / f"{number:06d}.json").read_text(encoding="utf-8")):
                        manifest.add(row)
            finally:
                manifest.close()
        add(place)
        replace_dir(place, self.folder)
        self.drop()

    def drop(self) -> None:
        """Remove what was begun."""
        shutil.rmtree(self.work, ignore_errors=True)
