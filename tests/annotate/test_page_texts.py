"""Texts of users on the annotation page are shown as text."""

import re

from support.browser import needs_chromium

pytestmark = needs_chromium
PAGES = "diffdoctor.annotate", "diffdoctor.web", "diffdoctor.evaluate.compare"
HOSTILE = "<img src=x onerror=window.hit=1><script>window.hit=1</script>\u202e'\"&"


def test_markup_in_texts_is_text(rater):
    def guide(project):
        (project.folder / "guidelines.md").write_text(
            f"# {HOSTILE}\n\n- {HOSTILE}\n\n**{HOSTILE}** [x](javascript:hit=1)"
        )

    someone = rater(meta={"prompt": HOSTILE, "category": HOSTILE}, before=guide, guidelines=True)
    page = someone.page
    assert page.inner_text("#prompt") == HOSTILE
    assert page.locator("#chips span").first.text_content() == HOSTILE
    assert page.locator("#guidelines").is_visible()
    text = page.locator("#guidelines-text").text_content()
    assert text.count(HOSTILE) == 3 and "[x](javascript:hit=1)" in text
    assert page.locator("main img, article img, article script, article a").count() == 0
    assert page.evaluate("window.hit") is None


def test_no_text_is_put_in_as_markup():
    """No script parses a string as HTML or runs one; the markup has no inline script or style."""
    from importlib import resources

    for file in (file for package in PAGES for file in resources.files(package).joinpath("static").iterdir()):
        text = file.read_text()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", text
        ), file.name
        assert not re.search(r"\sstyle=|\son\w+=\"|<script(?![^>]*\ssrc=)|<style", text) or file.name.endswith(".js"), (
            file.name
        )
        assert len(text.splitlines()) <= 400, file.name
