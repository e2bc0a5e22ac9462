"""`weighted_loss` and `modulate_gradient` by the kernels of csrc/cuda."""

from __future__ import annotations

from torch import Tensor

from diffdoctor.backends.cuda import device
from diffdoctor.backends.native_call import call_arguments, native_plan, scale_arguments
from diffdoctor.lowering.plan import Problem


def weighted_loss(problem: Problem) -> None:
    """Fill the outputs that `problem.outputs` names."""
    plan, outputs, where = problem.plan, problem.outputs, problem.pred.device
    native_form = native_plan(plan, device.native)
    size = plan.cache.get(("cuda", outputs))
    if size is None:
        size = plan.cache["cuda", outputs] = device.native.weighted_loss_cuda_workspace(native_form, outputs)
    pointers, per_sample = call_arguments(problem)
    with device.guard(where):
        stream = device.raw_stream(where)
        workspace = device.workspace_for(where, stream, size, problem.keeps_workspace)
        device.native.weighted_loss_cuda(native_form, outputs, pointers, per_sample, device.address(workspace), stream)


def bind(problem: Problem) -> None:
    """There is no fast path here: a launch is lowered each time."""
    return


def weight_mean(problem: Problem, out: Tensor) -> None:
    """The mean spatial weight into `out`: (B,) per sample, (1,) over the batch."""
    plan, where = problem.plan, problem.pred.device
    native_form = native_plan(plan, device.native)
    with device.guard(where):
        stream = device.raw_stream(where)
        size = device.native.weight_mean_cuda_workspace(native_form)
        workspace = device.workspace_for(where, stream, size, problem.keeps_workspace)
        device.native.weight_mean_cuda(
            native_form,
            device.address(problem.confidence),
            device.address(problem.mask),
            out.data_ptr(),
            out.shape[0] == plan.batch and plan.batch > 1,
            device.address(workspace),
            stream,
        )


def scale_gradient(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> None:
    """out = grad · g_b over `batch` dense runs of `count` elements; in place nothing is written where g is 1."""
    arguments = scale_arguments(grad, grad_output, out, batch, count)
    with device.guard(grad.device):
        device.native.scale_gradient_cuda(*arguments, device.raw_stream(grad.device))
