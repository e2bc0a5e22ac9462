"""`artifact_loss` behind torch.compile; see schemas.py."""

from __future__ import annotations

import torch

from diffdoctor import reference
from diffdoctor.backends.select import pick, requested
from diffdoctor.lowering.artifact_loss import lower
from diffdoctor.ops.library.schemas import library
from diffdoctor.reference.grid import accumulation_dtype

library.define(
    "artifact_loss(Tensor logits, int height, int width, float threshold, str method, str reduction, str backend, "
    "bool want_grad) -> (Tensor, Tensor, Tensor)"
)
library.define("artifact_loss_grad(Tensor kept, Tensor factor, Tensor g, Tensor logits, str backend) -> Tensor")


def artifact_loss(logits, height, width, threshold, method, reduction, backend):
    """The public function on traced tensors."""
    want_grad = torch.is_grad_enabled() and logits.requires_grad
    name = requested(backend) or ""
    return torch.ops.diffdoctor.artifact_loss(
        logits, height, width, float(threshold), method, reduction, name, want_grad
    )[0]


@torch.library.impl(library, "artifact_loss", "CompositeExplicitAutograd")
def _artifact_impl(logits, height, width, threshold, method, reduction, backend, want_grad):
    acc, batch = accumulation_dtype(logits.dtype), logits.shape[0]
    logits = logits.detach()
    module = pick(backend or None, "artifact_loss", logits.device.type)
    shape = (batch, *logits.shape[-2:]) if want_grad else (0,)
    kept = torch.empty(shape, dtype=acc, device=logits.device)
    factor = torch.ones(batch if want_grad else 0, dtype=acc, device=logits.device)
    if batch == 0:
        return torch.zeros((0,) if reduction == "sample" else (), dtype=acc, device=logits.device), kept, factor
    if module is None:
        x = logits.requires_grad_(want_grad)
        with torch.enable_grad():
            loss = reference.artifact_loss(
                x, size=(height, width), threshold=threshold, method=method, reduction=reduction
            )
        if want_grad:
            (grad,) = torch.autograd.grad(loss.sum(), x)
            kept.copy_(grad.reshape(shape))
        return loss.detach(), kept, factor
    problem = lower(logits, (height, width), threshold, method, reduction, want_grad)
    problem.keeps_workspace = False
    module.artifact_loss(problem)
    return problem.loss, problem.kept if want_grad else kept, problem.factor if want_grad else factor


@torch.library.register_fake("diffdoctor::artifact_loss", lib=library)
def _artifact_fake(logits, height, width, threshold, method, reduction, backend, want_grad):
    acc, batch = accumulation_dtype(logits.dtype), logits.shape[0]
    loss = logits.new_empty((batch,) if reduction == "sample" else (), dtype=acc)
    kept = logits.new_empty((batch, *logits.shape[-2:]) if want_grad else (0,), dtype=acc)
    return loss, kept, logits.new_empty((batch if want_grad else 0,), dtype=acc)


@torch.library.impl(library, "artifact_loss_grad", "CompositeExplicitAutograd")
def _artifact_grad_impl(kept, factor, g, logits, backend):
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    module = pick(backend or None, "artifact_loss", logits.device.type)
    if module is None or kept.numel() == 0:
        scale = (factor * g).reshape(-1, 1, 1)
        return grad.copy_((kept * scale).reshape(grad.shape))
    module.artifact_loss_backward(kept, factor, g, grad.view(kept.shape))
    return grad


@torch.library.register_fake("diffdoctor::artifact_loss_grad", lib=library)
def _artifact_grad_fake(kept, factor, g, logits, backend):
    return logits.new_empty(logits.shape)


def _artifact_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.backend = inputs[6]
    ctx.save_for_backward(output[1], output[2], inputs[0])


def _artifact_backward(ctx, g, *_):
    if g is None:
        return (None,) * 8
    kept, factor, logits = ctx.saved_tensors
    return torch.ops.diffdoctor.artifact_loss_grad(kept, factor, g, logits, ctx.backend), *(None,) * 7


torch.library.register_autograd(
    "diffdoctor::artifact_loss", _artifact_backward, setup_context=_artifact_setup, lib=library
)
