"""Problems as the native module takes them: the static half once per plan, then addresses and numbers."""

from __future__ import annotations

from diffdoctor.lowering.artifact_loss import ARTIFACT_METHODS, ArtifactProblem
from diffdoctor.lowering.plan import (
    DTYPES,
    MAP_MODES,
    REDUCTIONS,
    MapPlan,
    OperandPlan,
    PerSample,
    Plan,
    Problem,
)


def native_plan(plan: Plan, native):
    """The plan as a `_native.WeightedLossPlan`, made once and kept in the plan's cache."""
    made = plan.cache.get("native")
    if made is None:
        made = plan.cache["native"] = native.WeightedLossPlan(_describe(plan))
    return made


def _describe(plan: Plan) -> dict:
    options = plan.options
    return {
        "batch": plan.batch,
        "count": plan.count,
        "size": plan.size,
        "ndim": plan.ndim,
        "dtype": DTYPES[plan.dtype],
        "contiguous": plan.contiguous,
        "pred": _describe_operand(plan.pred),
        "grad": _describe_operand(plan.grad),
        "terms": tuple(map(_describe_operand, plan.terms)),
        "weighting": _describe_operand(plan.weighting),
        "confidence": _describe_map(plan.confidence),
        "mask": _describe_map(plan.mask),
        "coord": plan.coord,
        "grid": plan.grid,
        "strength": options.strength,
        "artifact_weight": options.artifact_weight,
        "clean_weight": options.clean_weight,
        "artifact_grad": options.artifact_grad,
        "clean_grad": options.clean_grad,
        "threshold": options.threshold,
        "gamma": options.gamma,
        "reduction": REDUCTIONS[options.reduction],
    }


def _describe_operand(plan: OperandPlan | None):
    return None if plan is None else (DTYPES[plan.dtype], plan.strides)


def _describe_map(plan: MapPlan | None):
    if plan is None:
        return None
    return (DTYPES[plan.dtype], MAP_MODES[plan.mode], plan.strides, plan.in_size, plan.in_stride)


def call_arguments(problem: Problem) -> tuple[tuple, tuple]:
    """(pointers, per_sample) of `bind_call` in csrc/native_plan.h."""
    terms, coefs, count = problem.terms, problem.coefs, len(problem.terms)
    pointers = (
        problem.pred.data_ptr(),
        _pointer(problem.grad),
        terms[0].data_ptr() if count else 0,
        terms[1].data_ptr() if count > 1 else 0,
        _pointer(problem.weighting),
        _pointer(problem.confidence),
        _pointer(problem.mask),
        _pointer(problem.loss),
        _pointer(problem.sums),
    )
    per_sample = (
        _number(problem.pred_scale),
        _number(coefs[0]) if count else None,
        _number(coefs[1]) if count > 1 else None,
        _number(problem.huber_c),
        _number(problem.weight),
        _number(problem.z),
        _number(problem.grad_output),
    )
    return pointers, per_sample


def _pointer(tensor) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _number(entry: PerSample):
    return entry.value if entry.data is None else (entry.data.data_ptr(), entry.stride)


def artifact_arguments(problem: ArtifactProblem) -> tuple:
    """The description of `bind_artifact_loss` in csrc/native_plan.h."""
    logits = problem.logits
    return (
        logits.data_ptr(),
        logits.stride(),
        tuple(logits.shape),
        problem.size,
        problem.threshold,
        DTYPES[logits.dtype],
        ARTIFACT_METHODS[problem.method],
        REDUCTIONS[problem.reduction],
        problem.loss.data_ptr(),
        _pointer(problem.kept),
        _pointer(problem.factor) if problem.kept is not None else 0,
    )
