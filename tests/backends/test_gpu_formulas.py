"""The trainers' formulas (test_trainer_formulas.py) as one call each, by both backends on a GPU."""

import pytest
import torch

from support.formulas import *  # noqa: F403
from support.formulas_diffusers import *  # noqa: F403
from support.formulas_trainers import *  # noqa: F403

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def backend(gpu_backend):
    return gpu_backend


@pytest.fixture
def device():
    return "cuda"
