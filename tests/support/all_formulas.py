"""Every masked, weighted or Huber formula of the trainers we know, as one call (two with a prior target).

Each is typed out in plain PyTorch as the trainer computes it (docs/ops.md has the table of names), in fp32, in
formulas_diffusers.py and formulas_trainers.py. Value and gradient are compared with the reference and the CPU kernels
in ops/test_trainer_formulas.py, and under backends/ with the CUDA kernels on the CPU in test_cuda_shim_calls.py, with
Triton's in its interpreter in interpreter/test_formulas.py, and with both on a GPU in test_gpu_formulas.py.
"""

from support import formulas_diffusers, formulas_trainers

FORMULAS = [*formulas_diffusers.FORMULAS, *formulas_trainers.FORMULAS]
