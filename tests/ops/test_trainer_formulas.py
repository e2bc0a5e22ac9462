"""The trainers' formulas (support/all_formulas.py) as one call each, by the reference and the CPU kernels."""

import pytest

from diffdoctor.backends.select import why_not
from support.all_formulas import FORMULAS

HAS_CPU = why_not("cpu") is None
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not HAS_CPU, reason="no compiled module"))]


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_call_equals_the_trainers_formula(formula, backend):
    formula.run(backend)
