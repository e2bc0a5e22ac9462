"""Adjudication: a reviewer settles what raters do not agree on."""

from __future__ import annotations

import itertools
import math
import sqlite3
import time
from typing import Any

import numpy as np

from diffdoctor.annotate.answers import conflict_of, insert_logged, marks_of, newest_answers
from diffdoctor.annotate.overlap import iou, tolerant_iou
from diffdoctor.annotate.project import Project
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.web.bodies import Refused

DECISIONS = ("accept", "edit", "reject")


def next_review(project: Project, reviewer: int) -> dict[str, Any]:
    """The next task in conflict that the reviewer has not labelled; `task` None where there is none."""
    row = project.store.one(
        "SELECT task.id AS task, height, width, prompt, category, blind, kind FROM task "
        "JOIN picture ON picture.id = picture WHERE state = 'conflict' AND NOT EXISTS "
        "(SELECT 1 FROM annotation WHERE task = task.id AND annotator = ?) ORDER BY priority DESC, task.id LIMIT 1",
        reviewer,
    )
    if row is None:
        return {"task": None}
    reason = conflict_of(project.store, newest_answers(project.store, row["task"])) or "asked"
    threshold = project.settings.threshold_byte
    return dict(row) | {"blind": bool(row["blind"]), "reason": reason, "threshold": threshold}


def answers_of(project: Project, task: int, shape: tuple[int, int]) -> dict[str, Any]:
    """The answers to a task side by side, without the raters' names, and how alike each pair of masks is."""
    store, rows = project.store, newest_answers(project.store, task)
    names = {row["annotator"]: chr(ord("A") + index % 26) for index, row in enumerate(rows)}
    answers = [
        {
            "id": row["id"],
            "rater": names[row["annotator"]],
            **{name: row[name] for name in ("verdict", "version", "active_ms")},
            "late": bool(row["late"]),
            "tags": row["tags"],
            "mask": row["mask"] is not None,
            "ignore": row["ignore"] is not None,
        }
        for row in rows
    ]
    pairs = []
    for first, second in itertools.combinations(rows, 2):
        masks = marks_of(store, first, shape), marks_of(store, second, shape)
        measures = {"iou": iou(*masks), "tolerant_iou": tolerant_iou(*masks)}
        numbers = {name: None if math.isnan(value) else value for name, value in measures.items()}
        pairs.append({"a": first["id"], "b": second["id"], **numbers})
    return {"answers": answers, "pairs": pairs}


def decide(
    project: Project,
    task: int,
    reviewer: int,
    decision: str,
    *,
    annotation: int | None = None,
    verdict: str | None = None,
    mask: np.ndarray | None = None,
    ignore: np.ndarray | None = None,
    comment: str = "",
) -> dict[str, Any]:
    """Keep a reviewer's decision on a task.

    Args:
        project: the project.
        task: its id.
        reviewer: who decides.
        decision: accept (an answer is the truth), edit (`verdict`, `mask` and `ignore` are) or reject (the task is
            asked of one more person).
        annotation: the accepted answer.
        verdict, mask, ignore: of an edit, as in `queue.Submission`.
        comment: for the record.

    Returns:
        review, state.

    Raises:
        UserError: the values do not fit the decision.
        Refused: the answer is none of this task's.
    """
    if decision not in DECISIONS:
        raise UserError(expected("decision", f"one of {', '.join(DECISIONS)}", repr(decision)))
    store = project.store
    with store.writing() as connection:
        if decision == "accept":
            row = store.one("SELECT * FROM annotation WHERE id = ? AND task = ?", annotation, task)
            if row is None:
                raise Refused(404, expected("annotation", "one of this task's", annotation))
            verdict, names = row["verdict"], (row["mask"], row["ignore"])
        elif decision == "edit":
            _check_edit(verdict, mask)
            names = tuple(None if plane is None else store.put_mask(plane) for plane in (mask, ignore))
        else:
            verdict, names = None, (None, None)
        values = {"task": task, "reviewer": reviewer, "decision": decision, "annotation": annotation}
        values |= {"verdict": verdict, "mask": names[0], "ignore": names[1], "comment": comment, "at": time.time()}
        review = insert_logged(store, "review", "review", reviewer, values)
        state = "open" if decision == "reject" else "reviewed"
        more = "needed = max(needed, done) + 1," if decision == "reject" else ""
        connection.execute(f"UPDATE task SET {more} state = ? WHERE id = ?", (state, task))
    return {"review": review["id"], "state": state}


def _check_edit(verdict: str | None, mask: np.ndarray | None) -> None:
    if verdict not in ("damaged", "clean", "unusable"):
        raise UserError(expected("verdict", "damaged, clean or unusable", repr(verdict)))
    if (mask is not None and bool(mask.any())) != (verdict == "damaged") or (mask is not None and not mask.any()):
        raise UserError(expected("mask", "marks with the verdict damaged, none with another", verdict))


def newest_review(project: Project, task: int) -> sqlite3.Row | None:
    """The newest decision on a task that says what is true; None: there is none, or the newest is a rejection."""
    row = project.store.one("SELECT * FROM review WHERE task = ? ORDER BY id DESC LIMIT 1", task)
    return None if row is None or row["decision"] == "reject" else row
