"""`artifact_loss` behind torch.compile; see schemas.py."""

from __future__ import annotations

import torch

from diffdoctor import reference
from diffdoctor.backends.select import pick, requested
from diffdoctor.lowering.artifact_loss import ArtifactProblem, lower
from diffdoctor.ops.library.schemas import differentiating, library
from diffdoctor.reference.grid import accumulation_dtype

library.define(
    "artifact_loss(Tensor logits, int height, int width, float threshold, str method, str reduction, str backend, "
    "bool want_grad) -> (Tensor, Tensor, Tensor)"
)
library.define("artifact_loss_grad(Tensor unit_grad, Tensor factor, Tensor g, Tensor logits, str backend) -> Tensor")


def artifact_loss(logits, height, width, threshold, method, reduction, backend):
    """The public function on traced tensors."""
    want_grad = torch.is_grad_enabled() and logits.requires_grad
    name = requested(backend) or ""
    return torch.ops.diffdoctor.artifact_loss(
        logits, height, width, float(threshold), method, reduction, name, want_grad
    )[0]


@torch.library.impl(library, "artifact_loss", "CompositeExplicitAutograd")
def _artifact_impl(logits, height, width, threshold, method, reduction, backend, want_grad):
    logits = logits.detach()
    module = pick(backend or None, "artifact_loss", logits.device.type, elements=logits.numel())
    problem = lower(logits, (height, width), threshold, method, reduction, want_grad)
    problem.keeps_workspace = False
    if logits.shape[0] == 0:
        problem.loss.zero_()
    elif module is None:
        _run_reference(problem, want_grad)
    else:
        module.artifact_loss(problem)
    if want_grad:
        return problem.loss, problem.unit_grad, problem.factor
    return problem.loss, problem.loss.new_empty(0), problem.loss.new_empty(0)


def _run_reference(problem: ArtifactProblem, want_grad: bool) -> None:
    x = problem.logits.detach().requires_grad_(want_grad)
    with differentiating():
        loss = reference.artifact_loss(
            x, size=problem.size, threshold=problem.threshold, method=problem.method, reduction=problem.reduction
        )
        grad = torch.autograd.grad(loss.sum(), x)[0] if want_grad else None
    problem.loss.copy_(loss.detach())
    if want_grad:
        problem.unit_grad.copy_(grad)
        problem.factor.fill_(1.0)


@torch.library.register_fake("diffdoctor::artifact_loss", lib=library)
def _artifact_fake(logits, height, width, threshold, method, reduction, backend, want_grad):
    acc, batch = accumulation_dtype(logits.dtype), logits.shape[0]
    loss = logits.new_empty((batch,) if reduction == "sample" else (), dtype=acc)
    unit_grad = logits.new_empty((batch, *logits.shape[-2:]) if want_grad else (0,), dtype=acc)
    return loss, unit_grad, logits.new_empty((batch if want_grad else 0,), dtype=acc)


@torch.library.impl(library, "artifact_loss_grad", "CompositeExplicitAutograd")
def _artifact_grad_impl(unit_grad, factor, g, logits, backend):
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    module = pick(backend or None, "artifact_loss", logits.device.type, elements=logits.numel())
    if module is None or unit_grad.numel() == 0:
        scale = (factor * g).reshape(-1, 1, 1)
        return grad.copy_((unit_grad * scale).reshape(grad.shape))
    module.artifact_loss_backward(unit_grad, factor, g, grad.view(unit_grad.shape))
    return grad


@torch.library.register_fake("diffdoctor::artifact_loss_grad", lib=library)
def _artifact_grad_fake(unit_grad, factor, g, logits, backend):
    return logits.new_empty(logits.shape)


def _artifact_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    logits, *ctx.options, ctx.backend, ctx.saves_grad = inputs
    ctx.save_for_backward(output[1], output[2], logits)


def _artifact_backward(ctx, g, *_):
    if g is None:
        return (None,) * 8
    unit_grad, factor, logits = ctx.saved_tensors
    if not ctx.saves_grad:  # it was traced on logits that required no gradient
        _, unit_grad, factor = torch.ops.diffdoctor.artifact_loss(logits.detach(), *ctx.options, ctx.backend, True)
    return torch.ops.diffdoctor.artifact_loss_grad(unit_grad, factor, g, logits, ctx.backend), *(None,) * 7


torch.library.register_autograd(
    "diffdoctor::artifact_loss", _artifact_backward, setup_context=_artifact_setup, lib=library
)
