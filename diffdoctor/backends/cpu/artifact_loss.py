"""`artifact_loss` by the C++ of csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor.backends import native
from diffdoctor.backends.native_call import artifact_arguments, artifact_backward_arguments
from diffdoctor.lowering.artifact_loss import ArtifactProblem

_native = native.load()


def artifact_loss(problem: ArtifactProblem) -> None:
    """Fill loss, and unit_grad and factor where they are wanted."""
    _native.artifact_loss_cpu(artifact_arguments(problem), torch.get_num_threads())


def artifact_loss_backward(unit_grad: Tensor, factor: Tensor, grad_output: Tensor, out: Tensor) -> None:
    """out = unit_grad · factor_b · g_b, in the logits' dtype."""
    _native.artifact_loss_backward_cpu(*artifact_backward_arguments(unit_grad, factor, grad_output, out))
