"""A set of shards made in units: a shard and its rows of the manifest each, put together when all are committed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.data.columns import ParquetColumns
from diffdoctor.data.identity import picture_hash, picture_uid
from diffdoctor.data.manifest import MANIFEST, ManifestWriter
from diffdoctor.data.shard_writer import ShardFile, key_hash, shard_name
from diffdoctor.data.shards import ShardData
from diffdoctor.data.store_path import Location, StorePath
from diffdoctor.data.tar import SkipCounts
from diffdoctor.engine import commits as engine_commits
from diffdoctor.engine.attempt import Attempt
from diffdoctor.engine.places import commits_at
from diffdoctor.engine.running import Report, run, settle
from diffdoctor.engine.units import Plan, Unit, WorkerSpec
from diffdoctor.measures.pixels import is_flagged
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_path
from diffdoctor.runs.record import RunFolder

PARTS, SHARDS = "parts", "shard-*.tar"
# What such a set puts into its output folder.
RESULTS = (MANIFEST, SHARDS, PARTS, *engine_commits.RESULTS)
# Of `manifest.MORE`, what every such set has.
IDENTITIES = ("uid", "phash")
# Of the histogram of broken areas.
AREAS = 20
_KEY_LENGTH = 80


class SetSums:
    """Sums over pictures, by category, generator and label; those of all units add up to the set's.

    Attributes:
        groups: {(category, generator, label): sums}, which are `pictures`, `mean_confidence` (the sum of the maps'
            means), `flagged`, `areas` (pictures by share of broken pixels, in 20 equal steps) and `sizes`
            ({"HxW": pictures}).
    """

    def __init__(self):
        self.groups: dict[tuple[str, str, str], dict[str, Any]] = {}

    def add(self, row: dict[str, Any], area: float = 0.0, flagged: bool = False) -> None:
        """Count a picture.

        Args:
            row: of the manifest.
            area: share of its pixels that are broken, in [0, 1].
            flagged: whether it is flagged.
        """
        group = self._group(row["category"], row["generator"], row["label"])
        group["pictures"] += 1
        group["mean_confidence"] += row["mask_mean"]
        group["flagged"] += bool(flagged)
        group["areas"][min(int(area * AREAS), AREAS - 1)] += 1
        size = f"{row['height']}x{row['width']}"
        group["sizes"][size] = group["sizes"].get(size, 0) + 1

    def join(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add what `entries` gave of other pictures."""
        for entry in entries:
            group = self._group(entry["category"], entry["generator"], entry["label"])
            for name in ("pictures", "mean_confidence", "flagged"):
                group[name] += entry[name]
            group["areas"] = [a + b for a, b in zip(group["areas"], entry["areas"], strict=True)]
            for size, count in entry["sizes"].items():
                group["sizes"][size] = group["sizes"].get(size, 0) + count

    def entries(self) -> list[dict[str, Any]]:
        """The sums as JSON values, in the order of the groups."""
        named = (dict(zip(("category", "generator", "label"), key, strict=True)) for key in sorted(self.groups))
        return [names | self.groups[tuple(names.values())] for names in named]

    def total(self, name: str) -> float:
        """One of the sums over all groups."""
        return sum(group[name] for group in self.groups.values())

    def _group(self, category: str, generator: str, label: str) -> dict[str, Any]:
        empty = {"pictures": 0, "mean_confidence": 0.0, "flagged": 0, "areas": [0] * AREAS, "sizes": {}}
        return self.groups.setdefault((category, generator, label), empty)


class UnitFiles:
    """The shard of a unit and its rows of the manifest, being written by a worker; a context.

    Args:
        unit: the unit.
        attempt: at it.
        picture_type: see `shard_writer.write_shards`.
        more: which of `manifest.MORE` the set has.
    """

    def __init__(self, unit: Unit, attempt: Attempt, picture_type: str = "png", more: tuple[str, ...] = ()):
        name = shard_name(int(unit.id))
        self.shard = ShardFile(attempt.path(name), attempt.name(name), picture_type)
        self.rows = ManifestWriter(attempt.path(f"{PARTS}/{unit.id}.parquet"), more=more)
        self.records, self.sums = 0, SetSums()

    def add(
        self,
        sample: dict[str, Any],
        picture_at: tuple[str, int, int] | None = None,
        *,
        labelled: bool = True,
        area: float = 0.0,
        flagged: bool = False,
    ) -> None:
        """Write a sample.

        Args:
            sample: with a `key`, see `shard_writer.write_shards`.
            picture_at: see `ShardFile.add`.
            labelled: likewise.
            area: see `SetSums.add`.
            flagged: likewise.
        """
        row = self.shard.add(sample, self.records, picture_at, labelled=labelled)
        self._count(row, sample["picture"], area, flagged)

    def copy(self, values: dict[str, Any], members: dict[str, bytes], *, labelled: bool = True) -> None:
        """Write a sample of another set as it is, see `ShardFile.copy`.

        Raises:
            UserError: a member is broken.
        """
        try:
            row, picture, mask = self.shard.copy(values, members)
        except ValueError as error:
            raise UserError(f"{values['key']}: {error}") from error
        area = float((mask >= 128).mean())
        self._count(row, picture, area, labelled and bool(is_flagged(area)))

    def _count(self, row: dict[str, Any], picture: np.ndarray, area: float, flagged: bool) -> None:
        self.rows.add(row | {"uid": picture_uid(picture), "phash": picture_hash(picture)})
        self.sums.add(row, area, flagged)
        self.records += 1

    def result(self, counts: SkipCounts | None = None) -> dict[str, Any]:
        """What the worker returns, when the context is closed."""
        counts = SkipCounts() if counts is None else counts
        skipped = {"reasons": counts.reasons, "examples": counts.examples}
        return {"records": self.records, "skipped": skipped, "sums": self.sums.entries()}

    def __enter__(self) -> UnitFiles:
        return self

    def __exit__(self, *_) -> None:
        try:
            self.shard.__exit__()
        finally:
            self.rows.close()


class Assembled:
    """What all units of a set came to.

    Attributes:
        records: pictures.
        skipped: what was left out.
        sums: over the pictures.
    """

    def __init__(self):
        self.records, self.skipped, self.sums = 0, SkipCounts(), SetSums()


def make_set(
    folder: RunFolder,
    plan: Plan,
    spec: WorkerSpec,
    config,
    *,
    state,
    desc: str,
    more: tuple[str, ...] = IDENTITIES,
    overwrite: bool = False,
) -> tuple[Report, Assembled] | None:
    """Make a set in the folder of a run: its units by the engine of the options, then its manifest.

    Args:
        folder: of the run, entered and not yet checked.
        plan: what is to be done.
        spec: how a worker is made that does it.
        config: the command's options, with `engine`.
        state: Accelerate's.
        desc: name of the bar.
        more: see `UnitFiles`.
        overwrite: replace what another run of this kind has made in the folder.

    Returns:
        What became of the plan, and of the set; None on other than the main process.

    Raises:
        UserError: see `running.run` and `assemble`.
    """
    folder.check(overwrite=overwrite)
    if state.num_processes > 1:
        state.wait_for_everyone()  # all have looked at the folder before one changes it
    if state.is_main_process:
        folder.begin(config, overwrite=overwrite)
    report = run(plan, spec, folder.place, config.engine, state=state, desc=desc)
    if not state.is_main_process:
        return None
    return report, assemble(folder.place, settle(plan, folder.place, report), more, into=folder.path)


def assemble(
    output: Location, commits: Iterable[dict[str, Any]], more: tuple[str, ...] = (), *, into: Path | None = None
) -> Assembled:
    """Write the manifest of a set whose units are committed, after checking that it is whole.

    Args:
        output: folder of the set.
        commits: of its units in order, see `running.settle`.
        more: see `UnitFiles`.
        into: the folder to write it into; None: the set's.

    Raises:
        UserError: a unit has another number of rows than of pictures, or two pictures have one key.
    """
    found, hashes, parts, opened = Assembled(), [], [], commits_at(output)
    with atomic_path((output if into is None else into) / MANIFEST) as temporary:
        manifest = ManifestWriter(temporary, more=more)
        try:
            for commit in commits:
                part = opened.file(commit, f"{PARTS}/{commit['unit']}.parquet")
                parts.append(part)
                rows = manifest.add_part(part)
                if rows != commit["records"]:
                    raise UserError(expected(part, f"{commit['records']} rows, as its commit says", rows))
                found.records += rows
                skipped = commit["skipped"]
                found.skipped.join(SkipCounts(skipped.get("reasons", {}), skipped.get("examples", {})))
                found.sums.join(commit["sums"])
                hashes.append(np.fromiter(map(key_hash, _keys(part)), np.uint64, rows))
        finally:
            manifest.close()
        if found.sums.total("pictures") != found.records:
            raise UserError(expected(output, f"sums over {found.records} pictures", found.sums.total("pictures")))
        _refuse_repeated(output, hashes, parts)
    return found


def read_sample(output: Location, unit: str, key: str) -> dict[str, Any]:
    """A sample of a set that was made in units, by its unit and key: memory holds the unit's rows alone.

    Raises:
        UserError: the unit has no such sample, or it cannot be read.
    """
    name = f"{PARTS}/{unit}.parquet"
    if isinstance(output, StorePath):
        opened = commits_at(output)
        name = str(opened.file(opened.read(unit), name).relative_to(output))
    part = ShardData(output, name)
    found = np.flatnonzero(part.keys == key)
    if not len(found):
        raise UserError(expected(f"{output}: {key}", f"a sample of the unit {unit}", "none"))
    return part[int(found[0])]


def _keys(part: Location) -> list[str]:
    with ParquetColumns(part) as table:
        return table.texts("key", longest=_KEY_LENGTH).tolist()


def _refuse_repeated(output: Location, hashes: list[np.ndarray], parts: list[Location]) -> None:
    """Refuse a key that two pictures have; of equal hashes, the keys themselves are compared."""
    ordered = np.sort(np.concatenate([*hashes, np.empty(0, np.uint64)]))
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: set[str] = set()
    for key in _keys_of_hashes(parts, repeated):
        if key in seen:
            raise UserError(expected(output, "a key of its own for every picture", f"{key!r} twice"))
        seen.add(key)


def _keys_of_hashes(parts: list[Location], wanted: set[int]) -> Iterator[str]:
    if wanted:
        for part in parts:
            yield from (key for key in _keys(part) if key_hash(key) in wanted)
