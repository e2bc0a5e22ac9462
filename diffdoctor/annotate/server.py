"""The server of the annotation page, as an ASGI application."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from diffdoctor.annotate import gold, review
from diffdoctor.annotate.project import Project
from diffdoctor.annotate.queue import Queue, Submission
from diffdoctor.annotate.requests import Ask, envelope_limit, raw
from diffdoctor.annotate.status import status_of
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.web.bodies import Refused, count_of, text_of
from diffdoctor.web.guard import ASGI
from diffdoctor.web.page import guarded_page
from diffdoctor.web.requests import endpoint, png

Assist = Callable[[np.ndarray, int, int], np.ndarray]


def build_app(project: Project, hosts: Iterable[str], *, scheme: str = "http", assist: Assist | None = None) -> ASGI:
    """The application: the page, and what it asks, behind the guard.

    Args:
        project: the project.
        hosts: values of the Host header that are served, with their port.
        scheme: http or https.
        assist: from a picture (H, W, 3) uint8 and a point (x, y) to a mask (H, W) bool, an array or a tensor; it is
            called for one point at a time. None: not offered.
    """
    routes = Endpoints(project, assist).routes()
    person_of = project.store.person_of
    return guarded_page("diffdoctor.annotate", routes, person_of, hosts, scheme=scheme, name="annotate serve")


class Endpoints:
    """What the page asks for.

    Args:
        project: the project.
        assist: see `build_app`.
    """

    def __init__(self, project: Project, assist: Assist | None = None):
        self.project, self.store, self.queue, self.assist = project, project.store, Queue(project), assist
        # One click at a time: programs that run a network keep the picture they are at, and share a GPU.
        self._assist_lock = threading.Lock()
        # Whoever opens a task asks for its picture more than once.
        self._png = functools.lru_cache(maxsize=16)(lambda picture: png(project.picture(picture)))

    def routes(self) -> list[Route]:
        """The routes under /api/."""
        limit = envelope_limit(lambda task: self._shape(self._task(task)))
        table: list[tuple[str, str, Callable[[Ask], Response], Any]] = [
            ("GET", "me", self.me, None),
            ("GET", "guidelines", self.guidelines, None),
            ("POST", "next", self.next, None),
            ("GET", "tasks/{task:int}/picture", self.picture, None),
            ("GET", "tasks/{task:int}/proposal", self.proposal, None),
            ("GET", "tasks/{task:int}/components", self.components, None),
            ("GET", "tasks/{task:int}/draft", self.draft, None),
            ("PUT", "tasks/{task:int}/draft", self.save_draft, limit),
            ("GET", "tasks/{task:int}/mine", self.mine, None),
            ("GET", "tasks/{task:int}/truth", self.truth, None),
            ("PUT", "tasks/{task:int}/annotation", self.submit, limit),
            ("POST", "tasks/{task:int}/release", self.release, None),
            ("POST", "tasks/{task:int}/assist", self.assisted, None),
            ("GET", "review/next", self.next_review, None),
            ("GET", "tasks/{task:int}/annotations", self.annotations, None),
            ("GET", "tasks/{task:int}/annotations/{answer:int}/{plane}", self.plane, None),
            ("PUT", "tasks/{task:int}/review", self.decide, limit),
            ("GET", "raters", self.raters, None),
            ("POST", "raters/{rater:int}/resume", self.resume, None),
            ("GET", "agreement", self.agreement, None),
            ("GET", "status", self.status, None),
            ("GET", "events", self.events, None),
        ]
        return [Route(f"/api/{path}", endpoint(ask, most, Ask), methods=[verb]) for verb, path, ask, most in table]

    def _task(self, task: int):
        if not task < 2**63 or (row := self.store.one(_TASK, task)) is None:
            raise Refused(404, expected("task", "the number of one", str(task)[:20]))
        return row

    @staticmethod
    def _shape(row) -> tuple[int, int]:
        return row["height"], row["width"]

    def _seen(self, ask: Ask):
        """The task in the path, for a rater who has it or a reviewer."""
        row = self._task(ask.params["task"])
        if ask.person["role"] == "annotator" and not self.queue.knows(row["id"], ask.me):
            raise Refused(403, "this task is not yours")
        return row

    def me(self, ask: Ask) -> Response:
        """Who asks, and how far the work is."""
        count = "SELECT count(DISTINCT task) FROM annotation WHERE annotator = ? AND verdict"
        reviews = ask.person["role"] != "annotator"
        conflicts = self.store.one("SELECT count(*) FROM task WHERE state = 'conflict'")[0] if reviews else 0
        lessons = self.store.one("SELECT count(*) FROM task WHERE kind = 'training'")[0]
        training = min(self.project.settings.training, lessons)
        counts = {
            "labelled": self.store.one(f"{count} != 'skipped'", ask.me)[0],
            "skipped": self.store.one(f"{count} = 'skipped'", ask.me)[0],
            "open": self.queue.open_to(ask.me),
            "conflicts": conflicts,
        }
        return JSONResponse(
            {
                "name": ask.person["name"],
                "role": ask.person["role"],
                "counts": counts,
                "training_left": max(0, training - self.queue.training_done(ask.me)),
                "gold": gold.score(self.project, ask.me),
                "paused": ask.person["paused"] is not None,
                "paused_reason": ask.person["paused"],
                "project": self.project.folder.resolve().name,
                "assist": self.assist is not None,
            }
        )

    def guidelines(self, ask: Ask) -> Response:
        """What raters are told."""
        text, name = self.project.guidelines()
        return JSONResponse({"text": text, "hash": name})

    def next(self, ask: Ask) -> Response:
        """The task that one works on, or the next."""
        return JSONResponse(self.queue.take(ask.person))

    def picture(self, ask: Ask) -> Response:
        """The picture as PNG."""
        picture = self._seen(ask)["picture"]
        return Response(self._png(picture), media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    def proposal(self, ask: Ask) -> Response:
        """The detector's map, unless the task is blind."""
        row = self._seen(ask)
        if row["proposal"] is None or self._is_hidden(row, ask):
            return Response(status_code=204)
        return raw(self.store.mask(row["proposal"]))

    @staticmethod
    def _is_hidden(row, ask: Ask) -> bool:
        return bool(row["blind"]) and ask.person["role"] == "annotator"

    def components(self, ask: Ask) -> Response:
        """Boxes of the map's components at a threshold."""
        row = self._seen(ask)
        default = str(self.project.settings.threshold_byte)
        text = ask.query.get("threshold", default)
        if not (text.isascii() and text.isdecimal() and 1 <= int(text[:4]) <= 255):
            raise UserError(expected("threshold", "a number in 1..255", repr(text[:20])))
        found = []
        if row["proposal"] is not None and not self._is_hidden(row, ask):
            found = _boxes(self.store.mask(row["proposal"]), int(text))
        return JSONResponse({"threshold": int(text), "components": found})

    def draft(self, ask: Ask) -> Response:
        """What one has drawn so far."""
        row = self._seen(ask)
        found = self.queue.draft(row["id"], ask.me)
        if found is None:
            raise Refused(404, "there is no draft")
        return raw(found[1], {"ETag": f'"{found[0]}"'})

    def save_draft(self, ask: Ask) -> Response:
        """Keep what one has drawn so far."""
        row = self._seen(ask)
        fields, planes = ask.envelope(self._shape(row), ("forced", "ignore", "refused"))
        text = ask.headers.get("if-match", "").strip('"')
        if not (text.isascii() and text.isdecimal() and len(text) < 12):
            raise UserError(expected("If-Match", "the version of a draft, or 0", repr(text[:20])))
        from diffdoctor.annotate.masks import envelope

        kept = {"version": int(text) + 1, "state": fields.get("state", {})}
        fence = text_of(fields, "fence")
        return JSONResponse(self.queue.save_draft(row["id"], ask.me, int(text), fence, envelope(kept, planes)))

    def mine(self, ask: Ask) -> Response:
        """The version and verdict of one's newest answer."""
        row = self._seen(ask)
        found = self.store.one(
            "SELECT version, verdict FROM annotation WHERE task = ? AND annotator = ? ORDER BY version DESC LIMIT 1",
            row["id"],
            ask.me,
        )
        return JSONResponse(dict(found) if found else {"version": 0, "verdict": None})

    def truth(self, ask: Ask) -> Response:
        """The truth of a training task that one has answered."""
        row = self._seen(ask)
        shown = row["kind"] == "training" and self.queue.newest_version(row["id"], ask.me) > 0
        if row["truth"] is None or not (shown or ask.person["role"] != "annotator"):
            raise Refused(404, "there is no truth to show")
        return raw(self.store.mask(row["truth"]))

    def submit(self, ask: Ask) -> Response:
        """Keep an answer."""
        row = self._seen(ask)
        fields, planes = ask.envelope(self._shape(row), ("mask", "ignore"))
        answer = Submission(
            count_of(fields, "version", 1),
            text_of(fields, "verdict"),
            text_of(fields, "fence"),
            planes.get("mask"),
            planes["ignore"] if "ignore" in planes and planes["ignore"].any() else None,
            _tags(fields),
            None if fields.get("threshold") is None else count_of(fields, "threshold", 1, 255),
            **{name: count_of(fields, name) for name in ("accepted", "refused", "drawn", "active_ms", "wall_ms")},
            guidelines=text_of(fields, "guidelines", 64),
        )
        sha = None if answer.mask is None else hashlib.sha256(answer.mask.tobytes()).hexdigest()
        return JSONResponse({**self.queue.submit(row["id"], ask.me, answer), "sha256": sha})

    def release(self, ask: Ask) -> Response:
        """Give a task back."""
        fields = ask.json()
        self.queue.release(self._seen(ask)["id"], ask.me, text_of(fields, "fence"), text_of(fields, "reason", 500))
        return JSONResponse({"released": True})

    def assisted(self, ask: Ask) -> Response:
        """The mask that a model gives for a click."""
        row, fields = self._seen(ask), ask.json()
        if self.assist is None:
            raise Refused(404, "assistance is off")
        x, y = count_of(fields, "x", 0, row["width"] - 1), count_of(fields, "y", 0, row["height"] - 1)
        picture = self.project.picture(row["picture"])
        with self._assist_lock:
            mask = self.assist(picture, x, y)
        # NumPy takes no tensor from a GPU
        mask = np.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask)
        if mask.shape != self._shape(row):
            raise UserError(expected("assist", f"a mask {self._shape(row)}", mask.shape))
        return raw((mask > 0) * np.uint8(255))

    def next_review(self, ask: Ask) -> Response:
        """The next task in conflict."""
        ask.require("reviewer")
        return JSONResponse(review.next_review(self.project, ask.me))

    def annotations(self, ask: Ask) -> Response:
        """The answers to a task, side by side."""
        ask.require("reviewer")
        row = self._task(ask.params["task"])
        found = review.answers_of(self.project, row["id"], self._shape(row))
        for answer in found["answers"]:
            answer["tags"] = json.loads(answer["tags"])
        return JSONResponse({"annotations": found["answers"], "pairs": found["pairs"]})

    def plane(self, ask: Ask) -> Response:
        """A mask of an answer."""
        ask.require("reviewer")
        row, plane = self._task(ask.params["task"]), ask.params["plane"]
        answer = ask.params["answer"]
        found = None
        if plane in ("mask", "ignore") and answer < 2**63:
            found = self.store.one(f'SELECT "{plane}" FROM annotation WHERE id = ? AND task = ?', answer, row["id"])
        if found is None or found[0] is None:
            raise Refused(404, "there is no such mask")
        return raw(self.store.mask(found[0]))

    def decide(self, ask: Ask) -> Response:
        """Keep a reviewer's decision."""
        ask.require("reviewer")
        row = self._task(ask.params["task"])
        fields, planes = ask.envelope(self._shape(row), ("mask", "ignore"))
        answer = fields.get("annotation")
        result = review.decide(
            self.project,
            row["id"],
            ask.me,
            text_of(fields, "decision"),
            annotation=None if answer is None else count_of(fields, "annotation", 1),
            verdict=fields.get("verdict"),
            mask=planes.get("mask"),
            ignore=planes.get("ignore"),
            comment=text_of(fields, "comment", 2000) if "comment" in fields else "",
        )
        return JSONResponse(result)

    def raters(self, ask: Ask) -> Response:
        """Everybody, and how each does."""
        ask.require("reviewer")
        rows = self.store.all(
            "SELECT id, name, role, paused, (SELECT count(DISTINCT task) FROM annotation "
            "WHERE annotator = annotator.id AND verdict != 'skipped') AS labelled FROM annotator ORDER BY id"
        )
        return JSONResponse({"raters": [{**dict(row), "gold": gold.score(self.project, row["id"])} for row in rows]})

    def resume(self, ask: Ask) -> Response:
        """Let a paused rater work again."""
        ask.require("reviewer")
        rater = ask.params["rater"]
        if not rater < 2**63 or self.store.one("SELECT 1 FROM annotator WHERE id = ?", rater) is None:
            raise Refused(404, "there is no such rater")
        gold.resume(self.project, rater, ask.me)
        return JSONResponse({"paused": False})

    def agreement(self, ask: Ask) -> Response:
        """How well raters agree."""
        ask.require("admin")
        from diffdoctor.annotate.agreement import measure_agreement

        return JSONResponse(measure_agreement(self.project))

    def status(self, ask: Ask) -> Response:
        """How far the work is."""
        ask.require("admin")
        return JSONResponse(status_of(self.project))

    def events(self, ask: Ask) -> Response:
        """What happened, in order."""
        ask.require("admin")
        text = ask.query.get("after", "0")
        if not (text.isascii() and text.isdecimal() and len(text) < 19):
            raise UserError(expected("after", "the number of an event", repr(text[:20])))
        rows = self.store.all(
            "SELECT id, at, actor, task, kind, detail FROM event WHERE id > ? ORDER BY id LIMIT 500", int(text)
        )
        return JSONResponse({"events": [{**dict(row), "detail": json.loads(row["detail"])} for row in rows]})


_TASK = "SELECT task.*, height, width FROM task JOIN picture ON picture.id = picture WHERE task.id = ?"


def _tags(fields: dict) -> list[str]:
    tags = fields.get("tags", [])
    if not isinstance(tags, list) or len(tags) > 20 or not all(isinstance(t, str) and len(t) <= 80 for t in tags):
        raise UserError(expected("tags", "up to 20 texts of at most 80 characters", repr(tags)[:80]))
    return tags


def _boxes(proposal: np.ndarray, threshold: int) -> list[dict[str, Any]]:
    """The 8-connected components of map >= threshold, numbered from 1 by their first pixel, row by row."""
    from scipy import ndimage

    labels, count = ndimage.label(proposal >= threshold, np.ones((3, 3), bool))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    scores = np.bincount(labels.ravel(), weights=proposal.ravel(), minlength=count + 1)
    return [
        {
            "id": index,
            "box": [columns.start, rows.start, columns.stop, rows.stop],
            "area": int(areas[index]),
            "score": float(scores[index] / areas[index] / 255),
        }
        for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1)
    ]
