"""A session on the page of `diffdoctor evaluate compare` in a real Chromium, over a reload and a killed server."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from diffdoctor.data.codec import encode_picture
from support.browser import VIEWPORT, browser, needs_chromium  # noqa: F401
from support.launch import free_port
from support.paths import ROOT

pytestmark = needs_chromium
pytest.importorskip("starlette")


def shade(index, side):
    """A picture of one colour that tells whose it is."""
    return np.full((64, 96, 3), [40 + index, 200 if side == "b" else 60, 90], np.uint8)


class Visitor:
    """Someone at the page; `problems` are the errors that the page had."""

    def __init__(self, context, link):
        self.page, self.problems = context.new_page(), []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self._heard(message.text))
        self.page.goto(link)

    def _heard(self, text):
        if "Failed to load resource" not in text:
            self.problems.append(text)

    def ready(self, but=None):
        """Waits for a pair, or for another than `but`; its number, or `none`."""
        return self.page.wait_for_selector(
            f"body[data-ready]:not([data-ready='{but}'])", state="attached", timeout=30_000
        ).get_attribute("data-ready")

    def seen(self):
        """Whose picture stands on the left and whose on the right, by its colour."""
        look = """(side) => {
            const image = document.getElementById(side), canvas = document.createElement("canvas");
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return context.getImageData(5, 5, 1, 1).data[1];
        }"""
        return "".join("b" if self.page.evaluate(look, side) > 120 else "a" for side in ("left", "right"))


class Server:
    """The command in a child of a process that has imported it, which may be killed and started again; a context."""

    def __init__(self, folder, port):
        command = ["evaluate", "compare", folder / "a", folder / "b", "--output", folder / "out", "--port", port]
        command += ["--raters", '["ann", "ben"]', "--overlap", "1"]
        program = [sys.executable, ROOT / "tests" / "programs" / "forked_command.py"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(list(map(str, program + command)), **pipes, text=True)

    def start(self):
        """Starts the command; the raters' links by name."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.child = int(self.process.stdout.readline())
        return dict(self.process.stdout.readline().strip().split(": ", 1) for _ in range(2))

    def end(self, number):
        """Ends it by a signal; its exit code."""
        os.kill(self.child, number)
        said = []
        while not said or not said[-1].lstrip("-").isdecimal():
            said.append(self.process.stdout.readline().strip())
        return int(said[-1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None and hasattr(self, "child"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


def test_a_session_over_a_reload_and_a_killed_server(browser, tmp_path):  # noqa: F811
    for side in "ab":
        (tmp_path / side).mkdir()
        for index in range(5):
            (tmp_path / side / f"{index}.png").write_bytes(encode_picture(shade(index, side), "png"))
            (tmp_path / side / f"{index}.txt").write_text(f"<b>shade</b> {index}")
    context = browser.new_context(viewport=VIEWPORT)
    answers, prefers_b = tmp_path / "out" / "compare.jsonl", 0
    with Server(tmp_path, free_port()) as server:
        links = server.start()
        ann = Visitor(context, links["ann"])
        first = ann.ready()
        assert "<b>shade</b>" in ann.page.inner_text("#prompt")
        sides = ann.seen()
        assert sorted(sides) == ["a", "b"]
        ann.page.reload()
        assert ann.ready() == first and ann.seen() == sides
        second_tab = Visitor(context, links["ann"])
        assert second_tab.ready() != first
        second_tab.page.close()
        ann.page.click("#choose-left" if sides[0] == "b" else "#choose-right")
        second = ann.ready(but=first)
        ann.page.keyboard.press("Backspace")  # the wrong one: changed, and changed back
        assert ann.ready(but=second) == first
        ann.page.keyboard.press("ArrowDown")
        assert ann.ready(but=first) == second
        sides = ann.seen()
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        ann.page.keyboard.press("ArrowLeft" if sides[0] == "b" else "ArrowRight")
        ann.page.wait_for_selector("#saved:not(:empty)")
        assert "kept" in ann.page.inner_text("#saved")
        assert len(answers.read_text().splitlines()) == 2
        links = server.start()
        while (shown := ann.ready(but=second)) != "none":
            assert len({*map(str, ann.seen())}) == 2
            prefers_b += 1
            ann.page.keyboard.press("ArrowLeft" if ann.seen()[0] == "b" else "ArrowRight")
            second = shown
        assert prefers_b == 3 and "All done" in ann.page.inner_text("#message")
        ben = Visitor(browser.new_context(viewport={"width": 390, "height": 780}), links["ben"])
        shown = ben.ready()
        assert ben.page.is_visible("#choose-left .stacked") and ben.page.inner_text("#counts") == "0 of 5"
        assert ben.page.evaluate("document.documentElement.scrollWidth") <= 390
        ben.page.click("#choose-neither")
        ben.ready(but=shown)
        ben.page.context.close()
        assert server.end(signal.SIGINT) == 0
    context.close()
    assert ann.problems == ben.problems == []
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["raters"]["ann"] | {"left": 0, "seconds": 0} == {"a": 0, "b": 4, "neither": 1, "left": 0, "seconds": 0}
    assert found["raters"]["ben"]["neither"] == 1 and found["answered"] == 5
    assert len(answers.read_text().splitlines()) == 7
