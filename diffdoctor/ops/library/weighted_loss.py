"""`weighted_loss` under torch.compile; see _library."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor import reference
from diffdoctor.backends.select import pick, requested
from diffdoctor.lowering.plan import LOSS_KINDS, SUMS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, PerSample
from diffdoctor.ops.arguments import add_divisor, allocate, make_problem, meta, target_meta
from diffdoctor.ops.autograd import forbid_second_derivative
from diffdoctor.ops.library.schemas import acc_dtype, library, pack_layout, unpack_layout
from diffdoctor.ops.prepare import Prepared, make_options, prepare, remember
from diffdoctor.ops.stats import LossStats
from diffdoctor.ops.target import Target

_plans: dict[tuple, Prepared] = {}


def weighted_loss(
    model_pred, target, confidence, *, mask, weighting, artifact_weight, clean_weight, artifact_grad, clean_grad,
    threshold, gamma, interpolation, loss_type, huber_c, normalize, normalizer, reduction, layout, return_stats,
    backend,
):  # fmt: skip
    """The public function on traced tensors."""
    from diffdoctor.ops.weighted_loss import check_arguments

    maps = (artifact_weight, clean_weight, artifact_grad, clean_grad, threshold, gamma, interpolation)
    options = check_arguments(
        model_pred, target, confidence, mask, weighting, maps, loss_type, huber_c, normalize, normalizer, reduction,
        layout,
    )  # fmt: skip
    terms = [target] if isinstance(target, Tensor) else list(target.terms)
    coefs = [1.0] if isinstance(target, Tensor) else list(target.coefs)
    pred_scale = 1.0 if isinstance(target, Tensor) else target.pred_scale
    values = [pred_scale, *coefs, *[1.0] * (2 - len(coefs)), huber_c, normalizer]
    per_sample = [value if isinstance(value, Tensor) else None for value in values]
    numbers = [0.0 if isinstance(value, Tensor) or value is None else float(value) for value in values]
    mode = "given" if normalizer is not None else normalize or ""
    want_grad = torch.is_grad_enabled() and model_pred.requires_grad and model_pred.dtype != torch.float16
    loss, _, sums = torch.ops.diffdoctor.weighted_loss(
        model_pred, terms, confidence, mask, weighting, per_sample, numbers,
        [options.artifact_weight, options.clean_weight, options.artifact_grad, options.clean_grad, options.threshold,
         options.gamma],
        list(options.strength), interpolation, mode, reduction, pack_layout(layout),
        requested(backend) or "", want_grad, return_stats,
    )  # fmt: skip
    if not return_stats:
        return loss
    count = model_pred.numel() // max(model_pred.shape[0], 1)
    return loss, LossStats.from_sums(sums.detach(), count)


def _public_arguments(
    terms, confidence, mask, weighting, per_sample, numbers, scalars, strength, interpolation, normalize, reduction,
    layout,
):  # fmt: skip
    """The operator's arguments as those of the public function, without model_pred."""
    values = [number if tensor is None else tensor for tensor, number in zip(per_sample, numbers, strict=True)]
    pred_scale, *coefs, huber_c, normalizer = values
    names = ("artifact_weight", "clean_weight", "artifact_grad", "clean_grad", "threshold", "gamma")
    return {
        "target": Target(terms, coefs[: len(terms)], pred_scale),
        "confidence": confidence,
        "mask": mask,
        "weighting": weighting,
        **dict(zip(names, scalars, strict=True)),
        "interpolation": interpolation,
        "loss_type": dict(zip(LOSS_KINDS, strength, strict=True)),
        "huber_c": huber_c,
        "normalize": normalize if normalize in ("sample", "batch") else None,
        "normalizer": normalizer if normalize == "given" else None,
        "reduction": reduction,
        "layout": unpack_layout(layout),
    }


def _run(model_pred, arguments: dict, backend: str, work: int, g: Tensor | None = None):
    """(loss, grad, sums) of one call, whatever of it `work` asks for; works on no graph."""
    model_pred = model_pred.detach()
    module = pick(backend or None, "weighted_loss", model_pred.device.type)
    if module is None or model_pred.numel() == 0:
        return _run_reference(model_pred, arguments, work, g)
    options = {name: arguments[name] for name in arguments if name not in ("target", "confidence", "mask", "weighting")}
    maps = tuple(
        options[name]
        for name in ("artifact_weight", "clean_weight", "artifact_grad", "clean_grad", "threshold", "gamma",
                     "interpolation")
    )  # fmt: skip
    target, confidence, mask, weighting = (arguments[n] for n in ("target", "confidence", "mask", "weighting"))
    scalars = make_options(*maps[:-1], options["loss_type"], options["reduction"])
    key = (*meta(model_pred), *target_meta(target), meta(confidence), meta(mask), meta(weighting),
           scalars, maps[-1], options["layout"])  # fmt: skip
    prepared = _plans.get(key)
    if prepared is None:
        prepared = prepare(model_pred, target.terms, confidence, mask, weighting, maps[-1], options["layout"], scalars)
        remember(_plans, key, prepared)
    problem = make_problem(prepared, model_pred, target, confidence, mask, weighting, options["huber_c"])
    problem.keeps_workspace = False
    add_divisor(module, problem, options["normalize"], options["normalizer"])
    allocate(problem, options["reduction"], bool(work & WRITE_SUMS))
    problem.work = work
    if work & WRITE_GRAD:
        problem.grad = torch.empty_like(model_pred)
    if g is not None:
        problem.grad_output = PerSample(0.0, g.reshape(1) if g.ndim == 0 else g)
    module.weighted_loss(problem)
    return problem.loss, problem.grad, problem.sums


def _run_reference(model_pred, arguments, work, g):
    pred = model_pred.detach().requires_grad_(bool(work & WRITE_GRAD))
    acc = acc_dtype(pred.dtype)
    if pred.numel() == 0:
        batch = pred.shape[0]
        loss = torch.zeros((batch,) if arguments["reduction"] == "sample" else (), dtype=acc, device=pred.device)
        return loss, torch.zeros_like(pred), torch.zeros(batch, SUMS, dtype=acc, device=pred.device)
    with torch.enable_grad():
        loss, sums = reference.weighted_loss(pred, **arguments, return_sums=True)
    grad = None
    if work & WRITE_GRAD:
        (grad,) = torch.autograd.grad(loss, pred, torch.ones_like(loss) if g is None else g)
        # The operator's fake promises empty_like's strides; what autograd returns may have others.
        grad = torch.empty_like(model_pred).copy_(grad)
    return loss.detach(), grad, sums


@torch.library.impl(library, "weighted_loss", "CompositeExplicitAutograd")
def _weighted_loss_impl(
    model_pred, terms, confidence, mask, weighting, per_sample, numbers, scalars, strength, interpolation, normalize,
    reduction, layout, backend, want_grad, want_sums,
):  # fmt: skip
    arguments = _public_arguments(
        terms, confidence, mask, weighting, per_sample, numbers, scalars, strength, interpolation, normalize,
        reduction, layout,
    )  # fmt: skip
    work = WRITE_LOSS | (WRITE_GRAD if want_grad else 0) | (WRITE_SUMS if want_sums else 0)
    loss, grad, sums = _run(model_pred, arguments, backend, work)
    acc = acc_dtype(model_pred.dtype)
    empty = model_pred.new_empty(0)
    return loss, grad if want_grad else empty, sums if want_sums else empty.to(acc, copy=True)


@torch.library.register_fake("diffdoctor::weighted_loss", lib=library)
def _weighted_loss_fake(
    model_pred, terms, confidence, mask, weighting, per_sample, numbers, scalars, strength, interpolation, normalize,
    reduction, layout, backend, want_grad, want_sums,
):  # fmt: skip
    acc, batch = acc_dtype(model_pred.dtype), model_pred.shape[0]
    loss = model_pred.new_empty((batch,) if reduction == "sample" else (), dtype=acc)
    grad = torch.empty_like(model_pred) if want_grad else model_pred.new_empty(0)
    sums = model_pred.new_empty((batch, SUMS) if want_sums else (0,), dtype=acc)
    return loss, grad, sums


@torch.library.impl(library, "weighted_loss_grad", "CompositeExplicitAutograd")
def _weighted_loss_grad_impl(
    g, model_pred, terms, confidence, mask, weighting, per_sample, numbers, scalars, strength, interpolation, normalize,
    reduction, layout, backend,
):  # fmt: skip
    arguments = _public_arguments(
        terms, confidence, mask, weighting, per_sample, numbers, scalars, strength, interpolation, normalize,
        reduction, layout,
    )  # fmt: skip
    return _run(model_pred, arguments, backend, WRITE_GRAD, g)[1]


@torch.library.register_fake("diffdoctor::weighted_loss_grad", lib=library)
def _weighted_loss_grad_fake(g, model_pred, *others):
    return torch.empty_like(model_pred)


def _no_gradients(inputs) -> tuple:
    """None for every input, in the structure register_autograd asks of a schema that has lists of tensors."""
    return tuple(
        [None] * len(x) if isinstance(x, (list, tuple)) and all(isinstance(item, Tensor) for item in x) else None
        for x in inputs
    )


def _weighted_loss_setup(ctx, inputs, output):
    model_pred, *others, want_grad, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.none = _no_gradients(inputs)[1:]
    ctx.kept = want_grad
    if want_grad:
        ctx.save_for_backward(output[1])
        return
    terms, confidence, mask, weighting, per_sample, *ctx.plain = others
    ctx.counts = (len(terms), len(per_sample))
    ctx.save_for_backward(model_pred, *terms, confidence, mask, weighting, *per_sample)


def _weighted_loss_backward(ctx, g, *_):
    if g is None:
        return None, *ctx.none
    if ctx.kept:
        (kept,) = ctx.saved_tensors
        factor = g if g.ndim == 0 else g.reshape(-1, *(1,) * (kept.ndim - 1))
        grad = (kept.to(g.dtype) * factor).to(kept.dtype)
    else:
        model_pred, *saved = ctx.saved_tensors
        terms = saved[: ctx.counts[0]]
        confidence, mask, weighting, *per_sample = saved[ctx.counts[0] :]
        grad = torch.ops.diffdoctor.weighted_loss_grad(
            g, model_pred, terms, confidence, mask, weighting, per_sample, *ctx.plain
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        x = torch.empty(0, requires_grad=True) if ctx.kept else model_pred
        grad = forbid_second_derivative(grad, x, "weighted_loss")
    return grad, *ctx.none


torch.library.register_autograd(
    "diffdoctor::weighted_loss", _weighted_loss_backward, setup_context=_weighted_loss_setup, lib=library
)
