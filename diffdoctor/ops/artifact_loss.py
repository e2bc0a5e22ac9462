"""The public `artifact_loss`: how much artifact a detector still sees in a picture."""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor

from diffdoctor import reference
from diffdoctor.backends.select import pick, requested
from diffdoctor.lowering.artifact_loss import ARTIFACT_METHODS, ArtifactProblem, lower
from diffdoctor.ops import checks
from diffdoctor.ops.autograd import (
    forbid_second_derivative,
    guard_reference,
    refuse_forward_mode,
    refuse_functorch,
    scaled,
)
from diffdoctor.ops.call import Kept
from diffdoctor.ops.library import artifact_loss as registered
from diffdoctor.ops.observed import PLAIN, is_observed, is_plain, unrecorded
from diffdoctor.reference.grid import accumulation_dtype
from diffdoctor.runs.errors import expected

__all__ = ["artifact_loss"]


def artifact_loss(
    logits: Tensor,
    *,
    size: tuple[int, int] | None = None,
    threshold: float = 0.1,
    method: str = "threshold",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The treatment's loss: a detector's logits, up-sampled, through a sigmoid, reduced to one number per picture.

    "threshold": the mean confidence of the pixels above `threshold`, sum(c [c > t]) / (count + 1e-5), the form of the
    DiffDoctor paper's code; "mean", "sum" and "max" of the confidence likewise. The up-sampled map is never stored.

    Args:
        logits: (B, 1, h, w) or (B, h, w), fp32, bf16, fp16 or fp64; any strides.
        size: (H, W) of the picture, reached bilinearly (align_corners=False); None leaves the logits' size.
        threshold: confidence up to it does not count; in [0, 1], rounded to fp32. Used by "threshold" only.
        method: threshold | mean | sum | max (equal maxima share the gradient).
        reduction: over pictures: "mean" -> (), "sample" -> (B,), "sum" -> ().
        backend: cuda | triton | cpu | reference; None takes the fastest (or DIFFDOCTOR_BACKEND).

    Returns:
        The loss, fp32 (fp64 for fp64).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, name or number that cannot be.
        RuntimeError: the backend asked for cannot serve; torch.func transforms; a second derivative.
    """
    as_operator = is_observed() or type(logits) not in PLAIN
    height, width = _checked_size(as_operator, logits, size, threshold, method, reduction)
    if as_operator:
        return registered.artifact_loss(logits, height, width, threshold, method, reduction, backend)
    refuse_functorch("artifact_loss")
    refuse_forward_mode("artifact_loss", logits)
    module = pick(requested(backend), "artifact_loss", logits.device.type, elements=logits.numel())
    if logits.shape[0] == 0 or module is None:
        x = guard_reference(logits, "artifact_loss")
        if logits.shape[0] == 0:  # no picture: 0, not the NaN of an empty mean
            x = x.flatten(1).to(accumulation_dtype(x.dtype))
            return x.sum(1) if reduction == "sample" else x.sum()
        return reference.artifact_loss(x, size=(height, width), threshold=threshold, method=method, reduction=reduction)
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    problem = lower(logits, (height, width), threshold, method, reduction, differentiable)
    if differentiable:
        return _keep_gradient(logits, problem, module)
    module.artifact_loss(problem)
    return problem.loss


class _ArtifactLoss(torch.autograd.Function):
    """Keeps one gradient of the logits' size in the accumulation type, and one factor per picture."""

    @staticmethod
    def forward(ctx, logits, problem: ArtifactProblem, module):
        module.artifact_loss(problem)
        ctx.module, ctx.shape, ctx.dtype, ctx.x = module, logits.shape, logits.dtype, ref(logits)
        ctx.save_for_backward(problem.unit_grad, problem.factor)
        return problem.loss

    @staticmethod
    def backward(ctx, g):
        refuse_functorch("artifact_loss", g)
        unit_grad, factor = ctx.saved_tensors
        if is_observed() or not is_plain(g, unit_grad, factor):
            grad = scaled(unit_grad, factor * g).to(ctx.dtype).reshape(ctx.shape)
        else:
            unit_grad, factor = unit_grad.contiguous(), factor.contiguous()  # saved-tensor hooks may have changed that
            grad = torch.empty(ctx.shape, dtype=ctx.dtype, device=unit_grad.device)
            ctx.module.artifact_loss_backward(unit_grad, factor, g.resolve_neg(), grad.view(unit_grad.shape))
        if torch.is_grad_enabled():
            grad = forbid_second_derivative(grad, ctx.x(), "artifact_loss")
        return grad, None, None


# Function.apply without what it does first for functorch, which was refused before.
_keep_gradient = super(torch.autograd.Function, _ArtifactLoss).apply

_INT = frozenset({int})
_known_sizes = Kept()  # by all that the checks of a plain tensor read


def _checked_size(as_operator: bool, logits, size, threshold, method, reduction) -> tuple[int, int]:
    """check_arguments, which a call like an earlier one has passed."""
    arguments = (logits, size, threshold, method, reduction)
    # In a key True is equal to 1 and 1 to 1.0.
    usual = type(threshold) is float and (size is None or (type(size) is tuple and _INT.issuperset(map(type, size))))
    if as_operator or not usual or type(method) is not str or type(reduction) is not str:
        return unrecorded(check_arguments, *arguments)
    key = (logits.shape, logits.dtype, logits.layout, logits.is_neg(), *arguments[1:])
    return _known_sizes.get(key) or _known_sizes.keep(key, check_arguments(*arguments))


def check_arguments(logits, size, threshold, method, reduction) -> tuple[int, int]:
    """Every check of artifact_loss; returns the up-sampled size."""
    if not isinstance(logits, Tensor):
        raise checks.kind_error("logits", "a tensor", logits)
    checks.check_dtype("logits", logits, checks.FLOATS)
    checks.check_memory("logits", logits)
    if logits.ndim not in (3, 4) or (logits.ndim == 4 and logits.shape[1] != 1):
        raise checks.value_error("logits", "shape (B, 1, h, w) or (B, h, w)", tuple(logits.shape))
    checks.check_number("threshold", threshold, 0.0, 1.0)
    checks.check_choice("method", method, tuple(ARTIFACT_METHODS))
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    height, width = logits.shape[-2:]
    if height == 0 or width == 0:
        raise checks.value_error("logits", "at least one pixel", f"shape {tuple(logits.shape)}")
    if size is None:
        return height, width
    if not isinstance(size, (tuple, list, torch.Size)) or not all(type(n) is int for n in size):
        raise TypeError(expected("size", "a pair of ints (height, width) or None", repr(size)))
    if len(size) != 2 or min(size) < 1:
        raise checks.value_error("size", "a pair of positive ints (height, width)", tuple(size))
    return size[0], size[1]
