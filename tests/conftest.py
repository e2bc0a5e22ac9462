"""What all tests share: their device, their order, and the backends of a GPU.

Stages run on the CPU, also where there is a GPU, since there alone the same seed gives the same bits. With
DIFFDOCTOR_TEST_DEVICE=cuda they run on the GPU, and the tests marked `cpu` are skipped.
"""

import os

import pytest

if "OMP_WAIT_POLICY" not in os.environ:  # before torch is imported, here and by the processes that tests start
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


ON_GPU = os.environ.get("DIFFDOCTOR_TEST_DEVICE", "cpu") != "cpu"
if not ON_GPU:
    os.environ["ACCELERATE_USE_CPU"] = "true"

# Folders whose files take some ten seconds each.
LONG = ("treat", "demo", "evaluate", "detector")


def pytest_collection_modifyitems(items):
    """Files with slow tests first, short files last, so that several processes end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    if ON_GPU:
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason="of the CPU alone"))
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
