"""Cases for weighted_loss that every backend is run over, and what they are compared with.

A `Case` names the public call; `build` makes its inputs from a seed, `lower` turns them into the `Problem` a backend's
glue receives, `expected` is the reference's answer, `check` compares. Outputs start as NaN, so that what a kernel
forgets to write is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from diffdoctor import Packed, Target, reference
from diffdoctor.lowering.plan import SUMS, WRITE_GRAD, WRITE_LOSS, WRITE_SUMS, PerSample, Problem
from diffdoctor.ops.arguments import make_problem, per_sample
from diffdoctor.ops.prepare import prepare
from diffdoctor.ops.weighted_loss import check_arguments

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Case:
    """One call. `pred_view`/`target_view` name how the tensor lies in memory (see `lay_out`)."""

    id: str
    shape: tuple[int, ...] = (2, 3, 5, 7)
    dtype: torch.dtype = F32
    target: str = "tensor"  # or the name of a Target constructor
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
    elif case.target == "velocity":
        target = Target.velocity(first, second, level)
    elif case.target == "preconditioned":
        target = Target.preconditioned(first, second, -level, 1 / (1 + level))
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
    kwargs = dict(case.options)
    kwargs["mask"] = _map(case.mask, g, case.map_view)
    kwargs["weighting"] = weighting
    kwargs["huber_c"] = torch.rand(batch, generator=g) + 0.1 if case.huber_c == "tensor" else case.huber_c
    if case.normalizer is not None:
        kwargs["normalizer"] = torch.rand(batch, generator=g) + 0.5 if case.normalizer == "tensor" else case.normalizer
    return {"model_pred": pred, "target": target, "confidence": _map(case.confidence, g, case.map_view), **kwargs}


_DEFAULTS = {
    "mask": None,
    "weighting": None,
    "artifact_weight": 2.0,
    "clean_weight": 1.0,
    "artifact_grad": 1.0,
    "clean_grad": 1.0,
    "threshold": 0.0,
    "gamma": 1.0,
    "interpolation": "area",
    "loss_type": "l2",
    "huber_c": 0.1,
    "normalize": None,
    "normalizer": None,
    "reduction": "mean",
    "layout": None,
}


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


def lower(inputs: dict, work: int = WRITE_LOSS | WRITE_GRAD | WRITE_SUMS, weight_mean=None, device=None) -> Problem:
    """The Problem of `inputs`, outputs allocated and full of NaN; g is `cotangent`.

    `weight_mean(problem, out)` is the backend's own, needed where the case normalises.
    """
    a = {**_DEFAULTS, **inputs}
    a = {key: _move(value, device) for key, value in a.items()}
    maps = tuple(
        a[name]
        for name in (
            "artifact_weight",
            "clean_weight",
            "artifact_grad",
            "clean_grad",
            "threshold",
            "gamma",
            "interpolation",
        )
    )
    pred, target = a["model_pred"], a["target"]
    options = check_arguments(
        pred, target, a["confidence"], a["mask"], a["weighting"], maps, a["loss_type"], a["huber_c"], a["normalize"],
        a["normalizer"], a["reduction"], a["layout"],
    )  # fmt: skip
    terms = (target,) if isinstance(target, torch.Tensor) else target.terms
    prepared = prepare(
        pred, terms, a["confidence"], a["mask"], a["weighting"], a["interpolation"], a["layout"], options
    )
    problem = make_problem(prepared, pred, target, a["confidence"], a["mask"], a["weighting"], a["huber_c"])
    plan, acc = prepared.plan, prepared.plan.acc_dtype
    g = cotangent(inputs).to(pred.device)
    problem.grad_output = PerSample(0.0, g.reshape(-1))
    if a["normalizer"] is not None:
        problem.z = per_sample(a["normalizer"], acc)
    elif a["normalize"] is not None:
        if a["confidence"] is None and a["mask"] is None:
            problem.z = PerSample(options.clean_weight)
        else:
            out = torch.full((plan.batch if a["normalize"] == "sample" else 1,), float("nan"), dtype=acc)
            out = out.to(pred.device)
            weight_mean(problem, out)
            problem.z = PerSample(0.0, out)
    nan = float("nan")
    problem.work = work
    if work & WRITE_LOSS:
        shape = (plan.batch,) if a["reduction"] == "sample" else ()
        problem.loss = torch.full(shape, nan, dtype=acc, device=pred.device)
    if work & WRITE_GRAD:
        problem.grad = torch.empty_like(pred).fill_(nan)
    if work & WRITE_SUMS:
        problem.sums = torch.full((plan.batch, SUMS), nan, dtype=acc, device=pred.device)
    return problem


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


def all_cases() -> list[Case]:
    """The matrix: each dtype, layout, map, target, loss and option at least once, and the combinations that bite."""
    conf = ((2, 1, 5, 7), F32)
    big = ((2, 40, 56), torch.uint8)
    cases = [Case(f"plain-{_name(d)}", dtype=d, target_dtype=d) for d in (F32, BF16, F16, F64)]
    cases += [
        Case("mixed-bf16-f32", dtype=BF16, target_dtype=F32),
        Case("mixed-f16-f64", dtype=F16, target_dtype=F64),
        Case("mixed-f32-bf16", target_dtype=BF16),
        Case("mixed-f64-f16", dtype=F64, target_dtype=F16),
        Case("one-element", shape=(1, 1, 1, 1), confidence=((1, 1, 1, 1), F32)),
        Case("prime", shape=(3, 1, 13, 17), confidence=((3, 13, 17), F32)),
        Case("power-plus-one", shape=(2, 1, 1, 4097)),
        Case("power-minus-one", shape=(1, 3, 1, 1023), confidence=((1, 1, 1023), BF16)),
        Case("large", shape=(2, 5, 65, 63), confidence=((2, 65, 63), F32), options={"threshold": 0.4}),
        Case("large-bf16", shape=(2, 5, 65, 64), dtype=BF16, target_dtype=BF16, confidence=((2, 65, 64), F32)),
    ]
    views = ("transposed", "sliced", "chunk", "channels_last", "batch_inner", "expanded")
    for view in views:
        cases.append(Case(f"pred-{view}", pred_view=view, confidence=conf))
        cases.append(
            Case(
                f"all-{view}-bf16",
                dtype=BF16,
                pred_view=view,
                target_view=view,
                map_view=view if view != "channels_last" else "contiguous",
                confidence=((2, 1, 5, 7), F16),
                options={"reduction": "sample"},
            )
        )
    cases.append(Case("video", shape=(2, 3, 4, 5, 7), confidence=((2, 1, 5, 7), F32)))
    cases.append(Case("video-resample", shape=(2, 3, 4, 5, 7), confidence=((2, 10, 14), F32)))
    for mode in ("area", "bilinear", "nearest", "nearest-exact"):
        opts = {"interpolation": mode}
        cases += [
            Case(f"{mode}-down", confidence=big, options=opts),
            Case(f"{mode}-up", confidence=((2, 1, 3, 2), F32), mask=((1, 1, 2, 9), F64), options=opts),
            Case(f"{mode}-odd", confidence=((1, 11, 3), BF16), mask=((2, 13, 13), torch.bool), options=opts),
            Case(f"{mode}-video", shape=(2, 2, 3, 4, 5), confidence=((2, 1, 5, 9, 7), F32), options=opts),
            Case(f"{mode}-channels-last", pred_view="channels_last", target_view="channels_last", confidence=big,
                 options=opts),
            Case(f"{mode}-f64", dtype=F64, confidence=((2, 9, 4), F32), options=opts),
        ]  # fmt: skip
    for order in ("c ph pw", "ph pw c"):
        layout = Packed(6, 8, 2, order)
        tag = order.replace(" ", "")
        cases += [
            Case(f"packed-{tag}", shape=(2, 12, 12), confidence=((2, 6, 8), F32), options={"layout": layout}),
            Case(f"packed-{tag}-resampled", shape=(2, 12, 12), dtype=BF16, confidence=((2, 48, 64), torch.uint8),
                 weighting=((2, 1, 6, 8), F32), options={"layout": layout}),
            Case(f"packed-{tag}-image-target", shape=(2, 12, 12), target="image", mask=((1, 3, 4), F32),
                 options={"layout": layout}),
        ]  # fmt: skip
    cases += [
        Case("packed-patch1", shape=(2, 48, 3), confidence=((2, 6, 8), F32), options={"layout": Packed(6, 8, 1)}),
        Case("tokens", shape=(2, 10, 6), confidence=((2, 10), F32), weighting=((2, 10, 1), F32)),
        Case("tokens-bf16", shape=(3, 33, 16), dtype=BF16, confidence=((3, 33), torch.bool), mask=((1, 33), F32)),
    ]
    for target in ("epsilon", "sample", "velocity", "flow", "flow_reversed", "preconditioned"):
        cases.append(Case(f"target-{target}", target=target, confidence=conf))
        cases.append(Case(f"target-{target}-bf16", target=target, dtype=BF16, pred_view="chunk"))
    losses = ("l1", "huber", "smooth_l1", "pseudo_huber", "log_cosh")
    for loss in losses:
        cases.append(Case(f"loss-{loss}", options={"loss_type": loss}, confidence=conf))
        cases.append(Case(f"loss-{loss}-f64", dtype=F64, options={"loss_type": loss}))
    mixture = {"l2": 1.0, "l1": 0.5, "huber": 0.25, "smooth_l1": 2.0, "pseudo_huber": 1.5, "log_cosh": 0.75}
    cases += [
        Case("loss-mixture", options={"loss_type": mixture}, huber_c="tensor", confidence=conf),
        Case("loss-mixture-f16", dtype=F16, target_dtype=F16, options={"loss_type": mixture}, huber_c="tensor"),
        Case("huber-per-sample", options={"loss_type": "huber"}, huber_c="tensor"),
        Case("huber-zero", options={"loss_type": {"pseudo_huber": 1.0, "smooth_l1": 1.0, "huber": 1.0}}, huber_c=0.0),
        Case("weighting-1d", weighting=((2,), F32)),
        Case("weighting-1d-one", weighting=((1,), F64)),
        Case("weighting-keepdim", weighting=((2, 1, 1, 1), BF16), confidence=conf),
        Case("weighting-full", weighting=((2, 3, 5, 7), F16)),
        Case("weighting-channel", weighting=((3, 1, 1), F32), options={"reduction": "sample"}),
        Case("weighting-spatial-f16", dtype=F16, target_dtype=F16, weighting=((2, 1, 5, 7), F32)),
        Case("weighting-video", shape=(2, 3, 4, 5, 7), weighting=((2, 1, 4, 1, 1), F32)),
        Case("mask-only", mask=((2, 5, 7), torch.bool)),
        Case("grad-modulated", confidence=conf, options={"artifact_grad": 1.0, "clean_grad": 0.0, "threshold": 0.5}),
        Case("grad-amplified", confidence=conf, options={"artifact_grad": 3.0, "clean_grad": 0.2, "gamma": 2.5}),
        Case("weights", confidence=conf, options={"artifact_weight": 0.0, "clean_weight": 1.5, "threshold": 0.25}),
        Case("normalizer", confidence=conf, normalizer="tensor"),
        Case("normalizer-number", confidence=conf, normalizer=12.5, options={"reduction": "sum"}),
    ]
    for reduction in ("mean", "sample", "sum"):
        opts = {"reduction": reduction}
        cases += [
            Case(f"reduce-{reduction}", confidence=conf, weighting=((2,), F32), options=opts),
            Case(f"reduce-{reduction}-f16", dtype=F16, target_dtype=F16, confidence=conf, weighting=((2,), F32),
                 options=opts),
            Case(f"normalize-sample-{reduction}", confidence=conf, mask=((1, 20, 28), F32),
                 options={**opts, "normalize": "sample"}),
            Case(f"normalize-batch-{reduction}", dtype=BF16, confidence=big, weighting=((2,), F32),
                 options={**opts, "normalize": "batch"}),
        ]  # fmt: skip
    cases.append(Case("normalize-no-map", options={"normalize": "sample", "clean_weight": 0.5}))
    return cases


def tiled_cases() -> list[Case]:
    """Sizes at which a sample is cut into several tiles, in every way that tiles are cut."""
    return [
        Case("runs", shape=(2, 16, 32, 64), confidence=((2, 32, 64), F32)),
        Case("runs-bf16-resampled", shape=(1, 7, 48, 64), dtype=BF16, confidence=((1, 96, 96), torch.uint8)),
        Case("runs-odd-f16", shape=(2, 3, 41, 67), dtype=F16, target_dtype=F16, mask=((2, 41, 67), BF16)),
        Case("runs-strided", shape=(2, 3, 40, 64), pred_view="sliced", confidence=((1, 40, 64), torch.bool)),
        Case("uniform-f64", shape=(3, 1, 150, 120), dtype=F64, target="velocity"),
        Case("uniform-two-terms", shape=(2, 4, 64, 96), dtype=BF16, target="flow", target_dtype=BF16),
        Case("outers-channels-last", shape=(2, 24, 40, 40), dtype=BF16, pred_view="channels_last",
             target_view="channels_last", target_dtype=BF16, confidence=((2, 80, 80), F32)),
        Case("outers-packed", shape=(2, 384, 64), dtype=BF16, confidence=((2, 32, 48), F32),
             options={"layout": Packed(32, 48, 2)}),
        Case("outers-packed-f64", shape=(1, 384, 48), dtype=F64, mask=((1, 1, 64, 96), F32),
             options={"layout": Packed(32, 48, 2, "ph pw c"), "interpolation": "bilinear"}),
        Case("outers-tokens", shape=(2, 300, 40), confidence=((2, 300), F32), weighting=((2, 300, 1), F32)),
        Case("too-many-channels", shape=(1, 3, 17000), confidence=((1, 3), F32)),
        Case("full-weighting", shape=(2, 8, 32, 40), dtype=BF16, weighting=((2, 8, 32, 40), BF16)),
        Case("frames", shape=(2, 6, 5, 24, 20), confidence=((2, 1, 7, 24, 20), F32), weighting=((2, 1, 5, 1, 1), F32),
             options={"normalize": "sample"}),
        Case("many-samples", shape=(300, 1, 5, 4), confidence=((300, 5, 4), F32), options={"normalize": "batch"}),
    ]  # fmt: skip


def shifted(x: torch.Tensor, elements: int) -> torch.Tensor:
    """A dense copy that starts so many elements behind an aligned address."""
    buffer = torch.full((x.numel() + elements,), float("nan"), dtype=x.dtype, device=x.device)
    return buffer[elements:].view(x.shape).copy_(x)


def spaced(x: torch.Tensor, elements: int) -> torch.Tensor:
    """A copy whose samples are dense, with so many elements between them."""
    shape = (x.shape[0], x[0].numel() + elements)
    buffer = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    return buffer[:, : x[0].numel()].unflatten(1, x.shape[1:]).copy_(x)


def _name(dtype: torch.dtype) -> str:
    return {F32: "f32", BF16: "bf16", F16: "f16", F64: "f64"}[dtype]
