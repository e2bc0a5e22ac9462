"""`artifact_loss` by the kernels of csrc/cuda."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor.backends.cuda import device
from diffdoctor.backends.native_call import artifact_arguments, artifact_backward_arguments
from diffdoctor.lowering.artifact_loss import ArtifactProblem


def artifact_loss(problem: ArtifactProblem) -> None:
    """Fill loss, and unit_grad and factor where they are wanted."""
    where = problem.logits.device
    # Of the call: another thread's launch may come between its two passes, and shares the workspace.
    two_passes = problem.method == "max" and problem.unit_grad is not None
    maxima = torch.empty_like(problem.factor) if two_passes else None
    description = artifact_arguments(problem, maxima)
    size = device.native.artifact_loss_cuda_workspace(description)
    device.launch(device.native.artifact_loss_cuda, (description,), where, size, problem.keeps_workspace)


def artifact_loss_backward(unit_grad: Tensor, factor: Tensor, grad_output: Tensor, out: Tensor) -> None:
    """out = unit_grad · factor_b · g_b, in the logits' dtype."""
    arguments = artifact_backward_arguments(unit_grad, factor, grad_output, out)
    device.launch(device.native.artifact_loss_backward_cuda, arguments, unit_grad.device)
