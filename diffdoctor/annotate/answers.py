"""The answers of raters: written with their event, and compared."""

from __future__ import annotations

import itertools
import sqlite3
from typing import Any

import numpy as np

from diffdoctor.annotate.overlap import ALIKE, tolerant_iou
from diffdoctor.annotate.store import Store, row_digest


def newest_answers(store: Store, task: int) -> list[sqlite3.Row]:
    """The newest answer of each rater of a task, without those that were skipped, in the order of raters."""
    return store.all(
        "SELECT * FROM annotation AS a WHERE task = ? AND verdict != 'skipped' AND version = "
        "(SELECT max(version) FROM annotation WHERE task = a.task AND annotator = a.annotator) ORDER BY annotator",
        task,
    )


def insert_logged(store: Store, table: str, kind: str, actor: int, values: dict[str, Any]) -> sqlite3.Row:
    """Add a row of a label, and its event with the row's digest. Inside a transaction.

    Args:
        store: the project's.
        table: annotation or review.
        kind: of the event.
        actor: who did it.
        values: of the row; `id` is given by the database.

    Returns:
        The row.
    """
    names = ", ".join(f'"{name}"' for name in values)
    marks = ", ".join("?" * len(values))
    cursor = store.connection.execute(f"INSERT INTO {table}({names}) VALUES ({marks})", tuple(values.values()))
    row = store.one(f"SELECT * FROM {table} WHERE id = ?", cursor.lastrowid)
    store.log(kind, actor=actor, task=values["task"], id=row["id"], digest=row_digest(row))
    return row


def marks_of(store: Store, row: sqlite3.Row, shape: tuple[int, int] | None = None) -> np.ndarray:
    """An answer's mask (H, W) bool; none is marked where it has no mask, for which `shape` must be given."""
    return np.zeros(shape, bool) if row["mask"] is None else store.mask(row["mask"]) > 0


def conflict_of(store: Store, answers: list[sqlite3.Row]) -> str | None:
    """Why the answers to a task need a reviewer: verdicts differ, or masks differ; None: they agree."""
    if len({row["verdict"] for row in answers}) > 1:
        return "verdicts differ"
    marked = [marks_of(store, row) for row in answers if row["mask"] is not None]
    if any(tolerant_iou(*pair) < ALIKE for pair in itertools.combinations(marked, 2)):
        return "masks differ"
    return None
