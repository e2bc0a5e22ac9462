"""`policy_loss` and `policy_log_prob` behind torch.compile; see schemas.py."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor import reference
from diffdoctor.backends.select import pick, requested
from diffdoctor.lowering.plan import WRITE_GRAD, WRITE_LOSS, WRITE_SUMS
from diffdoctor.lowering.policy_loss import POLICY_SUMS
from diffdoctor.ops.arguments import pack_layout, unpack_layout
from diffdoctor.ops.autograd import forbid_second_derivative, scaled
from diffdoctor.ops.library.schemas import differentiating, library, no_gradients
from diffdoctor.ops.policy_arguments import PolicyInputs, PolicyOptions, log_prob_shape
from diffdoctor.ops.policy_call import log_prob, lower, with_cotangent
from diffdoctor.ops.stats import PolicyStats
from diffdoctor.reference.grid import accumulation_dtype

# `coefs` are the numbers among a, b and sigma, `per_sample` those that are tensors, `slots` the indices of these.
# `numbers` are clip_range, advantage_clip (infinity for none) and kl_weight.
_STEP = (
    "Tensor model_pred, Tensor latents, Tensor next_latents, Tensor[] per_sample, int[] slots, float[] coefs, "
    "int[] layout, str backend"
)
_ARGUMENTS = (
    f"{_STEP}, Tensor? old_log_prob, Tensor advantage, Tensor? mask, Tensor? ref_pred, float[] numbers, "
    "str interpolation, str level, str reduction"
)
library.define(f"policy_loss({_ARGUMENTS}, bool want_grad, bool want_sums) -> (Tensor, Tensor, Tensor)")
library.define(f"policy_loss_grad(Tensor g, {_ARGUMENTS}) -> Tensor")
library.define(f"policy_log_prob({_STEP}) -> Tensor")


def policy_loss(inputs: PolicyInputs, options: PolicyOptions, return_stats: bool, backend: str | None):
    """The public function on traced tensors, checked."""
    pred = inputs.model_pred
    want_grad = torch.is_grad_enabled() and pred.requires_grad and pred.dtype != torch.float16
    clip = float("inf") if options.advantage_clip is None else options.advantage_clip
    loss, _, sums = torch.ops.diffdoctor.policy_loss(
        *_step(inputs, options.layout, backend), inputs.old_log_prob, inputs.advantage, inputs.mask, inputs.ref_pred,
        [*options.clip_range, clip, options.kl_weight], options.interpolation, options.level, options.reduction,
        want_grad, return_stats,
    )  # fmt: skip
    return (loss, PolicyStats.from_sums(sums.detach())) if return_stats else loss


def policy_log_prob(inputs: PolicyInputs, layout, backend: str | None) -> Tensor:
    """Likewise `policy_log_prob`."""
    return torch.ops.diffdoctor.policy_log_prob(*_step(inputs, layout, backend))


def _step(inputs: PolicyInputs, layout, backend: str | None) -> tuple:
    """The arguments of _STEP."""
    slots = [k for k, value in enumerate(inputs.coefs) if isinstance(value, Tensor)]
    coefs = [0.0 if isinstance(value, Tensor) else float(value) for value in inputs.coefs]
    return (
        *inputs[:3], [inputs.coefs[k] for k in slots], slots, coefs, pack_layout(layout), requested(backend) or "",
    )  # fmt: skip


def _inputs(model_pred, latents, next_latents, per_sample, slots, coefs, *others) -> PolicyInputs:
    """The tensors that `_step` wrote down; `others`: old_log_prob, advantage, mask and ref_pred."""
    values = list(coefs)
    for k, tensor in zip(slots, per_sample, strict=True):
        values[k] = tensor
    old, advantage, mask, ref_pred = others or (None,) * 4
    return PolicyInputs(model_pred.detach(), latents, next_latents, old, advantage, tuple(values), mask, ref_pred)


def _run(arguments, outputs: int, g: Tensor | None = None):
    """(loss, grad, sums) of one call, whatever of it `outputs` asks for; works on no graph."""
    step, (layout, backend) = arguments[:6], arguments[6:8]
    *tensors, numbers, interpolation, level, reduction = arguments[8:]
    inputs = _inputs(*step, *tensors)
    *clip_range, clip, kl_weight = numbers
    clip = None if clip == float("inf") else clip
    options = PolicyOptions(
        tuple(clip_range), clip, kl_weight, interpolation, level, reduction, unpack_layout(layout)
    )  # fmt: skip
    pred = inputs.model_pred
    module = pick(backend or None, "policy_loss", pred.device.type, elements=pred.numel())
    if module is None or pred.numel() == 0:
        return _run_reference(inputs, options, outputs, g)
    problem = lower(inputs, options, outputs)
    problem.keeps_workspace = False
    module.policy_loss(problem if g is None else with_cotangent(problem, g))
    return problem.loss, problem.grad, problem.sums


def _run_reference(inputs: PolicyInputs, options: PolicyOptions, outputs: int, g: Tensor | None):
    pred = inputs.model_pred.detach().requires_grad_(bool(outputs & WRITE_GRAD))
    if pred.numel() == 0:
        acc, batch = accumulation_dtype(pred.dtype), pred.shape[0]
        loss = torch.zeros((batch,) if options.reduction == "sample" else (), dtype=acc, device=pred.device)
        return loss, torch.zeros_like(pred), torch.zeros(batch, POLICY_SUMS, dtype=acc, device=pred.device)
    with differentiating():
        loss, sums = reference.policy_loss(
            **inputs._replace(model_pred=pred)._asdict(), **vars(options), return_sums=True
        )
        grad = None
        if outputs & WRITE_GRAD:
            (grad,) = torch.autograd.grad(loss, pred, torch.ones_like(loss) if g is None else g)
    if grad is not None:  # the fake promises empty_like's strides
        grad = torch.empty_like(inputs.model_pred).copy_(grad)
    return loss.detach(), grad, sums


@torch.library.impl(library, "policy_loss", "CompositeExplicitAutograd")
def _policy_loss_impl(*arguments):
    *call, want_grad, want_sums = arguments
    outputs = WRITE_LOSS | (WRITE_GRAD if want_grad else 0) | (WRITE_SUMS if want_sums else 0)
    loss, grad, sums = _run(call, outputs)
    empty = call[0].new_empty(0)
    acc = accumulation_dtype(empty.dtype)
    return loss, grad if want_grad else empty, sums if want_sums else empty.to(acc, copy=True)


@torch.library.register_fake("diffdoctor::policy_loss", lib=library)
def _policy_loss_fake(model_pred, *arguments):
    *_, reduction, want_grad, want_sums = arguments
    acc, batch = accumulation_dtype(model_pred.dtype), model_pred.shape[0]
    loss = model_pred.new_empty((batch,) if reduction == "sample" else (), dtype=acc)
    grad = torch.empty_like(model_pred) if want_grad else model_pred.new_empty(0)
    return loss, grad, model_pred.new_empty((batch, POLICY_SUMS) if want_sums else (0,), dtype=acc)


@torch.library.impl(library, "policy_loss_grad", "CompositeExplicitAutograd")
def _policy_loss_grad_impl(g, *arguments):
    return _run(arguments, WRITE_GRAD, g)[1]


@torch.library.register_fake("diffdoctor::policy_loss_grad", lib=library)
def _policy_loss_grad_fake(g, model_pred, *others):
    return torch.empty_like(model_pred)


@torch.library.impl(library, "policy_log_prob", "CompositeExplicitAutograd")
def _policy_log_prob_impl(*arguments):
    *step, layout, backend = arguments
    module = pick(backend or None, "policy_loss", step[0].device.type)
    return log_prob(_inputs(*step), unpack_layout(layout), module)


@torch.library.register_fake("diffdoctor::policy_log_prob", lib=library)
def _policy_log_prob_fake(model_pred, latents, next_latents, per_sample, slots, coefs, layout, backend):
    shape = log_prob_shape(model_pred, unpack_layout(layout))
    return model_pred.new_empty(shape, dtype=accumulation_dtype(model_pred.dtype))


def _policy_loss_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *arguments, ctx.saves_grad, _ = inputs
    ctx.none = no_gradients(inputs)[1:]
    if ctx.saves_grad:
        ctx.save_for_backward(output[1])
        return
    ctx.slots = [k for k, x in enumerate(arguments) if isinstance(x, Tensor)]
    ctx.arguments = [None if isinstance(x, Tensor) or k == 3 else x for k, x in enumerate(arguments)]
    ctx.save_for_backward(*(arguments[k] for k in ctx.slots), *arguments[3])


def _policy_loss_backward(ctx, g, *_):
    if g is None:
        return None, *ctx.none
    if ctx.saves_grad:
        grad, x = scaled(ctx.saved_tensors[0], g), torch.empty(0, requires_grad=True)
    else:
        x, saved = ctx.saved_tensors[0], ctx.saved_tensors
        arguments = list(ctx.arguments)
        for k, tensor in zip(ctx.slots, saved, strict=False):
            arguments[k] = tensor
        arguments[3] = list(saved[len(ctx.slots) :])
        grad = torch.ops.diffdoctor.policy_loss_grad(g, *arguments)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grad = forbid_second_derivative(grad, x, "policy_loss")
    return grad, *ctx.none


torch.library.register_autograd(
    "diffdoctor::policy_loss", _policy_loss_backward, setup_context=_policy_loss_setup, lib=library
)
