"""Small annotation projects, served or not, and a client of theirs."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import struct
import urllib.request
from pathlib import Path

import numpy as np

from diffdoctor.annotate import masks
from diffdoctor.annotate.intake import NewTask, add_task
from diffdoctor.annotate.project import Project, read_place
from diffdoctor.data.codec import encode_picture

#: {name: role} of a project's people.
PEOPLE = {"ann": "annotator", "ben": "annotator", "rev": "reviewer", "adm": "admin"}


def picture(seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture (H, W, 3) uint8 of smooth colours with a dark square, other for each seed."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / rng.uniform(5, 20) + columns / rng.uniform(5, 20) + rng.uniform(0, 6)) for _ in range(3)]
    result = (np.stack(waves, -1) * 60 + 128).astype(np.uint8)
    result[spot(seed, height, width) > 0] = 20
    return result


def spot(seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    """A mask (H, W) uint8 of 0 and 255: one rectangle, other for each seed."""
    rng = np.random.default_rng([seed, 1])
    mask = np.zeros((height, width), np.uint8)
    y, x = int(rng.integers(height // 2)), int(rng.integers(width // 2))
    mask[y : y + height // 3, x : x + width // 3] = 255
    return mask


def proposal(seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    """A detector's map (H, W) uint8: `spot` at 200, and a false blob at 150 in a corner."""
    result = (spot(seed, height, width) > 0) * np.uint8(200)
    result[-height // 8 :, -width // 8 :] = 150
    return result


def make_project(folder: Path, tasks: int = 3, *, height: int = 48, width: int = 64, settings=None, **task) -> Project:
    """A project of so many tasks on pictures in `folder`; further values are `NewTask`'s, or functions of the seed."""
    project = Project(folder / "project", create=True)
    for name, value in (settings or {}).items():
        setattr(project.settings, name, value)
    files = folder / "pictures"
    files.mkdir(exist_ok=True)
    first = len(list(files.iterdir()))
    with project.store.writing():
        for seed in range(first, first + tasks):
            path = files / f"{seed:04d}.png"
            path.write_bytes(encode_picture(picture(seed, height, width), "png"))
            place = {"file": str(path)}
            values = {"proposal": proposal(seed, height, width), "priority": -float(seed)}
            values |= {key: value(seed) if callable(value) else value for key, value in task.items()}
            values.setdefault("meta", {"category": "sign", "prompt": f"a sign, number {seed}"})
            add_task(project.store, NewTask(read_place(place), place, **values), round=1)
    return project


def sha256(mask: np.ndarray) -> str:
    """As the server answers it for a mask (H, W) uint8."""
    return hashlib.sha256(mask.tobytes()).hexdigest()


@contextlib.contextmanager
def serving(project: Project, assist=None):
    """The address of a server of the project, which runs in a thread of this process; `assist`: see `build_app`."""
    from diffdoctor.annotate.server import build_app
    from diffdoctor.web.serve import running

    with running(lambda hosts: build_app(project, hosts, assist=assist)) as url:
        yield url


class Client:
    """Asks a server as the page does, with the standard library alone."""

    def __init__(self, url: str, token: str | None = None):
        self.url, self.token = url, token

    def call(self, verb: str, path: str, body: bytes | None = None, headers: dict | None = None):
        """(status, headers, body), the body uncompressed."""
        headers = dict(headers or {})
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        request = urllib.request.Request(self.url + path, body, headers, method=verb)
        try:
            answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            data = answer.read()
            if answer.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            return answer.status, answer.headers, data

    def json(self, verb: str, path: str, value=None):
        """(status, value) of a JSON endpoint."""
        body = None if verb == "GET" else json.dumps(value or {}).encode()
        status, _, data = self.call(verb, path, body, {} if body is None else {"Content-Type": "application/json"})
        return status, json.loads(data)

    def next_task(self) -> dict:
        """The next task, once the one that is held is answered."""
        status, task = self.json("POST", "/api/next")
        assert status == 200 and task["task"] is not None
        return task

    def put(self, path: str, fields: dict, planes: dict | None = None, **headers):
        """(status, value) of an endpoint that takes an envelope."""
        body = gzip.compress(masks.envelope(fields, planes or {}))
        kinds = {"Content-Type": "application/octet-stream", "Content-Encoding": "gzip", **headers}
        status, _, data = self.call("PUT", path, body, kinds)
        return status, json.loads(data)

    def draft(self, task: int):
        """(fields, planes as bytes) of one's draft."""
        status, _, body = self.call("GET", f"/api/tasks/{task}/draft")
        assert status == 200, body
        (length,) = struct.unpack_from("<I", body)
        return json.loads(body[4 : 4 + length]), body[4 + length :]

    def submit(self, task: dict, mask: np.ndarray | None, **fields):
        """(status, value) of an answer to what `next` gave; damaged where a mask is given, else clean."""
        values = {"fence": task["fence"], "version": task["version"], "verdict": "clean" if mask is None else "damaged"}
        values |= dict.fromkeys(("accepted", "refused", "drawn", "active_ms", "wall_ms"), 0)
        values |= {"threshold": task["threshold"], "tags": [], "guidelines": ""} | fields
        return self.put(f"/api/tasks/{task['task']}/annotation", values, {} if mask is None else {"mask": mask})
