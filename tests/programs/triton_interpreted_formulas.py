"""The trainers' formulas by the Triton kernels: collected by test_triton_interpreter.py, see triton_interpreted.py."""

import pytest

from diffdoctor.backends.select import pick
from diffdoctor.backends.triton import weighted_loss as _triton
from programs.triton_interpreted import no_division_warnings, served  # noqa: F401
from support.all_formulas import FORMULAS


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.id)
def test_one_call_equals_the_trainers_formula(served, formula):  # noqa: F811
    assert pick(None, "weighted_loss", "cpu") is _triton
    formula.run(backend=None)
