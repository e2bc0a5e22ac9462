"""`weighted_loss` and `modulate_gradient` by the C++ of csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor.backends import native
from diffdoctor.backends.native_call import call_arguments, native_plan, scale_arguments, takes_more
from diffdoctor.lowering.plan import DTYPES, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, Problem

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
    """The problem's call with only its tensors left open; None where a call takes more than one native call."""
    if problem.z_is_mean or problem.pred.dtype == torch.float16:  # fp16 computes its gradient in backward
        return None
    return FastCall(problem)


class FastCall:
    """weighted_loss on the tensors of another call with the same plan and the same numbers.

    Args:
        problem: of a first call.
    """

    __slots__ = ("_count", "_dtype", "_more", "_numbers", "_plan", "_tensor_slots")

    def __init__(self, problem: Problem):
        self._plan, self._numbers = native_plan(problem.plan, _native), call_arguments(problem)[1]
        self._count, self._dtype = problem.plan.batch * problem.plan.count, DTYPES[problem.plan.dtype]
        self._tensor_slots = [k for k, number in enumerate(self._numbers) if type(number) is tuple]
        self._more = takes_more(problem)

    def __call__(
        self,
        pred: Tensor,
        terms: tuple[Tensor, ...],
        confidence: Tensor | None,
        mask: Tensor | None,
        weighting: Tensor | None,
        per_sample: list[Tensor] | None,
        loss: Tensor,
        grad: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        """Fill the outputs that are given; `per_sample` are the numbers that are tensors, in the problem's order."""
        numbers = self._numbers
        if per_sample is not None:
            numbers = list(numbers)
            for k, tensor in zip(self._tensor_slots, per_sample, strict=True):
                numbers[k] = (tensor.data_ptr(), 0 if tensor.shape[0] == 1 else tensor.stride(0))
            numbers = tuple(numbers)
        outputs = WRITE_LOSS if grad is None else WRITE_LOSS | WRITE_GRAD
        if sums is not None:
            outputs |= WRITE_SUMS
        pointers: tuple = (
            pred.data_ptr(),
            0 if grad is None else grad.data_ptr(),
            terms[0].data_ptr(),
            terms[1].data_ptr() if len(terms) > 1 else 0,
            0 if weighting is None else weighting.data_ptr(),
            0 if confidence is None else confidence.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            loss.data_ptr(),
            0 if sums is None else sums.data_ptr(),
        )
        if self._more:
            pointers += (terms[2].data_ptr() if len(terms) > 2 else 0,)
        launch(self._plan, outputs, pointers, numbers, _threads())

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
        out.shape[0] == problem.plan.batch and problem.plan.batch > 1,
        _threads(),
    )


def scale_gradient(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> None:
    """out = grad · g_b over `batch` dense runs of `count` elements; in place nothing is written where g is 1."""
    launch_scale(*scale_arguments(grad, grad_output, out, batch, count), _threads())
