"""A set of shards opened for the commands on sets: its manifest, its commits, and what tells its pictures apart."""

from __future__ import annotations

import numpy as np

from diffdoctor.data.identity import picture_hash, picture_uid
from diffdoctor.data.manifest import read_columns
from diffdoctor.data.shards import ShardData
from diffdoctor.data.store_path import Location, StorePath, at
from diffdoctor.engine.commits import FAILED, PLAN
from diffdoctor.engine.places import commits_at
from diffdoctor.engine.sets import SetSums
from diffdoctor.engine.units import Plan
from diffdoctor.measures.pixels import FLAG_SHARE
from diffdoctor.runs.progress import progress

_FIGURES = ("category", "generator", "label", "height", "width", "mask_mean", "mask_max")


class OpenSet:
    """One set.

    Args:
        folder: of the set.

    Raises:
        UserError: there is no manifest, or it cannot be read.
    """

    def __init__(self, folder: str | Location):
        self.folder = at(folder)
        self.commits = commits_at(self.folder)

    def units(self) -> list[str]:
        """The ids of its committed units, in order; none where the set was not made in units."""
        path = self.folder / PLAN
        return [unit.id for unit in Plan.read(path) if self.commits.is_done(unit.id)] if path.is_file() else []

    def failed(self) -> dict[str, str]:
        """{id: reason} of the units that were given up."""
        return self.commits.reasons() if isinstance(self.folder, StorePath) or (self.folder / FAILED).is_dir() else {}

    def sums(self) -> SetSums:
        """The sums over its pictures: from the commits, or row by row, in which case areas are not known."""
        sums = SetSums()
        if units := self.units():
            for unit in units:
                sums.join(self.commits.read(unit)["sums"])
            return sums
        columns = read_columns(self.folder, _FIGURES)
        for values in zip(*(columns[name].tolist() for name in _FIGURES), strict=True):
            row = dict(zip(_FIGURES, values, strict=True))
            # A mask of injected damage is binary but for its rim, so that its mean is the broken share.
            damaged = row["mask_max"] >= 0.5
            sums.add(row, row["mask_mean"] if damaged else 0.0, damaged and row["mask_mean"] >= FLAG_SHARE)
        return sums

    def identities(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(keys, uids, perceptual hashes) of its pictures, (N,) each; read from the pictures where nothing has them.

        Raises:
            BrokenSample: a picture that must be read cannot be.
        """
        columns = read_columns(self.folder, ("key", "uid", "phash"))
        keys, uids, hashes = columns["key"], columns["uid"], columns["phash"]
        if len(keys) and not all(uids):
            data = ShardData(self.folder)
            with progress(len(keys), desc=f"read {self.folder.name}", unit="picture") as bar:
                for index in np.flatnonzero(uids == ""):
                    picture = data.picture(int(index))
                    uids[index], hashes[index] = picture_uid(picture), picture_hash(picture)
                    bar.update(1)
        return keys, uids, hashes


def open_sets(folders: list[str]) -> list[OpenSet]:
    """The sets of some folders.

    Raises:
        UserError: one of them is none.
    """
    sets = [OpenSet(folder) for folder in folders]
    for each in sets:
        read_columns(each.folder, ("key",))
    return sets
