"""What the tests of the operations share."""

import pytest

from support.backends import BACKENDS


@pytest.fixture(params=BACKENDS)
def default_backend(request, monkeypatch):
    """Every backend for CPU tensors, as the one that DIFFDOCTOR_BACKEND names."""
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", request.param)
    return request.param
