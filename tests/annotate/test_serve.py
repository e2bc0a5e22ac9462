"""`diffdoctor annotate serve` as a process: Ctrl-C, a kill between commit and answer, one server a project."""

import http.client
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from diffdoctor.runs.errors import UserError
from support.annotation import Client, make_project, sha256, spot
from support.paths import ROOT


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
            task = certain(lambda: ann.next_task())
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
