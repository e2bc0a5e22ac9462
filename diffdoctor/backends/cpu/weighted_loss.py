"""`weighted_loss` and `modulate_gradient` by the C++ of csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor.backends import native, native_call
from diffdoctor.backends.native_call import call_arguments, native_plan, scale_arguments
from diffdoctor.lowering.plan import Problem

# Found in this module rather than in torch's, whose large table is in no cache after two million elements.
_threads = torch.get_num_threads
_native = native.load()

# What a call runs, by the names under which benchmarks count and time it.
LAUNCHES = ("launch", "launch_scale", "weight_mean")
if _native is not None:
    launch, launch_scale = _native.weighted_loss_cpu, _native.scale_gradient_cpu


def weighted_loss(problem: Problem) -> None:
    """Fill the outputs that `problem.outputs` names."""
    pointers, per_sample = call_arguments(problem)
    launch(native_plan(problem.plan, _native), problem.outputs, pointers, per_sample, _threads())


def bind(problem: Problem) -> FastCall | None:
    """The problem's call with only its tensors left open; None where backward, another call, needs its mean weight."""
    return None if problem.pred.dtype == torch.float16 and problem.z_is_mean else FastCall(problem, _native)


class FastCall(native_call.FastCall):
    """A call of the native module's kernels for the CPU."""

    __slots__ = ()

    def launch(self, outputs: int, pointers: tuple, numbers: tuple) -> None:
        launch(self._plan, outputs, pointers, numbers, _threads())

    def launch_mean(self, confidence: int, mask: int, out: Tensor) -> None:
        _native.weight_mean_cpu(self._plan, confidence, mask, out.data_ptr(), out.shape[0] > 1, _threads())

    def scale(self, grad: Tensor, g: Tensor, out: Tensor) -> None:
        """out = grad · g, of one number, for the call's gradient; in place nothing is written where g is 1."""
        launch_scale(grad.data_ptr(), out.data_ptr(), self._dtype, 1, self._count, g.data_ptr(), 0, _threads())


def weight_mean(problem: Problem, out: Tensor) -> None:
    """The mean spatial weight into `out`: (B,) per sample, (1,) over the batch."""
    confidence, mask = problem.confidence, problem.mask
    _native.weight_mean_cpu(
        native_plan(problem.plan, _native),
        0 if confidence is None else confidence.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        out.data_ptr(),
        out.shape[0] > 1,
        _threads(),
    )


def scale_gradient(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> None:
    """out = grad · g_b over `batch` dense runs of `count` elements; in place nothing is written where g is 1."""
    launch_scale(*scale_arguments(grad, grad_output, out, batch, count), _threads())
