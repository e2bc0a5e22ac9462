"""`diffdoctor set join`: several sets as one, labels from the last that has them; nothing is encoded anew."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, ClassVar

import numpy as np

from diffdoctor.data.manifest import read_columns
from diffdoctor.data.shard_writer import is_key
from diffdoctor.data.shards import ShardData
from diffdoctor.data.store_path import absolute
from diffdoctor.data.tar import MASK
from diffdoctor.data.text import readable
from diffdoctor.engine.attempt import Attempt
from diffdoctor.engine.sets import IDENTITIES, RESULTS, UnitFiles, make_set
from diffdoctor.engine.store_run import run_folder
from diffdoctor.engine.units import Place, Plan, Unit, Worker, check_unchanged
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.record import METRICS, versions
from diffdoctor.runs.summary import print_summary
from diffdoctor.sets.config import SetJoinConfig
from diffdoctor.sets.dedup import superfluous
from diffdoctor.sets.opened import open_sets
from diffdoctor.training.processes import process_state


def run_set_join(config: SetJoinConfig) -> dict:
    """Run `diffdoctor set join`.

    Returns:
        What metrics.json holds; nothing on other than the main process.

    Raises:
        UserError: a set cannot be read, or two pictures have one key.
    """
    state = process_state("cpu")
    chosen = choose(config)
    plan = Plan.of_ranges(len(chosen), config.shard_size)
    spec = JoinWorkerSpec(config, chosen.digest())
    identity = {"prefix": config.prefix, "chosen": spec.digest, "plan": plan.digest()}
    results = dict.fromkeys(RESULTS)
    with run_folder(config.output, "set join", identity, results, main=state.is_main_process) as folder:
        if (made := make_set(folder, plan, spec, config, state=state, desc="join")) is None:
            return {}
        report, found = made
        metrics = {"pictures": found.records, "labels": _labels(found.sums), "failed_units": report.failed}
        atomic_write_json(folder.path / METRICS, metrics | {"versions": versions()})
        print_summary(f"{found.records} pictures: {folder.place}")
        return metrics


def _labels(sums) -> dict[str, int]:
    counts: dict[str, int] = {}
    for (_, _, label), group in sorted(sums.groups.items()):
        counts[label or "none"] = counts.get(label or "none", 0) + group["pictures"]
    return counts


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a joined set consists of, in order.

    Attributes:
        keys: (N,) of the samples.
        pictures: (N, 2) int64, set and row of each picture.
        labels: (N, 2) int64, set and row of each label.
        fingerprints: of the sets.
    """

    keys: np.ndarray
    pictures: np.ndarray
    labels: np.ndarray
    fingerprints: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def digest(self) -> str:
        """A hash of all of it."""
        digest = hashlib.sha256(" ".join(self.fingerprints).encode())
        for column in (self.keys.astype(str), self.pictures, self.labels):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


def choose(config: SetJoinConfig) -> Chosen:
    """Which pictures and labels the joined set has: pictures of one key are one, if they are the same.

    Raises:
        UserError: a set cannot be read, or two pictures have one key.
    """
    sets = [ShardData(each.folder) for each in open_sets(config.sets)]
    without = superfluous(config.without) if config.without else {}
    uids = [read_columns(data.folder, ("uid",))["uid"] for data in sets]
    places: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
    for number, data in enumerate(sets):
        left_out = without.get(readable(absolute(data.folder)), set())
        for row, key in enumerate(data.keys.tolist()):
            if key in left_out:
                continue
            key = f"{number:02d}_{key}" if config.prefix else key
            picture, label = places.get(key, ((number, row), (number, row)))
            if picture != (number, row):
                _require_same(key, sets, uids, picture, (number, row))
                label = (number, row) if data.byte_ranges[row, 3] else label
            places[key] = picture, label
    if not places:
        raise UserError(expected("sets", "at least one picture", "none"))
    pictures, labels = (np.array([place[side] for place in places.values()], np.int64) for side in (0, 1))
    return Chosen(np.array(list(places)), pictures, labels, [data.fingerprint() for data in sets])


def _require_same(key: str, sets: list[ShardData], uids: list[np.ndarray], one: tuple, other: tuple) -> None:
    known = [uids[number][row] for number, row in (one, other)]
    same = known[0] == known[1]
    if not all(known):
        pictures = [sets[number].picture(row) for number, row in (one, other)]
        same = pictures[0].shape == pictures[1].shape and np.array_equal(*pictures)
    if not same:
        folders = " and ".join(str(sets[number].folder) for number, _ in (one, other))
        what = "one picture of this key"
        raise UserError(f"{expected(key, what, f'two, in {folders}')}; --prefix true tells them apart")


@dataclasses.dataclass(frozen=True)
class JoinWorkerSpec:
    """How a worker is made that copies the samples of a unit.

    Attributes:
        config: the command's options.
        digest: of what was chosen when the run began.
    """

    uses_accelerator: ClassVar[bool] = False

    config: SetJoinConfig
    digest: str

    def build(self, place: Place) -> Worker:
        """Open the sets.

        Raises:
            UserError: they are not those with which the run began.
        """
        chosen = choose(self.config)
        check_unchanged("sets: others", chosen.digest(), self.digest)
        return _JoinWorker(chosen, [ShardData(folder) for folder in self.config.sets])


class _JoinWorker:
    def __init__(self, chosen: Chosen, sets: list[ShardData]):
        self.chosen, self.sets = chosen, sets

    def __call__(self, unit: Unit, attempt: Attempt) -> dict[str, Any]:
        with UnitFiles(unit, attempt, more=IDENTITIES) as files:
            for index in range(unit.first, unit.first + unit.count):
                self._copy(index, files)
        return files.result()

    def _copy(self, index: int, files: UnitFiles) -> None:
        (number, row), (label_number, label_row) = self.chosen.pictures[index], self.chosen.labels[index]
        picture = self.sets[number].members(row)
        members = self.sets[label_number].members(label_row) | {"png": picture["png"]}
        key = str(self.chosen.keys[index])
        if not is_key(key):
            raise UserError(expected("key", "up to 80 letters, digits, _ and -", repr(key)))
        # What is known of the picture stays known, unless the label says otherwise.
        values = json.loads(picture["json"]) | json.loads(members["json"]) | {"key": key}
        files.copy(values, members, labelled=MASK in members)
