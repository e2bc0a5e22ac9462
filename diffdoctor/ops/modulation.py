"""The gradient's modulation m on its own: what `modulate_gradient` takes from the kernels of `weighted_loss`.

A residual that is the incoming gradient itself (no target, half an l2 loss, summed) makes the gradient of weighted_loss
equal m times it, so one kernel serves both ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor import reference
from diffdoctor.backends.select import pick, requested
from diffdoctor.lowering.plan import WRITE_GRAD
from diffdoctor.ops.arguments import Inputs, LossOptions
from diffdoctor.ops.call import lower, run

#: The options of modulate_gradient, in the order of its operators.
NAMES = ("artifact_grad", "clean_grad", "threshold", "gamma", "interpolation", "layout")


def modulation_options(**options) -> LossOptions:
    """The options, checked, as those of the weighted_loss whose gradient is m times a residual.

    Args:
        options: those of NAMES.
    """
    return LossOptions(artifact_weight=1.0, clean_weight=1.0, loss_type={"l2": 0.5}, reduction="sum", **options)


def modulated(grad: Tensor, confidence: Tensor, options: LossOptions) -> Tensor:
    """grad times m, as a new tensor; of an empty grad, itself.

    Args:
        grad: (B, C, H, W), (B, C, T, H, W) or (B, N, D).
        confidence: a map, checked against it.
        options: of `modulation_options`.
    """
    if grad.numel() == 0:
        return grad
    grad = grad.resolve_neg()
    module = pick(requested(None), "modulate_gradient", grad.device.type, "weighted_loss", grad.numel())
    if module is None:
        probe = grad.detach().requires_grad_()
        with torch.enable_grad():
            out = reference.modulate_gradient(probe, confidence, **{name: getattr(options, name) for name in NAMES})
        return torch.autograd.grad(out, probe, grad)[0]
    problem = lower(Inputs(grad, None, confidence), options, WRITE_GRAD)
    run(module, problem)
    return problem.grad
