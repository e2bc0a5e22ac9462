"""The server over HTTP: tasks, masks and reviews, as the page asks for them."""

import functools
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from diffdoctor.annotate.command import _assist
from diffdoctor.data.codec import decode
from diffdoctor.runs.errors import UserError
from diffdoctor.web import serve
from diffdoctor.web.guard import Guard
from support.annotation import PEOPLE, Client, make_project, picture, proposal, serving, sha256, spot
from support.gpu import on_gpu


def test_a_task_from_the_first_look_to_the_answer(served):
    project, clients = served
    ann = clients["ann"]
    task = ann.next_task()
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
    assert ann.next_task()["draft_version"] == 1
    status, answer = ann.submit(task, spot(seed), tags=["text"], active_ms=1200, wall_ms=5)
    assert status == 200 and not answer["late"] and answer["sha256"] == sha256(spot(seed))
    row = project.store.one("SELECT * FROM annotation WHERE id = ?", answer["annotation"])
    np.testing.assert_array_equal(project.store.mask(row["mask"]), spot(seed))
    assert (row["verdict"], json.loads(row["tags"]), row["active_ms"]) == ("damaged", ["text"], 5)
    assert ann.call("GET", f"{path}/draft")[0] == 404
    assert ann.json("GET", f"{path}/mine")[1] == {"version": 1, "verdict": "damaged"}
    me = ann.json("GET", "/api/me")[1]
    assert me["counts"]["labelled"] == 1 and me["role"] == "annotator"


@pytest.mark.parametrize("size", [(4, 3), (13, 5), (512, 512), (1023, 8)])
def test_masks_of_any_size_arrive_bit_by_bit(tmp_path, size):
    project = make_project(tmp_path, 1, height=size[0], width=size[1], proposal=None)
    client_token = project.store.add_person("ann", "annotator")
    mask = (np.random.default_rng(0).uniform(size=size) < 0.3) * np.uint8(255)
    mask[0, 0] = 255
    with serving(project) as url:
        ann = Client(url, client_token)
        task = ann.next_task()
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
        tasks.append(ben.next_task())
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
        ann.submit(ann.next_task(), spot(0))
        ben.submit(ben.next_task(), None)
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


def test_a_program_of_ones_own_marks_a_point(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def near(picture, x, y):\n    return abs(picture.astype(int) - picture[y, x]).max(-1) <= 12\n")
    project = make_project(tmp_path, 1)
    with serving(project, _assist(f"{file}:near")) as url:
        client = Client(url, project.store.add_person("ann", "annotator"))
        assert client.json("GET", "/api/me")[1]["assist"] is True
        assert client.json("POST", "/api/tasks/1/assist", {"x": 1, "y": 1})[0] in (403, 404)  # not theirs yet
        client.next_task()
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


def test_a_program_on_a_gpu_is_asked_for_one_point_at_a_time(tmp_path):
    asked, at_once = [], []

    def assist(picture, x, y):
        asked.append(x)
        time.sleep(0.05)
        at_once.append(len(asked))
        asked.pop()
        return on_gpu(picture.max(-1) >= 0)

    project = make_project(tmp_path, 1)
    with serving(project, assist) as url:
        client = Client(url, project.store.add_person("ann", "annotator"))
        client.next_task()
        with ThreadPoolExecutor(4) as clicks:
            options = b'{"x": 1, "y": 1}', {"Content-Type": "application/json"}
            call = functools.partial(client.call, "POST", "/api/tasks/1/assist", *options)
            answers = [click.result() for click in [clicks.submit(call) for _ in range(4)]]
    assert [(status, set(plane)) for status, _, plane in answers] == [(200, {255})] * 4
    assert at_once == [1] * 4


def test_a_client_that_does_not_send_all_neither_holds_the_server_nor_prints(monkeypatch, capfd):
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    from diffdoctor.web.requests import endpoint

    monkeypatch.setattr(serve, "END_SECONDS", 0.2)

    def build(hosts):
        route = Route("/", endpoint(lambda ask: Response("all")), methods=["POST"])
        return Guard(Starlette(routes=[route]), lambda token: token, hosts, ())

    started = time.monotonic()
    with serve.running(build) as url:
        host = url.removeprefix("http://")
        lines = f"POST / HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer x\r\nContent-Type: application/json\r\n"
        clients = [socket.create_connection(host.split(":")) for _ in range(2)]
        for client in clients:
            client.sendall(f"{lines}Content-Length: 9\r\n\r\n{{".encode())
        time.sleep(0.2)
        clients[0].close()
        time.sleep(0.2)
    assert time.monotonic() - started < 9  # 10 s later the thread is left alone
    clients[1].close()
    assert "Traceback" not in capfd.readouterr().err
