"""`weighted_loss` behind torch.compile; see schemas.py."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor import reference
from diffdoctor.backends.select import pick, requested
from diffdoctor.lowering.plan import MAX_TERMS, SUMS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, PerSample
from diffdoctor.ops.arguments import Inputs, LossOptions, target_parts
from diffdoctor.ops.autograd import forbid_second_derivative
from diffdoctor.ops.call import lower, run
from diffdoctor.ops.library.schemas import differentiating, library, no_gradients
from diffdoctor.ops.observed import unrecorded
from diffdoctor.ops.stats import LossStats
from diffdoctor.ops.target import Target
from diffdoctor.reference.grid import accumulation_dtype

# The values that may be tensors are pred_scale, the coefficients of MAX_TERMS terms, huber_c and normalizer, and the
# artifact_coefs of a target that has them: `coef_values` are their numbers, `per_sample` those that are tensors, and
# `slots` the indices of these (torch.jit.trace records no list of optional tensors). `map_options`, `loss_weights` and
# what follows them are a LossOptions; `normalize` is "given" where there is a normalizer.
_ARGUMENTS = (
    "Tensor model_pred, Tensor[] terms, Tensor? confidence, Tensor? mask, Tensor? weighting, Tensor[] per_sample, "
    "int[] slots, float[] coef_values, float[] map_options, float[] loss_weights, str interpolation, str normalize, "
    "str reduction, int[] layout, str backend"
)
library.define(f"weighted_loss({_ARGUMENTS}, bool want_grad, bool want_sums) -> (Tensor, Tensor, Tensor)")
library.define(f"weighted_loss_grad(Tensor g, {_ARGUMENTS}) -> Tensor")


def weighted_loss(inputs: Inputs, options: LossOptions, return_stats: bool, backend: str | None):
    """The public function on traced tensors, checked."""
    pred = inputs.model_pred
    want_grad = torch.is_grad_enabled() and pred.requires_grad and pred.dtype != torch.float16
    loss, _, sums = torch.ops.diffdoctor.weighted_loss(
        *_to_schema(inputs, options), requested(backend) or "", want_grad, return_stats
    )
    if not return_stats:
        return loss
    return loss, LossStats.from_sums(sums.detach(), unrecorded(pred.numel))


def _to_schema(inputs: Inputs, options: LossOptions) -> tuple:
    """The operators' arguments up to the layout."""
    terms, coefs, pred_scale, artifact_coefs = target_parts(inputs.target)
    values = [pred_scale, *coefs, *[1.0] * (MAX_TERMS - len(coefs)), inputs.huber_c, inputs.normalizer, *artifact_coefs]
    slots = [k for k, value in enumerate(values) if isinstance(value, Tensor)]
    per_sample = [values[k] for k in slots]
    coef_values = [0.0 if isinstance(value, Tensor) or value is None else float(value) for value in values]
    map_options, loss_weights, interpolation, normalize, reduction, layout = options.to_schema()
    return (
        inputs.model_pred, list(terms), inputs.confidence, inputs.mask, inputs.weighting, per_sample, slots,
        coef_values, map_options, loss_weights, interpolation, normalize if inputs.normalizer is None else "given",
        reduction, layout,
    )  # fmt: skip


def _from_schema(
    model_pred, terms, confidence, mask, weighting, per_sample, slots, coef_values, map_options, loss_weights,
    interpolation, normalize, reduction, layout,
) -> tuple[Inputs, LossOptions]:  # fmt: skip
    """The call that `_to_schema` wrote down."""
    values = list(coef_values)
    for k, tensor in zip(slots, per_sample, strict=True):
        values[k] = tensor
    pred_scale, *coefs = values[: 1 + MAX_TERMS]
    huber_c, normalizer, *artifact_coefs = values[1 + MAX_TERMS :]
    given = normalize == "given"
    target = Target(terms, coefs[: len(terms)], pred_scale, artifact_coefs or None)
    inputs = Inputs(model_pred.detach(), target, confidence, mask, weighting, huber_c, normalizer if given else None)
    options = LossOptions.from_schema(
        map_options, loss_weights, interpolation, "" if given else normalize, reduction, layout
    )
    return inputs, options


def _run(inputs: Inputs, options: LossOptions, backend: str, outputs: int, g: Tensor | None = None):
    """(loss, grad, sums) of one call, whatever of it `outputs` asks for; works on no graph."""
    pred = inputs.model_pred
    module = pick(backend or None, "weighted_loss", pred.device.type, elements=pred.numel())
    if module is None or pred.numel() == 0:
        return _run_reference(inputs, options, outputs, g)
    problem = lower(inputs, options, outputs)
    problem.keeps_workspace = False
    if g is not None:
        problem.grad_output = PerSample(0.0, g.reshape(1) if g.ndim == 0 else g)
    run(module, problem)
    return problem.loss, problem.grad, problem.sums


def _run_reference(inputs: Inputs, options: LossOptions, outputs: int, g: Tensor | None):
    pred = inputs.model_pred.detach().requires_grad_(bool(outputs & WRITE_GRAD))
    if pred.numel() == 0:
        acc, batch = accumulation_dtype(pred.dtype), pred.shape[0]
        loss = torch.zeros((batch,) if options.reduction == "sample" else (), dtype=acc, device=pred.device)
        return loss, torch.zeros_like(pred), torch.zeros(batch, SUMS, dtype=acc, device=pred.device)
    with differentiating():
        loss, sums = reference.weighted_loss(
            **inputs._replace(model_pred=pred)._asdict(), **vars(options), return_sums=True
        )
        grad = None
        if outputs & WRITE_GRAD:
            (grad,) = torch.autograd.grad(loss, pred, torch.ones_like(loss) if g is None else g)
    if grad is not None:
        # The operator's fake promises empty_like's strides; what autograd returns may have others.
        grad = torch.empty_like(inputs.model_pred).copy_(grad)
    return loss.detach(), grad, sums


@torch.library.impl(library, "weighted_loss", "CompositeExplicitAutograd")
def _weighted_loss_impl(*arguments):
    *call, backend, want_grad, want_sums = arguments
    outputs = WRITE_LOSS | (WRITE_GRAD if want_grad else 0) | (WRITE_SUMS if want_sums else 0)
    inputs, options = _from_schema(*call)
    loss, grad, sums = _run(inputs, options, backend, outputs)
    empty = inputs.model_pred.new_empty(0)
    acc = accumulation_dtype(empty.dtype)
    return loss, grad if want_grad else empty, sums if want_sums else empty.to(acc, copy=True)


@torch.library.register_fake("diffdoctor::weighted_loss", lib=library)
def _weighted_loss_fake(model_pred, *arguments):
    *_, reduction, _, _, want_grad, want_sums = arguments
    acc, batch = accumulation_dtype(model_pred.dtype), model_pred.shape[0]
    loss = model_pred.new_empty((batch,) if reduction == "sample" else (), dtype=acc)
    grad = torch.empty_like(model_pred) if want_grad else model_pred.new_empty(0)
    sums = model_pred.new_empty((batch, SUMS) if want_sums else (0,), dtype=acc)
    return loss, grad, sums


@torch.library.impl(library, "weighted_loss_grad", "CompositeExplicitAutograd")
def _weighted_loss_grad_impl(g, *arguments):
    *call, backend = arguments
    return _run(*_from_schema(*call), backend, WRITE_GRAD, g)[1]


@torch.library.register_fake("diffdoctor::weighted_loss_grad", lib=library)
def _weighted_loss_grad_fake(g, model_pred, *others):
    return torch.empty_like(model_pred)


def _weighted_loss_setup(ctx, inputs, output):
    model_pred, *others, want_grad, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.none = no_gradients(inputs)[1:]
    ctx.saves_grad = want_grad
    if want_grad:
        ctx.save_for_backward(output[1])
        return
    terms, confidence, mask, weighting, per_sample, *ctx.plain = others
    ctx.counts = (len(terms), len(per_sample))
    ctx.save_for_backward(model_pred, *terms, confidence, mask, weighting, *per_sample)


def _weighted_loss_backward(ctx, g, *_):
    if g is None:
        return None, *ctx.none
    if ctx.saves_grad:
        (unit_grad,) = ctx.saved_tensors
        factor = g if g.ndim == 0 else g.reshape(-1, *(1,) * (unit_grad.ndim - 1))
        grad = (unit_grad.to(g.dtype) * factor).to(unit_grad.dtype)
    else:
        model_pred, *saved = ctx.saved_tensors
        terms = saved[: ctx.counts[0]]
        confidence, mask, weighting, *per_sample = saved[ctx.counts[0] :]
        grad = torch.ops.diffdoctor.weighted_loss_grad(
            g, model_pred, terms, confidence, mask, weighting, per_sample, *ctx.plain
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        x = torch.empty(0, requires_grad=True) if ctx.saves_grad else model_pred
        grad = forbid_second_derivative(grad, x, "weighted_loss")
    return grad, *ctx.none


torch.library.register_autograd(
    "diffdoctor::weighted_loss", _weighted_loss_backward, setup_context=_weighted_loss_setup, lib=library
)
