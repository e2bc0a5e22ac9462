"""The page of `diffdoctor repair` in a real browser, from the disk: the slider uncovers what was redrawn."""

import io
import shutil

import numpy as np
import pytest

pytest.importorskip("jinja2")
from PIL import Image

from diffdoctor.repairs.report import write_page
from diffdoctor.viz.draw import png_bytes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIDE = 320


def record(name):
    tries = [{"seed": 1, "strength": 0.6, "score": 0.1, "why_not": ""}]
    region = {"box": [80, 80, 160, 160], "score_before": 0.9, "score_after": 0.1, "tries": tries, "kept": True}
    return {"name": name, "height": SIDE, "width": SIDE, "mean_before": 0.4, "mean_after": 0.1, "regions": [region]}


def pixel(page, box, share):
    """The colour of the screen at a share of a slider's width, near its top."""
    shot = Image.open(io.BytesIO(page.screenshot()))
    return shot.convert("RGB").getpixel((int(box["x"] + share * box["width"]), int(box["y"] + 20)))


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_slider_moves_by_mouse_and_by_keys(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    for folder, colour in (("before", (200, 0, 0)), ("pictures", (0, 0, 200))):
        (tmp_path / folder / "a b").mkdir(parents=True)
        for name in ("a b/x", "y"):
            (tmp_path / folder / f"{name}.png").write_bytes(png_bytes(np.full((SIDE, SIDE, 3), colour, np.uint8)))
    metrics = {"kept": 2, "regions": 2, "flagged_before": 2, "flagged_after": 0, "pictures": 2}
    write_page(tmp_path / "before_after.html", [record("a b/x"), record("y")], metrics)
    shutil.rmtree(tmp_path / "before")  # the page holds its pictures
    with playwright.sync_playwright() as start:
        browser = start.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 700})
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(request.url))
        page.goto((tmp_path / "before_after.html").as_uri())
        sliders = page.locator(".slider")
        assert sliders.count() == 2
        box = sliders.first.bounding_box()

        def is_before(share):
            red, _, blue = pixel(page, box, share)
            assert abs(red - blue) > 100
            return red > blue

        assert [is_before(share) for share in (0.2, 0.4, 0.6, 0.8)] == [True, True, False, False]
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] / 2, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.7 * box["width"], middle, steps=4)
        page.mouse.up()
        assert [is_before(share) for share in (0.4, 0.6, 0.8)] == [True, True, False]
        inputs = page.locator(".slider input")
        inputs.first.focus()
        page.keyboard.press("Home")
        assert [is_before(share) for share in (0.1, 0.5)] == [False, False]
        page.keyboard.press("End")
        assert [is_before(share) for share in (0.5, 0.9)] == [True, True]
        assert inputs.nth(1).input_value() == "50"  # each picture has its own
        link = page.locator(".slider + figcaption a").first
        link.click()
        assert page.url.endswith("pictures/a%20b/x.png")
        page.go_back()
        assert page.locator("svg rect.over").count() == 2
        browser.close()
    assert not faults
