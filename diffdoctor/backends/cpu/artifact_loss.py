"""`artifact_loss` by the C++ of csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor.backends import native
from diffdoctor.backends.native_call import artifact_arguments
from diffdoctor.lowering.artifact_loss import ArtifactProblem
from diffdoctor.lowering.plan import DTYPES

_native = native.load()


def artifact_loss(problem: ArtifactProblem) -> None:
    """Fill loss, and unit_grad and factor where they are wanted."""
    _native.artifact_loss_cpu(artifact_arguments(problem), torch.get_num_threads())


def artifact_loss_backward(unit_grad: Tensor, factor: Tensor, grad_output: Tensor, out: Tensor) -> None:
    """out = unit_grad · factor_b · g_b, in the logits' dtype."""
    stride = grad_output.stride(0) if grad_output.ndim else 0
    _native.artifact_loss_backward_cpu(
        unit_grad.data_ptr(),
        factor.data_ptr(),
        grad_output.data_ptr(),
        stride,
        out.data_ptr(),
        DTYPES[out.dtype],
        unit_grad.shape[0],
        unit_grad[0].numel(),
    )
