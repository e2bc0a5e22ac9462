"""The trainers' formulas (test_trainer_formulas.py) as one call each, by both backends on a GPU."""

import pytest
import torch
from formulas_diffusers import *  # noqa: F403
from formulas_trainers import *  # noqa: F403
from helpers_formulas import *  # noqa: F403

from diffdoctor import backends

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    reason = backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def device():
    return "cuda"
