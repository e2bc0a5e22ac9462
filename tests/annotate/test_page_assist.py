"""The annotation page's tool that asks a program of one's own, where there is one."""

import time

import numpy as np

from support.browser import SIZE, needs_chromium

pytestmark = needs_chromium


def test_a_program_marks_what_is_clicked_on_where_there_is_one(rater):
    def assist(picture, x, y):
        assert picture.shape == (SIZE["height"], SIZE["width"], 3)
        asked.append((x, y))
        if x < 20:
            return np.zeros((3, 3))
        mask = np.zeros(picture.shape[:2], bool)
        mask[y - 5 : y + 6, x - 8 : x + 9] = True
        return mask

    asked = []
    someone = rater(assist=assist, proposal=None)
    assert someone.page.is_visible("#tool-assist") and not someone.mask().any()
    someone.press("q")
    someone.click(100, 100)
    end = time.monotonic() + 30
    while not someone.mask().any() and time.monotonic() < end:
        someone.page.wait_for_timeout(40)
    ((x, y),) = asked
    assert abs(x - 100) <= 1 and abs(y - 100) <= 1  # the window's whole pixels are not the picture's
    expected = np.zeros((SIZE["height"], SIZE["width"]), bool)
    expected[y - 5 : y + 6, x - 8 : x + 9] = True
    assert np.array_equal(someone.mask() > 0, expected)
    someone.press("z")
    assert not someone.mask().any()
    someone.click(5, 100)  # the program's fault is said, and nothing is drawn
    someone.until("#toast:not([hidden])")
    assert "assist: expected a mask" in someone.page.inner_text("#toast") and not someone.mask().any()


def test_without_a_program_there_is_no_such_tool(rater):
    someone = rater()
    before = someone.mask()
    assert not someone.page.is_visible("#tool-assist")
    someone.press("q")
    someone.click(100, 30)
    assert someone.js("app.editor.tools.tool") == "lasso" and np.array_equal(someone.mask(), before)
