"""Both GPU backends on a GPU: the shared cases, layouts, and what is at the edges.

Every test that takes `gpu_backend` or `glue` runs once on `cuda` and once on `triton`.
"""

import importlib

import pytest
import torch

import diffdoctor
from diffdoctor import available_backends
from diffdoctor.lowering.plan import WRITE_GRAD, WRITE_LOSS
from diffdoctor.ops import policy_call
from support import artifact, case_lists, cases, policy

try:
    from hypothesis import HealthCheck, given, settings

    from support import search
except ImportError:  # a GPU machine may hold torch, Triton and pytest alone
    search = None

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def solve(glue, inputs, device="cuda"):
    problem = cases.lower(inputs, weight_mean=glue.weight_mean, device=device)
    glue.weighted_loss(problem)
    return problem


def assert_same_bits(first, again):
    for output in ("loss", "grad", "sums"):
        got, want = getattr(first, output), getattr(again, output)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), f"{output} differs between two equal calls"


# ---- the shared cases


@pytest.mark.parametrize("case", case_lists.all_cases(), ids=lambda case: case.id)
def test_weighted_loss_equals_the_reference(glue, case):
    inputs = cases.build(case)
    first = solve(glue, inputs)
    cases.check(first, cases.expected(inputs))
    assert_same_bits(first, solve(glue, inputs))


@pytest.mark.parametrize("case", case_lists.tiled_cases(), ids=lambda case: case.id)
def test_many_programs_equal_the_reference(glue, case):
    inputs = cases.build(case)
    first = solve(glue, inputs)
    # In fp64: PyTorch's fp32 sum over an expanded dim is off by 1e-4 at 17,000 elements.
    cases.check(first, cases.expected(inputs, upcast=True))
    assert_same_bits(first, solve(glue, inputs))


if search is not None:

    @settings(max_examples=100, deadline=None, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
    @given(case=search.cases(max_side=40))
    def test_search(case):
        reason = available_backends()["cuda"]  # Triton would compile a kernel for most of the examples
        if reason is not None:
            pytest.skip(reason)
        inputs = cases.build(case)
        cases.check(
            solve(importlib.import_module("diffdoctor.backends.cuda.weighted_loss"), inputs), cases.expected(inputs)
        )


@pytest.mark.parametrize("place", [cases.shifted, cases.spaced], ids=["shifted", "spaced"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_dense_but_unaligned_tensors(glue, dtype, place):
    case = cases.Case("", shape=(2, 8, 8, 16), dtype=dtype, target_dtype=BF16, confidence=((2, 8, 16), F32))
    inputs = cases.build(case)
    want = cases.expected(inputs)
    there = {key: cases._move(value, "cuda") for key, value in inputs.items()}
    for key in ("model_pred", "target"):
        cases.check(solve(glue, there | {key: place(there[key], 1)}, device=None), want)
    problem = cases.lower(there, WRITE_GRAD)
    problem.grad = cases.shifted(problem.grad, 1)
    glue.weighted_loss(problem)
    cases.check(problem, want)


@pytest.mark.parametrize("case", policy.every_case(), ids=lambda case: case.id)
def test_policy_loss_equals_the_reference(gpu_backend, case):
    glue = importlib.import_module(f"diffdoctor.backends.{gpu_backend}.policy_loss")
    policy_call.plans.clear()  # a plan holds its backend's form
    inputs = policy.build(case)
    problem = policy.lower(inputs, device="cuda")
    glue.policy_loss(problem)
    policy.check(problem, policy.expected(inputs))


@pytest.mark.parametrize("case", artifact.every_case(), ids=lambda case: case.id)
def test_artifact_loss_equals_the_reference(artifact_glue, case):
    logits = artifact.build(case)
    strided = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="cuda").copy_(logits)
    problem = artifact.lower(case, strided)
    artifact_glue.artifact_loss(problem)
    g = torch.linspace(0.5, 1.5, logits.shape[0], dtype=problem.loss.dtype)
    g = g if case.reduction == "sample" else g[0]
    want_loss, want_grad = artifact.expected(case, logits, g)
    rtol = 1e-12 if case.dtype == F64 else 3e-6
    torch.testing.assert_close(problem.loss.cpu(), want_loss, rtol=rtol, atol=rtol)
    grad = torch.full(logits.shape, float("nan"), dtype=case.dtype, device="cuda")
    artifact_glue.artifact_loss_backward(problem.unit_grad, problem.factor, g.cuda(), grad)
    atol = cases.GRAD_TOLERANCE[case.dtype] * want_grad.abs().max().item() + 1e-30
    torch.testing.assert_close(grad.cpu(), want_grad, rtol=0, atol=atol)


@pytest.mark.parametrize("case", artifact.nan_cases(), ids=lambda case: case.id)
def test_a_nan_logit_gives_the_gradient_that_the_reference_gives(artifact_glue, case):
    logits = artifact.build_with_nan(case)
    problem = artifact.lower(case, logits.cuda())
    artifact_glue.artifact_loss(problem)
    grad = torch.empty_like(logits, device="cuda")
    artifact_glue.artifact_loss_backward(problem.unit_grad, problem.factor, torch.ones(2).cuda(), grad)
    artifact.check(case, problem.loss, grad, artifact.expected(case, logits, torch.ones(2)))


@pytest.mark.parametrize("confidence_grid", [(4, 5), (9, 11)], ids=["grid", "pixel"])
def test_modulate_gradient_equals_the_reference(gpu_backend, monkeypatch, confidence_grid):
    monkeypatch.setenv("DIFFDOCTOR_BACKEND", gpu_backend)
    confidence = torch.rand(2, 1, *confidence_grid, generator=torch.Generator().manual_seed(0))
    options = {"artifact_grad": 2.0, "clean_grad": 0.25, "threshold": 0.3, "gamma": 1.5}
    grads = []
    for function, device in ((diffdoctor.modulate_gradient, "cuda"), (diffdoctor.reference.modulate_gradient, "cpu")):
        x = torch.linspace(-1, 1, 2 * 3 * 4 * 5, device=device).reshape(2, 3, 4, 5).requires_grad_()
        function(x, confidence.to(device), **options).pow(3).sum().backward()
        grads.append(x.grad.cpu())
    torch.testing.assert_close(*grads, rtol=5e-6, atol=1e-7)


# ---- what is at the edges


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sample", "sum"])
def test_an_empty_tensor_gives_zero(gpu_backend, shape, reduction):
    pred = torch.empty(shape, device="cuda", requires_grad=True)
    loss = diffdoctor.weighted_loss(pred, torch.empty(shape, device="cuda"), reduction=reduction, backend=gpu_backend)
    loss.sum().backward()
    assert not loss.any()
    assert pred.grad.shape == shape


def test_nan_under_zero_weight_and_an_empty_mask(gpu_backend):
    pred = torch.randn(2, 3, 12, 16, device="cuda")
    pred[0, :, :, 3] = float("nan")
    pred.requires_grad_()
    mask = torch.ones(2, 12, 16, device="cuda")
    mask[0, :, 3] = 0
    target = torch.randn(2, 3, 12, 16, device="cuda")
    loss = diffdoctor.weighted_loss(pred, target, mask=mask, normalize="sample", backend=gpu_backend)
    (grad,) = torch.autograd.grad(loss, pred)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()
    assert not grad[0, :, :, 3].any()
    loss = diffdoctor.weighted_loss(pred, target, mask=torch.zeros_like(mask), normalize="batch", backend=gpu_backend)
    (grad,) = torch.autograd.grad(loss, pred)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("method", ["threshold", "mean", "max"])
def test_a_nan_logit_does_what_it_does_to_the_reference(artifact_glue, method):
    case = artifact.Case(method, shape=(2, 13, 12), size=(13, 12), method=method, reduction="sample")
    logits = artifact.build(case)
    logits[0, 2, 3] = float("nan")
    problem = artifact.lower(case, logits.cuda())
    artifact_glue.artifact_loss(problem)
    want, _ = artifact.expected(case, logits, torch.ones(2))
    torch.testing.assert_close(problem.loss.cpu(), want, rtol=3e-6, atol=0, equal_nan=True)


def test_ties_share_the_gradient_of_the_maximum(artifact_glue):
    case = artifact.Case("", shape=(1, 3, 4), size=(12, 16), method="max", reduction="sample")
    problem = artifact.lower(case, torch.zeros(case.shape, device="cuda"))
    artifact_glue.artifact_loss(problem)
    assert problem.loss.item() == 0.5
    torch.testing.assert_close((problem.unit_grad * problem.factor).sum().cpu(), torch.tensor(0.25))


def test_fp16_under_a_loss_scale(gpu_backend):
    pred = torch.randn(1, 16, 21, 90, 160, device="cuda").half().requires_grad_()
    target = torch.randn(1, 16, 21, 90, 160, device="cuda").half()
    (diffdoctor.weighted_loss(pred, target, backend=gpu_backend) * 65536).backward()
    exact = 65536 * 2 * (pred.detach().double() - target.double()) / pred.numel()
    assert (pred.grad.double() - exact).norm() / exact.norm() <= 5e-4


def test_more_than_two_to_the_thirty_one_elements(gpu_backend):
    count = (1 << 31) + 4096
    if torch.cuda.mem_get_info()[0] < 8 * count:
        pytest.skip("needs 17 GB of free GPU memory")
    pred = torch.zeros(1, 1, count // 4096, 4096, dtype=BF16, device="cuda")
    target = torch.zeros_like(pred)
    pred[0, 0, -1, -8:] = 1
    pred.requires_grad_()
    loss = diffdoctor.weighted_loss(pred, target, reduction="sum", backend=gpu_backend)
    loss.backward()
    assert loss == 8
    assert pred.grad[0, 0, -1].sum() == 16
    assert pred.grad.count_nonzero() == 8


@pytest.mark.parametrize("far", ["batch", "channel"])
def test_offsets_beyond_two_to_the_thirty_one(glue, far):
    """Few elements, far apart."""
    if torch.cuda.mem_get_info()[0] < 6 * (1 << 31):
        pytest.skip("needs 13 GB of free GPU memory")
    memory = torch.empty((2 << 31) + 64, dtype=BF16, device="cuda")
    shape, strides = ((3, 1), (1 << 31, 32)) if far == "batch" else ((1, 3), (0, 1 << 31))
    pred = memory.as_strided((*shape, 4, 8), (*strides, 8, 1))
    pred.copy_(torch.randn(pred.shape, device="cuda"))
    inputs = {"model_pred": pred, "target": torch.randn(pred.shape, device="cuda"),
              "confidence": torch.rand(1, 4, 8, device="cuda"), "artifact_weight": 2.0}  # fmt: skip
    problem = cases.lower(inputs, WRITE_LOSS)
    glue.weighted_loss(problem)
    want = cases.expected({
        key: value.cpu() if isinstance(value, torch.Tensor) else value
        for key, value in (inputs | {"model_pred": pred.clone()}).items()
    })  # fmt: skip
    torch.testing.assert_close(problem.loss.cpu(), want["loss"], rtol=3e-6, atol=0)
