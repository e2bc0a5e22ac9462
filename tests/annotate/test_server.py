"""The server over HTTP: what the page asks for, what is refused, and a kill between commit and answer."""

import gzip
import http.client
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from diffdoctor.annotate.command import _assist
from diffdoctor.data.codec import decode
from diffdoctor.runs.errors import UserError
from diffdoctor.web import bodies
from diffdoctor.web.guard import HEADERS, WRONG_TOKENS, Guard
from support.annotation import Client, make_project, picture, proposal, serving, spot
from support.paths import ROOT


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of a project of sixty tasks, and its people's clients by name."""
    project = make_project(tmp_path_factory.mktemp("served"), 60, blind=lambda seed: seed == 1)
    tokens = {name: project.store.add_person(name, role) for name, role in PEOPLE.items()}
    with serving(project) as url:
        yield project, {name: Client(url, token) for name, token in tokens.items()}


PEOPLE = {"ann": "annotator", "ben": "annotator", "rev": "reviewer", "adm": "admin"}
ENVELOPE = {"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"}


def fresh(client):
    """The next task, once the one that is held is answered."""
    status, task = client.json("POST", "/api/next")
    assert status == 200 and task["task"] is not None
    return task


def test_a_task_from_the_first_look_to_the_answer(served):
    project, clients = served
    ann = clients["ann"]
    task = fresh(ann)
    path, seed = f"/api/tasks/{task['task']}", task["task"] - 1
    assert task["prompt"] == f"a sign, number {seed}" and task["threshold"] == 128 and not task["blind"]
    status, headers, body = ann.call("GET", f"{path}/picture")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    np.testing.assert_array_equal(decode(body, "RGB"), picture(seed))
    status, _, body = ann.call("GET", f"{path}/proposal")
    np.testing.assert_array_equal(np.frombuffer(body, np.uint8).reshape(48, 64), proposal(seed))
    found = ann.json("GET", f"{path}/components?threshold=180")[1]["components"]
    (top, left), (bottom, right) = np.argwhere(spot(seed))[[0, -1]].tolist()
    box = [left, top, right + 1, bottom + 1]
    assert [each["box"] for each in found] == [box] and found[0]["area"] == (spot(seed) > 0).sum()
    forced = np.random.default_rng(0).integers(0, 3, (48, 64), np.uint8)
    planes = {"forced": forced, "ignore": spot(9), "refused": spot(8)}
    fields = {"fence": task["fence"], "state": {"threshold": 99}}
    assert ann.put(f"{path}/draft", fields, planes, **{"If-Match": '"0"'})[1]["version"] == 1
    assert ann.put(f"{path}/draft", fields, planes, **{"If-Match": "0"})[0] == 409
    kept, pixels = ann.draft(task["task"])
    assert kept == {"version": 1, "state": {"threshold": 99}, "planes": ["forced", "ignore", "refused"]}
    assert pixels == b"".join(plane.tobytes() for plane in planes.values())
    assert fresh(ann)["draft_version"] == 1
    status, answer = ann.submit(task, spot(seed), tags=["text"], active_ms=1200, wall_ms=5)
    assert status == 200 and not answer["late"] and answer["sha256"] == sha256(spot(seed))
    row = project.store.one("SELECT * FROM annotation WHERE id = ?", answer["annotation"])
    np.testing.assert_array_equal(project.store.mask(row["mask"]), spot(seed))
    assert (row["verdict"], json.loads(row["tags"]), row["active_ms"]) == ("damaged", ["text"], 5)
    assert ann.call("GET", f"{path}/draft")[0] == 404
    assert ann.json("GET", f"{path}/mine")[1] == {"version": 1, "verdict": "damaged"}
    me = ann.json("GET", "/api/me")[1]
    assert me["counts"]["labelled"] == 1 and me["role"] == "annotator"


def sha256(mask):
    import hashlib

    return hashlib.sha256(mask.tobytes()).hexdigest()


@pytest.mark.parametrize("size", [(4, 3), (13, 5), (512, 512), (1023, 8)])
def test_masks_of_any_size_arrive_bit_by_bit(tmp_path, size):
    project = make_project(tmp_path, 1, height=size[0], width=size[1], proposal=None)
    client_token = project.store.add_person("ann", "annotator")
    mask = (np.random.default_rng(0).uniform(size=size) < 0.3) * np.uint8(255)
    mask[0, 0] = 255
    with serving(project) as url:
        ann = Client(url, client_token)
        task = fresh(ann)
        assert ann.call("GET", f"/api/tasks/{task['task']}/proposal")[0] == 204
        status, answer = ann.submit(task, mask)
        assert status == 200 and answer["sha256"] == sha256(mask)
    stored = project.store.one("SELECT mask FROM annotation")[0]
    np.testing.assert_array_equal(project.store.mask(stored), mask)


def test_a_blind_task_shows_no_proposal(served):
    _, clients = served
    ben = clients["ben"]
    tasks = []
    while not tasks or not tasks[-1]["blind"]:
        tasks.append(fresh(ben))
        path = f"/api/tasks/{tasks[-1]['task']}"
        assert ben.call("GET", f"{path}/proposal")[0] == (204 if tasks[-1]["blind"] else 200)
        assert bool(ben.json("GET", f"{path}/components")[1]["components"]) != tasks[-1]["blind"]
        assert ben.submit(tasks[-1], None)[0] == 200
    assert tasks[-1]["task"] == 2


def test_review_over_http(tmp_path):
    project = make_project(tmp_path, 1, needed=2)
    tokens = [project.store.add_person(name, role) for name, role in PEOPLE.items()]
    with serving(project) as url:
        ann, ben, rev, adm = (Client(url, token) for token in tokens)
        ann.submit(fresh(ann), spot(0))
        ben.submit(fresh(ben), None)
        assert rev.json("GET", "/api/me")[1]["counts"]["conflicts"] == 1
        task = rev.json("GET", "/api/review/next")[1]
        assert (task["task"], task["reason"]) == (1, "verdicts differ")
        shown = rev.json("GET", "/api/tasks/1/annotations")[1]
        first, second = shown["annotations"]
        assert first["mask"] and not second["mask"] and shown["pairs"][0]["iou"] == 0
        body = rev.call("GET", f"/api/tasks/1/annotations/{first['id']}/mask")[2]
        assert body == spot(0).tobytes()
        assert rev.call("GET", f"/api/tasks/1/annotations/{second['id']}/mask")[0] == 404
        assert ann.put("/api/tasks/1/review", {"decision": "reject"})[0] == 403
        merged = np.maximum(spot(0), spot(1))
        fields = {"decision": "edit", "verdict": "damaged", "comment": "both"}
        assert rev.put("/api/tasks/1/review", fields, {"mask": merged})[1]["state"] == "reviewed"
        assert adm.json("GET", "/api/agreement")[1]["all"]["pictures"] == 1
        kinds = [event["kind"] for event in adm.json("GET", "/api/events?after=0")[1]["events"]]
        assert kinds == ["token"] * 4 + ["lease", "annotate", "lease", "annotate", "review"]
        assert adm.json("GET", "/api/status")[1]["faults"] == []
        raters = rev.json("GET", "/api/raters")[1]["raters"]
        assert [each["labelled"] for each in raters] == [1, 1, 0, 0]
        project.store.connection.execute("UPDATE annotator SET paused = 'why' WHERE id = 1")
        assert ann.json("POST", "/api/next")[1] == {"task": None, "reason": "paused"}
        assert ann.json("GET", "/api/me")[1]["paused_reason"] == "why"
        assert rev.json("POST", "/api/raters/1/resume")[1] == {"paused": False}
        assert ann.json("POST", "/api/next")[1]["reason"] == "empty"
        assert rev.json("POST", "/api/raters/77/resume")[0] == 404


def ask(url, path="/api/me", verb="GET", headers=(), body=None):
    """(status, headers, body) of a request whose headers are exactly these, but for a Host where none is given."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    names = {name.lower() for name, _ in headers}
    connection.putrequest(verb, path, skip_host="host" in names, skip_accept_encoding=True)
    for name, value in headers:
        connection.putheader(name, value)
    if body is not None and "content-length" not in names:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    if body is not None:
        connection.send(body)
    answer = connection.getresponse()
    result = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return result


def own(clients, name="ann"):
    return ("Authorization", f"Bearer {clients[name].token}")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Host", "evil.example")], 403),  # a name that was made to lead here
        ([("Host", "127.0.0.1:1")], 403),
        ([("Host", "evil.example"), ("X-Forwarded-Host", "127.0.0.1")], 403),
        ([("Origin", "http://evil.example")], 403),
        ([("Origin", "null")], 403),
        ([("Sec-Fetch-Site", "cross-site")], 403),
        ([("Sec-Fetch-Site", "same-site")], 403),
        ([("Sec-Fetch-Site", "same-origin")], 200),
        ([], 200),
    ],
    ids=lambda value: str(value)[:60],
)
def test_other_sites_get_nothing(served, headers, status):
    _, clients = served
    assert ask(clients["ann"].url, headers=[own(clients), *headers])[0] == status


def test_two_hosts_are_refused_and_the_page_may_be_opened_from_anywhere(served):
    _, clients = served
    url = clients["ann"].url
    host = url.removeprefix("http://")
    assert ask(url, headers=[own(clients), ("Host", host), ("Host", "evil.example")])[0] in (400, 403)
    link = [("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "navigate")]
    assert ask(url, "/", headers=link)[0] == 200
    assert ask(url, "/", headers=[("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "no-cors")])[0] == 403
    assert ask(url, "/api/me", headers=[own(clients), *link])[0] == 403
    # an Origin of our own is not refused
    assert ask(url, headers=[own(clients), ("Origin", url)])[0] == 200


def test_the_path_that_is_served_decides_and_not_the_address(served):
    _, clients = served
    url = clients["ann"].url
    for host in ("127.0.0.1/static/x?", "127.0.0.1/#", "a@127.0.0.1"):
        assert ask(url, headers=[("Host", host)])[0] in (400, 403)
    for path in ("/%61pi/me", "//api/me", "/api/me/", "/static/../api/me", "/static/%2e%2e/api/me"):
        assert ask(url, path)[0] in (400, 401, 404)
    assert ask(url, "http://evil.example/static/app.js", headers=[])[0] in (400, 401, 403, 404)


@pytest.mark.parametrize(
    "path", ["/static/../store.py", "/static/%2e%2e/store.py", "/static//etc/passwd", "/static/", "/etc/passwd"]
)
def test_no_path_names_a_file(served, path):
    _, clients = served
    assert ask(clients["ann"].url, path)[0] in (401, 404)
    assert ask(clients["ann"].url, path, headers=[own(clients)])[0] == 404


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer ", "Bearer x", "Basic x", "bearer é"])
def test_without_a_token_there_is_nothing(tmp_path, value):
    project = make_project(tmp_path, 1)
    with serving(project) as url:
        status, headers, body = ask(url, headers=[] if value is None else [("Authorization", value.encode("latin-1"))])
    assert status == 401 and headers["www-authenticate"] == "Bearer" and "error" in json.loads(body)


def test_tokens_are_kept_as_hashes_and_end_when_disabled(served):
    project, clients = served
    token = project.store.add_person("temp", "annotator")
    client = Client(clients["ann"].url, token)
    assert client.json("GET", "/api/me")[0] == 200
    assert token.encode() not in project.store.path.read_bytes()
    assert project.store.disable("temp") and client.json("GET", "/api/me")[0] == 401
    assert not project.store.disable("nobody")


def test_guessing_tokens_ends_after_ten(tmp_path):
    import asyncio

    project, now = make_project(tmp_path, 1), [0.0]
    token = project.store.add_person("ann", "annotator")

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = Guard(app, project.store.person_of, ["127.0.0.1:1"], [], clock=lambda: now[0])

    def status(token, client="1.2.3.4"):
        sent = []

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"127.0.0.1:1"), (b"authorization", f"Bearer {token}".encode())]
        scope = {"type": "http", "method": "GET", "path": "/api/me", "headers": headers, "client": (client, 1)}
        asyncio.run(guard(scope, None, send))
        return sent[0]["status"]

    assert [status("wrong") for _ in range(WRONG_TOKENS + 1)] == [401] * WRONG_TOKENS + [429]
    assert status(token) == 429 and status(token, "5.6.7.8") == 200
    now[0] = 61
    assert status(token) == 200


def test_roles_hold(served):
    _, clients = served
    admin_only = ("/api/status", "/api/events", "/api/agreement")
    reviewers = ("/api/review/next", "/api/raters", "/api/tasks/1/annotations")
    for path in (*admin_only, *reviewers):
        assert clients["ann"].json("GET", path)[0] == 403
    for path in admin_only:
        assert clients["rev"].json("GET", path)[0] == 403
    # a task that was never one's own
    for part in ("picture", "proposal", "components", "draft", "mine", "truth"):
        assert clients["ann"].call("GET", f"/api/tasks/60/{part}")[0] == 403
        assert clients["ann"].call("GET", f"/api/tasks/6000/{part}")[0] == 404
    assert clients["ann"].call("GET", "/api/tasks/99999999999999999999999/picture")[0] == 404
    assert clients["rev"].call("GET", "/api/tasks/60/picture")[0] == 200


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
    task = fresh(clients["ann"])
    before = project.store.one("SELECT count(*) FROM annotation")[0]
    got, _, answer = clients["ann"].call("PUT", f"/api/tasks/{task['task']}/annotation", body, ENVELOPE)
    assert got == status and says in json.loads(answer)["error"]
    assert project.store.one("SELECT count(*) FROM annotation")[0] == before


def test_a_body_ends_at_its_limit(served):
    _, clients = served
    task = fresh(clients["ann"])
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


def test_every_answer_says_what_a_browser_may_do_with_it(served):
    _, clients = served
    url = clients["ann"].url
    wanted = {name.decode(): value.decode() for name, value in HEADERS}
    assert "unsafe" not in wanted["content-security-policy"]
    for path, headers in (("/", []), ("/api/me", []), ("/api/me", [own(clients)]), ("/api/x", [own(clients)])):
        _, found, _ = ask(url, path, headers=headers)
        assert wanted.items() <= {name.lower(): value for name, value in found.items()}.items()
        assert found.get("server") is None and "set-cookie" not in found
    assert ask(url, "/api/me", headers=[own(clients)])[1]["cache-control"] == "no-store"


def test_texts_of_users_come_as_json_alone(tmp_path):
    evil = "</script><script>alert(1)</script>"
    project = make_project(tmp_path, 1, meta={"prompt": evil, "category": evil})
    (project.folder / "guidelines.md").write_text(evil)
    token = project.store.add_person(evil, "annotator")
    with serving(project) as url:
        ann = Client(url, token)
        for verb, path in (("GET", "/api/me"), ("GET", "/api/guidelines"), ("POST", "/api/next")):
            body = b"{}" if verb == "POST" else None
            _, headers, data = ann.call(verb, path, body, {"Content-Type": "application/json"})
            assert headers["Content-Type"] == "application/json" and evil in json.dumps(json.loads(data))
            assert headers["X-Content-Type-Options"] == "nosniff"


def started(*command):
    """A process of this Python, and the first line that it prints."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, env=environment)
    return process, process.stdout.readline().strip()


def test_the_command_serves_until_ctrl_c(tmp_path):
    project = make_project(tmp_path, 1)
    process, line = started("-m", "diffdoctor", "annotate", "serve", project.folder, "--port", 0)
    try:
        url, _, token = line.partition("/#token=")
        status, me = Client(url, token).json("GET", "/api/me")
        assert status == 200 and (me["name"], me["role"]) == ("admin", "admin")
        assert Client(url).call("GET", "/")[0] == 200
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.mark.parametrize("tasks", [12, pytest.param(30, marks=pytest.mark.study)])
def test_killed_between_commit_and_answer_nothing_is_lost_or_twice(tmp_path, tasks):
    project = make_project(tmp_path, tasks)
    token = project.store.add_person("ann", "annotator")
    rng = np.random.default_rng(3)
    process, url = started(ROOT / "tests" / "programs" / "annotate_server.py", project.folder)
    ann, child, lost = Client(url, token), int(process.stdout.readline()), 0

    def certain(call):
        """The result of a call that is repeated until it is answered, as the page does."""
        nonlocal child, lost
        while True:
            try:
                return call()
            except (OSError, http.client.HTTPException):
                lost += 1

    try:
        for seed in range(tasks):
            task = certain(lambda: fresh(ann))
            assert task["task"] == seed + 1
            path, draft = f"/api/tasks/{task['task']}/draft", {"If-Match": str(task["draft_version"])}
            certain(lambda: ann.put(path, {"fence": task["fence"]}, {}, **draft))  # noqa: B023
            # the server dies at a random moment of the request, or shortly before or after it
            killer = threading.Timer(float(rng.uniform(0, 0.03)), os.kill, (child, signal.SIGKILL))
            killer.start()
            status, answer = certain(lambda: ann.submit(task, spot(seed)))  # noqa: B023
            assert status == 200 and answer["sha256"] == sha256(spot(seed))
            killer.join()
            child = int(process.stdout.readline())
    finally:
        process.communicate(timeout=30)
    assert lost
    rows = project.store.all("SELECT task, version, mask FROM annotation ORDER BY task")
    assert [tuple(row)[:2] for row in rows] == [(task, 1) for task in range(1, tasks + 1)]
    for row in rows:
        np.testing.assert_array_equal(project.store.mask(row["mask"]), spot(row["task"] - 1))
    assert project.store.verify() == [] and {row[0] for row in project.store.all("SELECT state FROM task")} == {"done"}


def test_one_server_a_project_and_none_for_other_machines_unasked(tmp_path):
    from diffdoctor.annotate.command import run_annotate_serve
    from diffdoctor.annotate.config import AnnotateServeConfig
    from diffdoctor.runs.lock import locked_folder

    project = make_project(tmp_path, 1)
    assert project.folder.stat().st_mode & 0o077 == 0
    with locked_folder(project.folder), pytest.raises(UserError, match="another process is at work there"):
        run_annotate_serve(AnnotateServeConfig(str(project.folder), port=0))
    for host in ("0.0.0.0", "192.168.0.3", "::"):
        with pytest.raises(UserError, match="host: expected this machine's loopback"):
            AnnotateServeConfig(str(project.folder), host=host)
    assert AnnotateServeConfig(str(project.folder), host="0.0.0.0", allow_remote=True)
    with pytest.raises(UserError, match="certificate, key"):
        AnnotateServeConfig(str(project.folder), certificate="x")


@pytest.mark.parametrize("encrypted", [False, True])
def test_serving_other_machines_without_encryption_is_warned_of(tmp_path, monkeypatch, capsys, encrypted):
    from diffdoctor.annotate import command
    from diffdoctor.annotate.config import AnnotateServeConfig

    given = {}

    class Server:
        def run(self, sockets):
            given["port"] = sockets[0].getsockname()[1]

    def make_server(app, **options):
        given.update(options, hosts=app.hosts, origins=app.origins)
        return Server()

    monkeypatch.setattr("diffdoctor.web.serve.make_server", make_server)
    files = {"certificate": "cert.pem", "key": "key.pem"} if encrypted else {}
    project = make_project(tmp_path, 1)
    config = AnnotateServeConfig(
        str(project.folder), "0.0.0.0", 0, allow_remote=True, names=["labels.example"], **files
    )
    assert command.run_annotate_serve(config) == 0
    said, port = capsys.readouterr(), given["port"]
    assert ("can be read on the way" in said.err) != encrypted
    scheme = "https" if encrypted else "http"
    assert said.out.startswith(f"{scheme}://labels.example:{port}/#token=")
    assert f"{scheme}://labels.example:{port}" in given["origins"] and f"127.0.0.1:{port}" in given["hosts"]
    assert {"certificate": given["certificate"], "key": given["key"]} == {"certificate": None, "key": None} | files


def test_nothing_that_had_holes_is_used():
    # Starlette's CVE-2026-48710 and -54282 (request.url), -54283 and CVE-2024-47874 (form), the Range of FileResponse
    for path in (ROOT / "diffdoctor" / "annotate").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in (".url.", "request.url", ".form(", "FileResponse", "StaticFiles", "set_cookie", "TrustedHost"):
            assert name not in text.replace("`request.url`", ""), (path.name, name)


def test_a_program_of_ones_own_marks_a_point(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def near(picture, x, y):\n    return abs(picture.astype(int) - picture[y, x]).max(-1) <= 12\n")
    project = make_project(tmp_path, 1)
    with serving(project, _assist(f"{file}:near")) as url:
        client = Client(url, project.store.add_person("ann", "annotator"))
        assert client.json("GET", "/api/me")[1]["assist"] is True
        assert client.json("POST", "/api/tasks/1/assist", {"x": 1, "y": 1})[0] in (403, 404)  # not theirs yet
        fresh(client)
        y, x = np.argwhere(spot(0))[0].tolist()
        body = json.dumps({"x": x, "y": y}).encode()
        status, _, plane = client.call("POST", "/api/tasks/1/assist", body, {"Content-Type": "application/json"})
        found = np.frombuffer(plane, np.uint8).reshape(48, 64)
        assert status == 200 and set(np.unique(found)) <= {0, 255} and (found[spot(0) > 0] == 255).all()
        assert client.json("POST", "/api/tasks/1/assist", {"x": 64, "y": 0})[0] == 400
    with serving(project) as url:
        client = Client(url, project.store.add_person("ann", "annotator"))
        assert client.json("GET", "/api/me")[1]["assist"] is False
        status, answer = client.json("POST", "/api/tasks/1/assist", {"x": 1, "y": 1})
        assert (status, answer["error"]) == (404, "assistance is off")
    for source, words in ((str(file), "no such file"), (f"{file}:far", "expected the name of a function")):
        with pytest.raises(UserError, match=words):
            _assist(source)
