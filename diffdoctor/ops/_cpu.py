"""The C++ backend for CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor import native
from diffdoctor.ops._lowering import DTYPES, ArtifactProblem, Problem
from diffdoctor.ops._native_plan import artifact_arguments, call_arguments, native_plan

_threads = torch.get_num_threads
_native = native.load()


def unavailable() -> str | None:
    return native.reason()


def weighted_loss(problem: Problem) -> None:
    pointers, per_sample = call_arguments(problem)
    _native.weighted_loss_cpu(native_plan(problem.plan, _native), problem.work, pointers, per_sample, _threads())


def weight_mean(problem: Problem, out: Tensor) -> None:
    confidence, mask = problem.confidence, problem.mask
    _native.weight_mean_cpu(
        native_plan(problem.plan, _native),
        0 if confidence is None else confidence.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        out.data_ptr(),
        out.shape[0] == problem.plan.batch and problem.plan.batch > 1,
        _threads(),
    )


def scale_gradient(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> None:
    stride = grad_output.stride(0) if grad_output.ndim else 0
    _native.scale_gradient_cpu(
        grad.data_ptr(),
        out.data_ptr(),
        DTYPES[grad.dtype],
        batch,
        count,
        grad_output.data_ptr(),
        stride,
        _threads(),
    )


def artifact_loss(problem: ArtifactProblem) -> None:
    _native.artifact_loss_cpu(artifact_arguments(problem), _threads())


def artifact_loss_backward(kept: Tensor, factor: Tensor, grad_output: Tensor, out: Tensor) -> None:
    stride = grad_output.stride(0) if grad_output.ndim else 0
    _native.artifact_loss_backward_cpu(
        kept.data_ptr(),
        factor.data_ptr(),
        grad_output.data_ptr(),
        stride,
        out.data_ptr(),
        DTYPES[out.dtype],
        kept.shape[0],
        kept[0].numel(),
    )
