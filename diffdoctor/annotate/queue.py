"""Who labels what next: leases, drafts and submissions."""

from __future__ import annotations

import dataclasses
import secrets
import sqlite3
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffdoctor.annotate import gold
from diffdoctor.annotate.answers import conflict_of, insert_logged, newest_answers
from diffdoctor.annotate.masks import digest
from diffdoctor.annotate.project import Project
from diffdoctor.annotate.schema import KNOWN_KINDS
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.web.bodies import Refused

_KNOWN = ", ".join(repr(kind) for kind in KNOWN_KINDS)


@dataclass
class Submission:
    """A rater's answer to a task.

    Attributes:
        version: 1, or one more than the answer that it corrects.
        verdict: damaged, clean or unusable.
        fence: of the lease.
        mask: (H, W) uint8 of 0 and 255; with the verdict damaged alone, where it may be left out if there are tags.
        ignore: (H, W) uint8, 255 where the rater cannot decide; or None.
        tags: words for what has no pixels.
        threshold: byte at which the map was cut; None: nothing was proposed.
        accepted: components of the proposal that were taken.
        refused: components of the proposal that were not.
        drawn: regions that were drawn.
        active_ms: time at work, as the page counted it.
        wall_ms: time since the task was opened, likewise.
        guidelines: hash of what the rater was shown.
    """

    version: int
    verdict: str
    fence: str = ""
    mask: np.ndarray | None = None
    ignore: np.ndarray | None = None
    tags: list[str] = field(default_factory=list)
    threshold: int | None = None
    accepted: int = 0
    refused: int = 0
    drawn: int = 0
    active_ms: int = 0
    wall_ms: int = 0
    guidelines: str = ""

    def __post_init__(self):
        if self.verdict not in ("damaged", "clean", "unusable"):
            raise UserError(expected("verdict", "damaged, clean or unusable", repr(self.verdict)))
        if self.mask is not None and not self.mask.any():
            self.mask = None
        found = self.mask is not None or (self.verdict == "damaged" and bool(self.tags))
        if found != (self.verdict == "damaged"):
            what = "marks or tags with the verdict damaged, no marks with another"
            raise UserError(expected("mask", what, self.verdict))


class Queue:
    """The tasks of a project as raters meet them.

    Args:
        project: the project.
        clock: seconds since 1970; for tests.
    """

    def __init__(self, project: Project, clock: Callable[[], float] = time.time):
        self.project, self.store, self.clock = project, project.store, clock

    def take(self, person: sqlite3.Row) -> dict[str, Any]:
        """The task that a rater works on, or the next one, leased to the rater.

        Args:
            person: the rater's row.

        Returns:
            What the page is told; `task` None where there is none, with the `reason`: empty, paused, or elsewhere
            (others hold what is left).
        """
        with self.store.writing() as connection:
            now, me = self.clock(), person["id"]
            if self.store.one("SELECT paused FROM annotator WHERE id = ?", me)[0] is not None:
                return {"task": None, "reason": "paused"}
            task = self._leased(me, now) or self._training(me) or self._open(me, now, drafts=True)
            task = task or self._open(me, now)
            if task is None:
                left = self.open_to(me)
                return {"task": None, "reason": "elsewhere" if left else "empty"}
            until = now + self.project.settings.lease_seconds
            known = self.store.one("SELECT until FROM lease WHERE task = ? AND annotator = ?", task, me)
            connection.execute(
                "INSERT INTO lease VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO UPDATE SET until = ?5",
                (task, me, secrets.token_hex(16), now, until),
            )
            if known is None:
                self.store.log("lease", actor=me, task=task)
            return self._described(task, me, now)

    def _leased(self, me: int, now: float) -> int | None:
        row = self.store.one(
            "SELECT task FROM lease WHERE annotator = ? AND until > ? ORDER BY until DESC LIMIT 1", me, now
        )
        return row and row[0]

    def _training(self, me: int) -> int | None:
        """A training task, until the rater has had enough of them."""
        done, most = self.training_done(me), self.project.settings.training
        if done >= most:
            return None
        row = self.store.one(
            "SELECT id FROM task WHERE kind = 'training' AND NOT EXISTS "
            "(SELECT 1 FROM annotation WHERE task = task.id AND annotator = ?) ORDER BY priority DESC, id LIMIT 1",
            me,
        )
        return row and row[0]

    def training_done(self, me: int) -> int:
        """Training tasks that a rater has answered."""
        return self.store.one(
            "SELECT count(DISTINCT task) FROM annotation JOIN task ON task.id = task WHERE annotator = ? "
            "AND kind = 'training'",
            me,
        )[0]

    def _open(self, me: int, now: float, drafts: bool = False) -> int | None:
        """The open task of the highest priority that wants one more rater; with `drafts`, one that was begun."""
        begun = "AND EXISTS (SELECT 1 FROM draft WHERE task = task.id AND annotator = ?1)" if drafts else ""
        row = self.store.one(
            "SELECT id FROM task WHERE state = 'open' AND kind != 'training' "
            "AND NOT EXISTS (SELECT 1 FROM annotation WHERE task = task.id AND annotator = ?1) "
            f"AND (kind IN ({_KNOWN}) OR done + (SELECT count(*) FROM lease WHERE task = task.id "
            f"AND annotator != ?1 AND until > ?2) < needed) {begun} ORDER BY priority DESC, id LIMIT 1",
            me,
            now,
        )
        return row and row[0]

    def open_to(self, me: int) -> int:
        """Open tasks that a rater has not answered, whoever holds them."""
        return self.store.one(
            "SELECT count(*) FROM task WHERE state = 'open' AND kind != 'training' AND NOT EXISTS "
            "(SELECT 1 FROM annotation WHERE task = task.id AND annotator = ?)",
            me,
        )[0]

    def _described(self, task: int, me: int, now: float) -> dict[str, Any]:
        row = self.store.one(
            "SELECT task.id AS task, fence, until, height, width, blind, kind, prompt, category FROM task "
            "JOIN picture ON picture.id = picture JOIN lease ON lease.task = task.id AND annotator = ? "
            "WHERE task.id = ?",
            me,
            task,
        )
        draft = self.store.one("SELECT version FROM draft WHERE task = ? AND annotator = ?", task, me)
        result = dict(row) | {"now": now, "blind": bool(row["blind"]), "training": row["kind"] == "training"}
        # The kind would give gold tasks away.
        del result["kind"]
        return result | {
            "threshold": self.project.settings.threshold_byte,
            "version": self.newest_version(task, me) + 1,
            "has_draft": draft is not None,
            "draft_version": draft["version"] if draft else 0,
        }

    def newest_version(self, task: int, me: int) -> int:
        """The version of a rater's newest answer to a task; 0: there is none."""
        return self.store.one(
            "SELECT coalesce(max(version), 0) FROM annotation WHERE task = ? AND annotator = ?", task, me
        )[0]

    def knows(self, task: int, me: int) -> bool:
        """Whether a task was ever leased to a rater, or answered."""
        lease = self.store.one("SELECT 1 FROM lease WHERE task = ? AND annotator = ?", task, me)
        return lease is not None or self.newest_version(task, me) > 0

    def save_draft(self, task: int, me: int, version: int, fence: str, envelope: bytes) -> dict[str, Any]:
        """Keep what a rater has drawn so far, and renew the lease unless others have the task now.

        Args:
            task: of the draft.
            me: the rater.
            version: of the newest draft that the page knows; 0: none.
            fence: of the lease.
            envelope: the draft as it came, not compressed.

        Returns:
            version, lease (whether it is held), until, now.

        Raises:
            Refused: the task was never leased, or there is a newer draft.
        """
        with self.store.writing() as connection:
            now, lease = self.clock(), self._lease(task, me, fence)
            row = self.store.one("SELECT version FROM draft WHERE task = ? AND annotator = ?", task, me)
            current = row["version"] if row else 0
            if version != current:
                message = expected("If-Match", f"the newest draft's version, {current}", version)
                raise Refused(409, message, version=current)
            held = lease["until"] > now or self._has_room(task, me, now)
            until = now + self.project.settings.lease_seconds if held else lease["until"]
            connection.execute("UPDATE lease SET until = ? WHERE task = ? AND annotator = ?", (until, task, me))
            connection.execute(
                "INSERT INTO draft VALUES (?1, ?2, ?3, ?4, ?5) "
                "ON CONFLICT DO UPDATE SET version = ?3, envelope = ?4, at = ?5",
                (task, me, current + 1, zlib.compress(envelope, 1), now),
            )
            return {"version": current + 1, "lease": held, "until": until, "now": now}

    def draft(self, task: int, me: int) -> tuple[int, bytes] | None:
        """Version and envelope of a rater's draft."""
        row = self.store.one("SELECT version, envelope FROM draft WHERE task = ? AND annotator = ?", task, me)
        return row and (row["version"], zlib.decompress(row["envelope"]))

    def _lease(self, task: int, me: int, fence: str) -> sqlite3.Row:
        row = self.store.one("SELECT * FROM lease WHERE task = ? AND annotator = ?", task, me)
        if row is None or not secrets.compare_digest(row["fence"].encode(), fence.encode("utf-8", "replace")):
            raise Refused(403, expected("fence", "that of this task's lease", "another, or no lease"))
        return row

    def _has_room(self, task: int, me: int, now: float) -> bool:
        """Whether a task wants one more rater beside those who answered it or work on it."""
        row = self.store.one(
            f"SELECT kind IN ({_KNOWN}) OR (state = 'open' AND done + (SELECT count(*) FROM lease "
            "WHERE task = ?1 AND annotator != ?2 AND until > ?3) < needed) FROM task WHERE id = ?1",
            task,
            me,
            now,
        )
        return bool(row[0])

    def submit(self, task: int, me: int, answer: Submission) -> dict[str, Any]:
        """Keep a rater's answer; the same one sent again changes nothing.

        An answer that comes after its lease has gone is kept as late, and counts.

        Returns:
            annotation, version, late, repeated, and of a training task `training`: hit, iou, verdict.

        Raises:
            Refused: the task was never leased, or this version holds another answer.
        """
        with self.store.writing() as connection:
            now = self.clock()
            row = self.store.one(
                "SELECT * FROM annotation WHERE task = ? AND annotator = ? AND version = ?", task, me, answer.version
            )
            if row is not None:
                if not self._is_same(row, answer):
                    newest = self.newest_version(task, me)
                    raise Refused(409, f"version {answer.version} holds another answer", version=newest)
                return self._answered(row, task, repeated=True)
            before = self.newest_version(task, me)
            if answer.version != before + 1:
                raise Refused(409, expected("version", before + 1, answer.version), version=before)
            lease = None if before else self._lease(task, me, answer.fence)
            # A later correction needs no lease.
            late = lease is not None and lease["until"] <= now and not self._has_room(task, me, now)
            wall = answer.wall_ms if lease is None else min(answer.wall_ms, int(1000 * (now - lease["since"])) + 1)
            row = self._insert(connection, task, me, answer, now, wall, late)
            connection.execute("DELETE FROM lease WHERE task = ? AND annotator = ?", (task, me))
            connection.execute("DELETE FROM draft WHERE task = ? AND annotator = ?", (task, me))
            self.settle(task)
            gold.judge(self.project, row)
            return self._answered(row, task, repeated=False)

    def take_answer(self, task: int, me: int, answer: Submission) -> bool:
        """Keep an answer that was given elsewhere, without a lease.

        Returns:
            Whether it was kept: one that is the same as the rater's newest is not.
        """
        with self.store.writing() as connection:
            row = self.store.one(
                "SELECT * FROM annotation WHERE task = ? AND annotator = ? ORDER BY version DESC LIMIT 1", task, me
            )
            if row is not None and self._is_same(row, answer):
                return False
            version = 1 if row is None else row["version"] + 1
            answer = dataclasses.replace(answer, version=version)
            row = self._insert(connection, task, me, answer, self.clock(), answer.wall_ms, False)
            self.settle(task)
            gold.judge(self.project, row)
            return True

    def _insert(self, connection, task, me, answer: Submission, now, wall, late) -> sqlite3.Row:
        values = {
            "task": task,
            "annotator": me,
            "version": answer.version,
            "verdict": answer.verdict,
            "mask": None if answer.mask is None else self.store.put_mask(answer.mask),
            "ignore": None if answer.ignore is None else self.store.put_mask(answer.ignore),
            "tags": strict_json.dumps(answer.tags),
            "threshold": answer.threshold,
            "accepted": answer.accepted,
            "refused": answer.refused,
            "drawn": answer.drawn,
            "active_ms": min(answer.active_ms, wall),
            "wall_ms": wall,
            "guidelines": answer.guidelines,
            "late": int(late),
            "at": now,
        }
        return insert_logged(self.store, "annotation", "annotate", me, values)

    def _is_same(self, row: sqlite3.Row, answer: Submission) -> bool:
        names = [None if plane is None else digest(plane, 1) for plane in (answer.mask, answer.ignore)]
        return [row["verdict"], row["mask"], row["ignore"]] == [answer.verdict, *names]

    def _answered(self, row: sqlite3.Row, task: int, *, repeated: bool) -> dict[str, Any]:
        kind = self.store.one("SELECT kind FROM task WHERE id = ?", task)[0]
        return {
            "annotation": row["id"],
            "version": row["version"],
            "late": bool(row["late"]),
            "repeated": repeated,
            "training": gold.feedback(self.project, row) if kind == "training" else None,
        }

    def release(self, task: int, me: int, fence: str, reason: str) -> None:
        """Give a task back, for another rater; this one is not asked again.

        Raises:
            Refused: the task is not leased to this rater.
        """
        with self.store.writing() as connection:
            now, lease = self.clock(), self._lease(task, me, fence)
            wall = int(1000 * (now - lease["since"]))
            values = dict.fromkeys(("mask", "ignore", "threshold")) | dict.fromkeys(
                ("accepted", "refused", "drawn", "active_ms", "late"), 0
            )
            values |= {"task": task, "annotator": me, "version": self.newest_version(task, me) + 1, "at": now}
            values |= {"verdict": "skipped", "tags": strict_json.dumps([reason]), "wall_ms": wall, "guidelines": ""}
            insert_logged(self.store, "annotation", "annotate", me, values)
            connection.execute("DELETE FROM lease WHERE task = ? AND annotator = ?", (task, me))
            connection.execute("DELETE FROM draft WHERE task = ? AND annotator = ?", (task, me))

    def settle(self, task: int) -> None:
        """Bring a task's count and state in line with its answers. Inside a transaction."""
        row = self.store.one("SELECT kind, needed, state FROM task WHERE id = ?", task)
        answers = newest_answers(self.store, task)
        state = row["state"]
        if row["kind"] not in KNOWN_KINDS and state != "reviewed":
            state = "open"
            if len(answers) >= row["needed"]:
                state = "conflict" if conflict_of(self.store, answers) else _final(answers)
        self.store.connection.execute("UPDATE task SET done = ?, state = ? WHERE id = ?", (len(answers), state, task))


def _final(answers: list[sqlite3.Row]) -> str:
    return "unusable" if all(row["verdict"] == "unusable" for row in answers) else "done"
