"""Who gets an answer from the annotation server: hosts, origins, tokens and roles, and what a browser is told."""

import http.client
import json

import pytest

from diffdoctor.web.guard import HEADERS, WRONG_TOKENS, Guard
from support.annotation import Client, make_project, serving
from support.paths import ROOT


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


def test_nothing_that_had_holes_is_used():
    # Starlette's CVE-2026-48710 and -54282 (request.url), -54283 and CVE-2024-47874 (form), the Range of FileResponse
    for path in (ROOT / "diffdoctor" / "annotate").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in (".url.", "request.url", ".form(", "FileResponse", "StaticFiles", "set_cookie", "TrustedHost"):
            assert name not in text.replace("`request.url`", ""), (path.name, name)
