"""The browser of the annotation page's tests."""

from support.browser import browser, rater  # noqa: F401
