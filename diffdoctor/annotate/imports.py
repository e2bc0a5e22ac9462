"""`diffdoctor annotate import`: labels that were made elsewhere."""

from __future__ import annotations

import json
import re
import secrets
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from diffdoctor.annotate import label_studio
from diffdoctor.annotate.config import AnnotateImportConfig
from diffdoctor.annotate.labels import key_of
from diffdoctor.annotate.project import Project
from diffdoctor.annotate.queue import Queue, Submission
from diffdoctor.data.codec import SUFFIXES, UnreadablePicture, decode
from diffdoctor.data.tar import SkipCounts
from diffdoctor.detector.exchange import coco_masks
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.summary import print_summary

_NUMBER = re.compile(r"^\d{6}_(?=r\d+-[0-9a-f]{16}$)")


@dataclass(frozen=True)
class Imported:
    """A label from elsewhere.

    Attributes:
        task: the id of the task that it answers.
        rater: name of who made it.
        mask: (H, W) uint8 of 0 and 255.
        ignore: likewise, or None.
        seconds: of work, where it is known.
    """

    task: int
    rater: str
    mask: np.ndarray
    ignore: np.ndarray | None = None
    seconds: float = 0.0


def run_annotate_import(config: AnnotateImportConfig) -> int:
    """Run `diffdoctor annotate import`: all of a source, or where something in it is refused, nothing.

    Raises:
        UserError: there is no project, or the source cannot be read or does not fit it.
    """
    project, counts = Project(config.project), SkipCounts()
    read = {"label-studio": _label_studio, "coco": _coco, "masks": _masks}[config.format]
    found = list(read(config, _Tasks(project), counts))
    queue, added, repeated = Queue(project), 0, 0
    for label in found:
        if import_label(queue, label):
            added += 1
        else:
            repeated += 1
    known = f"; {repeated} were there already" if repeated else ""
    print_summary(f"{added} labels in {project.folder}{known}", counts.reasons, counts.examples)
    return 0


def import_label(queue: Queue, label: Imported) -> bool:
    """Put a label into a project as its rater's answer; returns whether it differs from the newest one there."""
    person = _person(queue.project, label.rater)
    newest = queue.newest_version(label.task, person)
    answer = Submission(
        max(newest, 1),
        "damaged" if label.mask.any() else "clean",
        mask=label.mask if label.mask.any() else None,
        ignore=None if label.ignore is None or not label.ignore.any() else label.ignore,
        active_ms=int(1000 * label.seconds),
        wall_ms=int(1000 * label.seconds),
    )
    return queue.take_answer(label.task, person, answer)


def _person(project: Project, name: str) -> int:
    """The id of a rater by name, added without a token where there is none."""
    with project.store.writing() as connection:
        row = project.store.one("SELECT id FROM annotator WHERE name = ?", name)
        if row is not None:
            return row["id"]
        values = (name, "annotator", secrets.token_hex(32), 1)
        cursor = connection.execute(
            "INSERT INTO annotator(name, role, token_hash, disabled) VALUES (?, ?, ?, ?)", values
        )
        project.store.log("import", name=name)
        return int(cursor.lastrowid)


class _Tasks:
    """A project's tasks by what their pictures are called: their key, or the name of their file or of their sample.

    Of several rounds the last one's task is meant.
    """

    def __init__(self, project: Project):
        self._by_name: dict[str, set[int]] = defaultdict(set)
        self._rows: dict[int, sqlite3.Row] = {}
        rows = project.store.all(
            "SELECT task.id, round, uid, place, height, width FROM task JOIN picture ON picture.id = picture "
            "WHERE kind IN ('normal', 'audit') ORDER BY round, task.id"
        )
        newest = {row["uid"]: row for row in rows}
        for row in rows:
            self._rows[row["id"]] = row
            self._by_name[key_of(row["uid"], row["round"])].add(row["id"])
        for row in newest.values():
            place = json.loads(row["place"])
            self._by_name[place.get("key") or Path(place["file"]).stem].add(row["id"])

    def find(self, name: str, counts: SkipCounts) -> sqlite3.Row | None:
        """The task of a name; None where there is none, or several, which is counted."""
        found = self._by_name.get(name, ())
        if len(found) != 1:
            counts.add("a name of no task" if not found else "a name of several tasks", name)
            return None
        return self._rows[next(iter(found))]


def _label_studio(config: AnnotateImportConfig, tasks: _Tasks, counts: SkipCounts) -> Iterator[Imported]:
    source = label_studio.read_tasks(Path(config.source))
    if config.labelling is not None:
        label_studio.check_config(Path(config.labelling), source)
    for task in source:
        name = label_studio.name_of(task)
        row = tasks.find(name, counts)
        for annotation in (task.get("annotations") or []) if row is not None else []:
            if annotation.get("was_cancelled"):
                counts.add("an annotation that was cancelled", name)
                continue
            before = counts.total
            mask = label_studio.brushed(annotation, row["height"], row["width"], config.label, counts, name)
            if not mask.any() and counts.total > before:
                continue  # not clean: what is there is of another kind
            seconds = annotation.get("lead_time")
            rater = config.rater or f"label-studio {_who(annotation.get('completed_by'))}"
            yield Imported(row["id"], rater, mask, seconds=float(seconds or 0) if _is_number(seconds) else 0.0)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e7


def _who(value) -> str:
    if isinstance(value, dict):
        value = value.get("email") or value.get("id")
    return str(value)[:60] if value is not None else "somebody"


def _coco(config: AnnotateImportConfig, tasks: _Tasks, counts: SkipCounts) -> Iterator[Imported]:
    for file, marked, crowds in coco_masks(config.source, config.label):
        # `write_coco` puts a number before the key.
        row = tasks.find(_NUMBER.sub("", PurePosixPath(file).stem), counts)
        if row is not None:
            mask, ignore = (_fitting(plane * np.uint8(255), row, file) for plane in (marked, crowds))
            yield Imported(row["id"], config.rater or config.format, mask, ignore)


def _masks(config: AnnotateImportConfig, tasks: _Tasks, counts: SkipCounts) -> Iterator[Imported]:
    folder = Path(config.source)
    if not folder.is_dir():
        raise UserError(expected(folder, "a folder of masks", "none"))
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        row = tasks.find(path.stem.removesuffix(".mask"), counts)
        if row is None:
            continue
        try:
            levels = decode(path, "L")
        except UnreadablePicture as error:
            counts.add(error.reason, path.name, detail=error.detail)
            continue
        if levels.max() == 1:
            counts.add("a mask of 0 and 1, where 255 is marked", path.name)
            continue
        mask = (levels >= 128) * np.uint8(255)
        yield Imported(row["id"], config.rater or config.format, _fitting(mask, row, path.name))


def _fitting(mask: np.ndarray, row: sqlite3.Row, name: str) -> np.ndarray:
    if mask.shape != (row["height"], row["width"]):
        raise UserError(
            expected(name, f"a mask of {row['width']} x {row['height']}", f"{mask.shape[1]} x {mask.shape[0]}")
        )
    return mask
