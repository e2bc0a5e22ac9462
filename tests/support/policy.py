"""Cases for policy_loss that every backend is run over, and what they are compared with; see cases.py."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from diffdoctor import Packed, reference
from diffdoctor.lowering.plan import WRITE_GRAD, WRITE_LOSS, WRITE_SUMS
from diffdoctor.lowering.policy_loss import PolicyProblem
from diffdoctor.ops.policy_arguments import PolicyInputs, PolicyOptions, log_prob_shape
from diffdoctor.ops.policy_call import lower as lower_call
from diffdoctor.ops.policy_call import with_cotangent
from support import cases
from support.cases import BF16, F16, F32, F64

ALL_OUTPUTS = WRITE_LOSS | WRITE_GRAD | WRITE_SUMS


@dataclass(frozen=True)
class Case:
    """One call. The views are those of `cases.lay_out`."""

    id: str
    shape: tuple[int, ...] = (2, 3, 5, 7)
    dtype: torch.dtype = F32
    step_dtype: torch.dtype = F32  # of latents and next_latents
    view: str = "contiguous"
    step_view: str = "contiguous"
    old: str = "map"  # | "none" | "mean" | "expanded"
    advantage: tuple | None = None  # a map's (shape, dtype); None: one for each sample
    mask: tuple | None = None
    ref: torch.dtype | None = None
    sigma: object = 0.3  # or "tensor", of which one is 0
    options: dict = field(default_factory=dict)


def build(case: Case) -> dict:
    """Arguments of the public call on the CPU. Ratios are about 1, some clipped; no ratio is at a bound."""
    g = torch.Generator().manual_seed(3)
    batch, layout = case.shape[0], case.options.get("layout")

    def normal(dtype, view, scale=1.0, shape=case.shape):
        return cases.lay_out((scale * torch.randn(shape, generator=g, dtype=F64)).to(dtype), view)

    pred = normal(case.dtype, case.view)
    latents = normal(case.step_dtype, case.step_view)
    noise = normal(F64, "contiguous", 0.3)
    next_latents = cases.lay_out((0.9 * latents.double() - 0.2 * pred.double() + noise).to(case.step_dtype),
                                 case.step_view)  # fmt: skip
    sigma = case.sigma
    coefs = (0.9, -0.2, sigma)
    if sigma == "tensor":
        per_sample = torch.linspace(0.2, 0.4, batch)
        per_sample[-1] = 0
        coefs = (torch.full((batch,), 0.9, dtype=F64), -0.2, per_sample)
    inputs = {"model_pred": pred, "latents": latents, "next_latents": next_latents, "coefs": coefs}
    old = reference.policy_log_prob(pred.double(), latents, next_latents, coefs=coefs, layout=layout)
    old = (old + 0.2 * torch.randn(old.shape, generator=g, dtype=F64)).to(F64 if case.dtype == F64 else F32)
    old = {"map": old, "none": None, "mean": old.flatten(1).mean(1), "expanded": old[:1].expand(old.shape)}[case.old]
    if case.advantage is None:
        advantage = torch.linspace(-1.0, 1.5, batch)
    else:
        shape, dtype = case.advantage
        advantage = normal(dtype, "contiguous", shape=shape)
        advantage.view(-1)[1] = 0
    mask = cases._map(case.mask, g, "contiguous")
    ref = None if case.ref is None else normal(case.ref, case.view)
    options = {"clip_range": (0.05, 0.1), **case.options}
    if ref is not None:
        options = {"kl_weight": 0.05, **options}
    return {**inputs, "old_log_prob": old, "advantage": advantage, "mask": mask, "ref_pred": ref, **options}


def cotangent(inputs: dict) -> torch.Tensor:
    return cases.cotangent(inputs)


def expected(inputs: dict) -> dict:
    """The reference's loss, gradient for `cotangent`, and sums, computed in fp64."""
    kwargs = dict(inputs)
    pred = kwargs.pop("model_pred").detach().double().requires_grad_()
    loss, sums = reference.policy_loss(pred, **kwargs, return_sums=True)
    loss.backward(cotangent(inputs).to(loss.dtype))
    return {"loss": loss.detach(), "grad": pred.grad, "sums": sums}


def call_of(**arguments) -> tuple[PolicyInputs, PolicyOptions]:
    """The two halves of a call's arguments."""
    inputs = {name: arguments.pop(name) for name in PolicyInputs._fields if name in arguments}
    return PolicyInputs(**inputs), PolicyOptions(**arguments)


def lower(inputs: dict, outputs: int = ALL_OUTPUTS, device=None) -> PolicyProblem:
    """The problem a backend's glue receives, its outputs full of NaN; g is `cotangent`."""
    moved = {name: cases._move(value, device) for name, value in inputs.items()}
    moved["coefs"] = tuple(cases._move(value, device) for value in inputs["coefs"])
    call, options = call_of(**moved)
    problem = with_cotangent(lower_call(call, options, outputs), cotangent(inputs).to(call.model_pred.device))
    for output in (problem.loss, problem.grad, problem.sums, problem.log_prob):
        if output is not None:
            output.fill_(float("nan"))
    return problem


def check(problem: PolicyProblem, want: dict) -> None:
    """Assert that a backend filled the problem's outputs with the reference's answer.

    A ratio is the exponential of a difference of sums, whose rounding grows with what is summed: 1e-5 in fp32.
    """
    dtype = problem.plan.dtype
    rtol = 1e-11 if dtype == F64 else 1e-5
    if problem.loss is not None:
        torch.testing.assert_close(problem.loss.cpu().double(), want["loss"], rtol=rtol, atol=rtol, equal_nan=True)
    if problem.grad is not None:
        got, grad = problem.grad.cpu().double(), want["grad"]
        finite = grad[grad.isfinite()].abs()
        scale = finite.max().item() if finite.numel() else 0.0
        atol = max(cases.GRAD_TOLERANCE[dtype], rtol) * scale + (2**-25 if dtype == F16 else 0.0)
        torch.testing.assert_close(got, grad, rtol=0, atol=atol, equal_nan=True)
    if problem.sums is not None:
        scale = want["sums"].abs().amax(0).clamp_min(1.0)
        torch.testing.assert_close(problem.sums.cpu().double() / scale, want["sums"] / scale, rtol=0, atol=10 * rtol,
                                   equal_nan=True)  # fmt: skip


def log_prob_of(problem: PolicyProblem, layout) -> torch.Tensor:
    """What a problem that asks for the log-probability is to hold."""
    coefs = [entry.value if entry.data is None else entry.data for entry in (problem.a, problem.b, problem.sigma)]
    assert problem.log_prob.shape == log_prob_shape(problem.pred, layout)
    return reference.policy_log_prob(
        problem.pred.double(), problem.latents, problem.next_latents, coefs=tuple(coefs), layout=layout
    )


def every_case() -> list[Case]:
    packed, other = Packed(8, 12), Packed(8, 12, order="ph pw c")
    found = []
    for level in ("pixel", "sample"):

        def add(name, level=level, **fields):
            options = {"level": level, **fields.pop("options", {})}
            found.append(Case(f"{level}-{name}", options=options, **fields))

        add("plain")
        add("bf16", dtype=BF16, step_dtype=BF16, shape=(2, 16, 9, 8), ref=BF16)
        add("f16", dtype=F16, advantage=((2, 1, 10, 14), F16), options={"reduction": "sample"})
        add("f64", dtype=F64, step_dtype=F64, ref=F64, advantage=((2, 5, 7), F64))
        add("on-policy", old="none", ref=F32, options={"reduction": "sum"})
        add("masked", mask=((2, 1, 5, 7), torch.uint8), advantage=((1, 10, 14), F32), ref=BF16)
        add("no-draw", shape=(3, 4, 6, 6), sigma="tensor", options={"reduction": "sample"}, ref=F32)
        add("packed", shape=(2, 24, 64), dtype=BF16, step_dtype=BF16, options={"layout": packed},
            advantage=((2, 1, 8, 12), F32))  # fmt: skip
        add("channels-last", shape=(2, 16, 5, 6), view="channels_last", step_view="channels_last", ref=F32,
            mask=((2, 5, 6), torch.bool))  # fmt: skip
    found += [
        Case("clipped-advantage", advantage=((2, 1, 9, 13), F32), options={"advantage_clip": 0.7}),
        Case("channels-last-step", shape=(2, 4, 6, 5), step_view="channels_last", step_dtype=BF16),
        Case("three-channels-last", shape=(2, 3, 6, 5), dtype=BF16, view="channels_last", step_view="channels_last"),
        Case("strided", view="sliced", step_view="transposed", dtype=BF16),
        Case("chunk", shape=(3, 4, 6, 5), view="chunk", step_view="batch_inner", ref=F32),
        Case("expanded", step_view="expanded", old="expanded"),
        Case(
            "packed-other-order",
            shape=(2, 24, 20),
            options={"layout": other, "interpolation": "bilinear"},
            advantage=((2, 1, 16, 24), BF16),
            mask=((1, 1, 4, 6), F32),
        ),
        Case("packed-odd-channels", shape=(2, 24, 12), dtype=F16, options={"layout": packed}),
        Case("tokens", shape=(2, 19, 24), advantage=((2, 19), F32), ref=BF16),
        Case("tokens-many-channels", shape=(1, 21, 70), dtype=BF16, step_dtype=BF16, advantage=((1, 21), F32)),
        Case("tokens-widest", shape=(1, 5, 3000), ref=F32),
        Case("video", shape=(2, 4, 5, 6, 7), advantage=((2, 1, 3, 12, 14), F32), options={"interpolation": "nearest"}),
        Case("video-one-map", shape=(1, 16, 3, 6, 7), dtype=BF16, advantage=((1, 1, 6, 7), F32), ref=BF16),
        Case("one-pixel", shape=(2, 5, 1, 1)),
        Case("one-channel", shape=(3, 1, 4, 6), mask=((3, 1, 8, 12), F32)),
        Case("sample-old-mean", old="mean", options={"level": "sample"}, advantage=((2, 1, 5, 7), F32)),
        Case("larger", shape=(1, 16, 40, 50), dtype=BF16, step_dtype=BF16, advantage=((1, 1, 160, 200), F32)),
        Case("larger-sample", shape=(2, 4, 67, 71), options={"level": "sample"}, mask=((2, 1, 67, 71), F32)),
    ]
    return found


def lanes_cases() -> list[Case]:
    """What csrc/cuda/policy_lanes.cu serves: each pair of dtypes, as latents and as tokens, maps of each kind."""
    packed = {"layout": Packed(8, 20)}
    maps = {"advantage": ((2, 1, 8, 40), F32), "mask": ((2, 1, 8, 40), torch.uint8)}
    found = []
    for dtype, step_dtype in ((F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)):
        fields = {"dtype": dtype, "step_dtype": step_dtype}
        name = "-".join(str(kind).removeprefix("torch.") for kind in (dtype, step_dtype))
        found += [
            Case(f"latents-{name}", shape=(2, 16, 8, 40), **maps, **fields),
            Case(f"latents-{name}-ref", shape=(2, 9, 8, 40), ref=step_dtype, sigma="tensor", **fields),
            Case(f"tokens-{name}", shape=(2, 40, 64), options=packed, advantage=((2, 1, 8, 20), F32), **fields),
            Case(f"tokens-{name}-ref", shape=(2, 40, 24), options=packed, ref=step_dtype,
                 mask=((1, 1, 8, 20), torch.bool), **fields),
        ]  # fmt: skip
    half = {"dtype": BF16, "step_dtype": BF16}
    found += [
        Case("three-channels", shape=(2, 3, 8, 40), advantage=((2, 8, 40), BF16), **half),
        Case("many-channels", shape=(2, 43, 16, 16), advantage=((1, 16, 16), F16), ref=BF16, **half),
        Case("many-channels-fp32", shape=(1, 37, 16, 12), ref=F32),
        Case("many-groups", shape=(2, 4, 80, 72), advantage=((2, 80, 72), F32), **half),
        Case("one-group", shape=(2, 16, 2, 4), advantage=((2, 2, 4), F32), **half),
        Case("video-one-map", shape=(2, 16, 3, 6, 8), advantage=((2, 1, 6, 8), F32), **half),
        Case("video", shape=(1, 5, 3, 6, 8), advantage=((1, 1, 3, 6, 8), F32)),
        Case("by-sample", shape=(2, 16, 24, 24), options={"level": "sample"}, mask=((2, 24, 24), F32), **half),
        Case("by-sample-mean", shape=(3, 4, 24, 24), old="mean", options={"level": "sample"}),
        Case("on-policy", shape=(2, 16, 8, 8), old="none", ref=BF16, options={"reduction": "sample"}, **half),
        Case("expanded-old", shape=(3, 4, 8, 8), old="expanded", options={"reduction": "sum"}),
        Case("chunk", shape=(3, 4, 8, 8), view="chunk", ref=F32),
        Case("tokens-by-sample", shape=(2, 40, 64), options=packed | {"level": "sample"}, **half),
    ]
    return found


def interpreted_cases() -> list[Case]:
    """A case for each branch of a kernel; Triton's interpreter takes seconds for one."""
    wanted = (
        "pixel-plain", "pixel-bf16", "pixel-f64", "pixel-masked", "pixel-no-draw", "sample-masked", "sample-on-policy",
        "sample-channels-last", "packed-other-order", "tokens-many-channels", "video-one-map", "one-pixel",
        "sample-old-mean",
    )  # fmt: skip
    return [case for case in every_case() if case.id in wanted]
