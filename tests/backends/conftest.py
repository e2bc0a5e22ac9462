"""What the tests of backends share."""

import importlib

import pytest


@pytest.fixture
def glue(gpu_backend):
    """The module that launches weighted_loss on each backend of a GPU."""
    return importlib.import_module(f"diffdoctor.backends.{gpu_backend}.weighted_loss")


@pytest.fixture
def artifact_glue(gpu_backend):
    """The module that launches artifact_loss on each backend of a GPU."""
    return importlib.import_module(f"diffdoctor.backends.{gpu_backend}.artifact_loss")
