"""The trainers' formulas (support/all_formulas.py) as one call each, by the reference and the CPU kernels."""

import pytest

from support.all_formulas import FORMULAS
from support.backends import BACKENDS


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_call_equals_the_trainers_formula(formula, backend):
    formula.run(backend)
