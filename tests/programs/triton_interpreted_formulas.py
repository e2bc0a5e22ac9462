"""The trainers' formulas by the Triton kernels: collected by test_triton_interpreter.py, see triton_interpreted.py."""

import pytest

from diffdoctor.backends.select import pick
from diffdoctor.backends.triton import weighted_loss as _triton
from programs.triton_interpreted import no_division_warnings, served  # noqa: F401
from support.formulas import *  # noqa: F403
from support.formulas_diffusers import *  # noqa: F403
from support.formulas_trainers import *  # noqa: F403


@pytest.fixture
def backend(served):  # noqa: F811
    """None, what the formulas give as `backend`: the one that `served` chose."""
    assert pick(None, "weighted_loss", "cpu") is _triton
