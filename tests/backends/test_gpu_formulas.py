"""The trainers' formulas (support/all_formulas.py) as one call each, by both backends on a GPU."""

import pytest
import torch

from support.all_formulas import FORMULAS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.id)
def test_one_call_equals_the_trainers_formula(formula, gpu_backend):
    formula.run(gpu_backend, device="cuda")
