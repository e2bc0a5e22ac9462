"""The CUDA kernels, run on the CPU through tests/cuda_shim, against the reference over the shared cases."""

import helpers_cases as cases
import pytest
import torch
from helpers_cuda_shim import build_module

from diffdoctor.ops import _cuda


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return build_module(tmp_path_factory.mktemp("cuda_shim"))


@pytest.fixture
def cuda(shim, monkeypatch):
    """The backend's glue over the host build of its kernels, with workspaces of its own."""
    monkeypatch.setattr(_cuda, "_native", shim)
    monkeypatch.setattr(_cuda, "_workspaces", {})
    return _cuda


@pytest.mark.parametrize("case", cases.all_cases(), ids=lambda case: case.id)
def test_weighted_loss_equals_the_reference(cuda, case):
    inputs = cases.build(case)
    problem = cases.lower(inputs, weight_mean=cuda.weight_mean)
    cuda.weighted_loss(problem)
    cases.check(problem, cases.expected(inputs))


@pytest.mark.parametrize("case", cases.artifact_cases(), ids=lambda case: case.id)
def test_artifact_loss_equals_the_reference(cuda, case):
    logits = cases.build_artifact(case)
    problem = cases.lower_artifact(case, logits)
    cuda.artifact_loss(problem)
    g = torch.linspace(0.5, 1.5, logits.shape[0], dtype=problem.loss.dtype)
    g = g if case.reduction == "sample" else g[0]
    want_loss, want_grad = cases.expected_artifact(case, logits, g)
    rtol = 1e-12 if case.dtype == torch.float64 else 3e-6
    torch.testing.assert_close(problem.loss, want_loss, rtol=rtol, atol=rtol)
    grad = torch.full(logits.shape, float("nan"), dtype=case.dtype)
    cuda.artifact_loss_backward(problem.kept, problem.factor, g, grad)
    scale = want_grad.abs().max().item()
    torch.testing.assert_close(grad, want_grad, rtol=0, atol=cases._GRAD_TOLERANCE[case.dtype] * scale + 1e-30)
