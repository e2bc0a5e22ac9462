"""What the tests of backends share."""

import importlib

import pytest

import diffdoctor
from benchmarks.ops import host
from diffdoctor.backends import select
from diffdoctor.backends.cuda import artifact_loss as cuda_artifact
from diffdoctor.backends.cuda import device as cuda_device
from diffdoctor.backends.cuda import policy_loss as cuda_policy
from diffdoctor.backends.cuda import weighted_loss as cuda_weighted
from support.cuda_shim import build_module


@pytest.fixture
def glue(gpu_backend):
    """The module that launches weighted_loss on each backend of a GPU."""
    return importlib.import_module(f"diffdoctor.backends.{gpu_backend}.weighted_loss")


@pytest.fixture
def artifact_glue(gpu_backend):
    """The module that launches artifact_loss on each backend of a GPU."""
    return importlib.import_module(f"diffdoctor.backends.{gpu_backend}.artifact_loss")


@pytest.fixture(scope="session")
def shim():
    """The native module's CUDA half, its kernels running on the CPU."""
    return build_module()


@pytest.fixture
def cuda(shim, monkeypatch):
    """The backend's glue over the host build of its kernels, with workspaces of its own."""
    monkeypatch.setattr(cuda_device, "native", shim)
    monkeypatch.setattr(cuda_device, "_workspaces", {})
    yield cuda_weighted
    # Every launch leaves the workspace's head as it found it.
    assert all(not workspace[:4096].any() for workspace in cuda_device._workspaces.values())


@pytest.fixture
def public(cuda, monkeypatch):
    """The public functions on CPU tensors, served by the CUDA backend."""
    monkeypatch.setitem(select._chosen, ("cpu", "weighted_loss"), cuda)
    monkeypatch.setitem(select._chosen, ("cpu", "artifact_loss"), cuda_artifact)
    monkeypatch.setitem(select._chosen, ("cpu", "policy_loss"), cuda_policy)
    # A plan holds its backend's form: those of other tests would lead around the kernels, and these around theirs.
    host.forget_plans()
    monkeypatch.delenv("DIFFDOCTOR_BACKEND", raising=False)
    yield diffdoctor
    host.forget_plans()
