"""Cases for artifact_loss that every backend is run over, and what they are compared with; see cases.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffdoctor import reference
from diffdoctor.lowering.artifact_loss import ArtifactProblem
from diffdoctor.lowering.artifact_loss import lower as lower_call
from support import cases

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True)
class Case:
    """One call of artifact_loss on (B, h, w) logits."""

    id: str
    shape: tuple[int, int, int] = (3, 5, 7)
    size: tuple[int, int] = (20, 28)
    dtype: torch.dtype = F32
    method: str = "threshold"
    reduction: str = "mean"
    threshold: float = 0.1
    view: str = "contiguous"


def build(case: Case) -> torch.Tensor:
    """Logits (B, h, w), mostly clean as a detector's are."""
    g = torch.Generator().manual_seed(7)
    return cases.lay_out((2 * torch.randn(case.shape, generator=g, dtype=F64) - 1).to(case.dtype), case.view)


def expected(case: Case, logits: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's loss, and gradient for the cotangent g."""
    x = logits.detach().clone().requires_grad_()
    loss = reference.artifact_loss(
        x, size=case.size, threshold=case.threshold, method=case.method, reduction=case.reduction
    )
    loss.backward(g)
    return loss.detach(), x.grad


def lower(case: Case, logits: torch.Tensor) -> ArtifactProblem:
    """The ArtifactProblem a backend's glue receives, its outputs full of NaN."""
    problem = lower_call(logits, case.size, case.threshold, case.method, case.reduction, want_grad=True)
    for output in (problem.loss, problem.unit_grad, problem.factor):
        output.fill_(float("nan"))
    return problem


def every_case() -> list[Case]:
    cases = []
    for method in ("threshold", "mean", "sum", "max"):
        for reduction in ("mean", "sample", "sum"):
            cases.append(Case(f"{method}-{reduction}", method=method, reduction=reduction))
        cases.append(Case(f"{method}-bf16", dtype=BF16, method=method, view="sliced"))
        cases.append(Case(f"{method}-same-size", size=(5, 7), method=method))
    cases += [
        Case("f16", dtype=F16, view="transposed"),
        Case("f64", dtype=F64),
        Case("down", shape=(2, 33, 17), size=(8, 9)),
        Case("odd", shape=(1, 13, 11), size=(57, 31), threshold=0.5),
        Case("one-logit", shape=(2, 1, 1), size=(4, 4)),
        Case("nothing-above", threshold=1.0),
        Case("larger", shape=(2, 32, 32), size=(128, 128), reduction="sample"),
    ]
    return cases


def nan_cases() -> list[Case]:
    """Cases for `build_with_nan`: at its own size and enlarged by powers of two, where no weight near it is 0."""
    return [
        Case(f"{method}-{name}", shape=(2, 9, 10), size=size, method=method, reduction="sample")
        for method in ("threshold", "mean", "sum", "max")
        for name, size in (("same-size", (9, 10)), ("enlarged", (18, 40)))
    ]


def build_with_nan(case: Case) -> torch.Tensor:
    """Logits of which one, in the first picture and away from its border, is NaN."""
    logits = build(case)
    logits[0, 4, 5] = float("nan")
    return logits


def check(case: Case, loss: torch.Tensor, grad: torch.Tensor, want: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Assert that a backend's loss and gradient are the reference's, NaN for NaN."""
    want_loss, want_grad = want
    rtol = 1e-12 if case.dtype == F64 else 3e-6
    torch.testing.assert_close(loss.cpu(), want_loss, rtol=rtol, atol=rtol, equal_nan=True)
    finite = want_grad[want_grad.isfinite()].abs()
    atol = cases.GRAD_TOLERANCE[case.dtype] * (finite.max().item() if finite.numel() else 0) + 1e-30
    torch.testing.assert_close(grad.cpu(), want_grad, rtol=0, atol=atol, equal_nan=True)
