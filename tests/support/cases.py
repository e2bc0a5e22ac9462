"""Cases for weighted_loss that every backend is run over, and what they are compared with.

A `Case` names the public call; `build` makes its inputs from a seed, `lower` turns them into the `Problem` a backend's
glue receives, `expected` is the reference's answer, `check` compares. Outputs start as NaN, so that what a kernel
forgets to write is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from diffdoctor import Target, reference
from diffdoctor.lowering.plan import WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, PerSample, Problem
from diffdoctor.ops.arguments import Inputs, LossOptions
from diffdoctor.ops.call import lower as lower_call
from diffdoctor.ops.prepare import prepare

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Case:
    """One call. `pred_view`/`target_view` name how the tensor lies in memory (see `lay_out`)."""

    id: str
    shape: tuple[int, ...] = (2, 3, 5, 7)
    dtype: torch.dtype = F32
    target: str = "tensor"  # or the name of a Target constructor, or a key of OTHER_TARGETS
    target_dtype: torch.dtype = F32
    pred_view: str = "contiguous"
    target_view: str = "contiguous"
    confidence: tuple | None = None  # (shape, dtype)
    mask: tuple | None = None
    map_view: str = "contiguous"
    weighting: tuple | None = None  # (shape, dtype)
    huber_c: object = 0.3  # or "tensor"
    normalizer: object = None  # or "tensor"
    options: dict = field(default_factory=dict)
    seed: int = 0


def lay_out(x: torch.Tensor, view: str) -> torch.Tensor:
    """The same values in another memory layout, inside a larger buffer filled with NaN where there is one."""
    if view == "contiguous":
        return x.contiguous()
    if view == "channels_last":
        if x.ndim not in (4, 5):
            return x.contiguous()
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if view == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if view == "batch_inner":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if view == "sliced":  # every second column, from an odd offset
        fill = float("nan") if x.is_floating_point() else 1
        big = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), fill, dtype=x.dtype)
        out = big[..., 1::2]
        out.copy_(x)
        return out
    if view == "chunk":  # the second half of the channels of a larger tensor
        fill = float("nan") if x.is_floating_point() else 1
        big = torch.full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), fill, dtype=x.dtype)
        out = big[:, x.shape[1] :]
        out.copy_(x)
        return out
    if view == "expanded":
        return x[:1].expand(x.shape)
    raise ValueError(view)


#: Targets by what they are made of: three tensors of model_pred's shape and a number in (0.1, 0.9) for each sample.
OTHER_TARGETS = {
    "three_terms": lambda a, b, c, level: Target((a, b, c), (1.0, level, -0.5), 1.5),
    "contrastive": lambda a, b, c, level: Target.contrastive(a, b),
    "contrastive_flow": lambda a, b, c, level: Target.contrastive(Target.flow(a, b), c, 0.25, -level),
    "contrastive_velocity": lambda a, b, c, level: Target.contrastive(Target.velocity(a, b, level), c, level, -1.0),
    "one_spatial_term": lambda a, b, c, level: Target((a,), (1.0,), level, (-level,)),
}
#: Those whose coefficients change with u, which need a confidence map.
SPATIAL_TARGETS = tuple(name for name in OTHER_TARGETS if name != "three_terms")


def _map(spec, generator, view: str) -> torch.Tensor | None:
    """Values on a grid of 1/255, a fifth of them exactly 0 and some exactly 1, as masks have them."""
    if spec is None:
        return None
    shape, dtype = spec
    levels = torch.randint(0, 256, shape, generator=generator)
    levels = torch.where(torch.rand(shape, generator=generator) < 0.2, torch.zeros_like(levels), levels)
    if dtype == torch.bool:
        values = levels > 127
    elif dtype == torch.uint8:
        values = levels.to(torch.uint8)
    else:
        values = (levels.double() / 255).to(dtype)
    return lay_out(values, view if values.ndim > 2 else "contiguous")


def build(case: Case) -> dict:
    """Arguments of the public call on the CPU. model_pred does not require a gradient yet."""
    g = torch.Generator().manual_seed(case.seed + 1)
    batch = case.shape[0]

    def normal(dtype, view):
        return lay_out(torch.randn(case.shape, generator=g, dtype=F64).to(dtype), view)

    pred = normal(case.dtype, case.pred_view)
    first, second = normal(case.target_dtype, case.target_view), normal(case.dtype, "contiguous")
    level = torch.rand(batch, generator=g) * 0.8 + 0.1
    if case.target == "tensor":
        target = first
    elif case.target == "image":  # a 4-D target read through the packing
        target = case.options["layout"].unpack(first)
    elif case.target == "image_contrastive":  # three of them
        terms = (case.options["layout"].unpack(x) for x in (first, second, normal(case.target_dtype, "contiguous")))
        target = OTHER_TARGETS["contrastive_flow"](*terms, level)
    elif case.target == "velocity":
        target = Target.velocity(first, second, level)
    elif case.target == "preconditioned":
        target = Target.preconditioned(first, second, -level, 1 / (1 + level))
    elif case.target in OTHER_TARGETS:
        target = OTHER_TARGETS[case.target](first, second, normal(case.target_dtype, case.pred_view), level)
    elif case.target in ("flow", "flow_reversed"):
        target = Target.flow(first, second, reversed=case.target == "flow_reversed")
    else:
        target = getattr(Target, case.target)(first)
    weighting = None
    if case.weighting is not None:
        shape, dtype = case.weighting
        weighting = torch.rand(shape, generator=g).to(dtype) + 0.5
        if weighting.numel() > 2:
            weighting.view(-1)[1] = 0
    kwargs = {"artifact_weight": 2.0, **case.options}
    kwargs["mask"] = _map(case.mask, g, case.map_view)
    kwargs["weighting"] = weighting
    kwargs["huber_c"] = torch.rand(batch, generator=g) + 0.1 if case.huber_c == "tensor" else case.huber_c
    if case.normalizer is not None:
        kwargs["normalizer"] = torch.rand(batch, generator=g) + 0.5 if case.normalizer == "tensor" else case.normalizer
    return {"model_pred": pred, "target": target, "confidence": _map(case.confidence, g, case.map_view), **kwargs}


def cotangent(inputs: dict) -> torch.Tensor:
    """A gradient of the result that is not 1: a number, or one per sample for reduction="sample"."""
    dtype = F64 if inputs["model_pred"].dtype == F64 else F32
    batch = inputs["model_pred"].shape[0]
    if inputs.get("reduction") == "sample":
        return torch.linspace(-1.5, 2.5, batch, dtype=dtype)
    return torch.tensor(1.75, dtype=dtype)


def expected(inputs: dict, upcast: bool = False) -> dict:
    """The reference's loss, gradient for `cotangent`, and sums; in fp64 where `upcast`."""
    kwargs = dict(inputs)
    pred = kwargs.pop("model_pred").detach()
    pred = (pred.double() if upcast else pred.clone()).requires_grad_()
    g = cotangent(inputs)
    loss, sums = reference.weighted_loss(pred, **kwargs, return_sums=True)
    loss.backward(g.to(loss.dtype))
    return {"loss": loss.detach(), "grad": pred.grad, "sums": sums}


def lower(inputs: dict, outputs: int = WRITE_LOSS | WRITE_GRAD | WRITE_SUMS, weight_mean=None, device=None) -> Problem:
    """The Problem of `inputs`, outputs allocated and full of NaN; g is `cotangent`.

    `weight_mean(problem, out)` is the backend's own, needed where the case normalises.
    """
    call, options = call_of(**{key: _move(value, device) for key, value in inputs.items()})
    problem = lower_call(call, options, outputs, prepare(call, options))
    problem.grad_output = PerSample(0.0, cotangent(inputs).to(call.model_pred.device).reshape(-1))
    for output in (problem.loss, problem.grad, problem.sums):
        if output is not None:
            output.fill_(float("nan"))
    if problem.z_is_mean:
        weight_mean(problem, problem.z.data.fill_(float("nan")))
    return problem


def call_of(**arguments) -> tuple[Inputs, LossOptions]:
    """The two halves of a call's arguments."""
    inputs = {name: arguments.pop(name) for name in Inputs._fields if name in arguments}
    return Inputs(**inputs), LossOptions(**arguments)


def _move(value, device):
    if device is None or value is None:
        return value
    if isinstance(value, torch.Tensor):  # strides survive the copy
        once = value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]
        out = torch.empty_strided(once.shape, once.stride(), dtype=value.dtype, device=device)
        return out.copy_(once).expand(value.shape)
    if isinstance(value, Target):
        return Target(
            tuple(_move(term, device) for term in value.terms),
            tuple(_move(coef, device) for coef in value.coefs),
            _move(value.pred_scale, device),
            value.artifact_coefs and tuple(_move(coef, device) for coef in value.artifact_coefs),
        )
    return value


# Relative to the largest gradient: one unit in the last place, which two fp32 values on either side of a tie differ by
# when they are stored; fp32 has the bound of the design.
GRAD_TOLERANCE = {F32: 3e-5, BF16: 2**-7, F16: 2**-10, F64: 1e-12}


def check(problem: Problem, want: dict) -> None:
    """Assert that a backend filled the problem's outputs with the reference's answer."""
    dtype = problem.plan.dtype
    rtol = 1e-12 if dtype == F64 else 3e-6
    if problem.loss is not None:
        torch.testing.assert_close(
            problem.loss.cpu().double(), want["loss"].double(), rtol=rtol, atol=rtol, equal_nan=True
        )
    if problem.grad is not None:
        got, ref = problem.grad.detach().cpu().double(), want["grad"].double()
        finite = ref[torch.isfinite(ref)]
        scale = finite.abs().max().item() if finite.numel() else 0.0
        floor = 2**-25 if dtype == F16 else 0.0  # half a subnormal's spacing
        atol = GRAD_TOLERANCE[dtype] * scale + floor
        torch.testing.assert_close(got, ref, rtol=0, atol=atol, equal_nan=True)
        assert torch.equal(got == 0, ref == 0) or (got[(got == 0) != (ref == 0)].abs().max() <= atol)
    if problem.sums is not None:
        got, ref = problem.sums.cpu().double(), want["sums"].double()
        scale = ref.abs().amax(0).clamp_min(1.0)
        torch.testing.assert_close(got / scale, ref / scale, rtol=0, atol=10 * rtol, equal_nan=True)


def shifted(x: torch.Tensor, elements: int) -> torch.Tensor:
    """A dense copy that starts so many elements behind an aligned address."""
    buffer = torch.full((x.numel() + elements,), float("nan"), dtype=x.dtype, device=x.device)
    return buffer[elements:].view(x.shape).copy_(x)


def spaced(x: torch.Tensor, elements: int) -> torch.Tensor:
    """A copy whose samples are dense, with so many elements between them."""
    shape = (x.shape[0], x[0].numel() + elements)
    buffer = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    return buffer[:, : x[0].numel()].unflatten(1, x.shape[1:]).copy_(x)
