"""The public `weighted_loss`: the key of its plan, and three exits: traced, bound to a fast path, general."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffdoctor import reference
from diffdoctor.backends.select import for_device, name_of, overridden, pick, requested
from diffdoctor.lowering.plan import SUMS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS
from diffdoctor.ops import checks
from diffdoctor.ops.arguments import Inputs, LossOptions, check_inputs, has_memory, target_key, tensor_key
from diffdoctor.ops.autograd import (
    BoundCall,
    differentiable_loss,
    functorch_level,
    guard_reference,
    refuse_forward_mode,
    refuse_functorch,
)
from diffdoctor.ops.call import lower, plans, run
from diffdoctor.ops.layout import Packed
from diffdoctor.ops.library import weighted_loss as registered
from diffdoctor.ops.observed import PLAIN, is_observed, unrecorded
from diffdoctor.ops.prepare import CachedPlan, prepare
from diffdoctor.ops.stats import LossStats
from diffdoctor.ops.target import Target
from diffdoctor.reference.grid import accumulation_dtype
from diffdoctor.reference.weighted_loss import weight_beside

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["weighted_loss"]

# Found in this module rather than in torch's, whose large table is in no cache after two million elements.
_is_grad_enabled = torch.is_grad_enabled
_find_plan = plans.get
_BOOL = frozenset({bool})


class _Keywords(TypedDict, total=False):
    """The arguments by name, for the overloads alone; tests/typing holds them equal to the function's."""

    mask: Tensor | None
    weighting: Tensor | None
    artifact_weight: float | None
    clean_weight: float
    artifact_grad: float
    clean_grad: float
    threshold: float
    gamma: float
    interpolation: str
    loss_type: str | dict[str, float]
    huber_c: float | Tensor
    normalize: str | None
    normalizer: Tensor | float | None
    reduction: str
    layout: Packed | None
    backend: str | None


@overload
def weighted_loss(
    model_pred: Tensor,
    target: Tensor | Target,
    confidence: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...
@overload
def weighted_loss(
    model_pred: Tensor,
    target: Tensor | Target,
    confidence: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, LossStats]: ...
def weighted_loss(
    model_pred: Tensor,
    target: Tensor | Target,
    confidence: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    weighting: Tensor | None = None,
    artifact_weight: float | None = None,
    clean_weight: float = 1.0,
    artifact_grad: float = 1.0,
    clean_grad: float = 1.0,
    threshold: float = 0.0,
    gamma: float = 1.0,
    interpolation: str = "area",
    loss_type: str | dict[str, float] = "l2",
    huber_c: float | Tensor = 0.1,
    normalize: str | None = None,
    normalizer: Tensor | float | None = None,
    reduction: str = "mean",
    layout: Packed | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LossStats]:
    """A diffusion training loss weighted, and its gradient modulated, by where a picture is broken.

    With d the residual, u = confidence ** gamma where confidence >= threshold (else 0), the spatial weight
    w = mask * (clean_weight + (artifact_weight - clean_weight) * u) and Z its mean where `normalize` says so, each
    sample's loss is the mean of weighting * w * loss_type(d) / Z, and its gradient is multiplied by
    clean_grad + (artifact_grad - clean_grad) * u. With no map and the defaults it is
    `F.mse_loss(model_pred.float(), target.float())`. All arithmetic is fp32 (fp64 for fp64).

    Args:
        model_pred: (B, C, H, W), (B, C, T, H, W), or tokens (B, N, D); fp32, bf16, fp16 or fp64; any strides. The
            only argument that gets a gradient.
        target: a tensor of the same shape (a dtype of its own is fine; under a layout also (B, C, H, W)), or a
            `Target`, which is built inside the kernel.
        confidence: a detector's map in [0, 1]: (B, H', W'), (B, 1, H', W') or, for video, (B, 1, T', H', W'); B may
            be 1; (B, N) for tokens without a layout. Floating point, uint8 (divided by 255) or bool; any size with the
            grid's aspect ratio, to within a cell. It is clamped to [0, 1]; a NaN counts as clean.
        mask: a region to train on, shapes and types as confidence; clamped to [0, 1], a NaN counts as 0; multiplies
            the spatial weight.
        weighting: (B,) or (1,) per sample, or anything that broadcasts to model_pred's (unpacked) shape.
        artifact_weight: weight of the loss where confidence is 1; must be given with confidence. 0.0 leaves out what is
            broken in training pictures; above 1.0 counts it more, where the target is clean and the map marks what
            the model gets wrong; 1.0 where artifact_grad alone is to act, and the default beside a target with
            artifact_coefs.
        clean_weight: weight of the loss where confidence is 0.
        artifact_grad: factor of the gradient, not of the loss's value, where confidence is 1.
        clean_grad: likewise where confidence is 0.
        threshold: confidence below it counts as 0; in [0, 1], rounded to fp32.
        gamma: exponent of the confidence; positive.
        interpolation: from a map's size to the grid: area | bilinear | nearest | nearest-exact, as
            `F.interpolate` (align_corners=False).
        loss_type: l2 | l1 | huber | smooth_l1 (torch's) | pseudo_huber | log_cosh, or a dict of their strengths.
        huber_c: delta, beta or c of the Huber kinds; a float or a (B,) tensor, at least 0.
        normalize: divide by the mean spatial weight of each "sample" or of the "batch"; None divides by nothing.
        normalizer: what to divide by instead: a number or a tensor of shape () or (B,). A sample divided by 0
            contributes 0.
        reduction: "mean" -> (), "sample" -> (B,), "sum" -> ().
        layout: `Packed` where model_pred holds packed tokens; maps are then on the unpacked latents' grid.
        return_stats: also return a `LossStats` of device tensors.
        backend: cuda | triton | cpu | reference; None takes the fastest (or DIFFDOCTOR_BACKEND).

    Returns:
        The loss, fp32 (fp64 for fp64), or (loss, LossStats).

    Raises:
        TypeError: an argument of the wrong kind or dtype; a confidence without an artifact_weight.
        ValueError: a shape, device, name or number that cannot be; a target, map or weighting that requires a gradient.
        RuntimeError: the backend asked for cannot serve (`BackendUnavailable`); torch.func transforms; a second
            derivative.

    Example:
        >>> loss = diffdoctor.weighted_loss(model_pred, diffdoctor.Target.epsilon(noise), confidence,
        ...                                 artifact_weight=0.0)
        >>> loss.backward()
    """
    as_operator = is_observed() or type(model_pred) not in PLAIN
    cached = key = None
    if not as_operator:
        if functorch_level() is not None:
            refuse_functorch("weighted_loss")
        if forward_ad._current_level >= 0:
            refuse_forward_mode("weighted_loss", model_pred, target, *getattr(target, "terms", ()))
        map_options = (
            artifact_weight, clean_weight, artifact_grad, clean_grad, threshold, gamma, interpolation
        )  # fmt: skip
        grad_mode = _is_grad_enabled()
        try:
            # Written out: with cold caches each function that is called costs microseconds. A tensor's type is in it.
            key = (
                model_pred.shape, model_pred.stride(), model_pred.dtype, model_pred.device, model_pred.requires_grad,
                model_pred.is_neg(), grad_mode,
                (target.shape, target.stride(), target.dtype, target.device, target.requires_grad, target.is_neg())
                if type(target) is Tensor else target_key(target),
                (
                    confidence.shape, confidence.stride(), confidence.dtype, confidence.device,
                    confidence.requires_grad, confidence.is_neg(),
                )
                if type(confidence) is Tensor else tensor_key(confidence), None if mask is None else tensor_key(mask),
                None if weighting is None else tensor_key(weighting),
                huber_c if type(huber_c) is float else tensor_key(huber_c),
                None if normalizer is None else tensor_key(normalizer), map_options,
                tuple(loss_type.items()) if isinstance(loss_type, dict) else loss_type, normalize, reduction, layout,
            )  # fmt: skip
            # True is equal to 1 in a key; the checks refuse it.
            if _BOOL.isdisjoint(map(type, map_options)) and type(huber_c) is not bool:
                cached = _find_plan(key)
        except (TypeError, RuntimeError):  # something unhashable or without strides came: the checks below name it
            cached = None
        if (
            cached is not None and cached.bound is not None and type(return_stats) is bool
            and (not overridden() if backend is None else backend == cached.backend)
        ):  # fmt: skip
            return cached.bound(
                model_pred, target, confidence, mask, weighting, huber_c, normalizer,
                grad_mode and model_pred.requires_grad, return_stats,
            )  # fmt: skip
    inputs = Inputs(model_pred, target, confidence, mask, weighting, huber_c, normalizer)
    if cached is None:
        options = LossOptions(
            weight_beside(confidence, artifact_weight, target), clean_weight, artifact_grad, clean_grad, threshold,
            gamma, interpolation, loss_type, normalize, reduction, layout,
        )  # fmt: skip
        unrecorded(check_inputs, inputs, options)
    checks.check_bool("return_stats", return_stats)
    if as_operator or (cached is None and not has_memory(inputs)):
        return registered.weighted_loss(inputs, options, return_stats, backend)
    if cached is None:
        cached = plans.keep(key, prepare(inputs, options))
    return _dispatch(inputs, cached, return_stats, backend)


def _dispatch(inputs: Inputs, cached: CachedPlan, return_stats: bool, backend: str | None):
    """A checked call to the backend that serves it; where that has a fast path, the plan's next calls take it."""
    pred, options, plan = inputs.model_pred, cached.options, cached.plan
    module = pick(requested(backend), "weighted_loss", pred.device.type, elements=pred.numel())
    if plan is None:
        return _empty(pred, options.reduction, return_stats)
    if module is None:
        return _run_reference(inputs, options, return_stats)
    differentiable = torch.is_grad_enabled() and pred.requires_grad
    outputs = WRITE_LOSS | (WRITE_SUMS if return_stats else 0)
    if differentiable and pred.dtype != torch.float16:  # fp16 computes its gradient in backward
        outputs |= WRITE_GRAD
    problem = lower(inputs, options, outputs, cached)
    if cached.bound is None and module is for_device(pred.device.type, "weighted_loss", pred.numel()):
        fast = module.bind(problem)
        if fast is not None:
            cached.bound, cached.backend = BoundCall(fast, problem, cached, module).run, name_of(module)
    if differentiable:
        loss = differentiable_loss(pred, problem, module, cached.grad_runs, options)
    else:
        run(module, problem)
        loss = problem.loss
    return (loss, LossStats.from_sums(problem.sums, plan.batch * plan.count)) if return_stats else loss


def _empty(model_pred: Tensor, reduction: str, return_stats: bool):
    """The result of an empty tensor: 0, connected to the graph."""
    dtype = accumulation_dtype(model_pred.dtype)
    flat = guard_reference(model_pred, "weighted_loss").flatten(1).to(dtype)
    loss = flat.sum(1) if reduction == "sample" else flat.sum()
    if not return_stats:
        return loss
    return loss, LossStats.from_sums(torch.zeros(flat.shape[0], SUMS, dtype=dtype, device=flat.device), 0)


def _run_reference(inputs: Inputs, options: LossOptions, return_stats: bool):
    guarded = inputs._replace(model_pred=guard_reference(inputs.model_pred, "weighted_loss"))
    result = reference.weighted_loss(**guarded._asdict(), **vars(options), return_sums=return_stats)
    return (result[0], LossStats.from_sums(result[1], inputs.model_pred.numel())) if return_stats else result
