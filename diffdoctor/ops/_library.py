"""The registered operators behind torch.compile, and the road to them.

An eager call never comes here. A traced one is checked while it is traced, then becomes one operator whose arguments
are tensors, numbers and strings; its implementation lowers and runs the call as the eager road does. Backward works
out of place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffdoctor import reference
from diffdoctor.backends import pick, requested
from diffdoctor.ops._autograd import forbid_second_derivative
from diffdoctor.ops._lowering import LOSS_KINDS, SUMS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, PerSample
from diffdoctor.ops._prepare import Prepared, make_options, prepare, remember
from diffdoctor.ops._problem import add_divisor, allocate, make_problem, meta, target_meta
from diffdoctor.ops.layout import Packed
from diffdoctor.ops.stats import LossStats
from diffdoctor.ops.target import Target

# Per-sample values are a list of [pred_scale, coef_0, coef_1, huber_c, normalizer]: a tensor where there is one, and a
# number beside it. `scalars` are the six of weighted_loss; `layout` is [] or [height, width, patch_size, order].
_ARGUMENTS = (
    "Tensor model_pred, Tensor[] terms, Tensor? confidence, Tensor? mask, Tensor? weighting, Tensor?[] per_sample, "
    "float[] numbers, float[] scalars, float[] strength, str interpolation, str normalize, str reduction, "
    "int[] layout, str backend"
)
_ORDERS = ("c ph pw", "ph pw c")
_plans: dict[tuple, Prepared] = {}

_library = torch.library.Library("diffdoctor", "DEF")
_library.define(f"weighted_loss({_ARGUMENTS}, bool want_grad, bool want_sums) -> (Tensor, Tensor, Tensor)")
_library.define(f"weighted_loss_grad(Tensor g, {_ARGUMENTS}) -> Tensor")
_library.define(
    "modulate_gradient(Tensor x, Tensor confidence, float[] scalars, str interpolation, int[] layout) -> Tensor"
)
_library.define(
    "modulate_gradient_grad(Tensor grad, Tensor confidence, float[] scalars, str interpolation, int[] layout) -> Tensor"
)
# A map that is set later is found through its modulator's key when backward runs; a captured CUDA graph would keep the
# address of the first one.
_LATER = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_library.define("modulate_gradient_later(Tensor x, SymInt key) -> Tensor")
_library.define("modulate_gradient_later_grad(Tensor grad, SymInt key) -> Tensor", tags=_LATER)
_library.define(
    "artifact_loss(Tensor logits, int height, int width, float threshold, str method, str reduction, str backend, "
    "bool want_grad) -> (Tensor, Tensor, Tensor)"
)
_library.define("artifact_loss_grad(Tensor kept, Tensor factor, Tensor g, Tensor logits, str backend) -> Tensor")


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pack_layout(layout: Packed | None) -> list[int]:
    if layout is None:
        return []
    return [layout.height, layout.width, layout.patch_size, _ORDERS.index(layout.order)]


def _unpack_layout(layout: list[int]) -> Packed | None:
    return Packed(*layout[:3], _ORDERS[layout[3]]) if layout else None


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
        list(options.strength), interpolation, mode, reduction, _pack_layout(layout),
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
        "layout": _unpack_layout(layout),
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
    acc = _acc(pred.dtype)
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


@torch.library.impl(_library, "weighted_loss", "CompositeExplicitAutograd")
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
    acc = _acc(model_pred.dtype)
    empty = model_pred.new_empty(0)
    return loss, grad if want_grad else empty, sums if want_sums else empty.to(acc, copy=True)


@torch.library.register_fake("diffdoctor::weighted_loss", lib=_library)
def _weighted_loss_fake(
    model_pred, terms, confidence, mask, weighting, per_sample, numbers, scalars, strength, interpolation, normalize,
    reduction, layout, backend, want_grad, want_sums,
):  # fmt: skip
    acc, batch = _acc(model_pred.dtype), model_pred.shape[0]
    loss = model_pred.new_empty((batch,) if reduction == "sample" else (), dtype=acc)
    grad = torch.empty_like(model_pred) if want_grad else model_pred.new_empty(0)
    sums = model_pred.new_empty((batch, SUMS) if want_sums else (0,), dtype=acc)
    return loss, grad, sums


@torch.library.impl(_library, "weighted_loss_grad", "CompositeExplicitAutograd")
def _weighted_loss_grad_impl(
    g, model_pred, terms, confidence, mask, weighting, per_sample, numbers, scalars, strength, interpolation, normalize,
    reduction, layout, backend,
):  # fmt: skip
    arguments = _public_arguments(
        terms, confidence, mask, weighting, per_sample, numbers, scalars, strength, interpolation, normalize,
        reduction, layout,
    )  # fmt: skip
    return _run(model_pred, arguments, backend, WRITE_GRAD, g)[1]


@torch.library.register_fake("diffdoctor::weighted_loss_grad", lib=_library)
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
        grad = forbid_second_derivative(grad, "weighted_loss")
    return grad, *ctx.none


torch.library.register_autograd(
    "diffdoctor::weighted_loss", _weighted_loss_backward, setup_context=_weighted_loss_setup, lib=_library
)


def modulate_gradient(x, confidence, modulator):
    """The public function on traced tensors."""
    options = modulator._options
    scalars = [options.artifact_grad, options.clean_grad, options.threshold, options.gamma]
    return torch.ops.diffdoctor.modulate_gradient(
        x, confidence, scalars, modulator.interpolation, _pack_layout(modulator.layout)
    )


@torch.library.impl(_library, "modulate_gradient", "CompositeExplicitAutograd")
def _modulate_impl(x, confidence, scalars, interpolation, layout):
    return x.clone()  # an operator's output may not alias its input


@torch.library.register_fake("diffdoctor::modulate_gradient", lib=_library)
def _modulate_fake(x, confidence, scalars, interpolation, layout):
    return x.clone()


@torch.library.impl(_library, "modulate_gradient_grad", "CompositeExplicitAutograd")
def _modulate_grad_impl(grad, confidence, scalars, interpolation, layout):
    from diffdoctor.ops.modulate_gradient import scaled

    options = make_options(1.0, 1.0, *scalars, {"l2": 0.5}, "sum")
    out = scaled(grad.detach(), confidence, options, interpolation, _unpack_layout(layout))
    return out.clone() if out.data_ptr() == grad.data_ptr() else torch.empty_like(grad).copy_(out)


@torch.library.register_fake("diffdoctor::modulate_gradient_grad", lib=_library)
def _modulate_grad_fake(grad, confidence, scalars, interpolation, layout):
    return torch.empty_like(grad)


def _modulate_setup(ctx, inputs, output):
    _, confidence, *ctx.plain = inputs
    ctx.save_for_backward(confidence)


def _modulate_backward(ctx, grad):
    result = torch.ops.diffdoctor.modulate_gradient_grad(grad, ctx.saved_tensors[0], *ctx.plain)
    return result, None, None, None, None


torch.library.register_autograd(
    "diffdoctor::modulate_gradient", _modulate_backward, setup_context=_modulate_setup, lib=_library
)


def modulate_gradient_later(x, key: int):
    """`GradientModulator.__call__` on traced tensors."""
    return torch.ops.diffdoctor.modulate_gradient_later(x, key)


@torch.library.impl(_library, "modulate_gradient_later", "CompositeExplicitAutograd")
def _later_impl(x, key):
    return x.clone()  # an operator's output may not alias its input


@torch.library.register_fake("diffdoctor::modulate_gradient_later", lib=_library)
def _later_fake(x, key):
    return x.clone()


@torch.library.impl(_library, "modulate_gradient_later_grad", "CompositeExplicitAutograd")
def _later_grad_impl(grad, key):
    from diffdoctor.ops.modulate_gradient import modulator_of

    out = modulator_of(key).scaled(grad.detach())
    return out.clone() if out.data_ptr() == grad.data_ptr() else torch.empty_like(grad).copy_(out)


@torch.library.register_fake("diffdoctor::modulate_gradient_later_grad", lib=_library)
def _later_grad_fake(grad, key):
    return torch.empty_like(grad)


def _later_setup(ctx, inputs, output):
    ctx.key = inputs[1]


def _later_backward(ctx, grad):
    return torch.ops.diffdoctor.modulate_gradient_later_grad(grad, ctx.key), None


torch.library.register_autograd(
    "diffdoctor::modulate_gradient_later", _later_backward, setup_context=_later_setup, lib=_library
)


def artifact_loss(logits, height, width, threshold, method, reduction, backend):
    """The public function on traced tensors."""
    want_grad = torch.is_grad_enabled() and logits.requires_grad
    name = requested(backend) or ""
    return torch.ops.diffdoctor.artifact_loss(
        logits, height, width, float(threshold), method, reduction, name, want_grad
    )[0]


@torch.library.impl(_library, "artifact_loss", "CompositeExplicitAutograd")
def _artifact_impl(logits, height, width, threshold, method, reduction, backend, want_grad):
    from diffdoctor.ops.artifact_loss import make_problem

    acc, batch = _acc(logits.dtype), logits.shape[0]
    logits = logits.detach()
    module = pick(backend or None, "artifact_loss", logits.device.type)
    shape = (batch, *logits.shape[-2:]) if want_grad else (0,)
    kept = torch.empty(shape, dtype=acc, device=logits.device)
    factor = torch.ones(batch if want_grad else 0, dtype=acc, device=logits.device)
    if batch == 0:
        return torch.zeros((0,) if reduction == "sample" else (), dtype=acc, device=logits.device), kept, factor
    if module is None:
        x = logits.requires_grad_(want_grad)
        with torch.enable_grad():
            loss = reference.artifact_loss(
                x, size=(height, width), threshold=threshold, method=method, reduction=reduction
            )
        if want_grad:
            (grad,) = torch.autograd.grad(loss.sum(), x)
            kept.copy_(grad.reshape(shape))
        return loss.detach(), kept, factor
    problem = make_problem(logits, height, width, threshold, method, reduction)
    problem.keeps_workspace = False
    if want_grad:
        problem.kept, problem.factor = kept, factor
    module.artifact_loss(problem)
    return problem.loss, kept, factor


@torch.library.register_fake("diffdoctor::artifact_loss", lib=_library)
def _artifact_fake(logits, height, width, threshold, method, reduction, backend, want_grad):
    acc, batch = _acc(logits.dtype), logits.shape[0]
    loss = logits.new_empty((batch,) if reduction == "sample" else (), dtype=acc)
    kept = logits.new_empty((batch, *logits.shape[-2:]) if want_grad else (0,), dtype=acc)
    return loss, kept, logits.new_empty((batch if want_grad else 0,), dtype=acc)


@torch.library.impl(_library, "artifact_loss_grad", "CompositeExplicitAutograd")
def _artifact_grad_impl(kept, factor, g, logits, backend):
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    module = pick(backend or None, "artifact_loss", logits.device.type)
    if module is None or kept.numel() == 0:
        scale = (factor * g).reshape(-1, 1, 1)
        return grad.copy_((kept * scale).reshape(grad.shape))
    module.artifact_loss_backward(kept, factor, g, grad.view(kept.shape))
    return grad


@torch.library.register_fake("diffdoctor::artifact_loss_grad", lib=_library)
def _artifact_grad_fake(kept, factor, g, logits, backend):
    return logits.new_empty(logits.shape)


def _artifact_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.backend = inputs[6]
    ctx.save_for_backward(output[1], output[2], inputs[0])


def _artifact_backward(ctx, g, *_):
    if g is None:
        return (None,) * 8
    kept, factor, logits = ctx.saved_tensors
    return torch.ops.diffdoctor.artifact_loss_grad(kept, factor, g, logits, ctx.backend), *(None,) * 7


torch.library.register_autograd(
    "diffdoctor::artifact_loss", _artifact_backward, setup_context=_artifact_setup, lib=_library
)

__all__ = ["artifact_loss", "modulate_gradient", "modulate_gradient_later", "weighted_loss"]
