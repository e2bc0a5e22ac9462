"""Problems as the native module takes them: the static half once per plan, then addresses and numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from diffdoctor.lowering.artifact_loss import ARTIFACT_METHODS, ArtifactProblem
from diffdoctor.lowering.plan import (
    DTYPES,
    MAP_MODES,
    MAX_TERMS,
    REDUCTIONS,
    WRITE_GRAD,
    WRITE_LOSS,
    WRITE_SUMS,
    MapPlan,
    OperandPlan,
    Options,
    PerSample,
    Plan,
    Problem,
)
from diffdoctor.lowering.policy_loss import LEVELS, PolicyProblem

# The names of DD_WEIGHTED_LOSS_PLAN in csrc/common/weighted_loss_params.h, but for their order.
_OPTION_FIELDS = tuple(field.name for field in fields(Options))
_PLAN_FIELDS = tuple(field.name for field in fields(Plan) if field.name not in ("acc_dtype", "options", "cache"))
_CODES = {**REDUCTIONS, **MAP_MODES}
_Z = 5  # of the numbers, the divisor
MAX_NUMBERS = 11  # of DD_WEIGHTED_LOSS_NUMBERS and DD_WEIGHTED_LOSS_MORE_NUMBERS


def native_plan(plan: Plan, native):
    """The plan as a `_native.WeightedLossPlan`, made once and kept in the plan's cache."""
    made = plan.cache.get("native")
    if made is None:
        made = plan.cache["native"] = native.WeightedLossPlan(plan_fields(plan))
    return made


def plan_fields(plan: Plan) -> dict:
    """What the plan and its options hold, by name, in numbers, tuples and dicts."""
    described = {name: _plain(getattr(plan, name)) for name in _PLAN_FIELDS}
    return described | {name: _plain(getattr(plan.options, name)) for name in _OPTION_FIELDS}


def _plain(value):
    if isinstance(value, torch.dtype):
        return DTYPES[value]
    if isinstance(value, str):
        return _CODES[value]
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, OperandPlan | MapPlan):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def call_arguments(problem: Problem) -> tuple[tuple, tuple]:
    """(pointers, numbers) in the order of DD_WEIGHTED_LOSS_POINTERS and _NUMBERS, then of those _MORE_ has if any."""
    terms, coefs, count = problem.terms, problem.coefs, len(problem.terms)
    pointers: tuple = (
        problem.pred.data_ptr(),
        address(problem.grad),
        terms[0].data_ptr() if count else 0,
        terms[1].data_ptr() if count > 1 else 0,
        address(problem.weighting),
        address(problem.confidence),
        address(problem.mask),
        address(problem.loss),
        address(problem.sums),
    )
    numbers: tuple = (
        _number(problem.pred_scale),
        _number(coefs[0]) if count else None,
        _number(coefs[1]) if count > 1 else None,
        _number(problem.huber_c),
        _number(problem.weight),
        _number(problem.z),
        _number(problem.grad_output),
    )
    if takes_more(problem):
        pointers += (terms[2].data_ptr() if count > 2 else 0,)
        more = (*coefs[2:], *(None,) * (MAX_TERMS - max(count, 2)), *problem.artifact_coefs)
        numbers += tuple(None if entry is None else _number(entry) for entry in more)
        numbers += (None,) * (MAX_NUMBERS - len(numbers))
    return pointers, numbers


def takes_more(problem: Problem) -> bool:
    """Whether a call has what DD_WEIGHTED_LOSS_MORE_... list: a third term, or coefficients that change with u."""
    return len(problem.terms) > 2 or problem.plan.spatial_coefs


def _with_tensors(numbers: tuple, slots: list[int], tensors: list[Tensor]) -> tuple:
    """The numbers per sample with those at `slots` taken from tensors (B,) or (1,)."""
    found = list(numbers)
    for k, tensor in zip(slots, tensors, strict=True):
        found[k] = (tensor.data_ptr(), 0 if tensor.shape[0] == 1 else tensor.stride(0))
    return tuple(found)


class FastCall:
    """weighted_loss on the tensors of another call with the same plan and the same numbers, but for those that are
    tensors. A backend's own has `launch` and `launch_mean`.

    Args:
        problem: of a first call.
        native: the native module.
    """

    __slots__ = ("_count", "_dtype", "_mean", "_more", "_numbers", "_plan", "_tensor_slots")

    def __init__(self, problem: Problem, native):
        self._plan, self._numbers = native_plan(problem.plan, native), call_arguments(problem)[1]
        self._count, self._dtype = problem.plan.batch * problem.plan.count, DTYPES[problem.plan.dtype]
        self._mean = problem.z.data.shape[0] if problem.z_is_mean and problem.z.data is not None else 0
        self._tensor_slots = [
            k for k, number in enumerate(self._numbers) if type(number) is tuple and not (self._mean and k == _Z)
        ]
        self._more = takes_more(problem)

    def __call__(
        self,
        pred: Tensor,
        terms: tuple[Tensor, ...],
        confidence: Tensor | None,
        mask: Tensor | None,
        weighting: Tensor | None,
        per_sample: list[Tensor] | None,
        loss: Tensor,
        grad: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        """Fill the outputs that are given; `per_sample` are the numbers that are tensors, in the problem's order."""
        numbers = self._numbers if per_sample is None else _with_tensors(self._numbers, self._tensor_slots, per_sample)
        outputs = WRITE_LOSS if grad is None else WRITE_LOSS | WRITE_GRAD
        if sums is not None:
            outputs |= WRITE_SUMS
        pointers: tuple = (
            pred.data_ptr(),
            0 if grad is None else grad.data_ptr(),
            terms[0].data_ptr(),
            terms[1].data_ptr() if len(terms) > 1 else 0,
            0 if weighting is None else weighting.data_ptr(),
            0 if confidence is None else confidence.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            loss.data_ptr(),
            0 if sums is None else sums.data_ptr(),
        )
        if self._more:
            pointers += (terms[2].data_ptr() if len(terms) > 2 else 0,)
        if self._mean:
            z = loss.new_empty(self._mean)
            self.launch_mean(pointers[5], pointers[6], z)
            numbers = (*numbers[:_Z], (z.data_ptr(), 0 if self._mean == 1 else 1), *numbers[_Z + 1 :])
        self.launch(outputs, pointers, numbers)

    def launch(self, outputs: int, pointers: tuple, numbers: tuple) -> None:
        """weighted_loss of the native module."""
        raise NotImplementedError

    def launch_mean(self, confidence: int, mask: int, out: Tensor) -> None:
        """weight_mean of the native module, of the maps at two addresses into `out`, (B,) or (1,)."""
        raise NotImplementedError


def address(tensor: Tensor | None) -> int:
    """A tensor's address; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def _number(entry: PerSample):
    return entry.value if entry.data is None else (entry.data.data_ptr(), entry.stride)


def scale_arguments(grad: Tensor, grad_output: Tensor, out: Tensor, batch: int, count: int) -> tuple[int, ...]:
    """What scale_gradient takes on both devices: a kept gradient, what arrives in backward, and where the product goes.

    Args:
        grad: `batch` dense runs of `count` elements.
        grad_output: one number, or one per run; any stride.
        out: like grad, or grad itself.
        batch: number of runs.
        count: elements of a run.
    """
    g = (grad_output.data_ptr(), _stride(grad_output))
    return grad.data_ptr(), out.data_ptr(), DTYPES[grad.dtype], batch, count, *g


def artifact_backward_arguments(unit_grad: Tensor, factor: Tensor, grad_output: Tensor, out: Tensor) -> tuple[int, ...]:
    """What artifact_loss_backward takes on both devices.

    Args:
        unit_grad: (B, h, w), contiguous.
        factor: (B,).
        grad_output: one number, or one per picture; any stride.
        out: like unit_grad, in the logits' dtype.
    """
    return (
        unit_grad.data_ptr(), factor.data_ptr(), grad_output.data_ptr(), _stride(grad_output), out.data_ptr(),
        DTYPES[out.dtype], unit_grad.shape[0], unit_grad[0].numel(),
    )  # fmt: skip


def _stride(grad_output: Tensor) -> int:
    return grad_output.stride(0) if grad_output.ndim else 0


class ArtifactArguments(NamedTuple):
    """DD_ARTIFACT_LOSS_PARAMS in csrc/common/artifact_loss_params.h."""

    logits: int
    batch_stride: int
    row_stride: int
    col_stride: int
    batch: int
    in_h: int
    in_w: int
    out_h: int
    out_w: int
    threshold: float
    dtype: int
    method: int
    reduction: int
    loss: int
    unit_grad: int
    factor: int
    maxima: int


def artifact_arguments(problem: ArtifactProblem, maxima: Tensor | None = None) -> ArtifactArguments:
    """`maxima`: (B,) like the factor, for the two passes that "max" with a gradient takes on a GPU."""
    logits = problem.logits
    return ArtifactArguments(
        logits.data_ptr(),
        *logits.stride(),
        *logits.shape,
        *problem.size,
        problem.threshold,
        DTYPES[logits.dtype],
        ARTIFACT_METHODS[problem.method],
        REDUCTIONS[problem.reduction],
        problem.loss.data_ptr(),
        address(problem.unit_grad),
        address(problem.factor) if problem.unit_grad is not None else 0,
        address(maxima),
    )


class PolicyArguments(NamedTuple):
    """DD_POLICY_LOSS_PARAMS in csrc/common/policy_loss_params.h."""

    outputs: int
    reduction: int
    level: int
    channel_dim: int
    old: int
    clip_low: float
    clip_high: float
    advantage_clip: float
    kl_weight: float
    a: object
    b: object
    sigma: object
    old_mean: object
    grad_output: object
    pred: int
    grad: int
    latents: int
    next_latents: int
    ref_pred: int
    log_prob: int
    advantage: int
    mask: int
    loss: int
    sums: int


_POLICY_NUMBERS = PolicyArguments._fields.index("a")  # the first of the numbers per sample, of which there are five
_POLICY_POINTERS = PolicyArguments._fields.index("pred")


class FastPolicyCall:
    """policy_loss on the tensors of another call with the same plan and the same numbers, but for those that are
    tensors. A backend's own has `launch`.

    Args:
        problem: of a first call.
        native: the native module.
    """

    __slots__ = ("_numbers", "_options", "_plan", "_tensor_slots")

    def __init__(self, problem: PolicyProblem, native):
        arguments = policy_arguments(problem)
        self._plan, self._options = native_plan(problem.plan, native), arguments[1:_POLICY_NUMBERS]
        self._numbers = arguments[_POLICY_NUMBERS:_POLICY_POINTERS]
        self._tensor_slots = [k for k, number in enumerate(self._numbers) if type(number) is tuple]

    def __call__(
        self,
        pred: Tensor,
        latents: Tensor,
        next_latents: Tensor,
        ref_pred: Tensor | None,
        log_prob: Tensor | None,
        advantage: Tensor,
        mask: Tensor | None,
        per_sample: list[Tensor],
        loss: Tensor,
        grad: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        """Fill the outputs that are given; `per_sample` are the numbers that are tensors, in the problem's order."""
        numbers = _with_tensors(self._numbers, self._tensor_slots, per_sample) if per_sample else self._numbers
        outputs = WRITE_LOSS if grad is None else WRITE_LOSS | WRITE_GRAD
        if sums is not None:
            outputs |= WRITE_SUMS
        pointers = (
            pred.data_ptr(),
            0 if grad is None else grad.data_ptr(),
            latents.data_ptr(),
            next_latents.data_ptr(),
            0 if ref_pred is None else ref_pred.data_ptr(),
            0 if log_prob is None else log_prob.data_ptr(),
            advantage.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            loss.data_ptr(),
            0 if sums is None else sums.data_ptr(),
        )
        self.launch((outputs, *self._options, *numbers, *pointers))

    def launch(self, arguments: tuple) -> None:
        """policy_loss of the native module."""
        raise NotImplementedError


def policy_arguments(problem: PolicyProblem) -> PolicyArguments:
    log_prob = problem.log_prob if problem.old_log_prob is None else problem.old_log_prob
    tensors = (
        problem.pred, problem.grad, problem.latents, problem.next_latents, problem.ref_pred, log_prob,
        problem.advantage, problem.mask, problem.loss, problem.sums,
    )  # fmt: skip
    return PolicyArguments(
        problem.outputs,
        REDUCTIONS[problem.reduction],
        LEVELS[problem.level],
        problem.channel_dim,
        problem.old_kind,
        *problem.clip_range,
        problem.advantage_clip,
        problem.kl_weight,
        *(_number(entry) for entry in (problem.a, problem.b, problem.sigma)),
        None if problem.old_mean is None else _number(problem.old_mean),
        _number(problem.grad_output),
        *map(address, tensors),
    )
