"""From a checked call of policy_loss to a problem, through one cache of plans."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from diffdoctor import reference
from diffdoctor.backends.select import name_of
from diffdoctor.lowering.plan import Grid, MapMeta, PerSample, Plan
from diffdoctor.lowering.policy_loss import POLICY_SUMS, WRITE_LOG_PROB, PolicyProblem, make_policy_plan
from diffdoctor.ops.arguments import tensor_key
from diffdoctor.ops.call import ONE, Kept, per_sample, with_outputs
from diffdoctor.ops.policy_arguments import PolicyInputs, PolicyOptions, log_prob_shape
from diffdoctor.ops.prepare import make_grid, map_meta, tensor_strides
from diffdoctor.reference.grid import accumulation_dtype

plans = Kept()
bound_calls = Kept()  # BoundPolicyCall by everything that a call depends on but its tensors' values


def plan_key(inputs: PolicyInputs, options: PolicyOptions) -> tuple:
    """What a plan, and whether the arguments can be, depends on."""
    tensors = (*inputs[:5], *inputs.coefs, inputs.mask, inputs.ref_pred)
    return (*map(tensor_key, tensors), options)


def _prepare(inputs: PolicyInputs, options: PolicyOptions, old: Tensor | None) -> Plan:
    pred, layout = inputs.model_pred, options.layout
    grid = make_grid(pred, layout)
    grad = torch.empty_like(pred, device="meta")
    if old is None:
        old = torch.empty(log_prob_shape(pred, layout), dtype=accumulation_dtype(pred.dtype), device="meta")
    terms = [inputs.latents, inputs.next_latents, *([] if inputs.ref_pred is None else [inputs.ref_pred])]

    def strides(x: Tensor) -> list[int]:
        return tensor_strides(x.stride(), x.ndim, grid, layout)

    return make_policy_plan(
        grid, pred.dtype, strides(pred), strides(grad), [(x.dtype, strides(x)) for x in terms],
        (old.dtype, _pixel_strides(map_meta(old, grid), grid)), _advantage_meta(inputs.advantage, grid),
        None if inputs.mask is None else map_meta(inputs.mask, grid), options.interpolation,
    )  # fmt: skip


def _pixel_strides(meta: MapMeta, grid: Grid) -> list[int]:
    b, t, y, x = meta.strides
    return grid.axis_strides(b, 0, t, y, x)


def _advantage_meta(advantage: Tensor | None, grid: Grid) -> MapMeta | None:
    if advantage is None or advantage.ndim > 1:
        return None if advantage is None else map_meta(advantage, grid)
    return MapMeta(advantage.dtype, (grid.frames, grid.height, grid.width), (advantage.stride(0), 0, 0, 0))


def _per_pixel(old: Tensor) -> Tensor:
    """An old log-probability with memory for every pixel: the dims along which it is 0 strides apart tell channels."""
    return old.contiguous() if any(n > 1 and not step for n, step in zip(old.shape, old.stride(), strict=True)) else old


def lower(inputs: PolicyInputs, options: PolicyOptions, outputs: int, key: tuple | None = None) -> PolicyProblem:
    """The problem of checked arguments, its outputs allocated; nothing is computed yet.

    Args:
        inputs: the tensors; model_pred is not empty. Without an advantage the log-probability is asked for.
        options: of the call.
        outputs: a union of WRITE_LOSS, WRITE_GRAD and WRITE_SUMS, or WRITE_LOG_PROB.
        key: `plan_key` of both, where it is known.
    """
    pred, old = inputs.model_pred, inputs.old_log_prob
    old_map = None if old is None or old.ndim == 1 else _per_pixel(old)
    key = plan_key(inputs, options) if key is None else key
    plan = plans.get(key) or plans.keep(key, _prepare(inputs, options, old_map))
    acc = plan.acc_dtype
    a, b, sigma = (per_sample(value, acc) for value in inputs.coefs)
    problem = PolicyProblem(
        plan, outputs, pred, inputs.latents, inputs.next_latents, a, b, sigma, ONE, old_log_prob=old_map,
        old_mean=per_sample(old, acc) if old is not None and old.ndim == 1 else None, advantage=inputs.advantage,
        mask=inputs.mask, ref_pred=inputs.ref_pred, clip_range=options.clip_range,
        advantage_clip=inf if options.advantage_clip is None else options.advantage_clip,
        kl_weight=options.kl_weight, level=options.level, reduction=options.reduction,
    )  # fmt: skip
    if outputs & WRITE_LOG_PROB:
        problem.log_prob = torch.empty(log_prob_shape(pred, options.layout), dtype=acc, device=pred.device)
    return with_outputs(problem, options.reduction, POLICY_SUMS)


class BoundPolicyCall:
    """A policy_loss call whose arguments are known but for their tensors' values, on a backend that binds calls: one
    native call, and nothing is checked or lowered.

    Args:
        fast: what the backend's `bind` gave for `problem`.
        problem: of a first call.
        options: of that call.
        key: of its plan.
        module: of the backend.
    """

    __slots__ = (
        "_acc", "_batch", "_launch", "_like_loss", "_old_is_mean", "backend", "key", "module", "options",
        "runs",
    )  # fmt: skip
    op = "policy_loss"

    def __init__(self, fast, problem: PolicyProblem, options: PolicyOptions, key: tuple, module):
        self._launch, self._acc, self._batch = fast.__call__, problem.plan.acc_dtype, problem.plan.batch
        self._like_loss, self._old_is_mean = torch.empty_like(problem.loss), problem.old_mean is not None
        self.module, self.backend, self.runs = module, name_of(module), grad_runs(problem)
        self.options, self.key = options, key

    def __call__(self, inputs: PolicyInputs, with_grad: bool, with_sums: bool):
        """(loss, gradient or None, sums or None)."""
        pred, old = inputs.model_pred, inputs.old_log_prob
        loss = torch.empty_like(self._like_loss)
        grad = torch.empty_like(pred) if with_grad else None
        sums = self._like_loss.new_empty(self._batch, POLICY_SUMS) if with_sums else None
        per_sample = [x.reshape(-1).to(self._acc) for x in inputs.coefs if isinstance(x, Tensor)]
        if self._old_is_mean:
            per_sample.append(old.reshape(-1).to(self._acc))
            old = None
        self._launch(
            pred, inputs.latents, inputs.next_latents, inputs.ref_pred, old, inputs.advantage, inputs.mask, per_sample,
            loss, grad, sums,
        )  # fmt: skip
        return loss, grad, sums

    def scale(self, unit_grad: Tensor, g: Tensor, out: Tensor) -> None:
        """out = unit_grad * g, of one number."""
        self.module.scale_gradient(unit_grad, g, out, 1, unit_grad.numel())


def call_key(inputs: PolicyInputs, options: tuple) -> tuple | None:
    """What a call depends on beside its tensors' values; None where some of it cannot be a key, or is a bool: True is
    equal to 1 in a key, and the checks refuse it.

    Args:
        inputs: unchecked.
        options: those of `PolicyOptions`, unchecked, in its order.
    """
    try:
        tensors = (*inputs[:5], *inputs.coefs, inputs.mask, inputs.ref_pred)
        low, high = options[0]
        if bool in map(type, (*inputs.coefs, low, high, *options[1:3])):
            return None
        key = (*map(tensor_key, tensors), *options, torch.is_grad_enabled())
        hash(key)
    except (TypeError, ValueError, RuntimeError):  # the checks name what came
        return None
    return key


def grad_runs(problem: PolicyProblem) -> tuple[int, int] | None:
    """(batch, count) where the gradient's memory is `batch` dense runs of `count` elements, else None."""
    plan = problem.plan
    return (plan.batch, plan.count) if plan.batch == 1 or plan.grad.strides[0] == plan.count else None


def with_cotangent(problem: PolicyProblem, g: Tensor) -> PolicyProblem:
    """The problem with the gradient of its result, one number or one per sample."""
    problem.grad_output = PerSample(0.0, g.reshape(1) if g.ndim == 0 else g)
    return problem


def log_prob(inputs: PolicyInputs, layout, module) -> Tensor:
    """Each pixel's log-probability of checked arguments, by a backend's module; None is the reference."""
    pred = inputs.model_pred.detach()
    if pred.numel() == 0:
        return pred.new_zeros(log_prob_shape(pred, layout), dtype=accumulation_dtype(pred.dtype))
    if module is None:
        with torch.no_grad():
            result = reference.policy_log_prob(
                pred, inputs.latents, inputs.next_latents, coefs=inputs.coefs, layout=layout
            )
        return result.contiguous()
    problem = lower(inputs._replace(model_pred=pred), PolicyOptions(layout=layout), WRITE_LOG_PROB)
    module.policy_loss(problem)
    return problem.log_prob


def gradient_by_reference(inputs: PolicyInputs, options: PolicyOptions, g: Tensor) -> Tensor:
    """The gradient of model_pred by torch's own operations, for what no kernel may read or write."""
    with torch.enable_grad():
        x = inputs.model_pred.detach().requires_grad_()
        loss = reference.policy_loss(**inputs._replace(model_pred=x)._asdict(), **vars(options))
    return torch.autograd.grad(loss, x, g)[0]
