"""autograd for eager calls: straight to a backend, without the dispatcher's price of 10 to 20 microseconds."""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffdoctor import reference
from diffdoctor.lowering.plan import SUMS, WRITE_GRAD, WRITE_LOSS, PerSample, Problem
from diffdoctor.ops.arguments import LossOptions, per_sample_order, target_parts
from diffdoctor.ops.call import run
from diffdoctor.ops.observed import is_observed, is_plain
from diffdoctor.ops.prepare import CachedPlan
from diffdoctor.ops.stats import LossStats
from diffdoctor.ops.target import Target

functorch_level = torch._C._functorch.peek_interpreter_stack
is_batched = torch._C._functorch.is_legacy_batchedtensor
graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
# Found in this module rather than in torch's, whose large table is in no cache after two million elements.
_empty_like, _is_grad_enabled = torch.empty_like, torch.is_grad_enabled
_ONE = PerSample()


def refuse_functorch(op: str, g: Tensor | None = None) -> None:
    """Raise under torch.func transforms, whose wrapped tensors no kernel can read; `g` is a backward's gradient."""
    if functorch_level() is not None or (g is not None and is_batched(g)):
        raise RuntimeError(
            f"diffdoctor.{op} does not support torch.func transforms (vmap, grad, jvp, is_grads_batched): "
            f"call diffdoctor.reference.{op}"
            + (', or pass reduction="sample" for per-sample losses' if op.endswith("loss") else "")
        )


def refuse_forward_mode(op: str, *tensors) -> None:
    """Raise where a tensor carries a tangent (`torch.autograd.forward_ad`), which no kernel carries on."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(f"diffdoctor.{op} has no forward-mode derivative; diffdoctor.reference.{op} has one")


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on a gradient that was asked for with create_graph=True; raises when differentiated."""

    @staticmethod
    def forward(ctx, grad, x, op):
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise second_derivative(ctx.op)


def forbid_second_derivative(grad: Tensor, x: Tensor | None, op: str) -> Tensor:
    """The gradient, which raises when it is differentiated by whatever `x`, the differentiated tensor, comes from.

    Raises:
        RuntimeError: at once where x is gone: nothing could be seen of a differentiation then.
    """
    if x is None:
        raise second_derivative(op)
    return _NoSecondDerivative.apply(grad, x, op)


def second_derivative(op: str) -> RuntimeError:
    """The error for a second derivative of an op."""
    return RuntimeError(f"diffdoctor.{op} has no second derivative; diffdoctor.reference.{op} in plain PyTorch has one")


class _GuardReference(torch.autograd.Function):
    """Identity in front of the reference, so that it refuses second derivatives as the other backends do."""

    @staticmethod
    def forward(ctx, x, op):
        ctx.op = op
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return (forbid_second_derivative(grad, *ctx.saved_tensors, ctx.op) if torch.is_grad_enabled() else grad), None


def guard_reference(x: Tensor, op: str) -> Tensor:
    """What the reference is called on: x, which raises where a second derivative passes it."""
    return _GuardReference.apply(x, op) if x.requires_grad and torch.is_grad_enabled() else x


def scaled(unit_grad: Tensor, factor: Tensor) -> Tensor:
    """unit_grad * factor by torch's own operations, the factor one number or one per sample; rounded once."""
    factor = factor if factor.ndim == 0 else factor.reshape(-1, *(1,) * (unit_grad.ndim - 1))
    return (unit_grad.to(factor.dtype) * factor).to(unit_grad.dtype)


def with_strides(x: Tensor | None, stride: tuple[int, ...] | None) -> Tensor | None:
    """A saved tensor in the strides with which it was saved, by which the kernels read it; None stays None.

    Saved-tensor hooks may hand back others; `torch.autograd.graph.save_on_cpu(pin_memory=True)` makes everything
    contiguous.
    """
    if x is None or x.stride() == stride:
        return x
    once = x[tuple(slice(None) if step else slice(1) for step in stride)]
    return torch.empty_strided(once.shape, stride, dtype=x.dtype, device=x.device).copy_(once).expand(x.shape)


class SavedGradLoss(torch.autograd.Function):
    """A loss whose gradient for g = 1 is already there; backward scales it."""

    @staticmethod
    def forward(ctx, model_pred, done):
        loss, grad, call = done
        ctx.made = (call, ref(model_pred), grad.stride())  # one attribute: each takes as long as a call
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, g):
        if functorch_level() is not None or is_batched(g):
            refuse_functorch(ctx.made[0].op, g)
        (unit_grad,) = ctx.saved_tensors
        call, x, stride = ctx.made
        if type(unit_grad) is not Tensor or type(g) is not Tensor or is_observed():
            grad = scaled(unit_grad, g)
            return (forbid_second_derivative(grad, x(), call.op) if _is_grad_enabled() else grad), None
        if unit_grad.stride() != stride:
            unit_grad = with_strides(unit_grad, stride)
        if g.is_neg():
            g = g.resolve_neg()
        if g.ndim == 0:
            grad = _empty_like(unit_grad) if graph_is_kept() else unit_grad
            call.scale(unit_grad, g, grad)
        elif call.runs is not None:
            grad = _empty_like(unit_grad) if graph_is_kept() else unit_grad
            call.module.scale_gradient(unit_grad, g, grad, *call.runs)
        else:
            grad = scaled(unit_grad, g)
        return (forbid_second_derivative(grad, x(), call.op) if _is_grad_enabled() else grad), None


# Function.apply without what it does first for functorch, which was refused before: it takes as long again as the rest.
save_grad = super(torch.autograd.Function, SavedGradLoss).apply


def _numbers_of(problem: Problem) -> tuple[PerSample, ...]:
    return (
        problem.pred_scale, *problem.coefs, problem.huber_c, problem.weight, problem.z, *problem.artifact_coefs,
    )  # fmt: skip


class RecomputedLoss(torch.autograd.Function):
    """Saves the inputs and computes the gradient in backward, rounded once: for fp16.

    A normalised fp16 gradient would be lost: at 4.8M elements most of it is below the smallest subnormal until the
    loss scale multiplies it.
    """

    @staticmethod
    def forward(ctx, model_pred, problem, module, options):
        ctx.options = options
        entries = _numbers_of(problem)
        ctx.module, ctx.x, ctx.plan, ctx.values = module, ref(model_pred), problem.plan, [x.value for x in entries]
        inputs = (problem.pred, problem.confidence, problem.mask, problem.weighting, *problem.terms)
        tensors = (*inputs, *(entry.data for entry in entries))
        ctx.strides = [None if x is None else x.stride() for x in tensors]
        ctx.save_for_backward(*tensors)
        return problem.loss

    @staticmethod
    def backward(ctx, g):
        refuse_functorch("weighted_loss", g)
        saved = ctx.saved_tensors
        if is_observed() or not is_plain(g, *saved):
            grad = _gradient_by_reference(ctx.options, saved, ctx.values, g, ctx.plan.spatial_coefs)
        else:
            grad = RecomputedLoss.gradient(ctx, saved, g)
        if torch.is_grad_enabled():
            grad = forbid_second_derivative(grad, ctx.x(), "weighted_loss")
        return grad, None, None, None

    @staticmethod
    def gradient(ctx, saved: tuple[Tensor | None, ...], g: Tensor) -> Tensor:
        """The gradient by the backend's kernel."""
        g = g.resolve_neg()
        pred, confidence, mask, weighting, *others = map(with_strides, saved, ctx.strides)
        terms = others[: -len(ctx.values)]
        numbers = list(map(PerSample, ctx.values, others[len(terms) :]))
        artifact_coefs = [numbers.pop() for _ in terms][::-1] if ctx.plan.spatial_coefs else []
        pred_scale, *coefs, huber_c, weight, z = numbers
        problem = Problem(
            ctx.plan, WRITE_GRAD, pred, tuple(terms), confidence, mask, weighting, pred_scale, tuple(coefs), huber_c,
            weight, z, PerSample(0.0, g.reshape(1) if g.ndim == 0 else g), grad=torch.empty_like(pred),
            artifact_coefs=tuple(artifact_coefs),
        )  # fmt: skip
        ctx.module.weighted_loss(problem)
        return problem.grad


save_inputs = super(torch.autograd.Function, RecomputedLoss).apply  # as save_grad


def _gradient_by_reference(
    options: LossOptions, saved: tuple[Tensor | None, ...], values: list[float], g: Tensor, is_spatial: bool
) -> Tensor:
    """The gradient of a RecomputedLoss by torch's own operations, for what no kernel may read or write."""
    pred, confidence, mask, weighting, *others = saved
    terms, numbers = others[: -len(values)], others[-len(values) :]
    numbers = [value if data is None else data for value, data in zip(values, numbers, strict=True)]
    artifact_coefs = [numbers.pop() for _ in terms][::-1] if is_spatial else None
    pred_scale, *coefs, huber_c, weight, z = numbers
    if weighting is None and isinstance(weight, Tensor):
        weighting = weight
    target = Target(terms, coefs, pred_scale, artifact_coefs) if terms else torch.zeros_like(pred)
    with torch.enable_grad():
        x = pred.detach().requires_grad_()
        loss = reference.weighted_loss(
            x, target, confidence, mask=mask, weighting=weighting, huber_c=huber_c, normalizer=z,
            **{**vars(options), "normalize": None},
        )  # fmt: skip
    return torch.autograd.grad(loss, x, g)[0]


def differentiable_loss(
    model_pred: Tensor, problem: Problem, module, runs: tuple[int, int] | None, options: LossOptions
) -> Tensor:
    """Run a problem, and connect its loss to the graph of model_pred.

    Args:
        model_pred: requires a gradient.
        problem: where it asks for a gradient, that is saved; else backward computes it.
        module: of the backend.
        runs: (batch, count) where the gradient's memory is `batch` dense runs of `count` elements, else None.
        options: of the call.
    """
    run(module, problem)
    if problem.grad is None:
        return save_inputs(model_pred, problem, module, options)
    return save_grad(model_pred, (problem.loss, problem.grad, GeneralCall(module, runs)))


class GeneralCall:
    """What the backward of a saved gradient needs of its call.

    Args:
        module: of the backend.
        runs: as in `differentiable_loss`.
        op: the public name.
    """

    __slots__ = ("module", "op", "runs")

    def __init__(self, module, runs: tuple[int, int] | None, op: str = "weighted_loss"):
        self.module, self.runs, self.op = module, runs, op

    def scale(self, unit_grad: Tensor, g: Tensor, out: Tensor) -> None:
        """out = unit_grad * g, of one number."""
        self.module.scale_gradient(unit_grad, g, out, 1, unit_grad.numel())


class BoundCall:
    """A weighted_loss call whose plan is known, on a backend with a fast path: one native call, and nothing is lowered.

    At a few elements a call is all overhead; at two million, whose 0.5 ms leave the caches cold, 30 microseconds of
    Python are still a twentieth.

    Args:
        fast: what the backend's `bind` gave for `problem`.
        problem: of a first call with the same plan, the same numbers and tensors in the same places.
        cached: its plan.
        module: of the backend.
    """

    __slots__ = (
        "_acc", "_batch", "_elements", "_elementwise", "_entries", "_launch", "_like_loss", "_options", "_plan",
        "_tensor_slots", "module", "runs", "scale",
    )  # fmt: skip
    op = "weighted_loss"

    def __init__(self, fast, problem: Problem, cached: CachedPlan, module):
        plan = cached.plan
        # Bound methods: calling an object takes twice as long.
        self._launch, self.scale = fast.__call__, fast.scale
        self.module, self.runs = module, cached.grad_runs
        self._acc, self._batch, self._elements = plan.acc_dtype, plan.batch, plan.batch * plan.count
        self._elementwise = problem.weighting is not None
        entries = per_sample_order(
            problem.pred_scale, problem.coefs, problem.artifact_coefs, problem.huber_c, problem.weight, problem.z
        )
        self._tensor_slots = [
            k for k, entry in enumerate(entries)
            if entry.data is not None and not (entry is problem.z and problem.z_is_mean)
        ]  # fmt: skip
        # fp16, whose gradient is computed in backward: what a problem holds beside tensors.
        recomputes = plan.dtype == torch.float16
        self._entries = [PerSample(entry.value) for entry in entries] if recomputes else None
        self._plan, self._options = plan, cached.options
        self._like_loss = torch.empty_like(problem.loss)  # empty_like of it takes half the time of empty

    def run(self, model_pred, target, confidence, mask, weighting, huber_c, normalizer, differentiable, return_stats):
        """The loss, connected to the graph where `differentiable`; with `return_stats` (loss, LossStats)."""
        loss = _empty_like(self._like_loss)
        grad = _empty_like(model_pred) if differentiable and self._entries is None else None
        sums = self._like_loss.new_empty(self._batch, SUMS) if return_stats else None
        terms = target.terms if isinstance(target, Target) else (target,)
        per_sample = None
        if self._tensor_slots:
            per_sample = self._per_sample_tensors(target, huber_c, weighting, normalizer)
        self._launch(
            model_pred, terms, confidence, mask, weighting if self._elementwise else None, per_sample, loss, grad, sums
        )
        if differentiable:
            if grad is None:
                maps = confidence, mask, weighting if self._elementwise else None
                problem = self._problem(model_pred, terms, maps, per_sample, loss)
                loss = save_inputs(model_pred, problem, self.module, self._options)
            else:
                loss = save_grad(model_pred, (loss, grad, self))
        return (loss, LossStats.from_sums(sums, self._elements)) if return_stats else loss

    def _problem(self, model_pred, terms, maps, per_sample, loss) -> Problem:
        """The call as a problem, for `RecomputedLoss`."""
        entries = self._entries.copy()
        for slot, tensor in zip(self._tensor_slots, per_sample or (), strict=True):
            entries[slot] = PerSample(0.0, tensor)
        few = min(2, len(terms))  # per_sample_order
        pred_scale, coefs, (huber_c, weight, z) = entries[0], entries[1 : 1 + few], entries[1 + few : 4 + few]
        rest = entries[4 + few :]
        third = len(terms) - few
        return Problem(
            self._plan, WRITE_LOSS, model_pred, terms, *maps, pred_scale, (*coefs, *rest[:third]), huber_c, weight, z,
            _ONE, loss=loss, artifact_coefs=tuple(rest[third:]),
        )  # fmt: skip

    def _per_sample_tensors(self, target, huber_c, weighting, normalizer) -> list[Tensor]:
        """The per-sample values that are tensors, as the kernels read them."""
        _, coefs, pred_scale, artifact_coefs = target_parts(target)
        values = per_sample_order(pred_scale, coefs, artifact_coefs, huber_c, weighting, normalizer)
        return [values[k].reshape(-1).to(self._acc) for k in self._tensor_slots]
