"""The maps of an evaluation in parts, each on the disk when it is done: shared among processes, and resumable."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffdoctor._errors import UserError
from diffdoctor._io import atomic_path, atomic_write_json, clear_temporaries
from diffdoctor._progress import progress
from diffdoctor.detector.samples import JoinedData
from diffdoctor.detector.shards import ShardData
from diffdoctor.evaluate.detector import Diagnosed, diagnose_data

_BATCHES = 4  # in a part


def data_fingerprint(sets: Sequence[ShardData]) -> str:
    """A hash of which pictures the sets hold and where."""
    digest = hashlib.sha256()
    for one in sets:
        for column in (one.keys, one.shards.astype(str), one.places):
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def diagnose_in_parts(
    detector, sets: Sequence[ShardData], folder: Path, settings: dict, state, *, batch_size: int, size, strict: bool
) -> Diagnosed | None:
    """`diagnose_data` over sets of shards, part by part; parts that a former life has done are not done again.

    Args:
        detector: a `Detector`.
        sets: the labelled pictures.
        folder: for the parts; the caller removes it when it has what it wants.
        settings: what the maps depend on, as JSON values; parts made with others are refused.
        state: Accelerate's state of the processes that share the work.
        batch_size, size, strict: see `diagnose_data`.

    Returns:
        The maps of all pictures on the main process, None on the others.

    Raises:
        UserError: the folder holds parts that were made with other settings; pictures differ in size.
    """
    settings = json.loads(
        json.dumps(settings | {"data": data_fingerprint(sets), "batch_size": batch_size, "size": size})
    )
    record = folder / "run.json"
    if record.is_file() and json.loads(record.read_text()) != settings:
        raise UserError(f"{folder}: holds parts of an evaluation with other settings or data; remove it")
    state.wait_for_everyone()
    if state.is_main_process:
        if not record.is_file():
            # Nobody knows what parts without it were made with.
            shutil.rmtree(folder, ignore_errors=True)
        clear_temporaries(folder.parent, deep=True)
        atomic_write_json(record, settings)
    state.wait_for_everyone()
    data, length = JoinedData(sets), _BATCHES * batch_size
    paths = [folder / f"part-{first // length:06d}.npz" for first in range(0, len(data), length)]
    with progress(len(data), desc="evaluate", unit="picture", enabled=state.is_main_process) as bar:
        for number, path in enumerate(paths):
            chosen = range(number * length, min((number + 1) * length, len(data)))
            if number % state.num_processes == state.process_index and (strict or not path.is_file()):
                options = {"batch_size": batch_size, "size": size, "strict": strict}
                _write(path, diagnose_data(detector, data, chosen=chosen, **options))
            bar.update(len(chosen))
    state.wait_for_everyone()
    return _joined([_read(path) for path in paths]) if state.is_main_process else None


def _write(path: Path, found: Diagnosed) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            confidence=found.confidence,
            masks=found.masks,
            categories=np.array(found.categories, dtype=str),
            generators=np.array(found.generators, dtype=str),
            indices=found.indices,
            skipped=np.array(json.dumps(found.skipped)),
        )


def _read(path: Path) -> Diagnosed:
    with np.load(path, allow_pickle=False) as part:
        texts = (part["categories"].tolist(), part["generators"].tolist())
        skipped = json.loads(str(part["skipped"]))
        return Diagnosed(part["confidence"], part["masks"], *texts, part["indices"], skipped)


def _joined(parts: list[Diagnosed]) -> Diagnosed:
    shapes = sorted({part.confidence.shape[1:] for part in parts if len(part.confidence)})
    if len(shapes) != 1:
        raise UserError(f"size: expected a side in pixels, since pictures differ in size ({shapes}), or there are none")
    skipped: dict[str, int] = {}
    for part in parts:
        for reason, count in part.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    parts = [part for part in parts if len(part.confidence)]
    return Diagnosed(
        np.concatenate([part.confidence for part in parts]),
        np.concatenate([part.masks for part in parts]),
        [name for part in parts for name in part.categories],
        [name for part in parts for name in part.generators],
        np.concatenate([part.indices for part in parts]),
        skipped,
    )
