"""Bodies and kinds of requests that the annotation server refuses."""

import gzip
import json
import os

import pytest

from diffdoctor.web import bodies

ENVELOPE = {"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"}


def gz(data):
    return gzip.compress(data)


PLANE = 48 * 64
GOOD = {"version": 1, "verdict": "clean", "fence": "", "planes": [], "tags": [], "guidelines": ""}
GOOD |= dict.fromkeys(("accepted", "refused", "drawn", "active_ms", "wall_ms"), 0)


def body_of(fields, planes=b""):
    head = json.dumps({**GOOD, **fields}).encode()
    return len(head).to_bytes(4, "little") + head + planes


BAD_BODIES = [
    (b"no gzip", 400, "gzip"),
    (gz(body_of({}))[:-9], 400, "whole gzip stream"),
    (gz(body_of({})) + b"more", 400, "whole gzip stream"),
    (gz(b""), 400, "the length of its JSON"),
    (gz(b"\xff\xff\xff\xff{}"), 400, "the length of its JSON"),
    (gz(bytes(64 * 2**20)), 400, "inflated"),  # a bomb: 64 KiB of zeros
    (gz(body_of({"planes": ["mask"]}, b"\xff" * (PLANE - 1))), 400, "planes"),
    (gz(body_of({"planes": ["mask"]}, b"\xff" * (PLANE + 1))), 400, "planes"),
    (gz(body_of({"planes": ["mask"], "verdict": "damaged"}, b"\x80" * PLANE)), 400, "mask: expected bytes among"),
    (gz(body_of({"planes": ["forced"]}, bytes(PLANE))), 400, "planes"),
    (gz(body_of({"planes": ["mask", "mask"]}, bytes(2 * PLANE))), 400, "each once"),
    (gz(body_of({"verdict": "skipped"})), 400, "verdict"),
    (gz(body_of({"verdict": "damaged"})), 400, "mask"),
    (gz(body_of({"version": True})), 400, "version"),
    (gz(body_of({"version": -1})), 400, "version"),
    (gz(body_of({"active_ms": 1.5})), 400, "active_ms"),
    (gz(body_of({"tags": ["x" * 99]})), 400, "tags"),
    (gz(body_of({"guidelines": None})), 400, "guidelines"),
    (gz(len(b"[]").to_bytes(4, "little") + b"[]"), 400, "JSON object"),
    (gz(len(b'{"a":NaN}').to_bytes(4, "little") + b'{"a":NaN}'), 400, "JSON"),
    (gz(body_of({"fence": "x"})), 403, "fence"),
    (os.urandom(9 * 2**20), 400, "gzip"),
]


# The bodies are other ones in each process, so the ids are not of them.
@pytest.mark.parametrize(
    ("body", "status", "says"), BAD_BODIES, ids=[f"{index}: {case[2]}" for index, case in enumerate(BAD_BODIES)]
)
def test_bodies_that_are_not_as_described_are_refused(served, body, status, says):
    project, clients = served
    task = clients["ann"].next_task()
    before = project.store.one("SELECT count(*) FROM annotation")[0]
    got, _, answer = clients["ann"].call("PUT", f"/api/tasks/{task['task']}/annotation", body, ENVELOPE)
    assert got == status and says in json.loads(answer)["error"]
    assert project.store.one("SELECT count(*) FROM annotation")[0] == before


def test_a_body_ends_at_its_limit(served):
    _, clients = served
    task = clients["ann"].next_task()
    # many empty gzip blocks: 5 bytes each that inflate to nothing
    block = b"\x00\x00\x00\xff\xff"
    endless = gzip.compress(b"", mtime=0)[:10] + block * (bodies.MAX_BODY // len(block) + 1)
    status, _, answer = clients["ann"].call("PUT", f"/api/tasks/{task['task']}/annotation", endless, ENVELOPE)
    assert status == 413 and "at most 8,388,608 bytes" in json.loads(answer)["error"]
    status, _, answer = clients["ann"].call("POST", "/api/next", b" " * 2**17, {"Content-Type": "application/json"})
    assert status == 413 and "at most 65,536 bytes" in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("verb", "path", "headers", "status"),
    [
        ("PUT", "/api/tasks/1/annotation", {"Content-Type": "application/octet-stream"}, 415),
        ("PUT", "/api/tasks/1/annotation", {"Content-Type": "text/plain", "Content-Encoding": "gzip"}, 415),
        ("POST", "/api/next", {"Content-Type": "text/plain"}, 415),  # what a form of another site can send
        ("POST", "/api/next", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/api/me", {"Content-Type": "application/json"}, 405),
        ("DELETE", "/api/tasks/1/draft", {}, 405),
    ],
)
def test_other_kinds_of_requests_are_refused(served, verb, path, headers, status):
    _, clients = served
    assert clients["ann"].call(verb, path, b"{}", headers)[0] == status
