"""The CUDA kernels of artifact_loss, run on the CPU through tests/cuda_shim, against the reference."""

import pytest
import torch

from diffdoctor.backends.cuda import artifact_loss as cuda_artifact
from support import artifact, cases

F64 = torch.float64


@pytest.mark.parametrize("case", artifact.every_case(), ids=lambda case: case.id)
def test_artifact_loss_equals_the_reference(cuda, case):
    logits = artifact.build(case)
    problem = artifact.lower(case, logits)
    cuda_artifact.artifact_loss(problem)
    g = torch.linspace(0.5, 1.5, logits.shape[0], dtype=problem.loss.dtype)
    g = g if case.reduction == "sample" else g[0]
    want_loss, want_grad = artifact.expected(case, logits, g)
    rtol = 1e-12 if case.dtype == F64 else 3e-6
    torch.testing.assert_close(problem.loss, want_loss, rtol=rtol, atol=rtol)
    grad = torch.full(logits.shape, float("nan"), dtype=case.dtype)
    cuda_artifact.artifact_loss_backward(problem.unit_grad, problem.factor, g, grad)
    scale = want_grad.abs().max().item()
    torch.testing.assert_close(grad, want_grad, rtol=0, atol=cases.GRAD_TOLERANCE[case.dtype] * scale + 1e-30)


def test_artifact_loss_shares_ties_and_passes_nan_on(cuda):
    case = artifact.Case("", shape=(2, 3, 4), size=(12, 16), method="max", reduction="sample")
    logits = torch.zeros(case.shape)
    logits[1, 1, 2] = float("nan")
    problem = artifact.lower(case, logits)
    cuda_artifact.artifact_loss(problem)
    assert problem.loss[0] == 0.5
    assert problem.loss[1].isnan()
    torch.testing.assert_close((problem.unit_grad[0] * problem.factor[0]).sum(), torch.tensor(0.25))


@pytest.mark.parametrize("case", artifact.nan_cases(), ids=lambda case: case.id)
def test_a_nan_logit_gives_the_gradient_that_the_reference_gives(cuda, case):
    logits = artifact.build_with_nan(case)
    problem = artifact.lower(case, logits)
    cuda_artifact.artifact_loss(problem)
    grad = torch.empty_like(logits)
    cuda_artifact.artifact_loss_backward(problem.unit_grad, problem.factor, torch.ones(2), grad)
    artifact.check(case, problem.loss, grad, artifact.expected(case, logits, torch.ones(2)))


@pytest.mark.parametrize("method", ["threshold", "mean", "max"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_logit_that_is_not_finite_reaches_no_neighbour_of_the_same_size(cuda, method, value):
    case = artifact.Case(method, shape=(2, 13, 12), size=(13, 12), method=method, reduction="sample")
    logits = artifact.build(case)
    logits[0, 2, 3] = value
    problem = artifact.lower(case, logits)
    cuda_artifact.artifact_loss(problem)
    want, _ = artifact.expected(case, logits, torch.ones(2))
    torch.testing.assert_close(problem.loss, want, rtol=3e-6, atol=0, equal_nan=True)
