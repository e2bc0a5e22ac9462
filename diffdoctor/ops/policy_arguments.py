"""The arguments of a `policy_loss` call as two objects: its tensors and its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffdoctor.ops import checks
from diffdoctor.ops.layout import Packed
from diffdoctor.runs.errors import expected

LEVELS = ("pixel", "sample")


class PolicyInputs(NamedTuple):
    """The tensors of a call, and the numbers that may be tensors; by name as `policy_loss` has them."""

    model_pred: Tensor
    latents: Tensor
    next_latents: Tensor
    old_log_prob: Tensor | None
    advantage: Tensor
    coefs: tuple
    mask: Tensor | None = None
    ref_pred: Tensor | None = None


@dataclass(frozen=True)
class PolicyOptions:
    """The numbers and names of a call, checked; by name as `policy_loss` has them.

    Raises:
        TypeError: an option of the wrong kind.
        ValueError: a name or a number that cannot be.
    """

    clip_range: tuple[float, float] = (1e-4, 1e-4)
    advantage_clip: float | None = None
    kl_weight: float = 0.0
    interpolation: str = "area"
    level: str = "pixel"
    reduction: str = "mean"
    layout: Packed | None = None

    def __post_init__(self):
        checks.check_choice("interpolation", self.interpolation, checks.INTERPOLATIONS)
        checks.check_choice("level", self.level, LEVELS)
        checks.check_choice("reduction", self.reduction, checks.REDUCTIONS)
        checks.check_layout(self.layout)
        object.__setattr__(self, "clip_range", _check_clip_range(self.clip_range))
        object.__setattr__(self, "kl_weight", checks.check_number("kl_weight", self.kl_weight, 0.0))
        if self.advantage_clip is not None:
            value = checks.check_number("advantage_clip", self.advantage_clip, 0.0)
            object.__setattr__(self, "advantage_clip", value)


def _check_clip_range(value) -> tuple[float, float]:
    """(low, high): how far below and above 1 a ratio counts."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(expected("clip_range", "a pair of numbers (low, high)", repr(value)))
    low, high = value
    return checks.check_number("clip_range[0]", low, 0.0, 1.0), checks.check_number("clip_range[1]", high, 0.0)


def check_inputs(inputs: PolicyInputs, options: PolicyOptions) -> None:
    """Check the tensors of a call against each other and against its options.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device or number that cannot be; an argument that requires a gradient.
    """
    pred, layout = inputs.model_pred, options.layout
    check_step(pred, inputs.latents, inputs.next_latents, inputs.coefs, layout)
    if inputs.old_log_prob is not None:
        _check_old_log_prob(inputs.old_log_prob, pred, options)
    check_advantage(inputs.advantage, pred, layout)
    if inputs.mask is not None:
        checks.check_map("mask", inputs.mask, pred, layout)
    if inputs.ref_pred is not None:
        checks.check_like("ref_pred", inputs.ref_pred, pred, layout)
    elif options.kl_weight:
        raise checks.value_error("ref_pred", "the reference model's prediction beside a kl_weight", None)


def check_step(model_pred, latents, next_latents, coefs, layout) -> None:
    """Check what says how a step was drawn: the prediction, the latents before and after it, and its coefs."""
    checks.check_pred("model_pred", model_pred, layout)
    checks.check_memory("model_pred", model_pred)
    checks.check_like("latents", latents, model_pred, layout)
    checks.check_like("next_latents", next_latents, model_pred, layout)
    if not isinstance(coefs, (tuple, list)) or len(coefs) != 3:
        raise TypeError(expected("coefs", "(a, b, sigma), numbers or tensors of shape (B,)", type(coefs).__name__))
    for name, value in zip(("a", "b", "sigma"), coefs, strict=True):
        if isinstance(value, Tensor):
            checks.check_per_sample(f"coefs' {name}", value, model_pred)
        else:
            checks.check_number(f"coefs' {name}", value, *((0.0,) if name == "sigma" else ()))


def log_prob_shape(model_pred: Tensor, layout) -> tuple[int, ...]:
    """The shape of `policy_log_prob`'s result."""
    if model_pred.ndim == 3 and layout is None:
        return tuple(model_pred.shape[:2])
    batch, _, *size = checks.grid_shape(model_pred, layout)
    return (batch, 1, *size)


def _check_old_log_prob(value, model_pred: Tensor, options: PolicyOptions) -> None:
    """What `policy_log_prob` gives, or at level "sample" also its means (B,)."""
    if not isinstance(value, Tensor):
        raise checks.kind_error("old_log_prob", "a tensor or None", value)
    checks.check_dtype("old_log_prob", value, (torch.float32, torch.float64))
    allowed = [log_prob_shape(model_pred, options.layout)]
    if options.level == "sample":
        allowed.append((model_pred.shape[0],))
    if tuple(value.shape) not in allowed:
        raise checks.value_error("old_log_prob", f"shape {' or '.join(map(str, allowed))}", tuple(value.shape))
    checks.check_input("old_log_prob", value, model_pred)


def check_advantage(value, model_pred: Tensor, layout) -> None:
    """One advantage per sample, (B,), or a map of them of any size."""
    if not isinstance(value, Tensor):
        raise checks.kind_error("advantage", "a tensor", value)
    checks.check_dtype("advantage", value, checks.FLOATS)
    if value.ndim != 1:
        checks.check_map("advantage", value, model_pred, layout)
        return
    if value.shape[0] != model_pred.shape[0]:
        raise checks.value_error("advantage", f"shape ({model_pred.shape[0]},), or a map", tuple(value.shape))
    checks.check_input("advantage", value, model_pred)
