"""Nothing drawn on the annotation page is lost: reload, another tab, another computer, no connection, a lost answer."""

import itertools

import numpy as np
import pytest

from support.browser import answers, needs_chromium, received

pytestmark = needs_chromium


def scribble(someone):
    """Four steps: two discs, a refusal, a stroke; returns the mask after each, the first before any."""
    states = [someone.mask()]
    someone.press("d")
    for point in ((200, 30), (220, 60)):
        someone.click(*point)
        states.append(someone.mask())
    someone.press("Tab", "Space")
    states.append(someone.mask())
    someone.press("e")
    someone.drag([(190, 30), (230, 60)])
    states.append(someone.mask())
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(states))
    return states


def test_undo_and_redo_over_a_reload(rater):
    someone = rater()
    states = scribble(someone)
    someone.press("z")
    someone.press("Shift+Digit3")
    someone.page.reload()  # at once: what IndexedDB has is enough
    someone.ready(1)
    assert np.array_equal(someone.mask(), states[3])
    assert someone.page.locator("#tag-text").get_attribute("aria-pressed") == "true"
    someone.press("Shift+Z")
    assert np.array_equal(someone.mask(), states[4])
    for state in reversed(states[:-1]):
        someone.press("z")
        assert np.array_equal(someone.mask(), state)
    someone.press(*["Control+y"] * 4)
    assert np.array_equal(someone.mask(), states[4])


def test_another_computer_goes_on_from_the_draft(rater):
    someone = rater()
    states = scribble(someone)
    someone.saved()
    other = someone.visit()
    assert np.array_equal(other.mask(), states[4])
    other.js("app.editor.model.setThreshold(180)")  # the layers came along, not the mask alone
    assert not np.array_equal(other.mask(), states[4])
    other.press("z", "d")
    other.click(20, 150)
    other.saved()
    newest = other.mask()
    someone.click(20, 20)
    assert "another computer" in someone.banner()
    mine = someone.mask()
    someone.page.click("#banner button:has-text('Take that')")
    someone.saved()
    assert np.array_equal(someone.mask(), newest)
    someone.press("z")  # and what was mine is one step back
    assert np.array_equal(someone.mask(), mine)


def test_a_second_tab_only_looks_until_it_takes_over(rater):
    someone = rater(tasks=2)
    someone.press("d")
    someone.click(200, 30)
    drawn = someone.mask()
    second = someone.visit(someone.page.context)
    assert "drawing in another tab" in second.banner()
    assert np.array_equal(second.mask(), drawn)
    second.click(20, 20)
    second.press("c")
    assert np.array_equal(second.mask(), drawn)
    assert not answers(someone.project)
    second.page.click("#banner button")
    second.ready(1)
    second.press("d")
    second.click(20, 20)
    assert not np.array_equal(second.mask(), drawn)
    assert "drawing in another tab" in someone.banner()
    someone.click(40, 160)
    assert np.array_equal(someone.mask(), drawn)
    second.press("Enter")
    second.ready(2)
    assert "drawing in another tab" in someone.banner()  # the tab that draws goes on to the next picture
    second.page.close()
    someone.ready(2)
    someone.until("#stage:not(.locked)")
    someone.press("c")
    assert someone.ready("none")
    assert [row["verdict"] for row in answers(someone.project)] == ["damaged", "clean"]


def test_offline_and_back(rater):
    someone = rater(tasks=2)
    context = someone.page.context
    context.set_offline(True)
    someone.press("b")
    someone.drag([(30, 30), (90, 60)])
    assert "No connection" in someone.banner()
    someone.drag([(30, 60), (90, 90)])
    drawn = someone.mask()
    context.set_offline(False)
    someone.saved()
    someone.until("#banner[hidden]")
    assert someone.project.store.one("SELECT version FROM draft")["version"] >= 1
    context.set_offline(True)
    someone.press("Enter")
    assert "answer is kept" in someone.banner()
    assert not answers(someone.project)
    context.set_offline(False)
    someone.ready(2)
    assert np.array_equal(received(someone.project), drawn)


@pytest.mark.parametrize("reloaded", [False, True], ids=["tried again", "reloaded and changed"])
def test_an_answer_whose_receipt_was_lost(rater, reloaded):
    """The server has it, the page never hears so: it is sent again and counts once."""
    someone = rater(tasks=2)
    lost = []

    def lose(route):
        if lost:
            return route.continue_()
        lost.append(route.fetch().status)
        return route.abort()

    someone.page.route("**/annotation", lose)
    someone.press("Enter")
    if reloaded:
        someone.banner()
        someone.page.reload()
    someone.ready(2)
    assert lost == [200]
    assert [(row["task"], row["version"]) for row in answers(someone.project)] == [(1, 1)]


def test_an_unknown_token_is_asked_for(rater):
    someone = rater()
    someone.page.evaluate("sessionStorage.setItem('diffdoctor-token', 'wrong')")
    someone.page.reload()
    someone.until("#message input")
    someone.page.fill("#message input", someone.project.store.add_person("bo", "annotator"))
    someone.press("Enter")
    someone.until("body[data-ready]:not([data-ready=error])")
    assert someone.js("app.me.name") == "bo"
