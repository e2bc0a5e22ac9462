"""Putting pictures and tasks into a project."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffdoctor.annotate.store import Store
from diffdoctor.data.identity import picture_hash, picture_uid
from diffdoctor.runs import strict_json


@dataclass
class NewTask:
    """A task to add.

    Attributes:
        picture: (H, W, 3) uint8, as `project.read_place` reads it.
        place: where it lies, see `project.read_place`.
        kind: normal, audit, gold or training.
        priority: the highest is asked first.
        reason: why it is asked, for the record.
        proposal: (H, W) uint8, the detector's map; None: nothing is proposed.
        truth: (H, W) uint8 of 0 and 255; of gold and training tasks.
        blind: the proposal is not shown.
        needed: raters.
        weights: digest of the detector.
        meta: category, generator, prompt.
    """

    picture: np.ndarray
    place: dict[str, Any]
    kind: str = "normal"
    priority: float = 0.0
    reason: str = ""
    proposal: np.ndarray | None = None
    truth: np.ndarray | None = None
    blind: bool = False
    needed: int = 1
    weights: str = ""
    meta: dict[str, str] = field(default_factory=dict)


def add_task(store: Store, task: NewTask, round: int) -> int | None:
    """Add a task, and its picture unless that is known by its pixels. Inside `store.writing`.

    Args:
        store: the project's.
        task: what to ask.
        round: of labelling.

    Returns:
        The task's id; None: this round has one of this picture.
    """
    uid = picture_uid(task.picture)
    row = store.one("SELECT id FROM picture WHERE uid = ?", uid)
    if row is None:
        texts = [str(task.meta.get(name) or "") for name in ("category", "generator", "prompt")]
        values = (uid, strict_json.dumps(task.place), *task.picture.shape[:2], *texts, picture_hash(task.picture))
        picture = store.connection.execute(
            "INSERT INTO picture(uid, place, height, width, category, generator, prompt, phash) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            values,
        ).lastrowid
    else:
        picture = row["id"]
        if store.one("SELECT 1 FROM task WHERE picture = ? AND round = ?", picture, round):
            return None
    values = {
        "picture": picture,
        "round": round,
        "proposal": None if task.proposal is None else store.put_mask(task.proposal, 8),
        "truth": None if task.truth is None else store.put_mask(task.truth),
        "weights": task.weights,
        "kind": task.kind,
        "blind": int(task.blind),
        "needed": task.needed,
        "priority": task.priority,
        "reason": task.reason,
        "state": "open",
    }
    names = ", ".join(values)
    marks = ", ".join("?" * len(values))
    return store.connection.execute(f"INSERT INTO task({names}) VALUES ({marks})", tuple(values.values())).lastrowid
