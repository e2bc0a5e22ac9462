"""From a call's arguments to the problem a backend receives, once the plan is known."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor.lowering.plan import SUMS, WRITE_LOSS, WRITE_SUMS, PerSample, Problem
from diffdoctor.ops.prepare import Prepared
from diffdoctor.ops.target import Target

ONE = PerSample()


def meta(x):
    """What a plan depends on in an argument: a tensor's metadata, or the argument itself."""
    if isinstance(x, Tensor):
        return (x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_neg())
    return x


def target_meta(target):
    if type(target) is not Target:
        return meta(target)
    return (
        *(meta(term) for term in target.terms),
        *(meta(coef) for coef in target.coefs),
        meta(target.pred_scale),
    )


def per_sample(value, dtype: torch.dtype) -> PerSample:
    """A number or a tensor as the kernels take it."""
    if isinstance(value, Tensor):
        return PerSample(0.0, value.reshape(-1).to(dtype))
    return ONE if value == 1.0 else PerSample(float(value))


def make_problem(prepared: Prepared, model_pred, target, confidence, mask, weighting, huber_c) -> Problem:
    """The problem without its divisor and its outputs."""
    plan = prepared.plan
    acc = plan.acc_dtype
    if isinstance(target, Tensor):
        terms, coefs, pred_scale = (target,), (ONE,), ONE
    else:
        terms = target.terms
        coefs = tuple(per_sample(coef, acc) for coef in target.coefs)
        pred_scale = per_sample(target.pred_scale, acc)
    weight = ONE
    if prepared.weighting_per_sample:
        weight, weighting = per_sample(weighting, acc), None
    return Problem(
        plan, WRITE_LOSS, model_pred, terms, confidence, mask, weighting, pred_scale, coefs,
        per_sample(huber_c, acc), weight, ONE, ONE,
    )  # fmt: skip


def add_divisor(module, problem: Problem, normalize, normalizer) -> None:
    """Z: given, or the mean spatial weight, which costs one pass over the maps alone."""
    plan = problem.plan
    if normalizer is not None:
        problem.z = per_sample(normalizer, plan.acc_dtype)
    elif normalize is not None:
        if problem.confidence is None and problem.mask is None:
            problem.z = PerSample(plan.options.clean_weight)
            return
        length = plan.batch if normalize == "sample" else 1
        out = torch.empty(length, dtype=plan.acc_dtype, device=problem.pred.device)
        module.weight_mean(problem, out)
        problem.z = PerSample(0.0, out)


def allocate(problem: Problem, reduction: str, return_stats: bool) -> None:
    plan, device = problem.plan, problem.pred.device
    shape = (plan.batch,) if reduction == "sample" else ()
    problem.loss = torch.empty(shape, dtype=plan.acc_dtype, device=device)
    if return_stats:
        problem.work |= WRITE_SUMS
        problem.sums = torch.empty(plan.batch, SUMS, dtype=plan.acc_dtype, device=device)
