"""Marking on the annotation page, in a real Chromium: what the server receives is what was drawn."""

import hashlib
import json
import re

import numpy as np
import pytest

from support.annotation import make_project, serving, spot
from support.browser import CHROMIUM, Rater, chromium

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]
SIZE = {"height": 192, "width": 256}


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def rater(browser, tmp_path):
    """Makes a project and someone at its page: rater(tasks=…, role=…); `rater.project` is the project."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        opened = []

        def make(tasks=1, role="annotator", before=None, guidelines=False, **values):
            project = make_project(tmp_path, tasks, **{**SIZE, **values})
            if before:
                before(project)
            url = stack.enter_context(serving(project))
            context = browser.new_context(viewport={"width": 1280, "height": 800})
            stack.callback(context.close)
            someone = Rater(context, url, project.store.add_person("anna", role), guidelines=guidelines)
            someone.project = project
            opened.append(someone)
            return someone

        yield make
        assert [problem for one in opened for problem in one.problems] == []


def answers(project):
    return project.store.all("SELECT * FROM annotation ORDER BY id")


def received(project, number=-1):
    """The mask (H, W) of an answer, as the server keeps it."""
    return project.store.mask(answers(project)[number]["mask"])


def centres(height, width):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], 1)


def inside(corners, height, width):
    """(H, W) bool: pixels whose centre lies in a polygon."""
    from matplotlib.path import Path

    return Path(np.vstack([corners, corners[:1]])).contains_points(centres(height, width)).reshape(height, width)


def along(points, radius, height, width):
    """(H, W) bool: pixels whose centre is at most `radius` from a path."""
    far, pixels = np.full(height * width, np.inf), centres(height, width)
    for a, b in zip(points[:-1], points[1:], strict=True):
        t = np.clip(((pixels - a) @ (b - a)) / max((b - a) @ (b - a), 1e-12), 0, 1)
        far = np.minimum(far, np.linalg.norm(pixels - a - t[:, None] * (b - a), axis=1))
    return (far <= radius).reshape(height, width)


def test_what_is_drawn_is_what_the_server_has(rater):
    """Every tool against its definition; a pixel whose centre lies on an edge may fall either way by rounding."""
    someone = rater()
    height, width = SIZE["height"], SIZE["width"]
    expected = spot(0, height, width) > 0
    expected[-height // 8 :, -width // 8 :] = True
    assert np.array_equal(someone.mask() > 0, expected)

    someone.press("v")
    someone.click(width - 10, height - 10)  # the false part
    expected[-height // 8 :, -width // 8 :] = False
    assert np.array_equal(someone.mask() > 0, expected)

    lasso = [(20, 120), (90, 110), (100, 160), (60, 180), (25, 170)]
    someone.press("l")
    seen = someone.seen(lasso)
    someone.drag(lasso)
    expected |= inside(seen, height, width)

    someone.press("b")
    someone.page.mouse.move(*someone.at(180, 60))
    for _ in range(3):
        someone.page.mouse.wheel(0, -120)  # zoomed: a stroke is where it is seen
    stroke = [(170, 50), (190, 62), (200, 55)]
    seen = someone.seen(stroke)
    someone.press("]", "]")
    radius = someone.js("app.editor.tools.size")
    someone.drag(stroke)
    expected |= along(seen, radius, height, width)

    someone.press("p")
    corners = [(175, 70), (200, 72), (195, 90)]
    seen = someone.seen(corners)
    for corner in corners:
        someone.click(*corner)
    someone.press("Enter", "0")
    expected |= inside(seen, height, width)

    someone.press("Shift+L")
    off = [(40, 130), (70, 130), (70, 150), (40, 150)]
    seen = someone.seen(off)
    someone.drag(off)
    expected &= ~inside(seen, height, width)

    someone.press("i")
    unsure = [(110, 150), (150, 150), (150, 180), (110, 180)]
    ignored = inside(someone.seen(unsure), height, width)
    someone.drag(unsure)

    drawn = someone.mask()
    assert np.mean((drawn > 0) != expected) < 1e-3
    someone.press("Enter")
    sha = someone.submitted(1)
    assert someone.ready("none")
    assert sha == hashlib.sha256(drawn.tobytes()).hexdigest()
    assert np.array_equal(received(someone.project), drawn)
    row = answers(someone.project)[0]
    assert (row["verdict"], row["accepted"], row["refused"], row["drawn"]) == ("damaged", 1, 1, 5)
    assert 0 < row["active_ms"] <= row["wall_ms"]
    assert np.mean((someone.project.store.mask(row["ignore"]) > 0) != ignored) < 1e-3


def test_a_disc_grows_and_alt_removes(rater):
    def flat(seed):
        """A map without a part, so that `grow` goes by the colours alone."""
        return np.zeros((SIZE["height"], SIZE["width"]), np.uint8)

    someone = rater(proposal=flat)
    height, width = SIZE["height"], SIZE["width"]
    square = spot(0, height, width) > 0  # the picture is of one colour there
    y, x = np.argwhere(square).mean(0)
    someone.press("g")
    someone.click(x, y)
    assert np.array_equal(someone.mask() > 0, square)
    someone.press("d")
    centre = someone.seen([(x, y)])[0]
    someone.page.keyboard.down("Alt")
    someone.click(x, y)
    someone.page.keyboard.up("Alt")
    hole = along(np.array([centre, centre]), round(height / 20), height, width)
    assert np.mean((someone.mask() > 0) != (square & ~hole)) < 1e-3


@pytest.mark.parametrize("shape", [(512, 512), (1024, 1024), (4096, 4096), (37, 53), (641, 479), (1, 300)], ids=str)
def test_masks_arrive_bit_for_bit(rater, shape):
    height, width = shape
    someone = rater(height=height, width=width, proposal=lambda seed: noise(height, width))
    someone.press("b")
    someone.drag([(width * 0.2, height * 0.3), (width * 0.8, height * 0.6), (width * 0.3, height * 0.9)])
    drawn = someone.mask()
    assert 0 < np.mean(drawn > 0) < 1
    someone.press("Enter")
    assert someone.submitted(1) == hashlib.sha256(drawn.tobytes()).hexdigest()
    assert np.array_equal(received(someone.project), drawn)


def noise(height, width):
    """A map of blobs with ragged edges."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (-(-height // 16), -(-width // 16)), np.uint8)
    return (np.kron(coarse, np.ones((16, 16), np.uint8))[:height, :width] & 0xF8) | rng.integers(0, 8, (height, width), np.uint8)


def test_the_slider_keeps_edits(rater):
    """The threshold there and back gives the same mask; drawings and refusals stay all the while."""
    someone = rater()
    someone.click(*np.argwhere(spot(0, **SIZE) > 0).mean(0)[::-1])  # the lasso refuses a part by a click, too
    lasso = [(20, 120), (90, 110), (100, 160), (25, 170)]
    someone.drag(lasso)
    edited = someone.mask()
    assert not (edited[spot(0, **SIZE) > 0].mean() > 200)
    shown = []
    for threshold in (1, 180, 255, 26):
        someone.js(f"app.editor.model.setThreshold({threshold})")
        shown.append(someone.mask() > 0)
    core = inside(np.array([(30, 122), (85, 116), (93, 155), (30, 165)]), **SIZE)
    assert all(mask[core].all() for mask in shown)
    someone.js(f"app.editor.model.setThreshold({someone.js('app.editor.start')})")
    assert np.array_equal(someone.mask(), edited)
    slider = someone.page.locator("#threshold")
    slider.focus()
    someone.press("End")  # 255: the proposal is gone, what was drawn is not
    last = someone.mask()
    assert last[core].all() and not last[-10:, -10:].any()
    someone.press("Escape", "z")
    assert np.array_equal(someone.mask(), edited)


def test_by_keyboard_alone(rater):
    someone = rater(tasks=4)
    order = [int(row["id"]) for row in someone.project.store.all("SELECT id FROM task ORDER BY priority DESC")]
    someone.press("Tab", "Tab")
    assert "Part 2 of 2" in someone.page.inner_text("#hint")
    someone.press("Space", "Shift+Digit1")
    assert someone.page.locator("#tag-missing-part").get_attribute("aria-pressed") == "true"
    someone.press("Enter")
    someone.ready(order[1])
    someone.press("c")
    someone.ready(order[2])
    someone.press("u")
    someone.ready(order[3])
    someone.press("s")
    someone.press("1")
    assert someone.ready("none")
    rows = {row["task"]: row for row in answers(someone.project)}
    assert [rows[task]["verdict"] for task in order] == ["damaged", "clean", "unusable", "skipped"]
    assert json.loads(rows[order[0]]["tags"]) == ["missing-part"]
    assert np.array_equal(someone.project.store.mask(rows[order[0]]["mask"]), spot(0, **SIZE))


def test_every_key_of_the_help_chooses_its_tool(rater):
    someone = rater()
    for key, tool in {"v": "select", "l": "lasso", "Shift+L": "unlasso", "b": "brush", "e": "eraser", "p": "polygon",
                      "g": "grow", "d": "disc", "i": "ignore"}.items():  # fmt: skip
        someone.press(key)
        assert someone.page.locator("#toolbar [aria-pressed=true]").get_attribute("id") == f"tool-{tool}"
    someone.press("1")
    assert someone.js("app.editor.view.scale") == 1
    someone.press("h")
    assert not someone.js("app.editor.view.masked")
    someone.press("h", "?")
    assert someone.page.locator("#help").is_visible()
    assert someone.page.locator("#keys dt").count() > 30
    someone.press("Escape")
    assert not someone.page.locator("#help").is_visible()


def test_clean_asks_again_where_something_was_drawn(rater):
    someone = rater(tasks=2)
    someone.press("d")
    someone.click(30, 30)
    someone.press("c")
    assert "You drew here" in someone.page.inner_text("#toast")
    assert not answers(someone.project)
    someone.press("c")
    someone.ready(2)
    assert [row["verdict"] for row in answers(someone.project)] == ["clean"]


def test_the_last_picture_can_be_corrected(rater):
    someone = rater(tasks=2)
    someone.press("d")
    someone.click(200, 30)
    first = someone.mask()
    someone.press("Enter")
    someone.ready(2)
    someone.press("Backspace")
    someone.ready(1)
    assert np.array_equal(someone.mask(), first)
    someone.press("z")  # the history is there as well
    second = someone.mask()
    assert not np.array_equal(first, second)
    someone.press("Enter")
    someone.ready(2)
    assert [(row["task"], row["version"]) for row in answers(someone.project)] == [(1, 1), (1, 2)]
    assert np.array_equal(received(someone.project), second)


def test_training_shows_the_truth_afterwards(rater):
    someone = rater(tasks=2, kind="training", truth=lambda seed: spot(seed, **SIZE))
    someone.press("Tab", "Tab", "Space", "Enter")
    someone.page.wait_for_selector("body[data-feedback=hit]")
    assert "Overlap 100 %" in someone.page.inner_text("#notice")
    assert someone.js("app.editor.overlay.truth.length") == SIZE["height"] * SIZE["width"]
    someone.press("Enter")
    someone.ready(2)
    someone.press("c")
    someone.page.wait_for_selector("body[data-feedback=miss]")
    assert "Not quite" in someone.page.inner_text("#notice")


def test_a_blind_task_shows_no_proposal(rater):
    someone = rater(blind=True)
    assert not someone.page.locator("#proposal").is_visible()
    assert not someone.mask().any()
    assert "No proposal" in someone.page.inner_text("#chips")


HOSTILE = "<img src=x onerror=window.hit=1><script>window.hit=1</script>\u202e'\"&"


def test_markup_in_texts_is_text(rater):
    def guide(project):
        (project.folder / "guidelines.md").write_text(f"# {HOSTILE}\n\n- {HOSTILE}\n\n**{HOSTILE}** [x](javascript:hit=1)")

    someone = rater(meta={"prompt": HOSTILE, "category": HOSTILE}, before=guide, guidelines=True)
    page = someone.page
    assert page.inner_text("#prompt") == HOSTILE
    assert page.locator("#chips span").first.text_content() == HOSTILE
    assert page.locator("#guidelines").is_visible()
    text = page.locator("#guidelines-text").text_content()
    assert text.count(HOSTILE) == 3 and "[x](javascript:hit=1)" in text
    assert page.locator("main img, article img, article script, article a").count() == 0
    assert page.evaluate("window.hit") is None


def test_random_edits_equal_a_replay(rater):
    """Edits, undo and redo in any order against the list of states that they went through, in the page's own engine."""
    someone = rater()
    assert someone.page.evaluate(REPLAY) == "160 histories"


REPLAY = """async () => {
  const { Mask } = await import("/static/mask.js"), { capsule } = await import("/static/raster.js");
  let seed = 1;
  const random = (n) => (seed = (seed * 1103515245 + 12345) % 2147483648) % n;
  const point = (w, h) => ({ x: random(w * 8) / 8, y: random(h * 8) / 8 });
  for (let trial = 0; trial < 160; trial++) {
    const w = 5 + random(50), h = 5 + random(40), map = new Uint8Array(w * h);
    for (let blob = 0; blob < 6; blob++) {
      const shape = capsule(point(w, h), point(w, h), 1 + random(4), w, h), value = random(256);
      if (shape) shape.inside.forEach((on, k) => { if (on) map[(shape.y + Math.floor(k / shape.width)) * w + shape.x + k % shape.width] = value; });
    }
    const model = new Mask(w, h, map, 26), show = () => model.bytes().join() + model.ignoreBytes().join() + model.threshold;
    const states = [show()];
    let at = 0;
    const step = (changed) => { if (changed) { states.length = ++at; states.push(show()); } };
    for (let move = 0; move < 50; move++) {
      const kind = random(10), before = model.threshold;
      if (kind < 3) step(model.draw(["forced", "ignore"][random(2)], capsule(point(w, h), point(w, h), random(5), w, h), random(3) - 1));
      else if (kind < 5 && model.parts.length) { const part = model.parts[random(model.parts.length)]; step(model.decide([part], !model.isKept(part))); }
      else if (kind === 5) { model.setThreshold(1 + random(255), false); model.setThreshold(1 + random(255)); step(model.threshold !== before); }
      else if (kind === 6) { model.begin("forced"); model.paint(capsule(point(w, h), point(w, h), 2, w, h), 1); model.cancel(); }
      else if (kind < 9) at -= model.undo() ? 1 : 0;
      else at += model.redo() ? 1 : 0;
      if (show() !== states[at]) return `trial ${trial}, move ${move}: another state`;
      if (model.marked !== model.bytes().filter(Boolean).length) return `trial ${trial}, move ${move}: miscounted`;
    }
    const other = new Mask(w, h, map, 26);
    other.restore(structuredClone(model.save()));
    while (model.undo() && other.undo());
    if (other.bytes().join() !== model.bytes().join()) return `trial ${trial}: another history after a reload`;
  }
  return "160 histories";
}"""


def test_budgets_at_1024(rater, capsys):
    """Printed; the bounds are those of the design, with room for a busy machine."""
    someone = rater(height=1024, width=1024)
    ready = someone.page.evaluate("performance.getEntriesByType('resource').reduce((a, b) => Math.max(a, b.responseEnd), 0)")
    someone.js("(() => { const v = app.editor.view, go = v.element.onpointermove; v.frames.length = 0; window.moves = []; let began; "
               "addEventListener('pointermove', () => { began = performance.now(); }, true); "
               "addEventListener('pointermove', () => { moves.push(performance.now() - began); }); })()")  # fmt: skip
    someone.press("b")
    someone.drag([(100, 100), (900, 300), (200, 500), (800, 800), (300, 900)], steps=40)
    moves, frames = someone.js("[moves, app.editor.view.frames]")
    slide = someone.js("(() => { const t = performance.now(); app.editor.model.setThreshold(90); return performance.now() - t; })()")
    someone.press("Enter")
    someone.submitted(1)
    submit = someone.js("app.submitMs")
    move, frame = np.percentile(moves, 99), np.percentile(frames, 99)
    with capsys.disabled():
        print(f"\n1024²: ready {ready:.0f} ms, move p99 {move:.1f} ms, frame p99 {frame:.1f} ms, slider {slide:.0f} ms, submit {submit:.0f} ms")
    assert ready < 10_000 and move < 100 and frame < 200 and submit < 5_000


def test_no_text_is_put_in_as_markup():
    """The page's scripts use nothing that would parse a string as HTML or run it; its markup has no inline script or style."""
    from importlib import resources

    for file in resources.files("diffdoctor.annotate").joinpath("static").iterdir():
        text = file.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", text), file.name
        assert not re.search(r"\sstyle=|\son\w+=\"|<script(?![^>]*\ssrc=)|<style", text) or file.name.endswith(".js"), file.name
        assert len(text.splitlines()) <= 400, file.name
