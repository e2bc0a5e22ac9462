"""`policy_loss` by the kernels of csrc/cuda."""

from __future__ import annotations

from diffdoctor.backends.cuda import device
from diffdoctor.backends.cuda.weighted_loss import scale_gradient as scale_gradient
from diffdoctor.backends.native_call import native_plan, policy_arguments
from diffdoctor.lowering.policy_loss import PolicyProblem


def policy_loss(problem: PolicyProblem) -> None:
    """Fill the outputs that `problem.outputs` names."""
    plan, where = problem.plan, problem.pred.device
    native_form = native_plan(plan, device.native)
    arguments = policy_arguments(problem)
    size = plan.cache.get("cuda")
    if size is None:
        size = plan.cache["cuda"] = device.native.policy_loss_cuda_workspace(native_form, arguments)
    device.launch(device.native.policy_loss_cuda, (native_form, arguments), where, size, problem.keeps_workspace)
