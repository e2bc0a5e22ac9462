"""autograd for eager calls: straight to a backend, without the dispatcher's price of 10 to 20 microseconds."""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffdoctor.lowering.plan import WRITE_GRAD, WRITE_LOSS, ArtifactProblem, PerSample, Problem

functorch_level = torch._C._functorch.peek_interpreter_stack
is_batched = torch._C._functorch.is_legacy_batchedtensor
graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph


def refuse_functorch(op: str, g: Tensor | None = None) -> None:
    """Raise under torch.func transforms, whose wrapped tensors no kernel can read; `g` is a backward's gradient."""
    if functorch_level() is not None or (g is not None and is_batched(g)):
        raise RuntimeError(
            f"diffdoctor.{op} does not support torch.func transforms (vmap, grad, jvp, is_grads_batched): "
            'call diffdoctor.reference, or pass reduction="sample" for per-sample losses'
        )


def refuse_forward_mode(op: str, *tensors) -> None:
    """Raise where a tensor carries a tangent (`torch.autograd.forward_ad`), which no kernel carries on."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(f"diffdoctor.{op} has no forward-mode derivative; diffdoctor.reference.{op} has one")


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on a gradient that was asked for with create_graph=True; raises when differentiated."""

    @staticmethod
    def forward(ctx, grad, x, op):
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise second_derivative(ctx.op)


def forbid_second_derivative(grad: Tensor, x: Tensor | None, op: str) -> Tensor:
    """The gradient, which raises when it is differentiated by whatever `x`, the differentiated tensor, comes from.

    Raises:
        RuntimeError: at once where x is gone: nothing could be seen of a differentiation then.
    """
    if x is None:
        raise second_derivative(op)
    return _NoSecondDerivative.apply(grad, x, op)


def second_derivative(op: str) -> RuntimeError:
    return RuntimeError(
        f"diffdoctor.{op} has no second derivative (its gradient is computed in the forward pass); "
        f"diffdoctor.reference.{op} in plain PyTorch has one"
    )


class _GuardReference(torch.autograd.Function):
    """Identity in front of the reference, so that it refuses second derivatives as the other backends do."""

    @staticmethod
    def forward(ctx, x, op):
        ctx.op = op
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return (forbid_second_derivative(grad, *ctx.saved_tensors, ctx.op) if torch.is_grad_enabled() else grad), None


def guard_reference(x: Tensor, op: str) -> Tensor:
    return _GuardReference.apply(x, op) if x.requires_grad and torch.is_grad_enabled() else x


class WeightedLoss(torch.autograd.Function):
    """Keeps the finished gradient for g = 1; for fp16 keeps the inputs and computes it in backward, rounded once.

    A normalised fp16 gradient would be lost: at 4.8M elements most of it is below the smallest subnormal until the
    loss scale multiplies it.
    """

    @staticmethod
    def forward(ctx, model_pred, problem, module, runs):
        ctx.module, ctx.runs, ctx.x = module, runs, weakref.ref(model_pred)
        ctx.recompute = model_pred.dtype == torch.float16
        if ctx.recompute:
            module.weighted_loss(problem)
            ctx.save_for_backward(*_tensors(problem))
            ctx.problem = _without_tensors(problem)
        else:
            problem.work |= WRITE_GRAD
            problem.grad = torch.empty_like(model_pred)
            module.weighted_loss(problem)
            ctx.save_for_backward(problem.grad)
            problem.grad = None
        return problem.loss

    @staticmethod
    def backward(ctx, g):
        refuse_functorch("weighted_loss", g)
        g = g.resolve_neg()
        if ctx.recompute:
            problem = _with_tensors(ctx.problem, ctx.saved_tensors)
            problem.work = WRITE_GRAD
            problem.grad = torch.empty_like(problem.pred)
            problem.grad_output = PerSample(data=g.reshape(1) if g.ndim == 0 else g)
            ctx.module.weighted_loss(problem)
            grad = problem.grad
        else:
            grad = scale_kept(ctx.module, ctx.saved_tensors[0], g, ctx.runs)
        if torch.is_grad_enabled():
            grad = forbid_second_derivative(grad, ctx.x(), "weighted_loss")
        return grad, None, None, None


def scale_kept(module, kept: Tensor, g: Tensor, runs) -> Tensor:
    """kept * g, in place unless the graph is kept for another backward."""
    if runs is None and g.ndim != 0:
        acc = kept.to(g.dtype) * g.reshape(-1, *(1,) * (kept.ndim - 1))
        return acc.to(kept.dtype)
    out = torch.empty_like(kept) if graph_is_kept() else kept
    batch, count = runs if g.ndim != 0 else (1, kept.numel())
    module.scale_gradient(kept, g, out, batch, count)
    return out


def _per_samples(problem: Problem) -> tuple[PerSample, ...]:
    return (problem.pred_scale, *problem.coefs, problem.huber_c, problem.weight, problem.z)


def _tensors(problem: Problem) -> tuple[Tensor | None, ...]:
    per_sample = (entry.data for entry in _per_samples(problem))
    return (problem.pred, *problem.terms, problem.confidence, problem.mask, problem.weighting, *per_sample)


def _without_tensors(problem: Problem) -> Problem:
    """A copy that holds no tensor: those must go through save_for_backward."""
    bare = [PerSample(entry.value) for entry in _per_samples(problem)]
    terms = len(problem.terms)
    return dataclasses.replace(
        problem,
        pred=None,
        terms=(None,) * terms,
        confidence=None,
        mask=None,
        weighting=None,
        pred_scale=bare[0],
        coefs=tuple(bare[1 : 1 + terms]),
        huber_c=bare[-3],
        weight=bare[-2],
        z=bare[-1],
        loss=None,
        sums=None,
    )


def _with_tensors(problem: Problem, tensors) -> Problem:
    terms = len(problem.terms)
    per_sample = [
        PerSample(entry.value, data) for entry, data in zip(_per_samples(problem), tensors[4 + terms :], strict=True)
    ]
    return dataclasses.replace(
        problem,
        pred=tensors[0],
        terms=tuple(tensors[1 : 1 + terms]),
        confidence=tensors[1 + terms],
        mask=tensors[2 + terms],
        weighting=tensors[3 + terms],
        pred_scale=per_sample[0],
        coefs=tuple(per_sample[1 : 1 + terms]),
        huber_c=per_sample[-3],
        weight=per_sample[-2],
        z=per_sample[-1],
    )


class ArtifactLoss(torch.autograd.Function):
    """Keeps one gradient of the logits' size in the accumulation type, and one factor per picture."""

    @staticmethod
    def forward(ctx, logits, problem: ArtifactProblem, module):
        acc = problem.loss.dtype
        problem.kept = torch.empty(problem.logits.shape, dtype=acc, device=logits.device)
        problem.factor = torch.empty(problem.logits.shape[0], dtype=acc, device=logits.device)
        module.artifact_loss(problem)
        ctx.module, ctx.shape, ctx.dtype, ctx.x = module, logits.shape, logits.dtype, weakref.ref(logits)
        ctx.save_for_backward(problem.kept, problem.factor)
        return problem.loss

    @staticmethod
    def backward(ctx, g):
        refuse_functorch("artifact_loss", g)
        kept, factor = ctx.saved_tensors
        grad = torch.empty(ctx.shape, dtype=ctx.dtype, device=kept.device)
        ctx.module.artifact_loss_backward(kept, factor, g.resolve_neg(), grad.view(kept.shape))
        if torch.is_grad_enabled():
            grad = forbid_second_derivative(grad, ctx.x(), "artifact_loss")
        return grad, None, None


__all__ = [
    "WRITE_LOSS",
    "ArtifactLoss",
    "WeightedLoss",
    "forbid_second_derivative",
    "functorch_level",
    "graph_is_kept",
    "guard_reference",
    "refuse_forward_mode",
    "refuse_functorch",
    "scale_kept",
]
