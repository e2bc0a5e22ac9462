"""The browser of the annotation page's tests."""

from support.browser import browser, computer, rater  # noqa: F401
