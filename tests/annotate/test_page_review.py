"""Conflicts on the annotation page: side by side, chosen, merged, edited, sent back."""

import numpy as np

from support.annotation import Client, serving
from support.browser import SIZE, needs_chromium

pytestmark = needs_chromium
LEFT, RIGHT = np.zeros((2, SIZE["height"], SIZE["width"]), np.uint8)
LEFT[20:90, 20:100] = 255
RIGHT[70:160, 80:220] = 255


def disagree(project):
    """Both raters answer every task, each with a mask of their own."""
    with serving(project) as url:
        for name, mask in (("bo", LEFT), ("cy", RIGHT)):
            client = Client(url, project.store.add_person(name, "annotator"))
            while (task := client.json("POST", "/api/next")[1])["task"] is not None:
                assert client.submit(task, mask)[0] == 200


def decisions(project):
    return project.store.all("SELECT * FROM review ORDER BY id")


def test_conflicts_are_decided(rater):
    someone = rater(tasks=4, needed=2, role="reviewer", before=disagree)
    page = someone.page
    someone.until("body[data-ready]")
    assert page.inner_text("#conflicts") == "4"
    page.click("#mode-review")
    someone.until(".tile")
    someone.ready()
    assert page.locator(".tile").count() == 3  # two raters and the proposal
    assert "masks differ" in page.inner_text("#review-chips")
    assert page.locator("#pairs tr").count() == 2

    def decided():
        """Waits for the answer to the decision on the picture of before; that decision."""
        someone.until(f"body[data-reviewed^='{task} ']")
        return decisions(someone.project)[-1]

    task = someone.ready()
    someone.press("2", "Enter")
    row = decided()
    assert row["decision"] == "accept"
    assert np.array_equal(someone.project.store.mask(row_mask(someone.project, row["annotation"])), RIGHT)

    task = someone.ready()
    page.fill("#comment", "both saw half of it")
    page.click("[data-merge=union]")
    assert page.locator(".tile").count() == 4
    someone.press("Enter")
    row = decided()
    assert (row["decision"], row["comment"]) == ("edit", "both saw half of it")
    assert np.array_equal(someone.project.store.mask(row["mask"]), np.maximum(LEFT, RIGHT))

    task = someone.ready()
    someone.press("o", "e")
    someone.until("body[data-ready^=edit]")
    assert np.array_equal(someone.mask(), np.minimum(LEFT, RIGHT))
    someone.press("d")
    someone.click(30, 150)
    edited = someone.mask()
    someone.press("Enter")
    assert np.array_equal(someone.project.store.mask(decided()["mask"]), edited)

    task = someone.ready()
    someone.press("x")
    assert decided()["decision"] == "reject"
    assert someone.ready() == "none"


def row_mask(project, annotation):
    return project.store.one("SELECT mask FROM annotation WHERE id = ?", annotation)["mask"]


def test_an_annotator_sees_no_reviews(rater):
    someone = rater()
    assert not someone.page.locator("#modes").is_visible()
