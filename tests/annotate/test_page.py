"""Marking on the annotation page, in a real Chromium: what the server receives is what was drawn."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from diffdoctor.annotate.intake import NewTask, add_task
from diffdoctor.annotate.project import read_place
from diffdoctor.data.codec import encode_picture
from support.annotation import spot
from support.browser import SIZE, answers, needs_chromium, received

pytestmark = needs_chromium
PROGRAMS = Path(__file__).parents[1] / "programs"


def centres(height, width):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], 1)


def inside(corners, height, width):
    """(H, W) bool: pixels whose centre lies in a polygon."""
    from matplotlib import path

    return path.Path(np.vstack([corners, corners[:1]])).contains_points(centres(height, width)).reshape(height, width)


def along(points, radius, height, width):
    """(H, W) bool: pixels whose centre is at most `radius` from a path."""
    far, pixels = np.full(height * width, np.inf), centres(height, width)
    for a, b in itertools.pairwise(points):
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


SHAPES = [(512, 512), (1024, 1024), (4096, 4096), (37, 53), (641, 479), (1, 300)]


def test_masks_arrive_bit_for_bit(rater, tmp_path):
    def add(project):
        for number, (height, width) in enumerate(SHAPES):
            path = tmp_path / f"{number}.png"
            path.write_bytes(encode_picture(np.full((height, width, 3), 100, np.uint8), "png"))
            place = {"file": str(path)}
            task = NewTask(read_place(place), place, proposal=noise(height, width), priority=-float(number))
            with project.store.writing():
                add_task(project.store, task, round=1)

    someone = rater(tasks=0, before=add)
    for height, width in SHAPES:
        task = someone.ready()
        someone.press("b")
        someone.drag([(width * 0.2, height * 0.3), (width * 0.8, height * 0.6), (width * 0.3, height * 0.9)])
        own = someone.js("import('/static/api.js').then((api) => api.sha256(app.editor.model.bytes()))")
        share = someone.js("app.editor.model.marked / app.editor.model.mask.length")
        someone.press("Enter")
        assert someone.submitted(task) == own
        mask = received(someone.project)
        assert mask.shape == (height, width)
        assert hashlib.sha256(mask.tobytes()).hexdigest() == own
        assert 0 < share < 1
        someone.until(f"body[data-ready]:not([data-ready='{task}'])")
    assert someone.ready() == "none"


def noise(height, width):
    """A map of blobs with ragged edges."""
    rng = np.random.default_rng(0)
    side = max(1, min(height, width) // 24)
    coarse = rng.integers(0, 256, (-(-height // side), -(-width // side)), np.uint8)
    ragged = rng.integers(0, 8, 509, np.uint8)  # a prime: no two rows alike
    return np.kron(coarse & 0xF8, np.ones((side, side), np.uint8))[:height, :width] | np.resize(ragged, (height, width))


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


def test_a_click_takes_a_marked_spot_away_whole(rater):
    """A part and what was drawn over it go by one click and come back by one undo."""
    someone = rater()
    before = someone.mask()
    y, x = np.argwhere(spot(0, **SIZE) > 0).mean(0)
    someone.press("d")
    someone.click(x + 2, y + 2)
    assert np.array_equal(someone.mask(), before)  # drawn inside the part: forced, but marked all the same
    someone.press("v")
    someone.click(x, y)
    gone = someone.mask()
    assert not gone[spot(0, **SIZE) > 0].any() and gone.any()
    someone.press("z")
    assert np.array_equal(someone.mask(), before)
    someone.press("Shift+Z")
    someone.click(x, y)
    assert np.array_equal(someone.mask(), before)


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


def test_a_token_that_is_not_known_is_asked_for_again(rater):
    someone = rater()
    token = someone.js("sessionStorage.getItem('diffdoctor-token')")
    someone.js("sessionStorage.setItem('diffdoctor-token', 'wrong')")
    someone.page.reload()
    someone.until("body[data-ready='error']")
    assert "This token is not known here" in someone.page.inner_text("#message")
    someone.page.fill("#message input", "  ")
    someone.press("Enter")  # nothing was given
    assert someone.page.locator("#message input").is_visible()
    someone.page.fill("#message input", f" {token} ")
    someone.press("Enter")
    assert someone.ready(1) == "1"


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
    someone.until("body[data-feedback=hit]")
    assert "Overlap 100 %" in someone.page.inner_text("#notice")
    assert someone.js("app.editor.overlay.truth.length") == SIZE["height"] * SIZE["width"]
    someone.press("Enter")
    someone.ready(2)
    someone.press("c")
    someone.until("body[data-feedback=miss]")
    assert "Not quite" in someone.page.inner_text("#notice")


def test_a_blind_task_shows_no_proposal(rater):
    someone = rater(blind=True)
    assert not someone.page.locator("#proposal").is_visible()
    assert not someone.mask().any()
    assert "No proposal" in someone.page.inner_text("#chips")


def test_random_edits_equal_a_replay(rater):
    """Edits, undo and redo in any order against the list of states that they went through, in the page's own engine."""
    someone = rater()
    assert someone.page.evaluate((PROGRAMS / "mask_replay.js").read_text()) == "80 histories"


def test_budgets_at_1024(rater, capsys):
    """Printed; the bounds are those of the design, with room for a busy machine."""
    someone = rater(height=1024, width=1024)
    ready = someone.page.evaluate(
        "performance.getEntriesByType('resource').reduce((a, b) => Math.max(a, b.responseEnd), 0)"
    )
    someone.js("app.editor.view.frames.splice(0)")
    someone.js("addEventListener('pointermove', () => { window.began = performance.now(); }, true)")
    someone.js("addEventListener('pointermove', () => (window.moves ??= []).push(performance.now() - began))")
    someone.press("b")
    someone.drag([(100, 100), (900, 300), (200, 500), (800, 800), (300, 900)], steps=25)
    moves, frames = someone.js("[moves, app.editor.view.frames]")
    slide = someone.js(
        "(() => { const t = performance.now(); app.editor.model.setThreshold(90); return performance.now() - t; })()"
    )
    someone.press("Enter")
    someone.submitted(1)
    submit = someone.js("app.submitMs")
    move, frame = np.percentile(moves, 99), np.percentile(frames, 99)
    with capsys.disabled():
        print(f"\n1024²: ready {ready:.0f} ms, move p99 {move:.1f} ms, frame p99 {frame:.1f} ms,", end=" ")
        print(f"slider {slide:.0f} ms, submit {submit:.0f} ms")
    assert ready < 10_000 and move < 100 and frame < 200 and submit < 5_000


def test_an_outline_of_large_pixels_hides_none_of_them(rater):
    someone = rater(height=18, width=40)
    mask = someone.mask() > 0
    shown = np.array(
        someone.js("""(({ canvas, x, y, scale }, { width, height }) => {
      const context = canvas.getContext('2d'), found = [];
      for (let row = 0; row < height; row++) for (let column = 0; column < width; column++)
        found.push([...context.getImageData(x + (column + 0.5) * scale, y + (row + 0.5) * scale, 1, 1).data]);
      return found;
    })(app.editor.view, app.editor.model)""")
    )[:, :3].reshape(*mask.shape, 3)
    picture = read_picture(someone.project)
    filled = picture + (np.array([255, 45, 120]) - picture) * (84 / 255)
    assert np.abs(shown - np.where(mask[..., None], filled, picture)).max() <= 3  # also along the outlines
    assert someone.js("app.editor.overlay.thickness") == 0


def read_picture(project):
    """(H, W, 3) of the first task's picture."""
    return np.array(Image.open(project.folder.parent / "pictures" / "0000.png").convert("RGB"), float)
