"""A set of shards that is made in a hidden folder beside its own, shard by shard, and resumes after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.data.manifest import MANIFEST, ManifestWriter
from diffdoctor.data.shard_writer import ShardFile, in_shards, shard_name
from diffdoctor.data.store_path import Location
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_path, atomic_write_json, reading, replace_dir
from diffdoctor.runs.record import RunFolder

# A record of the maker's state: JSON values and arrays.
State = tuple[dict[str, Any], dict[str, np.ndarray]]


def save_state(path: Path, state: State) -> None:
    """Write a state to a file; of equal states, equal bytes."""
    account, arrays = state
    with open(path, "wb") as file:
        np.savez(file, account=np.array(strict_json.dumps(account)), **arrays)


def load_state(path: Location) -> State:
    """Read what `save_state` wrote; raises whatever NumPy does of a file that is damaged."""
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("account"))), arrays


def work_folder(folder: Path) -> Path:
    """Where a set that is to be `folder` is made."""
    return folder.parent / f".{folder.name}.partial"


class ResumableSet:
    """Shards in the making.

    In the hidden folder stand `set`, which becomes the folder; `rows`, the manifest's rows shard by shard; and
    `state.npz`, which says how many shards are done and what the maker needs to resume after them. The state is
    replaced when a shard and its rows are on the disk, so that what it does not know of is written again.

    Args:
        folder: of the finished set.
        identity: what the set is a function of; what was begun of another set is deleted.
        shard_size, picture_type: see `shard_writer.write_shards`.

    Attributes:
        done: shards that are complete.
        state: what was recorded after the last of them; None where there is none.
        discarded_stale: what differed in the set that had been begun here and was deleted.

    Raises:
        UserError: the hidden folder holds something else.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, shard_size: int, picture_type: str):
        self.folder, self.work = folder, work_folder(folder)
        self.shard_size, self.picture_type = shard_size, picture_type
        results = dict.fromkeys(("set", "rows", "state.npz"))
        self.run = RunFolder(self.work, "inject", identity, results, exclusive=True)
        self.discarded_stale = self.run.begin(overwrite=True)
        self.done, self.state = 0, None
        if (self.work / "set").is_dir():
            self._load()
        else:
            # The set has its name already, and is made again.
            (self.work / "state.npz").unlink(missing_ok=True)

    def _load(self) -> None:
        path = self.work / "state.npz"
        if not path.is_file():
            return
        with reading(path, f"remove {self.work} to start again"):
            account, arrays = load_state(path)
            self.done, self.state = account["done"], (account["state"], arrays)

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
                with atomic_path(self.work / "state.npz") as temporary:
                    save_state(temporary, ({"done": number + 1, "state": account}, arrays))
                self.done = number + 1
        except BaseException as error:
            if not self.done:
                self.remove()
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
        made = self.work / "set"
        made.mkdir(parents=True, exist_ok=True)
        with atomic_path(made / MANIFEST) as temporary:
            manifest = ManifestWriter(temporary, min(self.shard_size, 1000))
            try:
                for number in range(self.done):
                    path = self.work / "rows" / f"{number:06d}.json"
                    with reading(path, f"remove {self.work} to start again"):
                        rows = json.loads(path.read_text(encoding="utf-8"))
                    for row in rows:
                        manifest.add(row)
            finally:
                manifest.close()
        add(made)
        replace_dir(made, self.folder)
        self.remove()

    def remove(self) -> None:
        """Delete what was begun."""
        self.run.remove()
