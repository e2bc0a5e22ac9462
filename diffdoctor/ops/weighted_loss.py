"""The public `weighted_loss`: checks, the plan's cache, and the road to a backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffdoctor import reference
from diffdoctor.backends.select import for_device, overridden, pick, requested
from diffdoctor.lowering.plan import SUMS
from diffdoctor.ops import checks
from diffdoctor.ops.arguments import add_divisor, allocate, make_problem, meta, target_meta
from diffdoctor.ops.autograd import (
    WeightedLoss,
    functorch_level,
    guard_reference,
    refuse_forward_mode,
    refuse_functorch,
)
from diffdoctor.ops.prepare import Prepared, make_options, prepare, remember
from diffdoctor.ops.stats import LossStats
from diffdoctor.ops.target import Target

__all__ = ["weighted_loss"]

_cache: dict[tuple, Prepared] = {}
# Found in this module rather than in torch's, whose large table is in no cache after two million elements.
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled


def weighted_loss(
    model_pred: Tensor,
    target: Tensor | Target,
    confidence: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    weighting: Tensor | None = None,
    artifact_weight: float = 2.0,
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
    layout=None,
    return_stats: bool = False,
    backend: str | None = None,
):
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
            be 1; (B, N) for tokens without a layout. Floating point, uint8 (divided by 255) or bool; any size.
        mask: a region to train on, shapes and types as confidence; multiplies the spatial weight.
        weighting: (B,) or (1,) per sample, or anything that broadcasts to model_pred's (unpacked) shape.
        artifact_weight: weight of the loss where confidence is 1.
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
        layout: `Packed` where model_pred holds packed tokens; maps are then on the picture's grid.
        return_stats: also return a `LossStats` of device tensors.
        backend: cuda | triton | cpu | reference; None takes the fastest (or DIFFDOCTOR_BACKEND).

    Returns:
        The loss, fp32 (fp64 for fp64), or (loss, LossStats).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device, name or number that cannot be; a target, map or weighting that requires a gradient.
        RuntimeError: the backend asked for cannot serve (`BackendUnavailable`); torch.func transforms; a second
            derivative.

    Example:
        >>> loss = diffdoctor.weighted_loss(model_pred, diffdoctor.Target.epsilon(noise), confidence,
        ...                                 artifact_weight=4.0)
        >>> loss.backward()
    """
    if _is_compiling() or type(model_pred) not in _PLAIN:
        from diffdoctor.ops.library import weighted_loss as _library_weighted_loss

        return _library_weighted_loss.weighted_loss(
            model_pred,
            target,
            confidence,
            mask=mask,
            weighting=weighting,
            artifact_weight=artifact_weight,
            clean_weight=clean_weight,
            artifact_grad=artifact_grad,
            clean_grad=clean_grad,
            threshold=threshold,
            gamma=gamma,
            interpolation=interpolation,
            loss_type=loss_type,
            huber_c=huber_c,
            normalize=normalize,
            normalizer=normalizer,
            reduction=reduction,
            layout=layout,
            return_stats=return_stats,
            backend=backend,
        )
    if functorch_level() is not None:
        refuse_functorch("weighted_loss")
    if forward_ad._current_level >= 0:
        refuse_forward_mode("weighted_loss", model_pred, target, *getattr(target, "terms", ()))
    maps = (
        artifact_weight, clean_weight, artifact_grad, clean_grad, threshold, gamma, interpolation
    )  # fmt: skip
    grad_mode = _is_grad_enabled()
    # Written out: with cold caches each function that is called costs microseconds.
    key = (
        model_pred.shape, model_pred.stride(), model_pred.dtype, model_pred.device, model_pred.requires_grad,
        model_pred.is_neg(), grad_mode,
        (target.shape, target.stride(), target.dtype, target.device, target.requires_grad, target.is_neg())
        if type(target) is Tensor else target_meta(target),
        (
            confidence.shape, confidence.stride(), confidence.dtype, confidence.device, confidence.requires_grad,
            confidence.is_neg(),
        )
        if type(confidence) is Tensor else meta(confidence), None if mask is None else meta(mask),
        None if weighting is None else meta(weighting), huber_c if type(huber_c) is float else meta(huber_c),
        None if normalizer is None else meta(normalizer), maps,
        tuple(loss_type.items()) if isinstance(loss_type, dict) else loss_type, normalize, reduction, layout,
    )  # fmt: skip
    try:
        # True is equal to 1 in a key; the checks refuse it.
        prepared = None if bool in map(type, maps) or type(huber_c) is bool else _cache.get(key)
    except TypeError:  # something unhashable came: the checks below name it
        prepared = None
    if prepared is None:
        prepared = _check_and_prepare(
            key, model_pred, target, confidence, mask, weighting, maps, loss_type, huber_c, normalize, normalizer,
            reduction, layout,
        )  # fmt: skip
    differentiable = grad_mode and model_pred.requires_grad
    chosen = backend == "cpu" or (backend is None and not overridden())
    if chosen and return_stats is False and prepared.short is not None:
        return prepared.short(model_pred, target, confidence, mask, weighting, huber_c, normalizer, differentiable)
    if type(return_stats) is not bool:
        raise checks.kind_error("return_stats", "a bool", return_stats)
    arguments = (model_pred, target, confidence, mask, weighting, huber_c, normalizer)
    if chosen and prepared.short is not None:
        return _run_short(prepared, arguments, differentiable, return_stats)
    module = pick(requested(backend), "weighted_loss", model_pred.device.type)
    if prepared.plan is None:
        return _empty(model_pred, reduction, return_stats)
    if module is None:
        return _run_reference(
            model_pred, target, confidence, mask, weighting, maps, loss_type, huber_c, normalize, normalizer,
            reduction, layout, return_stats,
        )  # fmt: skip
    problem = make_problem(prepared, model_pred, target, confidence, mask, weighting, huber_c)
    add_divisor(module, problem, normalize, normalizer)
    if _takes_short_way(problem, module, normalize):
        prepared.short = module.ShortCall(problem, prepared)
        return _run_short(prepared, arguments, differentiable, return_stats)
    allocate(problem, reduction, return_stats)
    if differentiable:
        loss = WeightedLoss.apply(model_pred, problem, module, prepared.grad_runs)
    else:
        module.weighted_loss(problem)
        loss = problem.loss
    return (loss, LossStats.from_sums(problem.sums, prepared.plan.count)) if return_stats else loss


_PLAIN = (Tensor, torch.nn.Parameter)


def _takes_short_way(problem, module, normalize) -> bool:
    """On the CPU, and in one pass: normalize takes another before, fp16 computes its gradient in backward."""
    return (
        hasattr(module, "ShortCall")
        and module is for_device("cpu", "weighted_loss")
        and problem.pred.dtype != torch.float16
        and normalize is None
    )


def _run_short(prepared: Prepared, arguments, differentiable: bool, return_stats: bool):
    if not return_stats:
        return prepared.short(*arguments, differentiable)
    sums = torch.empty(prepared.plan.batch, SUMS, dtype=prepared.plan.acc_dtype, device="cpu")
    loss = prepared.short(*arguments, differentiable, sums)
    return loss, LossStats.from_sums(sums, prepared.plan.count)


def check_arguments(
    model_pred, target, confidence, mask, weighting, maps, loss_type, huber_c, normalize, normalizer, reduction, layout
):
    """Every check of weighted_loss; returns the scalars."""
    checks.check_pred("model_pred", model_pred, layout)
    checks.check_memory("model_pred", model_pred)
    checks.check_target(target, model_pred, layout)
    for name, value in (("confidence", confidence), ("mask", mask)):
        if value is not None:
            checks.check_map(name, value, model_pred, layout)
    if weighting is not None:
        checks.check_weighting(weighting, model_pred, layout)
    *scalars, interpolation = maps
    checks.check_choice("interpolation", interpolation, checks.INTERPOLATIONS)
    options = make_options(*scalars, loss_type, reduction)
    if isinstance(huber_c, Tensor):
        checks.check_per_sample("huber_c", huber_c, model_pred)
    else:
        checks.check_number("huber_c", huber_c, 0.0)
    checks.check_choice("normalize", normalize, checks.NORMALIZE)
    if isinstance(normalizer, Tensor):
        checks.check_per_sample("normalizer", normalizer, model_pred)
    elif normalizer is not None:
        checks.check_number("normalizer", normalizer)
    if normalize is not None and normalizer is not None:
        raise ValueError(f"normalizer takes the place of normalize: give one of them, got normalize={normalize!r} too")
    return options


def _check_and_prepare(
    key, model_pred, target, confidence, mask, weighting, maps, loss_type, huber_c, normalize, normalizer, reduction,
    layout,
):  # fmt: skip
    options = check_arguments(
        model_pred, target, confidence, mask, weighting, maps, loss_type, huber_c, normalize, normalizer, reduction,
        layout,
    )  # fmt: skip
    terms = (target,) if isinstance(target, Tensor) else target.terms
    prepared = prepare(model_pred, terms, confidence, mask, weighting, maps[-1], layout, options)
    return remember(_cache, key, prepared)


def _empty(model_pred: Tensor, reduction: str, return_stats: bool):
    """The result of an empty tensor: 0, connected to the graph."""
    dtype = torch.float64 if model_pred.dtype == torch.float64 else torch.float32
    batch = model_pred.shape[0]
    flat = guard_reference(model_pred, "weighted_loss").flatten(1).to(dtype)
    loss = flat.sum(1) if reduction == "sample" else flat.sum()
    if not return_stats:
        return loss
    return loss, LossStats.from_sums(torch.zeros(batch, SUMS, dtype=dtype, device=model_pred.device), 0)


def _run_reference(
    model_pred, target, confidence, mask, weighting, maps, loss_type, huber_c, normalize, normalizer, reduction, layout,
    return_stats,
):  # fmt: skip
    artifact_weight, clean_weight, artifact_grad, clean_grad, threshold, gamma, interpolation = maps
    result = reference.weighted_loss(
        guard_reference(model_pred, "weighted_loss"), target, confidence, mask=mask, weighting=weighting,
        artifact_weight=artifact_weight, clean_weight=clean_weight, artifact_grad=artifact_grad,
        clean_grad=clean_grad, threshold=threshold, gamma=gamma, interpolation=interpolation, loss_type=loss_type,
        huber_c=huber_c, normalize=normalize, normalizer=normalizer, reduction=reduction, layout=layout,
        return_sums=return_stats,
    )  # fmt: skip
    return (result[0], LossStats.from_sums(result[1], model_pred[0].numel())) if return_stats else result
