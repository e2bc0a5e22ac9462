"""`diffdoctor diagnose --write shards`: a label set, made in units that any engine does."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffdoctor.data.manifest import MANIFEST, MORE
from diffdoctor.data.shard_writer import is_key
from diffdoctor.data.sources import Source
from diffdoctor.data.store import is_url
from diffdoctor.data.store_path import Location, at
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.commands.diagnose_batches import confidences, diagnosis_batches
from diffdoctor.detector.commands.diagnose_config import DiagnoseConfig
from diffdoctor.detector.commands.diagnose_results import write_diagnosis
from diffdoctor.detector.models.load import open_detector
from diffdoctor.detector.predict import describe_map
from diffdoctor.engine.attempt import Attempt
from diffdoctor.engine.places import commits_at
from diffdoctor.engine.sets import PARTS, UnitFiles, make_set, read_sample
from diffdoctor.engine.source_units import plan_of_sources, sources_of
from diffdoctor.engine.store_run import run_folder
from diffdoctor.engine.units import Place, Plan, Unit, Worker, check_unchanged
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_write_bytes, file_name
from diffdoctor.training.devices import open_device_at
from diffdoctor.training.weights import weights_digest
from diffdoctor.viz.draw import map_png, overlay, png_bytes

# What a label set depends on, beside the detector's weights and the pictures.
_IDENTITY = ("write", "detector", "batch_size", "tile", "overlap", "dtype", "round")
_KNOWN = ("category", "generator", "prompt")


def diagnose_shards(
    config: DiagnoseConfig, results: dict[str, None], sources: list[Source], left_out: SkipCounts, state
) -> dict:
    """Make a label set of the sources; returns what metrics.json holds, nothing on other than the main process."""
    weights, plan = weights_digest(open_detector(config.detector)), _plan(sources, config.shard_size)
    identity = {name: getattr(config, name) for name in _IDENTITY} | {"weights": weights, "plan": plan.digest()}
    if config.mirrored:
        identity["mirrored"] = True
    with run_folder(config.output, "diagnose", identity, results, main=state.is_main_process) as folder:
        spec = LabelWorkerSpec(config, weights)
        if (made_set := make_set(folder, plan, spec, config, state=state, desc="diagnose", more=MORE)) is None:
            return {}
        report, found = made_set
        found.skipped.join(left_out)
        made = [unit.id for unit in plan if unit.id not in report.failed]
        more = {"units": report.units, "failed_units": report.failed, "round": config.round}
        records, here = _Records(folder.place, made), dataclasses.replace(config, output=str(folder.path))
        return write_diagnosis(
            here, records, found.skipped, draw=records.draw_into(here), more=more, place=folder.place
        )


def _plan(sources: list[Source], size: int) -> Plan:
    # Keys of a set with a manifest are unique in the set; elsewhere, only within a shard.
    has_manifest = {folder: (folder / MANIFEST).is_file() for folder in {s.path.parent for s in sources if s.is_shard}}

    def details(group: list[Source]) -> dict[str, Any]:
        return {"keys": group[0].is_shard and has_manifest[group[0].path.parent]}

    return plan_of_sources(sources, size, details)


@dataclasses.dataclass(frozen=True)
class LabelWorkerSpec:
    """How a worker is made that labels the pictures of a unit.

    Attributes:
        config: the command's options.
        weights: digest of the detector with which the run began.
    """

    uses_accelerator: ClassVar[bool] = True

    config: DiagnoseConfig
    weights: str

    def build(self, place: Place) -> Worker:
        """Load the detector.

        Raises:
            UserError: it is not there, or not the one with which the run began.
        """
        detector = open_detector(self.config.detector)
        check_unchanged(f"detector {self.config.detector}: other weights", weights_digest(detector), self.weights)
        detector.to(open_device_at(self.config.device, place.number))
        detector.to(torch.bfloat16 if self.config.dtype == "bf16" else torch.float32)
        return _LabelWorker(self.config, detector)


class _LabelWorker:
    def __init__(self, config: DiagnoseConfig, detector):
        self.config, self.detector = config, detector

    def __call__(self, unit: Unit, attempt: Attempt) -> dict[str, Any]:
        counts, place, seen = SkipCounts(), 0, set()
        sources = sources_of(unit)
        stamps = dict.fromkeys((source.name for source in sources), "")
        lines = attempt.path(f"{PARTS}/{unit.id}.jsonl.gz")
        # No name and no time in the header: the same records make the same bytes.
        with (
            open(lines, "wb") as raw,
            gzip.GzipFile("", "wb", 1, raw, mtime=0) as records,
            UnitFiles(unit, attempt, more=MORE) as files,
        ):
            for batch in diagnosis_batches(sources, self.config, self.detector, counts, stamps):
                for sample, confidence, disagreement in confidences(self.detector, batch, self.config, counts):
                    key = f"{unit.id}_{place:06d}"
                    if unit.details["keys"] and is_key(sample["key"]) and sample["key"] not in seen:
                        key = sample["key"]
                    seen.add(key)
                    found = describe_map(sample["name"], confidence) | disagreement
                    known = {name: sample[name] for name in _KNOWN if sample.get(name)}
                    label = {name: value for name, value in found.items() if name != "components"}
                    label |= {"key": key, "label": "pseudo", "round": self.config.round, **known}
                    at = self._picture_at(sample)
                    shown = {"area": found["flagged_share"], "flagged": found["flagged"]}
                    files.add({"picture": sample["picture"], "mask": confidence, **label}, at, **shown)
                    line = found | {"path": sample["path"], **known, "key": key, "unit": unit.id}
                    records.write(strict_json.dumps(line).encode() + b"\n")
                    place += 1
        return files.result(counts)

    def _picture_at(self, sample: dict) -> tuple[str, int, int]:
        path = sample["path"]
        offset, size = sample["picture_at"] if "picture_at" in sample else (0, os.path.getsize(path))
        output = self.config.output
        return _relative(path, output if is_url(output) else os.path.abspath(output)), offset, size


@functools.lru_cache(maxsize=1024)
def _relative(path: str, folder: str) -> str:
    """A path from a folder, with slashes: sets that move together find each other; a URL from elsewhere as it is.

    Both are absolute, or URLs.

    Raises:
        UserError: the folder is in a store, and the file is not.
    """
    if is_url(folder) and not is_url(path):
        raise UserError(expected("pictures", f"shards in a store, for labels in {folder}", path))
    if is_url(path):
        bucket = at(path).url.split("/")[:3]
        if not is_url(folder) or at(folder).url.split("/")[:3] != bucket:
            return path
        return posixpath.relpath(at(path).url, at(folder).url)
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive
        return Path(path).as_posix()


class _Records:
    """The records of a label set's pictures, unit by unit, each with its line."""

    def __init__(self, output: Location, units: list[str]):
        self.output, self.units, self.commits = output, units, commits_at(output)

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        for unit in self.units:
            name = f"{PARTS}/{unit}.jsonl.gz"
            path = self.commits.file(self.commits.read(unit), name)
            with path.open("rb") as file, gzip.open(file, "rt", encoding="utf-8") as lines:
                yield from ((line, json.loads(line)) for line in lines)

    def draw_into(self, config: DiagnoseConfig):
        """What writes the maps and overlays of some records' pictures, from the label set."""

        def draw(worst: list[dict]) -> None:
            for record in worst:
                sample = read_sample(self.output, record["unit"], record["key"])
                file = file_name(record["name"], ".png")
                atomic_write_bytes(Path(config.output) / "maps" / file, map_png(sample["mask"], config.bits))
                if config.overlays:
                    reddened = overlay(sample["picture"], sample["mask"])
                    atomic_write_bytes(Path(config.output) / "overlays" / file, png_bytes(reddened))

        return draw
