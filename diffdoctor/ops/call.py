"""From a checked call to a problem, through one cache of plans, and its run on a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffdoctor.lowering.plan import SUMS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, PerSample, Problem
from diffdoctor.ops.arguments import Inputs, LossOptions, target_key, target_parts, tensor_key
from diffdoctor.ops.prepare import CachedPlan, prepare

ONE = PerSample()


class Kept(dict):
    """Values by what they depend on, such as plans; starts anew when it is full."""

    LIMIT = 1024

    def keep(self, key: tuple, cached: Any) -> Any:
        """Keep a value, and return it."""
        if len(self) >= self.LIMIT:
            self.clear()
        self[key] = cached
        return cached


plans = Kept()


def plan_of(inputs: Inputs, options: LossOptions) -> CachedPlan:
    """The plan of checked arguments, made where there is none yet."""
    pred, target, *others = inputs
    key = (tensor_key(pred), target_key(target), *map(tensor_key, others), options)
    return plans.get(key) or plans.keep(key, prepare(inputs, options))


def per_sample(value: float | Tensor, dtype: torch.dtype) -> PerSample:
    """A number or a tensor as the kernels take it."""
    if isinstance(value, Tensor):
        return PerSample(0.0, value.reshape(-1).to(dtype))
    return ONE if value == 1.0 else PerSample(float(value))


def lower(inputs: Inputs, options: LossOptions, outputs: int, cached: CachedPlan | None = None) -> Problem:
    """The problem of checked arguments, its outputs allocated; nothing is computed yet.

    Args:
        inputs: the tensors; model_pred is not empty.
        options: of the call.
        outputs: a union of WRITE_LOSS, WRITE_GRAD and WRITE_SUMS.
        cached: the plan, where it is known.
    """
    cached = cached or plan_of(inputs, options)
    plan, pred, weighting = cached.plan, inputs.model_pred, inputs.weighting
    acc, device = plan.acc_dtype, pred.device
    target = target_parts(inputs.target)
    weight = ONE
    if cached.weighting_per_sample:
        weight, weighting = per_sample(weighting, acc), None
    z, z_is_mean = ONE, False
    if inputs.normalizer is not None:
        z = per_sample(inputs.normalizer, acc)
    elif options.normalize is not None and inputs.confidence is None and inputs.mask is None:
        z = PerSample(options.clean_weight)
    elif options.normalize is not None:
        length = plan.batch if options.normalize == "sample" else 1
        z, z_is_mean = PerSample(0.0, torch.empty(length, dtype=acc, device=device)), True
    problem = Problem(
        plan, outputs, pred, target.terms, inputs.confidence, inputs.mask, weighting,
        per_sample(target.pred_scale, acc), tuple(per_sample(coef, acc) for coef in target.coefs),
        per_sample(inputs.huber_c, acc), weight, z, ONE, z_is_mean=z_is_mean,
        artifact_coefs=tuple(per_sample(coef, acc) for coef in target.artifact_coefs),
    )  # fmt: skip
    return with_outputs(problem, options.reduction, SUMS)


def with_outputs(problem, reduction: str, sums: int):
    """A problem of `weighted_loss` or `policy_loss` with what its `outputs` ask for allocated.

    Args:
        reduction: of the loss.
        sums: columns of the sums.
    """
    plan, pred = problem.plan, problem.pred
    acc, device = plan.acc_dtype, pred.device
    if problem.outputs & WRITE_LOSS:
        shape = (plan.batch,) if reduction == "sample" else ()
        problem.loss = torch.empty(shape, dtype=acc, device=device)
    if problem.outputs & WRITE_GRAD:
        problem.grad = torch.empty_like(pred)
    if problem.outputs & WRITE_SUMS:
        problem.sums = torch.empty(plan.batch, sums, dtype=acc, device=device)
    return problem


def run(module, problem: Problem) -> None:
    """Fill a problem's outputs by a backend's module; a mean spatial weight costs one pass over the maps before."""
    if problem.z_is_mean:
        module.weight_mean(problem, problem.z.data)
    module.weighted_loss(problem)
