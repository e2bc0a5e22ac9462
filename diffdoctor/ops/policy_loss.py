"""The public `policy_loss` and `policy_log_prob`: the clipped policy loss of a sampling step, pixel by pixel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffdoctor import reference
from diffdoctor.backends.select import for_device, overridden, pick, requested
from diffdoctor.lowering.plan import WRITE_GRAD, WRITE_LOSS, WRITE_SUMS
from diffdoctor.lowering.policy_loss import POLICY_SUMS
from diffdoctor.ops import checks
from diffdoctor.ops.autograd import (
    GeneralCall,
    forbid_second_derivative,
    functorch_level,
    guard_reference,
    refuse_forward_mode,
    refuse_functorch,
    save_grad,
    with_strides,
)
from diffdoctor.ops.layout import Packed
from diffdoctor.ops.library import policy_loss as registered
from diffdoctor.ops.observed import PLAIN, is_observed, is_plain, unrecorded
from diffdoctor.ops.policy_arguments import PolicyInputs, PolicyOptions, check_inputs, check_step
from diffdoctor.ops.policy_call import (
    BoundPolicyCall,
    bound_calls,
    call_key,
    grad_runs,
    gradient_by_reference,
    log_prob,
    lower,
    plan_key,
    plans,
    with_cotangent,
)
from diffdoctor.ops.stats import PolicyStats
from diffdoctor.reference.grid import accumulation_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["policy_log_prob", "policy_loss"]

Number = float | Tensor


class _Keywords(TypedDict, total=False):
    """The arguments by name that may be left out, for the overloads alone; tests/typing holds them equal."""

    clip_range: tuple[float, float]
    advantage_clip: float | None
    mask: Tensor | None
    ref_pred: Tensor | None
    kl_weight: float
    interpolation: str
    level: str
    reduction: str
    layout: Packed | None
    backend: str | None


@overload
def policy_loss(
    model_pred: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    old_log_prob: Tensor | None,
    advantage: Tensor,
    *,
    coefs: tuple[Number, Number, Number],
    return_stats: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...
@overload
def policy_loss(
    model_pred: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    old_log_prob: Tensor | None,
    advantage: Tensor,
    *,
    coefs: tuple[Number, Number, Number],
    return_stats: Literal[True],
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, PolicyStats]: ...
def policy_loss(
    model_pred: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    old_log_prob: Tensor | None,
    advantage: Tensor,
    *,
    coefs: tuple[Number, Number, Number],
    clip_range: tuple[float, float] = (1e-4, 1e-4),
    advantage_clip: float | None = None,
    mask: Tensor | None = None,
    ref_pred: Tensor | None = None,
    kl_weight: float = 0.0,
    interpolation: str = "area",
    level: str = "pixel",
    reduction: str = "mean",
    layout: Packed | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, PolicyStats]:
    """PPO's clipped policy loss of one stochastic sampling step, with a ratio and an advantage for every pixel.

    The step drew next_latents from N(mu, sigma^2) with mu = a * latents + b * model_pred. With lp the mean over
    channels of -(next_latents - mu)^2 / (2 sigma^2), the ratio r = exp(lp - old_log_prob) and A the advantage, a
    pixel's loss is max(-A r, -A clip(r, 1 - low, 1 + high)) + kl_weight * (mean over channels of
    (mu - mu_ref)^2 / (2 sigma^2)), times its mask; a sample's loss is the mean over its pixels. All arithmetic is fp32
    (fp64 for fp64). It is the loss of Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818) and DDPO (2305.13301) at
    level "sample", and that of localised rewards (SDG, 2606.06113; ImageDoctor, 2510.01010) at level "pixel";
    docs/ops.md has each.

    Args:
        model_pred: (B, C, H, W), (B, C, T, H, W), or tokens (B, N, D); fp32, bf16, fp16 or fp64; any strides. The
            only argument that gets a gradient.
        latents: what the step started from, in model_pred's shape (a dtype of its own is fine; under a layout also
            (B, C, H, W)).
        next_latents: what it drew, likewise.
        old_log_prob: what `policy_log_prob` gave at roll-out: fp32 (B, 1, H, W), for video (B, 1, T, H, W), for tokens
            without a layout (B, N); at level "sample" also its means (B,), with a mask those weighted by it. None: the
            policy that is trained drew the step, so that the ratio is 1.
        advantage: (B,), or a map of any size in the shapes of `weighted_loss`'s confidence; signed, floating point. A
            NaN counts as 0; where it is 0 the policy's term is left out.
        coefs: (a, b, sigma), each a number or a (B,) tensor: `flow_sde_coefs`, `ddim_coefs`. A sample whose sigma is 0
            (a deterministic step) contributes 0.
        clip_range: (low, high), how far below and above 1 a ratio counts; low in [0, 1], high at least 0.
        advantage_clip: advantages are clamped to [-advantage_clip, advantage_clip]; None: they are not.
        mask: a region to train on, shapes and types as `weighted_loss`'s; it multiplies a pixel's loss, and weights
            the pixel in the mean that makes a sample's lp.
        ref_pred: the reference model's prediction, like model_pred, for the KL divergence.
        kl_weight: of the KL divergence; at least 0; needs a ref_pred.
        interpolation: from a map's size to the grid: area | bilinear | nearest | nearest-exact.
        level: "pixel": each pixel has a ratio of its own. "sample": a sample has one, from the mean of lp over its
            pixels; the advantage may still be a map.
        reduction: "mean" -> (), "sample" -> (B,), "sum" over all pixels -> ().
        layout: `Packed` where model_pred holds packed tokens; maps are then on the unpacked latents' grid.
        return_stats: also return a `PolicyStats` of device tensors.
        backend: cuda | triton | cpu | reference; None takes the fastest (or DIFFDOCTOR_BACKEND).

    Returns:
        The loss, fp32 (fp64 for fp64), or (loss, PolicyStats).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device, name or number that cannot be; an argument beside model_pred that requires a
            gradient; a kl_weight without a ref_pred.
        RuntimeError: the backend asked for cannot serve (`BackendUnavailable`); torch.func transforms; a second
            derivative.

    Example:
        >>> coefs = diffdoctor.flow_sde_coefs(scheduler.sigmas, step, eta=0.7)
        >>> loss = diffdoctor.policy_loss(model_pred, latents, next_latents, old_log_prob, advantage, coefs=coefs)
        >>> loss.backward()
    """
    inputs = PolicyInputs(model_pred, latents, next_latents, old_log_prob, advantage, coefs, mask, ref_pred)
    as_operator = is_observed() or type(model_pred) not in PLAIN
    given = (clip_range, advantage_clip, kl_weight, interpolation, level, reduction, layout)
    known_by = None if as_operator or _is_transformed() else call_key(inputs, given)
    bound = None if known_by is None else bound_calls.get(known_by)
    if (
        bound is not None and type(return_stats) is bool
        and (not overridden() if backend is None else backend == bound.backend)
    ):  # fmt: skip
        return _run_bound(bound, inputs, return_stats)
    options = PolicyOptions(*given)
    key = None if as_operator else _known_key(inputs, options)
    if key is None:
        unrecorded(check_inputs, inputs, options)
    checks.check_bool("return_stats", return_stats)
    if as_operator or not is_plain(*inputs[:5], *coefs, mask, ref_pred):
        return registered.policy_loss(inputs, options, return_stats, backend)
    refuse_functorch("policy_loss")
    refuse_forward_mode("policy_loss", model_pred, latents, next_latents, ref_pred)
    module = pick(requested(backend), "policy_loss", model_pred.device.type, elements=model_pred.numel())
    if model_pred.numel() == 0:
        return _empty(guard_reference(model_pred, "policy_loss"), reduction, return_stats)
    if module is None:
        return _run_reference(inputs, options, return_stats)
    return _run(module, inputs, options, return_stats, key, known_by)


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return functorch_level() is not None or forward_ad._current_level >= 0


def _run_bound(bound: BoundPolicyCall, inputs: PolicyInputs, return_stats: bool):
    """A call like one before, of which only the tensors' values are new."""
    pred = inputs.model_pred
    differentiable = torch.is_grad_enabled() and pred.requires_grad
    keeps_grad = differentiable and pred.dtype != torch.float16
    loss, grad, sums = bound(inputs, keeps_grad, return_stats)
    if keeps_grad:
        loss = save_grad(pred, (loss, grad, bound))
    elif differentiable:
        loss = _save_inputs(pred, loss, bound.module, inputs, bound.options, bound.key)
    return (loss, PolicyStats.from_sums(sums)) if return_stats else loss


def _known_key(inputs: PolicyInputs, options: PolicyOptions) -> tuple | None:
    """The key of a plan that arguments like these have made, which need no other check; else None."""
    try:
        key = plan_key(inputs, options)
        # True is equal to 1 in a key; the checks refuse it.
        return key if key in plans and bool not in map(type, inputs.coefs) else None
    except (TypeError, RuntimeError):  # something unhashable or without strides came: the checks name it
        return None


def _run(
    module, inputs: PolicyInputs, options: PolicyOptions, return_stats: bool, key: tuple | None, known_by: tuple | None
):
    """A checked call on a backend; where that binds calls, the next ones with the key `known_by` are bound."""
    pred = inputs.model_pred
    differentiable = torch.is_grad_enabled() and pred.requires_grad
    outputs = WRITE_LOSS | (WRITE_SUMS if return_stats else 0)
    if differentiable and pred.dtype != torch.float16:  # fp16 computes its gradient in backward
        outputs |= WRITE_GRAD
    key = plan_key(inputs, options) if key is None else key
    problem = lower(inputs, options, outputs, key)
    as_given = problem.old_log_prob is None or problem.old_log_prob is inputs.old_log_prob
    if known_by is not None and as_given and module is for_device(pred.device.type, "policy_loss", pred.numel()):
        bound_calls.keep(known_by, BoundPolicyCall(module.bind(problem), problem, options, key, module))
    module.policy_loss(problem)
    loss = problem.loss
    if differentiable and problem.grad is not None:
        loss = save_grad(pred, (loss, problem.grad, GeneralCall(module, grad_runs(problem), "policy_loss")))
    elif differentiable:
        loss = _save_inputs(pred, loss, module, inputs, options, key)
    return (loss, PolicyStats.from_sums(problem.sums)) if return_stats else loss


class _RecomputedLoss(torch.autograd.Function):
    """Saves the inputs and computes the gradient in backward, rounded once: for fp16, as `autograd.RecomputedLoss`."""

    @staticmethod
    def forward(ctx, model_pred, loss, module, inputs: PolicyInputs, options: PolicyOptions, key: tuple):
        ctx.module, ctx.options, ctx.x, ctx.key = module, options, ref(model_pred), key
        tensors = [x if isinstance(x, Tensor) else None for x in (*inputs[:5], *inputs[6:], *inputs.coefs)]
        ctx.strides = [None if x is None else x.stride() for x in tensors]
        ctx.numbers = inputs.coefs
        ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    def backward(ctx, g):
        refuse_functorch("policy_loss", g)
        saved = ctx.saved_tensors
        observed = is_observed() or not is_plain(g, *saved)
        if not observed:
            g, saved = g.resolve_neg(), tuple(map(with_strides, saved, ctx.strides))
        coefs = tuple(x if tensor is None else tensor for x, tensor in zip(ctx.numbers, saved[7:], strict=True))
        inputs = PolicyInputs(*saved[:5], coefs, *saved[5:7])
        if observed:
            grad = gradient_by_reference(inputs, ctx.options, g)
        else:
            problem = with_cotangent(lower(inputs, ctx.options, WRITE_GRAD, ctx.key), g)
            ctx.module.policy_loss(problem)
            grad = problem.grad
        if torch.is_grad_enabled():
            grad = forbid_second_derivative(grad, ctx.x(), "policy_loss")
        return grad, None, None, None, None, None


_save_inputs = super(torch.autograd.Function, _RecomputedLoss).apply  # as autograd.save_grad


def _run_reference(inputs: PolicyInputs, options: PolicyOptions, return_stats: bool):
    guarded = inputs._replace(model_pred=guard_reference(inputs.model_pred, "policy_loss"))
    result = reference.policy_loss(**guarded._asdict(), **vars(options), return_sums=return_stats)
    return (result[0], PolicyStats.from_sums(result[1])) if return_stats else result


def _empty(model_pred: Tensor, reduction: str, return_stats: bool):
    """The result of an empty tensor: 0, connected to the graph."""
    flat = model_pred.flatten(1).to(accumulation_dtype(model_pred.dtype))
    loss = flat.sum(1) if reduction == "sample" else flat.sum()
    return (loss, PolicyStats.from_sums(flat.new_zeros(flat.shape[0], POLICY_SUMS))) if return_stats else loss


def policy_log_prob(
    model_pred: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    *,
    coefs: tuple[Number, Number, Number],
    layout: Packed | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each pixel's log-probability of a drawn step, as `policy_loss` takes it for old_log_prob; without a gradient.

    The mean over channels of -(next_latents - mu)^2 / (2 sigma^2). The constants of a normal density are left out: they
    cancel in a ratio. A trainer that stores one number per sample takes its mean over the pixels, weighted by the mask
    where the loss has one.

    Args:
        model_pred: as `policy_loss`'s.
        latents: likewise.
        next_latents: likewise.
        coefs: likewise; 0 comes where sigma is 0.
        layout: likewise.
        backend: likewise.

    Returns:
        (B, 1, H, W), for video (B, 1, T, H, W), for tokens without a layout (B, N); fp32 (fp64 for fp64).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device or number that cannot be.
        RuntimeError: the backend asked for cannot serve; torch.func transforms.
    """
    checks.check_layout(layout)
    model_pred = model_pred.detach() if isinstance(model_pred, Tensor) else model_pred
    unrecorded(check_step, model_pred, latents, next_latents, coefs, layout)
    inputs = PolicyInputs(model_pred, latents, next_latents, None, None, coefs)
    if is_observed() or not is_plain(model_pred, latents, next_latents, *coefs):
        return registered.policy_log_prob(inputs, layout, backend)
    refuse_functorch("policy_log_prob")
    return log_prob(inputs, layout, pick(requested(backend), "policy_loss", model_pred.device.type))
