"""What the tests of annotation share: a server with its people, and the page's browser."""

import pytest

from support.annotation import PEOPLE, Client, make_project, serving
from support.browser import browser, computer, rater  # noqa: F401


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of a project of sixty tasks, and its people's clients by name."""
    project = make_project(tmp_path_factory.mktemp("served"), 60, blind=lambda seed: seed == 1)
    tokens = {name: project.store.add_person(name, role) for name, role in PEOPLE.items()}
    with serving(project) as url:
        yield project, {name: Client(url, token) for name, token in tokens.items()}
