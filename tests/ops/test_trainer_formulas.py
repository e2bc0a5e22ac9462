"""Every masked, weighted or Huber formula of the trainers we know, as one call (two with a prior target).

Each formula is typed out in plain PyTorch as the trainer computes it (docs/ops.md has the table of names), in fp32, in
formulas_diffusers.py and formulas_trainers.py. Value and gradient are compared here with the reference and the CPU
kernels, in test_cuda_shim.py with the CUDA kernels on the CPU, in triton_interpreted_formulas.py with Triton's in its
interpreter, and in test_gpu_formulas.py with both on a GPU.
"""

import pytest

from diffdoctor.backends.select import why_not
from support.formulas import *  # noqa: F403
from support.formulas_diffusers import *  # noqa: F403
from support.formulas_trainers import *  # noqa: F403

HAS_CPU = why_not("cpu") is None
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not HAS_CPU, reason="no compiled module"))]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param
