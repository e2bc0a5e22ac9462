"""`diffdoctor set check`: whether sets are what their manifests and commits say."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator

import numpy as np

from diffdoctor.data.identity import picture_uid
from diffdoctor.data.manifest import read_columns
from diffdoctor.data.shards import BrokenSample, ShardData, decode_sample
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.progress import progress
from diffdoctor.sets.config import SetCheckConfig
from diffdoctor.sets.opened import OpenSet, open_sets

_SHOWN = 20


def run_set_check(config: SetCheckConfig) -> None:
    """Run `diffdoctor set check`: prints a line for each set, and its faults.

    Raises:
        UserError: a set has a fault.
    """
    total = 0
    for each in open_sets(config.sets):
        faults = list(_faults(each, config))
        total += len(faults)
        for fault in faults[:_SHOWN]:
            print(f"{each.folder}: {fault}", file=sys.stderr)
        if len(faults) > _SHOWN:
            print(f"{each.folder}: and {len(faults) - _SHOWN} more", file=sys.stderr)
        count = len(read_columns(each.folder, ("height",))["height"])
        print(f"{each.folder}: {count:,} pictures, {len(faults) or 'no'} fault{'s' * (len(faults) != 1)}")
    if total:
        raise UserError(f"{total} fault{'s' * (total != 1)} in {len(config.sets)} sets")


def _faults(opened: OpenSet, config: SetCheckConfig) -> Iterator[str]:
    yield from _faults_of_commits(opened, config.hashes)
    for unit, reason in opened.failed().items():
        yield f"unit {unit} was given up ({reason})"
    try:
        data = ShardData(opened.folder)
    except UserError as error:
        yield str(error).removeprefix(f"{opened.folder}: ")
        return
    yield from _faults_of_rows(data)
    if config.pixels:
        yield from _faults_of_samples(data, read_columns(opened.folder, ("uid",))["uid"])


def _faults_of_commits(opened: OpenSet, hashes: bool) -> Iterator[str]:
    rows = 0
    for unit in (units := opened.units()):
        commit = opened.commits.read(unit)
        rows += commit["records"]
        for file in commit["files"]:
            path = opened.folder / file["name"]
            size = path.stat().st_size if path.is_file() else None
            if size != file["bytes"]:
                got = "is missing" if size is None else f"has {size:,} bytes"
                yield f"{file['name']} {got}, of {file['bytes']:,} that were committed"
            elif hashes:
                with path.open("rb") as opened_file:
                    digest = hashlib.sha256()
                    while block := opened_file.read(2**20):
                        digest.update(block)
                if digest.hexdigest() != file["sha256"]:
                    yield f"{file['name']} has other bytes than those that were committed"
    found = len(read_columns(opened.folder, ("height",))["height"])
    if units and found != rows:
        yield f"the manifest has {found:,} rows, the commits {rows:,}"


def _faults_of_rows(data: ShardData) -> Iterator[str]:
    """Keys that come twice, and ranges beyond the ends of their files."""
    keys, counts = np.unique(data.keys, return_counts=True)
    for key in keys[counts > 1]:
        yield f"the key {str(key)!r} comes twice"
    pictures = np.where(data.picture_files == "", data.shards, data.picture_files)
    parts = [("picture", pictures, data.byte_ranges[:, :2])]
    parts += [(name, data.shards, data.byte_ranges[:, at : at + 2]) for name, at in (("mask", 2), ("values", 4))]
    parts.append(("undecided part", data.shards, data.ignore_ranges))
    for name, files, ranges in parts:
        ends = ranges.sum(axis=1)
        for file in sorted(set(files)):
            size = data.file(file).stat().st_size
            for row in np.flatnonzero((files == file) & (ends > size)):
                yield f"{data.keys[row]}: its {name} would end at byte {ends[row]:,} of {file}, which has {size:,}"


def _faults_of_samples(data: ShardData, uids: np.ndarray) -> Iterator[str]:
    with progress(len(data), desc=f"read {data.folder.name}", unit="picture") as bar:
        for index in range(len(data)):
            try:
                members = data.members(index)
                unlabelled = data.labels[index] == ""
                sample = decode_sample(members, str(data.keys[index]), "ignored" if unlabelled else "required")
            except BrokenSample as error:
                yield str(error)
                continue
            finally:
                bar.update(1)
            if uids[index] and picture_uid(sample["picture"]) != uids[index]:
                yield f"{data.keys[index]}: another picture than the one that was recorded"
