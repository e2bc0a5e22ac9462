"""`weighted_loss` and `modulate_gradient` by the kernels of csrc/cuda."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor.backends import native_call
from diffdoctor.backends.cuda import device
from diffdoctor.backends.native_call import address, call_arguments, native_plan, scale_arguments
from diffdoctor.lowering.plan import Plan, Problem


def weighted_loss(problem: Problem) -> None:
    """Fill the outputs that `problem.outputs` names."""
    plan, outputs = problem.plan, problem.outputs
    arguments = (native_plan(plan, device.native), outputs, *call_arguments(problem))
    _launch(plan, outputs, arguments, problem.pred.device, problem.keeps_workspace)


def _launch(plan: Plan, outputs: int, arguments: tuple, where: torch.device, keep: bool) -> None:
    size = plan.cache.get(("cuda", outputs))
    if size is None:
        size = plan.cache["cuda", outputs] = device.native.weighted_loss_cuda_workspace(arguments[0], outputs)
    device.launch(device.native.weighted_loss_cuda, arguments, where, size, keep)


def _launch_mean(plan: Plan, arguments: tuple, where: torch.device, keep: bool) -> None:
    size = plan.cache.get("cuda mean")
    if size is None:
        size = plan.cache["cuda mean"] = device.native.weight_mean_cuda_workspace(arguments[0])
    device.launch(device.native.weight_mean_cuda, arguments, where, size, keep)


def bind(problem: Problem) -> FastCall | None:
    """The problem's call with only its tensors left open; None where backward, another call, needs its mean weight."""
    return None if problem.pred.dtype == torch.float16 and problem.z_is_mean else FastCall(problem)


class FastCall(native_call.FastCall):
    """Launches of the native module's kernels on one device.

    Args:
        problem: of a first call.
    """

    __slots__ = ("_cached", "_where")

    def __init__(self, problem: Problem):
        super().__init__(problem, device.native)
        self._cached, self._where = problem.plan, problem.pred.device

    def launch(self, outputs: int, pointers: tuple, numbers: tuple) -> None:
        _launch(self._cached, outputs, (self._plan, outputs, pointers, numbers), self._where, True)

    def launch_mean(self, confidence: int, mask: int, out: Tensor) -> None:
        arguments = (self._plan, confidence, mask, out.data_ptr(), out.shape[0] > 1)
        _launch_mean(self._cached, arguments, self._where, True)

    def scale(self, grad: Tensor, g: Tensor, out: Tensor) -> None:
        """out = grad · g, of one number, for the call's gradient; in place nothing is written where g is 1."""
        arguments = (grad.data_ptr(), out.data_ptr(), self._dtype, 1, self._count, g.data_ptr(), 0)
        device.launch(device.native.scale_gradient_cuda, arguments, self._where)


def weight_mean(problem: Problem, out: Tensor) -> None:
    """The mean spatial weight into `out`: (B,) per sample, (1,) over the batch."""
    maps = address(problem.confidence), address(problem.mask)
    arguments = (native_plan(problem.plan, device.native), *maps, out.data_ptr(), out.shape[0] > 1)
    _launch_mean(problem.plan, arguments, problem.pred.device, problem.keeps_workspace)


def scale_gradient(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> None:
    """out = grad · g_b over `batch` dense runs of `count` elements; in place nothing is written where g is 1."""
    arguments = scale_arguments(grad, grad_output, out, batch, count)
    device.launch(device.native.scale_gradient_cuda, arguments, grad.device)
