"""The trainers' formulas (support/all_formulas.py) as one call each, by the Triton kernels in the interpreter."""

import pytest

from diffdoctor.backends.select import pick
from diffdoctor.backends.triton import weighted_loss as _triton
from support.all_formulas import FORMULAS

FIRST = {formula.id.split("-")[0]: formula.id for formula in reversed(FORMULAS)}
"""Of a formula with variants, which the interpreter takes seconds for, the first."""


@pytest.mark.parametrize(
    "formula",
    [
        pytest.param(formula, id=formula.id, marks=() if formula.id in FIRST.values() else pytest.mark.study)
        for formula in FORMULAS
    ],
)
def test_one_call_equals_the_trainers_formula(served, formula):
    assert pick(None, "weighted_loss", "cpu") is _triton
    formula.run(backend=None)
