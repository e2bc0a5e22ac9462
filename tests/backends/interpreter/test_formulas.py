"""The trainers' formulas (support/all_formulas.py) as one call each, by the Triton kernels in the interpreter."""

import pytest

from diffdoctor.backends.select import pick
from diffdoctor.backends.triton import weighted_loss as _triton
from support.all_formulas import FORMULAS


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.id)
def test_one_call_equals_the_trainers_formula(served, formula):
    assert pick(None, "weighted_loss", "cpu") is _triton
    formula.run(backend=None)
