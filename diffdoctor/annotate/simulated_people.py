"""Tasks of a project answered by simulated raters, and conflicts decided by a simulated reviewer."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable

import numpy as np

from diffdoctor.annotate import gold
from diffdoctor.annotate.project import Project, picture_uid, read_place
from diffdoctor.annotate.queue import Queue, Submission
from diffdoctor.annotate.review import decide, next_review
from diffdoctor.annotate.simulated import Annotator
from diffdoctor.data.shards import read_shards
from diffdoctor.runs.errors import UserError, expected

# From what identifies a picture's pixels (`project.picture_uid`) to what is broken, (H, W) bool.
Truth = Callable[[str], np.ndarray | None]


class KnownMasks:
    """The masks of labelled shards by their pictures' pixels, a bit a pixel in memory.

    Args:
        folders: of shards.
    """

    def __init__(self, folders: list[str]):
        self._masks: dict[str, tuple[np.ndarray, tuple[int, int]]] = {}
        for folder in folders:
            for sample in read_shards(folder, masks="optional"):
                mask = sample["mask"] >= 0.5
                self._masks[picture_uid(sample["picture"])] = np.packbits(mask), mask.shape

    def __call__(self, uid: str) -> np.ndarray | None:
        """What is broken in the picture, (H, W) bool; None: it is not known."""
        if uid not in self._masks:
            return None
        bits, shape = self._masks[uid]
        return np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)


_TIMES = (("at", "annotation"), ("since", "lease"))


class _Clock:
    """Seconds since 1970, ahead of the true ones by what simulated work takes."""

    def __init__(self, project: Project):
        newest = [project.store.one(f"SELECT max({at}) FROM {table}")[0] for at, table in _TIMES]
        self.now = max(time.time(), *(each or 0.0 for each in newest))

    def __call__(self) -> float:
        return self.now


def answer_tasks(project: Project, truth: Truth, rater: Annotator, *, raters: int = 2, seed: int = 0) -> int:
    """Answer every open task as often as it wants, and decide what is in conflict by the truth.

    Raters take turns, through the queue that people use; one that is paused goes on at once. After a kill the same call
    goes on where it was.

    Args:
        project: the project.
        truth: of every picture that is asked about.
        rater: how they all mark.
        raters: how many there are; two differ in their draws alone.
        seed: of the raters; an answer is a function of it, the task, and how many answers it had.

    Returns:
        The number of answers that were given now.

    Raises:
        UserError: of a picture nothing is known.
    """
    clock = _Clock(project)
    queue, people = Queue(project, clock), [_person(project, f"simulated-{n + 1}", "annotator") for n in range(raters)]
    reviewer, answers, busy = _person(project, "simulated-reviewer", "reviewer"), 0, True
    while busy:
        busy = False
        for person in people:
            task = queue.take(person)
            if task.get("reason") == "paused":
                gold.resume(project, person["id"], reviewer["id"])
                task = queue.take(person)
            if task["task"] is None:
                continue
            answer = _answer(project, truth, rater, task, seed)
            clock.now += answer.wall_ms / 1000
            queue.submit(task["task"], person["id"], answer)
            answers, busy = answers + 1, True
    while (task := next_review(project, reviewer["id"])["task"]) is not None:
        mask = _truth_of(project, truth, task) * np.uint8(255)
        verdict = "damaged" if mask.any() else "clean"
        decide(project, task, reviewer["id"], "edit", verdict=verdict, mask=mask if mask.any() else None)
    return answers


def _person(project: Project, name: str, role: str) -> sqlite3.Row:
    row = project.store.one("SELECT * FROM annotator WHERE name = ?", name)
    if row is None:
        project.store.add_person(name, role)
        row = project.store.one("SELECT * FROM annotator WHERE name = ?", name)
    return row


def _answer(project: Project, truth: Truth, rater: Annotator, task: dict, seed: int) -> Submission:
    proposal = None
    row = project.store.one("SELECT proposal, done FROM task WHERE id = ?", task["task"])
    if row["proposal"] is not None and not task["blind"]:
        proposal = project.store.mask(row["proposal"]) >= task["threshold"]
    seeds = [seed, task["task"], row["done"]]
    found = rater.marks(_truth_of(project, truth, task["task"]), proposal, seed=seeds)
    counts = {name: getattr(found, name) for name in ("accepted", "refused", "drawn")}
    times = dict.fromkeys(("active_ms", "wall_ms"), int(1000 * found.seconds))
    mask = found.mask * np.uint8(255) if found.mask.any() else None
    return Submission(task["version"], found.verdict, task["fence"], mask, **counts, **times)


def _truth_of(project: Project, truth: Truth, task: int) -> np.ndarray:
    row = project.store.one("SELECT uid, place FROM picture JOIN task ON picture.id = picture WHERE task.id = ?", task)
    place = json.loads(row["place"])
    x0, y0, x1, y1 = place.pop("crop", (0, 0, None, None))
    # Of a picture that was cut into tasks, the whole one is known.
    mask = truth(row["uid"] if x1 is None else picture_uid(read_place(place)))
    if mask is None:
        where = place["file"] + (f":{place['key']}" if "key" in place else "")
        raise UserError(
            expected("truth", f"the mask of every picture of the pool, {where} too", "none of that picture")
        )
    return mask[y0:y1, x0:x1]
