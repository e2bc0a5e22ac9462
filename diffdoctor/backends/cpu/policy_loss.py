"""`policy_loss` by the C++ of csrc/cpu."""

from __future__ import annotations

import torch

from diffdoctor.backends import native
from diffdoctor.backends.cpu.weighted_loss import scale_gradient as scale_gradient
from diffdoctor.backends.native_call import FastPolicyCall, native_plan, policy_arguments
from diffdoctor.lowering.policy_loss import PolicyProblem

_native = native.load()


def policy_loss(problem: PolicyProblem) -> None:
    """Fill the outputs that `problem.outputs` names."""
    _native.policy_loss_cpu(native_plan(problem.plan, _native), policy_arguments(problem), torch.get_num_threads())


def bind(problem: PolicyProblem) -> FastCall:
    """The problem's call with only its tensors left open."""
    return FastCall(problem, _native)


class FastCall(FastPolicyCall):
    """A call of the native module's kernels for the CPU."""

    __slots__ = ()

    def launch(self, arguments: tuple) -> None:
        _native.policy_loss_cpu(self._plan, arguments, torch.get_num_threads())
