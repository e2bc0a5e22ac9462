"""A simulated rater like the people of a project: its parameters from their answers."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from diffdoctor.annotate.answers import marks_of, newest_answers
from diffdoctor.annotate.overlap import iou
from diffdoctor.annotate.project import Project
from diffdoctor.annotate.simulated import USUAL_AREA, Annotator, parts_of, signed_distance
from diffdoctor.runs.errors import UserError, expected

# Components below which a slope over their area says nothing.
_FEWEST = 50


@dataclass
class _Seen:
    """What answers show of raters.

    Attributes:
        found: of each true component, whether it was marked.
        areas: of each, as a share of the picture.
        invented: marks of each answer to which no true component corresponds.
        offsets: squared distances in pixels of drawn outlines from the true ones.
        as_proposed: of each component of the proposal that is true and marked, whether the mark is the very component.
        times: (seconds, proposed, drawn) of each answer.
    """

    found: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    invented: list[int] = field(default_factory=list)
    offsets: list[float] = field(default_factory=list)
    as_proposed: list[bool] = field(default_factory=list)
    times: list[tuple[float, int, int]] = field(default_factory=list)


def fit(project: Project) -> Annotator:
    """The simulated rater whose answers are most like those of a project's raters.

    Truth is what a task of known truth has, or a reviewer decided; where two raters answered, each outline is compared
    with the other's too, of which both lie off. Times come from all answers, by least squares without negative ones.

    Args:
        project: the project.

    Raises:
        UserError: no task of known truth, or of a reviewer's decision, was answered.
    """
    seen, pairs = _Seen(), []
    for task, truth in _known(project):
        for answer in newest_answers(project.store, task["id"]):
            if answer["verdict"] != "unusable":
                _compare(seen, project, task, truth, answer)
    pairs = list(_between_raters(project))
    for answer in project.store.all("SELECT * FROM annotation WHERE verdict IN ('damaged', 'clean') AND active_ms > 0"):
        seen.times.append((answer["active_ms"] / 1000, answer["accepted"] + answer["refused"], answer["drawn"]))
    if not seen.invented:
        raise UserError(expected("project", "answers to tasks of known truth, or reviewed ones", "none"))
    offsets = seen.offsets + [square / 2 for square in pairs]
    missed, slope = _missing(np.array(seen.found, bool), np.array(seen.areas))
    looking, proposed, drawn = _times(seen.times)
    return Annotator(
        # An outline between pixels is off by up to half of one in any case, by 1 / 12 in the mean square.
        jitter_px=math.sqrt(max(float(np.mean(offsets)) - 1 / 12, 0)) if offsets else 0.0,
        missed=missed,
        missed_per_log_area=slope,
        false_rate=float(np.mean(seen.invented)),
        anchor=float(np.mean(seen.as_proposed)) if seen.as_proposed else 0.0,
        seconds_per_picture=looking,
        seconds_per_proposed=proposed,
        seconds_per_drawn=drawn,
    )


def _known(project: Project) -> Iterator[tuple[sqlite3.Row, np.ndarray]]:
    """Tasks with their true masks (H, W) bool."""
    rows = project.store.all(
        "SELECT task.*, height, width, (SELECT mask FROM review WHERE task = task.id AND decision != 'reject' "
        "ORDER BY id DESC LIMIT 1) AS reviewed FROM task JOIN picture ON picture.id = picture "
        "WHERE truth IS NOT NULL OR state = 'reviewed' ORDER BY task.id"
    )
    for row in rows:
        name = row["truth"] or row["reviewed"]
        yield row, np.zeros((row["height"], row["width"]), bool) if name is None else project.store.mask(name) > 0


def _compare(seen: _Seen, project: Project, task: sqlite3.Row, truth: np.ndarray, answer: sqlite3.Row) -> None:
    marks = marks_of(project.store, answer, truth.shape)
    proposal = np.zeros_like(truth)
    if task["proposal"] is not None and not task["blind"]:
        proposal = project.store.mask(task["proposal"]) >= project.settings.threshold_byte
    proposed = parts_of(proposal)
    true, drawn = parts_of(truth), parts_of(marks)
    distance = signed_distance(truth)
    for part in true:
        is_found = bool((part & marks).sum() * 2 >= part.sum())
        seen.found.append(is_found)
        seen.areas.append(float(part.mean()))
    invented = 0
    for part in drawn:
        taken = any(np.array_equal(part, other) for other in proposed)
        if not (part & truth).any():
            # A false proposal that was left is the anchor's doing.
            invented += not taken
        elif not taken:
            # what meets more than one true component, or the border, has outlines of its own
            own = _rim(part)
            seen.offsets += np.square(distance[own]).tolist() if own.any() and _is_alike(part, true) else []
    seen.invented.append(invented)
    for part in proposed:
        best = max((iou(part, other) for other in drawn), default=0.0)
        if best >= 0.5 and any(iou(part, other) >= 0.5 for other in true):
            seen.as_proposed.append(best == 1)


def _is_alike(part: np.ndarray, others: list[np.ndarray]) -> bool:
    return any(iou(part, other) >= 0.5 for other in others)


def _rim(part: np.ndarray) -> np.ndarray:
    """The pixels of a component that touch another one of the picture's outside it."""
    from scipy.ndimage import binary_erosion

    return part & ~binary_erosion(part, border_value=1)


def _between_raters(project: Project) -> Iterator[float]:
    """Squared distances in pixels of one rater's outlines from another's, of tasks whose truth is not known."""
    rows = project.store.all(
        "SELECT task.*, height, width FROM task JOIN picture ON picture.id = picture WHERE truth IS NULL "
        "AND state = 'done' AND done >= 2 AND (blind OR proposal IS NULL) ORDER BY task.id"
    )
    for row in rows:
        answers = [each for each in newest_answers(project.store, row["id"]) if each["mask"] is not None][:2]
        if len(answers) == 2:
            first, second = (marks_of(project.store, each) for each in answers)
            distance, others = signed_distance(second), parts_of(second)
            for part in parts_of(first):
                if _is_alike(part, others):
                    yield from np.square(distance[_rim(part)]).tolist()


def _missing(found: np.ndarray, areas: np.ndarray) -> tuple[float, float]:
    """Probability of overlooking a component of the usual area, and by how much its logit falls with the log of it."""
    if not len(found):
        return 0.0, 0.0
    share = 1 - float(found.mean())
    logs = np.log(areas / USUAL_AREA)
    if len(found) < _FEWEST or not 0 < share < 1 or logs.std() < 1e-6:
        return share, 0.0
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6).fit(logs[:, None], ~found)
    slope = -float(model.coef_[0, 0])
    if slope < 0:  # larger ones are not overlooked more often
        return share, 0.0
    return float(1 / (1 + math.exp(-float(model.intercept_[0])))), slope


def _times(times: list[tuple[float, int, int]]) -> tuple[float, float, float]:
    """Seconds a picture, a proposed component and a drawn region."""
    from scipy.optimize import nnls

    if not times:
        return Annotator.seconds_per_picture, Annotator.seconds_per_proposed, Annotator.seconds_per_drawn
    seconds, proposed, drawn = np.array(times, np.float64).T
    solution, _ = nnls(np.stack([np.ones_like(seconds), proposed, drawn], axis=1), seconds)
    return float(solution[0]), float(solution[1]), float(solution[2])
