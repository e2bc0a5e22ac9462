"""The trainers' formulas by the Triton kernels: collected by test_triton_interpreter.py, see triton_interpreted.py."""

import pytest
from formulas_diffusers import *  # noqa: F403
from formulas_trainers import *  # noqa: F403
from helpers_formulas import *  # noqa: F403
from triton_interpreted import no_division_warnings, served  # noqa: F401

from diffdoctor.backends.select import pick
from diffdoctor.backends.triton import weighted_loss as _triton


@pytest.fixture
def backend(served):  # noqa: F811
    """None, what the formulas give as `backend`: the one that `served` chose."""
    assert pick(None, "weighted_loss", "cpu") is _triton
