"""The annotation page in a real Chromium, driven by playwright."""

from __future__ import annotations

import contextlib
import shutil
import time

import numpy as np
import pytest

from support.annotation import make_project, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
RUNS = """(bytes) => {
  const runs = [];
  for (let i = 0, j; i < bytes.length; i = j) {
    for (j = i; j < bytes.length && bytes[j] === bytes[i]; j++);
    runs.push(bytes[i], j - i);
  }
  return runs;
}"""
WINDOW_POINT = """(view, x, y) => {
  const at = view.toScreen({ x, y }), stage = view.element.getBoundingClientRect();
  return [at.x + stage.left, at.y + stage.top];
}"""
TOUR_SEEN = "localStorage.setItem('diffdoctor-annotate-tour', 'done')"


needs_chromium = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]
VIEWPORT = {"width": 860, "height": 600}
FLAGS = ["--no-sandbox", "--disable-gpu", "--process-per-site"]
SIZE = {"height": 192, "width": 256}


@pytest.fixture(scope="module")
def browser():
    """One headless Chromium for a module's tests."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def computer(browser):
    """What one person's browser keeps. A module's tests share it: each has an origin of its own, its server's port."""
    context = browser.new_context(viewport=VIEWPORT)
    yield context
    context.close()


class Rater:
    """Someone at the annotation page.

    Args:
        context: a playwright context; its tabs share what the browser keeps.
        url: the server's.
        token: of the person.
        guidelines: leave the guidelines open, as they are at the first visit.
    """

    def __init__(self, context, url: str, token: str, *, guidelines: bool = False):
        self.page = context.new_page()
        self.page.add_init_script(TOUR_SEEN)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._heard)
        self.page.goto(f"{url}/#token={token}")
        self.ready()
        if not guidelines:
            self.page.keyboard.press("Escape")

    def _heard(self, message) -> None:
        # That a request failed is said by the browser, also where the page expects it.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def until(self, selector: str, seconds: float = 30) -> None:
        """Waits for an element. Asks now and then; playwright's own waiting draws the page sixty times a second."""
        end = time.monotonic() + seconds
        while not self.page.evaluate("(selector) => document.querySelector(selector) !== null", selector):
            assert time.monotonic() < end, f"no {selector} after {seconds} s"
            self.page.wait_for_timeout(40)

    def ready(self, task: int | str | None = None) -> str:
        """Waits for a picture, or for a task's; returns what the page is ready for: a task, `none` or `error`."""
        self.until("body[data-ready]" if task is None else f"body[data-ready='{task}']")
        return self.page.locator("body").get_attribute("data-ready")

    def submitted(self, task) -> str:
        """Waits until the answer for a task has arrived; the sha256 of its mask, or its verdict."""
        self.until(f"body[data-submitted^='{task} ']")
        return self.page.locator("body").get_attribute("data-submitted").split(" ", 1)[1]

    def js(self, expression: str):
        """The value of an expression in which `app` is the page's application."""
        return self.page.evaluate(f"import('/static/app.js').then(({{ app }}) => ({expression}))")

    def mask(self) -> np.ndarray:
        """(H, W) uint8, the mask as it would be submitted now."""
        runs = self.js(f"({RUNS})(app.editor.model.bytes())")
        values = np.repeat(np.array(runs[::2], np.uint8), runs[1::2])
        return values.reshape(self.js("[app.editor.model.height, app.editor.model.width]"))

    def at(self, x: float, y: float) -> tuple[int, int]:
        """The window's point, in whole pixels, of a point of the picture."""
        left, top = self.js(f"({WINDOW_POINT})(app.editor.view, {float(x)}, {float(y)})")
        return round(left), round(top)

    def seen(self, points) -> np.ndarray:
        """(N, 2): where in the picture the window's whole pixels lie at which `drag` and `click` hit the points."""
        scale, x, y, ratio, left, top = self.js(
            "(({ scale, x, y, ratio, element }) => [scale, x, y, ratio, element.getBoundingClientRect().left, "
            "element.getBoundingClientRect().top])(app.editor.view)"
        )
        window = np.array([self.at(*point) for point in points], float)
        return ((window - [left, top]) * ratio - [x, y]) / scale

    def drag(self, points, *, steps: int = 3) -> None:
        """Presses at the first point of the picture, moves through all, releases."""
        window = [self.at(*point) for point in points]
        self.page.mouse.move(*window[0])
        self.page.mouse.down()
        for point in window[1:]:
            self.page.mouse.move(*point, steps=steps)
        self.page.mouse.up()

    def click(self, x: float, y: float) -> None:
        """Clicks at a point of the picture."""
        self.page.mouse.click(*self.at(x, y))

    def press(self, *keys: str) -> None:
        """Presses keys, one after another."""
        for key in keys:
            self.page.keyboard.press(key)

    def saved(self) -> None:
        """Waits until the server has the draft."""
        self.until("#saved[data-state=saved]")

    def banner(self) -> str:
        """What stands over the picture; waits for it."""
        self.until("#banner:not([hidden])")
        return self.page.inner_text("#banner span")


@pytest.fixture
def rater(browser, computer, tmp_path):
    """Makes a project, serves it, and opens its page: rater(tasks=…, role=…, …); `project` and `url` are attributes.

    After the test no page may have raised an error or refused anything for its content security policy.
    """
    with contextlib.ExitStack() as stack:
        opened = []

        def make(tasks=1, role="annotator", before=None, guidelines=False, assist=None, **values):
            project = make_project(tmp_path, tasks, **{**SIZE, **values})
            token = project.store.add_person("anna", role)
            if before:
                before(project)
            url = stack.enter_context(serving(project, assist))

            if not computer.pages:
                computer.new_page().goto(f"{url}/static/icon.svg")  # keeps alive the process that the pages share

            def visit(context=None):
                """One more tab; on another computer unless the context is given."""
                if context is None:
                    context = browser.new_context(viewport=VIEWPORT)
                    stack.callback(context.close)
                someone = Rater(context, url, token, guidelines=guidelines)
                someone.project, someone.url, someone.visit = project, url, visit
                opened.append(someone)
                stack.callback(someone.page.close)
                return someone

            return visit(computer)

        yield make
        assert [problem for one in opened for problem in one.problems] == []


def answers(project):
    """The answers that the server has, in their order."""
    return project.store.all("SELECT * FROM annotation ORDER BY id")


def received(project, number: int = -1) -> np.ndarray:
    """The mask (H, W) of an answer, as the server keeps it."""
    return project.store.mask(answers(project)[number]["mask"])
