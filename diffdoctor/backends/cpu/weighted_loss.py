"""`weighted_loss` and `modulate_gradient` by the C++ of csrc/cpu."""

from __future__ import annotations

import sys
from weakref import ref as _ref

import torch
from torch import Tensor

from diffdoctor.backends import native
from diffdoctor.backends.native_call import call_arguments, native_plan
from diffdoctor.lowering.plan import DTYPES, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, Problem
from diffdoctor.ops.autograd import (
    forbid_second_derivative,
    functorch_level,
    graph_is_kept,
    is_batched,
    refuse_functorch,
    scale_kept,
)
from diffdoctor.ops.target import Target

# Found in this module rather than in torch's, whose large table is in no cache after two million elements.
_threads, _empty_like, _is_grad_enabled = torch.get_num_threads, torch.empty_like, torch.is_grad_enabled
_native = native.load()

# What a call runs, by the names under which benchmarks count and time it.
LAUNCHES = ("launch", "launch_scale", "weight_mean")
if _native is not None:
    launch, launch_scale = _native.weighted_loss_cpu, _native.scale_gradient_cpu


def weighted_loss(problem: Problem) -> None:
    pointers, per_sample = call_arguments(problem)
    launch(native_plan(problem.plan, _native), problem.work, pointers, per_sample, _threads())


class ShortCall:
    """weighted_loss on CPU tensors once its plan is known: one native call, and nothing is lowered.

    At a few elements a call is all overhead; at two million, whose 0.5 ms leave the caches cold, 30 microseconds of
    Python are still a twentieth.

    Args:
        problem: of a first call with the same plan, the same numbers and tensors in the same places.
        prepared: of that plan.
    """

    __slots__ = ("_acc", "_given", "_numbers", "_plan", "_scalar", "_weighted", "count", "dtype", "grad_runs")

    def __init__(self, problem: Problem, prepared):
        plan = problem.plan
        self._plan, self._numbers = native_plan(plan, _native), call_arguments(problem)[1]
        self._given = [k for k, number in enumerate(self._numbers) if type(number) is tuple]
        self._acc = plan.acc_dtype
        self._weighted = not prepared.weighting_per_sample
        shape = (plan.batch,) if plan.options.reduction == "sample" else ()
        # empty_like of it takes half the time of empty
        self._scalar = torch.empty(shape, dtype=plan.acc_dtype, device="cpu")
        self.count, self.dtype, self.grad_runs = plan.batch * plan.count, DTYPES[plan.dtype], prepared.grad_runs

    def __call__(
        self,
        model_pred: Tensor,
        target,
        confidence,
        mask,
        weighting,
        huber_c,
        normalizer,
        differentiable: bool,
        sums: Tensor | None = None,
    ) -> Tensor:
        """The loss; connected to the graph where `differentiable`. Fills `sums` where there are some."""
        loss = _empty_like(self._scalar)
        grad = _empty_like(model_pred) if differentiable else None
        terms = target.terms if type(target) is Target else (target,)
        numbers = self._numbers
        if self._given:
            alive = self._tensors(target, weighting, huber_c, normalizer)
            numbers = list(numbers)
            for k, tensor in zip(self._given, alive, strict=True):
                numbers[k] = (tensor.data_ptr(), 0 if tensor.shape[0] == 1 else tensor.stride(0))
            numbers = tuple(numbers)
        pointers = (
            model_pred.data_ptr(),
            grad.data_ptr() if differentiable else 0,
            terms[0].data_ptr(),
            terms[1].data_ptr() if len(terms) > 1 else 0,
            weighting.data_ptr() if self._weighted and weighting is not None else 0,
            0 if confidence is None else confidence.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            loss.data_ptr(),
            0 if sums is None else sums.data_ptr(),
        )
        work = WRITE_LOSS | WRITE_GRAD if differentiable else WRITE_LOSS
        if sums is not None:
            work |= WRITE_SUMS
        launch(self._plan, work, pointers, numbers, _threads())
        return _apply_kept(model_pred, (self, loss, grad)) if differentiable else loss

    def _tensors(self, target, weighting, huber_c, normalizer) -> list[Tensor]:
        """The per-sample tensors in the places of `_given` (see `bind_call` in csrc/native_plan.h)."""
        values = (None, None, None, huber_c, weighting, normalizer)
        if type(target) is Target:
            values = (target.pred_scale, *target.coefs, *values[1 + len(target.coefs) :])
        return [values[k].reshape(-1).to(self._acc) for k in self._given]


class WeightedLossKept(torch.autograd.Function):
    """The loss of a `ShortCall` whose gradient for g = 1 is already there."""

    @staticmethod
    def forward(ctx, model_pred, done):
        ctx.call, loss, grad = done
        ctx.x = _ref(model_pred)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, g):
        if functorch_level() is not None or is_batched(g):
            refuse_functorch("weighted_loss", g)
        (kept,) = ctx.saved_tensors
        call = ctx.call
        if g.is_neg():
            g = g.resolve_neg()
        if g.ndim == 0:
            grad = _empty_like(kept) if graph_is_kept() else kept
            launch_scale(kept.data_ptr(), grad.data_ptr(), call.dtype, 1, call.count, g.data_ptr(), 0, _threads())
        else:
            grad = scale_kept(sys.modules[__name__], kept, g, call.grad_runs)
        return (forbid_second_derivative(grad, ctx.x(), "weighted_loss") if _is_grad_enabled() else grad), None


# Function.apply without what it does first for functorch, which was refused above: it takes as long again as the rest.
_apply_kept = super(torch.autograd.Function, WeightedLossKept).apply


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
    launch_scale(
        grad.data_ptr(),
        out.data_ptr(),
        DTYPES[grad.dtype],
        batch,
        count,
        grad_output.data_ptr(),
        stride,
        _threads(),
    )
