"""What `diffdoctor diagnose` makes of its records: diagnosis.jsonl, metrics.json and the gallery."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from diffdoctor.data.store_path import StorePath, absolute
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.commands.diagnose_config import DiagnoseConfig
from diffdoctor.detector.report import write_gallery
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_path, atomic_write_json
from diffdoctor.runs.record import METRICS, versions
from diffdoctor.runs.summary import print_summary


def write_diagnosis(
    config: DiagnoseConfig,
    records: Iterable[tuple[str, dict]],
    skipped: SkipCounts,
    *,
    draw: Callable[[list[dict]], None] = lambda worst: None,
    more: dict | None = None,
    place: Path | StorePath | None = None,
) -> dict:
    """Write the results of a diagnosis.

    Args:
        config: the command's options.
        records: of every picture, in order: the line of diagnosis.jsonl, and what it says.
        skipped: what was left out.
        draw: called with the records of the gallery's pictures, to write their maps and overlays where they are not
            there yet.
        more: further values of metrics.json.
        place: where the results are to be, for the line that is printed; None: the output.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: there is no record.
    """
    output, pictures, flagged, confidence = Path(config.output), 0, 0, 0.0
    with atomic_path(output / "diagnosis.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as lines:

        def written() -> Iterator[dict]:
            nonlocal pictures, flagged, confidence
            for line, record in records:
                lines.write(line)
                pictures, flagged = pictures + 1, flagged + record["flagged"]
                confidence += record["mean"]
                yield record

        left = written()
        worst = heapq.nsmallest(config.gallery, left, key=_worst_first)
        collections.deque(left, maxlen=0)  # without a gallery, nothing is written yet
    metrics = {
        "pictures": pictures,
        "flagged": flagged,
        "artifact_rate": flagged / pictures if pictures else None,
        "mean_confidence": confidence / pictures if pictures else None,
        "skipped": dict(sorted(skipped.reasons.items())),
        "skipped_examples": dict(sorted(skipped.examples.items())),
        **(more or {}),
        "versions": versions(),
    }
    if config.gallery:
        draw(worst)
        folders = ("overlays", "maps") if config.overlays else ("maps",)
        write_gallery(output, worst, metrics, folders, _settings(config))
    atomic_write_json(output / METRICS, metrics)
    page = (output if place is None else place) / ("gallery.html" if config.gallery else "diagnosis.jsonl")
    failed = f"; {len(metrics['failed_units'])} units were given up" if metrics.get("failed_units") else ""
    line = f"{flagged} of {pictures} pictures are flagged: {page}{failed}"
    print_summary(line, metrics["skipped"], metrics["skipped_examples"])
    if not pictures:
        raise UserError(f"{output}: no picture could be diagnosed (left out: {skipped.sentence()})")
    return metrics


def _settings(config: DiagnoseConfig) -> dict:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("output", "engine")}
    settings["pictures"] = [absolute(path) for path in config.pictures]
    if os.path.exists(config.detector):
        settings["detector"] = os.path.abspath(config.detector)
    return settings


def _worst_first(record: dict) -> tuple:
    return -record["flagged_share"], -record["max"], record["name"]
