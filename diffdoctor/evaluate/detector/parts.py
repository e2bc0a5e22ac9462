"""An evaluation in parts that are stored one by one: split among processes, resumable, and with bounded memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffdoctor.data.shards import ShardData
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.predict import diagnosed_batches
from diffdoctor.detector.samples import JoinedData
from diffdoctor.engine.scratch import is_shared_out, remove_scratch, share_out
from diffdoctor.engine.units import Plan, Unit
from diffdoctor.evaluate.detector.sorted_pixels import ChunkWriter, SortedChunk
from diffdoctor.measures.curves import PixelCurves, average_precision_of_chunks
from diffdoctor.measures.statistics import PictureStatistics, slices
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import reading, refuse_foreign
from diffdoctor.runs.progress import progress
from diffdoctor.runs.record import RUN, RunFolder
from diffdoctor.runs.units import Units

if TYPE_CHECKING:
    from accelerate import PartialState

    from diffdoctor.detector.models.base import Detector
    from diffdoctor.engine.options import EngineConfig
    from diffdoctor.engine.units import WorkerSpec

_BATCHES = 4  # in a part
_PARTS = "part-*"
# What lies in the folder, what a kill left half-written included.
_NAMES = (RUN, _PARTS, f".{RUN}.diffdoctor-*", f".{_PARTS}.diffdoctor-*")
# Of the folder beside them in which an engine keeps its state.
_ENGINE = "-engine"


@dataclasses.dataclass
class Evaluated:
    """The results of an evaluation, without the maps.

    Attributes:
        statistics: of N pictures.
        categories: N names.
        generators: N names.
        kinds: N names, see `Diagnosed`.
        indices: (N,) the pictures' indices in the data.
        skipped: {reason: count} of the pictures that were skipped.
        curves: of all pixels.
        chunks: {("", "") | ("category", name) | ("generator", name): sorted pixels on the disk}.
    """

    statistics: PictureStatistics
    categories: list[str]
    generators: list[str]
    kinds: list[str]
    indices: np.ndarray
    skipped: dict[str, int]
    curves: PixelCurves
    chunks: dict[tuple[str, str], list[SortedChunk]]

    def auprc(self, column: str, name: str, chosen: np.ndarray) -> float:
        """The AUPRC of all pixels ("", ""), of a "category" or of a "generator", whose pictures are `chosen` (n,)."""
        true_positive, _, false_negative = self.statistics.columns["counts"][chosen].sum(axis=0)
        return average_precision_of_chunks(self.chunks[column, name], int(true_positive + false_negative))


def _parts_folder(folder: Path, identity: dict) -> RunFolder:
    return RunFolder(folder, "evaluate detector", identity, {_PARTS: None}, advice="remove it")


def evaluate_in_parts(
    detector: Detector,
    sets: Sequence[ShardData],
    folder: Path,
    identity: dict,
    state: PartialState,
    *,
    batch_size: int,
    size: int | None,
    strict: bool,
    engine: EngineConfig | None = None,
    spec: WorkerSpec | None = None,
) -> Evaluated | None:
    """Diagnose sets of shards part by part; parts that are already finished are skipped.

    Memory holds a batch of maps and about 1,200 bytes a picture; the folder takes up to 12 bytes a pixel.

    Args:
        detector: the detector.
        sets: the labelled pictures.
        folder: for the parts; the caller removes it at the end, see `remove_parts`.
        identity: all that the maps depend on beside the pictures and the options here; other parts are refused.
        state: Accelerate's state of the processes that split the work.
        batch_size: pictures at a time.
        size: side in pixels to which maps and masks are resized; None: the pictures must agree in size.
        strict: raise at a broken picture instead of skipping and counting it.
        engine: who writes the parts; None: the processes of `state`.
        spec: how a worker of the engines processes and ray is made, which calls `Parts.write`.

    Returns:
        The statistics on the main process, None on the others.

    Raises:
        UserError: the folder holds parts of another identity, or other files; or pictures differ in size.
    """
    data = JoinedData(sets)
    identity = identity | {"data": data.fingerprint(), "batch_size": batch_size, "size": size, "format": 5}
    run = _parts_folder(folder, identity)
    refuse_foreign(folder, _NAMES)
    run.check()
    state.wait_for_everyone()
    if state.is_main_process:
        run.begin()
    state.wait_for_everyone()
    parts = Parts(data, folder, batch_size=batch_size, size=size, strict=strict)
    scratch = folder.with_name(folder.name + _ENGINE)
    if engine is not None and is_shared_out(engine, state.num_processes):
        plan = Plan([unit for unit in parts.plan if parts.is_wanted(unit)])
        share_out(plan, spec, scratch, engine, desc="evaluate")
    else:
        if state.is_main_process:
            remove_scratch(scratch)  # of a run with an engine that was killed
        with progress(len(data), desc="evaluate", unit="picture", enabled=state.is_main_process) as bar:
            for unit in parts.plan:
                if int(unit.id) % state.num_processes == state.process_index and parts.is_wanted(unit):
                    parts.write(detector, unit)
                bar.update(unit.count)
        state.wait_for_everyone()
    return _joined([parts.path(unit) for unit in parts.plan]) if state.is_main_process else None


class Parts:
    """The parts of an evaluation: which pictures each has, and its files.

    Args:
        data: all pictures.
        folder: of the parts.
        batch_size: see `evaluate_in_parts`.
        size: likewise.
        strict: likewise.

    Attributes:
        plan: a unit for each part.
    """

    def __init__(self, data: JoinedData, folder: Path, *, batch_size: int, size: int | None, strict: bool):
        self.data, self.units, self.strict = data, Units(folder, ".npz"), strict
        self.options = {"batch_size": batch_size, "size": size, "strict": strict}
        self.plan = Plan.of_ranges(len(data), _BATCHES * batch_size)

    def path(self, unit: Unit) -> Path:
        """The part's file."""
        return self.units.path(f"part-{unit.id}")

    def is_wanted(self, unit: Unit) -> bool:
        """Whether the part is still to be written: with `strict`, broken pictures are looked for again."""
        return self.strict or not self.units.is_done(f"part-{unit.id}")

    def write(self, detector: Detector, unit: Unit) -> int:
        """Diagnose and write a part; returns the number of its pictures."""
        counts, chosen = SkipCounts(), range(unit.first, unit.first + unit.count)
        batches = diagnosed_batches(detector, self.data, chosen=chosen, counts=counts, **self.options)
        _write(self.units, f"part-{unit.id}", batches, counts)
        return unit.count


def remove_parts(folder: Path) -> None:
    """Delete the parts when the report is written, which needs their pixels."""
    _parts_folder(folder, {}).remove()


def _write(units: Units, name: str, batches: Iterator, counts: SkipCounts) -> None:
    """A part's two files."""
    statistics, curves = [], PixelCurves()
    names: dict[str, list[str]] = {"categories": [], "generators": [], "kinds": []}
    indices, shapes = [], set()
    with units.writing(name, ".pixels") as file:
        chunks = ChunkWriter(file)
        for batch in batches:
            for part in slices(batch.confidence):
                confidence, masks = batch.confidence[part], batch.masks[part]
                undecided = None if batch.ignore is None else batch.ignore[part]
                statistics.append(PictureStatistics.of(confidence, masks, undecided))
                curves.add(confidence, masks)
                chunks.add(confidence, masks, batch.categories[part], batch.generators[part])
            names["categories"] += batch.categories
            names["generators"] += batch.generators
            names["kinds"] += batch.kinds
            indices.append(batch.indices)
            shapes.add(batch.confidence.shape[1:])
        chunks.flush()
    columns = PictureStatistics.joined(statistics).to_arrays() if statistics else {}
    with units.writing(name) as file:
        np.savez(
            file,
            **columns,
            **{name: np.array(values, dtype=str) for name, values in names.items()},
            indices=np.concatenate([np.zeros(0, np.int64), *indices]),
            thresholds=curves.thresholds,
            calibration=curves.calibration,
            chunk_groups=np.array([group for group, _, _ in chunks.written], dtype=str).reshape(-1, 2),
            chunk_ranges=np.array([bounds for _, *bounds in chunks.written], dtype=np.int64).reshape(-1, 2),
            shapes=np.array(sorted(shapes), np.int64).reshape(-1, 2),
            skipped=np.array(strict_json.dumps(counts.reasons)),
        )


def _joined(paths: Sequence[Path]) -> Evaluated:
    found = Evaluated(None, [], [], [], np.zeros(0, np.int64), {}, PixelCurves(), {})
    statistics, indices, shapes = [], [], set()
    for path in paths:
        with reading(path), np.load(path, allow_pickle=False) as file:
            part = dict(file)
        for reason, count in json.loads(str(part["skipped"])).items():
            found.skipped[reason] = found.skipped.get(reason, 0) + count
        shapes |= {tuple(shape) for shape in part["shapes"].tolist()}
        if not len(part["indices"]):
            continue
        statistics.append(PictureStatistics.from_arrays(part))
        indices.append(part["indices"])
        found.categories += part["categories"].tolist()
        found.generators += part["generators"].tolist()
        found.kinds += part["kinds"].tolist()
        counted = PixelCurves()
        counted.thresholds, counted.calibration = part["thresholds"], part["calibration"]
        found.curves.merge(counted)
        groups, ranges = part["chunk_groups"].tolist(), part["chunk_ranges"].tolist()
        for (column, name), (begin, end) in zip(groups, ranges, strict=True):
            found.chunks.setdefault((column, name), []).append(SortedChunk(path.with_suffix(".pixels"), begin, end))
    if not shapes:
        raise UserError(expected("data", "at least one readable picture", "none"))
    if len(shapes) > 1:
        raise UserError(expected("size", "a side in pixels", f"none for pictures of sizes {sorted(shapes)}"))
    found.statistics, found.indices = PictureStatistics.joined(statistics), np.concatenate(indices)
    return found
