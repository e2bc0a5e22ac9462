"""`policy_loss` by the kernels of csrc/cuda."""

from __future__ import annotations

import torch

from diffdoctor.backends.cuda import device
from diffdoctor.backends.cuda.weighted_loss import scale_gradient as scale_gradient
from diffdoctor.backends.native_call import FastPolicyCall, native_plan, policy_arguments
from diffdoctor.lowering.plan import Plan
from diffdoctor.lowering.policy_loss import PolicyProblem


def policy_loss(problem: PolicyProblem) -> None:
    """Fill the outputs that `problem.outputs` names."""
    arguments = native_plan(problem.plan, device.native), policy_arguments(problem)
    _launch(problem.plan, arguments, problem.pred.device, problem.keeps_workspace)


def _launch(plan: Plan, arguments: tuple, where: torch.device, keep: bool) -> None:
    size = plan.cache.get("cuda")
    if size is None:
        size = plan.cache["cuda"] = device.native.policy_loss_cuda_workspace(*arguments)
    device.launch(device.native.policy_loss_cuda, arguments, where, size, keep)


def bind(problem: PolicyProblem) -> FastCall:
    """The problem's call with only its tensors left open."""
    return FastCall(problem)


class FastCall(FastPolicyCall):
    """Launches of the native module's kernels on one device.

    Args:
        problem: of a first call.
    """

    __slots__ = ("_cached", "_where")

    def __init__(self, problem: PolicyProblem):
        super().__init__(problem, device.native)
        self._cached, self._where = problem.plan, problem.pred.device

    def launch(self, arguments: tuple) -> None:
        _launch(self._cached, (self._plan, arguments), self._where, True)
