"""How far a project is."""

from __future__ import annotations

from typing import Any

from diffdoctor.annotate import gold
from diffdoctor.annotate.project import Project


def status_of(project: Project) -> dict[str, Any]:
    """Tasks by round, kind and state; raters; drafts and leases; whether the record is whole.

    Args:
        project: the project.

    Returns:
        JSON values.
    """
    store = project.store
    tasks = store.all(
        "SELECT round, kind, state, count(*) AS tasks FROM task GROUP BY round, kind, state ORDER BY 1, 2, 3"
    )
    labels = store.one(
        "SELECT count(*) AS labels, coalesce(sum(needed), 0) AS wanted, coalesce(sum(min(done, needed)), 0) AS done "
        "FROM task WHERE kind IN ('normal', 'audit')"
    )
    raters = store.all(
        "SELECT annotator.id, name, role, paused, disabled, count(DISTINCT task) AS labelled, "
        "coalesce(sum(active_ms), 0) / 1000.0 AS active_seconds, coalesce(sum(late), 0) AS late FROM annotator "
        "LEFT JOIN annotation ON annotator = annotator.id AND verdict != 'skipped' GROUP BY annotator.id ORDER BY 1"
    )
    verdicts = store.all("SELECT verdict, count(*) AS answers FROM annotation GROUP BY verdict ORDER BY 1")
    return {
        "tasks": [dict(row) for row in tasks],
        "labels": {"wanted": labels["wanted"], "done": labels["done"]},
        "raters": [{**dict(row), "gold": gold.score(project, row["id"])} for row in raters],
        "verdicts": {row["verdict"]: row["answers"] for row in verdicts},
        "drafts": store.one("SELECT count(*) FROM draft")[0],
        "faults": store.verify(),
    }
