"""What all tests share: their order, and the backends of a GPU."""

import os

import pytest

if "OMP_WAIT_POLICY" not in os.environ:  # before torch is imported, here and by the processes that tests start
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


# Folders whose files take some ten seconds each.
LONG = ("treat", "demo", "evaluate", "detector")


def pytest_collection_modifyitems(items):
    """Files with slow tests first, short files last, so that several processes end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name not in LONG))


@pytest.fixture(scope="session")
def commands():
    """A warm process of `programs/commands.py`, whose forks run commands, and other programs, in groups."""
    from support.warm import warm_program

    yield from warm_program("commands.py")


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    """The name of each backend for CUDA tensors that can be used here."""
    from diffdoctor import available_backends

    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param
