"""What people say of a task, as one label."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffdoctor.annotate.answers import newest_answers
from diffdoctor.annotate.project import Project
from diffdoctor.annotate.review import newest_review


@dataclass(frozen=True)
class Label:
    """A picture's label.

    Attributes:
        key: r01- and 16 digits of the picture's identity; the round is the task's.
        task: its id.
        picture: its id.
        mask: (H, W) float32 in [0, 1], soft where raters differ.
        ignore: (H, W) bool, where nobody decided; None: nowhere.
        values: category, generator, prompt, round, task_kind (`kind` is that of damage), raters, seconds, merge,
            tags.
    """

    key: str
    task: int
    picture: int
    mask: np.ndarray
    ignore: np.ndarray | None
    values: dict[str, Any]


def key_of(uid: str, round: int) -> str:
    """A picture's name in exports."""
    return f"r{round:02d}-{uid[:16]}"


def labels_of(
    project: Project,
    *,
    merge: str = "mean",
    round: int | None = None,
    kinds: tuple[str, ...] = ("normal", "audit"),
    conflicts: bool = False,
) -> Iterator[Label | str]:
    """The labels of a project, task by task; a text says why a task that was labelled has none.

    Args:
        project: the project.
        merge: mean: the mean over the raters who decided on a pixel; majority: more than half of them; reviewed: only
            what one rater answered, or a reviewer decided. A reviewer's decision is the label in any case.
        round: only this round's; None: all.
        kinds: of tasks.
        conflicts: with tasks in conflict.
    """
    states = ("done", "reviewed", "unusable", *(("conflict",) if conflicts else ()))
    marks = ", ".join("?" * len(states))
    rows = project.store.all(
        "SELECT task.id, task.picture, round, kind, state, uid, height, width, category, generator, prompt FROM task "
        f"JOIN picture ON picture.id = picture WHERE state IN ({marks}) AND kind IN ({', '.join('?' * len(kinds))}) "
        "AND (? IS NULL OR round = ?) ORDER BY round, task.id",
        *states,
        *kinds,
        round,
        round,
    )
    for row in rows:
        yield _label(project, row, merge)


def _label(project: Project, row, merge: str) -> Label | str:
    store, shape = project.store, (row["height"], row["width"])
    answers = newest_answers(store, row["id"])
    review = newest_review(project, row["id"])
    usable = [each for each in answers if each["verdict"] != "unusable"]
    sources, how = ([review], "reviewed") if review is not None else (usable, merge)
    if (review is not None and review["verdict"] == "unusable") or not sources:
        return "a picture that cannot be judged"
    # one who finds damage and does not say where has not said that the rest is sound
    placed = [each for each in sources if each["verdict"] != "damaged" or each["mask"] is not None]
    if len(placed) < len(sources) and all(each["mask"] is None for each in placed):
        return "a damaged picture of which nothing is marked"
    if len(sources) > 1 and merge == "reviewed":
        return "a picture of several answers that nobody reviewed"
    sources = placed
    how = "single" if review is None and len(sources) == 1 else how
    masks = [_plane(store, each["mask"], shape) for each in sources]
    decided = [~_plane(store, each["ignore"], shape) for each in sources]
    count = np.sum(decided, axis=0)
    marked = np.sum([mask & given for mask, given in zip(masks, decided, strict=True)], axis=0)
    share = np.divide(marked, count, out=np.zeros(shape), where=count > 0).astype(np.float32)
    mask = (share > 0.5).astype(np.float32) if how == "majority" else share
    tags = sorted({tag for each in answers for tag in json.loads(each["tags"])})
    values = {name: row[name] for name in ("category", "generator", "prompt", "round")} | {"task_kind": row["kind"]}
    values |= {"raters": len(answers), "seconds": sum(each["active_ms"] for each in answers) / 1000}
    values |= {"merge": how, "tags": tags}
    ignore = count == 0
    key = key_of(row["uid"], row["round"])
    return Label(key, row["id"], row["picture"], mask, ignore if ignore.any() else None, values)


def _plane(store, name: str | None, shape: tuple[int, int]) -> np.ndarray:
    return np.zeros(shape, bool) if name is None else store.mask(name) > 0
