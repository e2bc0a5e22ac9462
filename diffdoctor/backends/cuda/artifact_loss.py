"""`artifact_loss` by the kernels of csrc/cuda."""

from __future__ import annotations

from torch import Tensor

from diffdoctor.backends.cuda import device
from diffdoctor.backends.native_call import artifact_arguments
from diffdoctor.lowering.artifact_loss import ArtifactProblem
from diffdoctor.lowering.plan import DTYPES


def artifact_loss(problem: ArtifactProblem) -> None:
    """Fill loss, and unit_grad and factor where they are wanted."""
    where = problem.logits.device
    description = artifact_arguments(problem)
    with device.guard(where):
        stream = device.raw_stream(where)
        size = device.native.artifact_loss_cuda_workspace(description)
        workspace = device.workspace_for(where, stream, size, problem.keeps_workspace)
        device.native.artifact_loss_cuda(description, device.address(workspace), stream)


def artifact_loss_backward(unit_grad: Tensor, factor: Tensor, grad_output: Tensor, out: Tensor) -> None:
    """out = unit_grad · factor_b · g_b, in the logits' dtype."""
    stride = grad_output.stride(0) if grad_output.ndim else 0
    with device.guard(unit_grad.device):
        device.native.artifact_loss_backward_cuda(
            unit_grad.data_ptr(),
            factor.data_ptr(),
            grad_output.data_ptr(),
            stride,
            out.data_ptr(),
            DTYPES[out.dtype],
            unit_grad.shape[0],
            unit_grad[0].numel(),
            device.raw_stream(unit_grad.device),
        )
