"""Tasks of known truth: how a rater does, who is paused, and what a beginner is told."""

from __future__ import annotations

import math
import sqlite3
from typing import Any

from diffdoctor.annotate.answers import marks_of
from diffdoctor.annotate.overlap import ALIKE, tolerant_iou
from diffdoctor.annotate.project import Project
from diffdoctor.annotate.schema import KNOWN_KINDS

# Gold answers below which a rater's share of hits says nothing.
FEWEST = 5


def judge(project: Project, answer: sqlite3.Row) -> None:
    """Compare a rater's answer with the truth, where that is known, and pause the rater where need be.

    A hit is the right verdict, and a tolerant IoU of at least 0.5 with the truth's mask. Inside a transaction.

    Args:
        project: the project.
        answer: the row that was just written.
    """
    store, me = project.store, answer["annotator"]
    task = store.one("SELECT kind, truth FROM task WHERE id = ?", answer["task"])
    if task["kind"] not in KNOWN_KINDS:
        return
    truth = store.mask(task["truth"]) > 0
    marks = marks_of(store, answer, truth.shape)
    overlap = tolerant_iou(marks, truth)
    hit = answer["verdict"] == "clean" if math.isnan(overlap) else overlap >= ALIKE
    values = (answer["id"], int(hit), None if math.isnan(overlap) else overlap, int(marks.any() and not truth.any()))
    store.connection.execute("INSERT INTO gold VALUES (?, ?, ?, ?)", values)
    if task["kind"] == "gold" and (reason := _pause(project, me)):
        store.connection.execute("UPDATE annotator SET paused = ? WHERE id = ? AND paused IS NULL", (reason, me))
        store.log("pause", actor=me, reason=reason)


def _recent(project: Project, me: int, after: int) -> list[sqlite3.Row]:
    """The first answers of a rater to the last gold tasks, without later corrections."""
    return project.store.all(
        "SELECT gold.* FROM gold JOIN annotation ON annotation.id = annotation JOIN task ON task.id = task "
        "WHERE annotator = ? AND kind = 'gold' AND version = 1 AND annotation.id > ? "
        "ORDER BY annotation.id DESC LIMIT ?",
        me,
        after,
        project.settings.gold_window,
    )


def _pause(project: Project, me: int) -> str | None:
    settings = project.settings
    after = project.store.one("SELECT resumed FROM annotator WHERE id = ?", me)[0]
    rows = _recent(project, me, after)
    marked, hits = sum(row["marked"] for row in rows), sum(row["hit"] for row in rows)
    if marked >= settings.gold_marked:
        return f"marked {marked} clean pictures of the last {len(rows)} that were checked"
    if len(rows) >= FEWEST and hits < settings.gold_share * len(rows):
        return f"{hits} of the last {len(rows)} pictures that were checked are right"
    return None


def score(project: Project, me: int) -> dict[str, int] | None:
    """A rater's hits among the last gold tasks; None while these are too few to say anything."""
    rows = _recent(project, me, 0)
    return {"hits": sum(row["hit"] for row in rows), "of": len(rows)} if len(rows) >= FEWEST else None


def resume(project: Project, rater: int, reviewer: int) -> None:
    """Let a paused rater work again; what was checked so far no longer counts towards a pause."""
    with project.store.writing() as connection:
        newest = project.store.one("SELECT coalesce(max(id), 0) FROM annotation WHERE annotator = ?", rater)[0]
        connection.execute("UPDATE annotator SET paused = NULL, resumed = ? WHERE id = ?", (newest, rater))
        project.store.log("resume", actor=reviewer, rater=rater)


def feedback(project: Project, answer: sqlite3.Row) -> dict[str, Any]:
    """What a beginner is told of an answer: hit, iou (tolerant, or None), and the right verdict."""
    row = project.store.one("SELECT hit, iou FROM gold WHERE annotation = ?", answer["id"])
    truth = project.store.one("SELECT truth FROM task WHERE id = ?", answer["task"])[0]
    verdict = "damaged" if project.store.mask(truth).any() else "clean"
    return {"hit": bool(row["hit"]), "iou": row["iou"], "verdict": verdict}
