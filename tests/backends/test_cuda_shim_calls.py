"""The public functions, served by the CUDA kernels on the CPU (tests/cuda_shim): autograd, later calls, formulas."""

import pytest
import torch

import diffdoctor
from diffdoctor import Target
from diffdoctor.backends.cuda import device as cuda_device
from diffdoctor.ops import policy_call
from diffdoctor.ops.call import plans
from support import later_calls
from support.all_formulas import FORMULAS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.id)
def test_one_call_equals_the_trainers_formula(public, formula):
    formula.run(backend=None)


def test_autograd_keeps_one_gradient_and_launches_twice(public, shim):
    pred = torch.randn(2, 4, 16, 16, requires_grad=True)
    target, confidence = torch.randn(2, 4, 16, 16), torch.rand(2, 1, 64, 64)
    before = shim.launches()
    loss = public.weighted_loss(pred, target, confidence, artifact_weight=2.0)
    assert shim.launches() == before + 1
    loss.backward()
    assert shim.launches() == before + 2
    want = pred.detach().clone().requires_grad_()
    diffdoctor.reference.weighted_loss(want, target, confidence, artifact_weight=2.0).backward()
    torch.testing.assert_close(pred.grad, want.grad, rtol=3e-5, atol=1e-9)


@pytest.mark.parametrize("kind", later_calls.KINDS)
def test_later_calls_equal_the_reference(public, shim, kind):
    before = shim.launches()
    later_calls.check(kind)
    assert all((known.bound is None) == (kind == "half normalized") for known in plans.values())
    assert shim.launches() == before + 3 * (3 if kind in ("everything", "contrastive", "half normalized") else 2)


@pytest.mark.parametrize("kind", later_calls.POLICY_KINDS)
def test_later_policy_calls_equal_the_reference(public, shim, kind):
    before = shim.launches()
    later_calls.check_policy(kind)
    assert len(policy_call.bound_calls) == (0 if kind == "policy" else 1)  # its clip_range is a list
    assert shim.launches() == before + 3 * (3 if kind == "policy sample" else 2)


def test_a_compiled_graph_leaves_no_workspace_behind(public, cuda):
    target, confidence, logits = torch.randn(2, 4, 8, 8), torch.rand(2, 1, 16, 16), torch.randn(2, 1, 4, 4)

    def loss(x):
        one = public.weighted_loss(x, target, confidence, artifact_weight=2.0, normalize="sample")
        return one + public.artifact_loss(logits, size=(16, 16))

    pred = torch.randn(2, 4, 8, 8, requires_grad=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(pred)
    compiled.backward()
    assert not cuda_device._workspaces
    torch.testing.assert_close(compiled, loss(pred))
    assert len(cuda_device._workspaces) == 1


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
def test_a_retained_graph_gives_the_same_gradient(public, dtype):
    pred = torch.randn(3, 2, 9, 9).to(dtype).requires_grad_()
    loss = public.weighted_loss(pred, torch.randn(3, 2, 9, 9), reduction="sample", weighting=torch.rand(3))
    g = torch.tensor([2.0, -1.0, 0.5])
    (first,) = torch.autograd.grad(loss, pred, g, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss, pred, g)
    assert torch.equal(first, second)


def test_fp16_under_a_loss_scale(public):
    pred = torch.randn(2, 3, 200, 200).half().requires_grad_()
    target = torch.randn(2, 3, 200, 200).half()
    (public.weighted_loss(pred, target) * 65536).backward()
    exact = 65536 * 2 * (pred.detach().double() - target.double()) / pred.numel()
    assert (pred.grad.double() - exact).norm() / exact.norm() <= 5e-4


def test_nan_under_zero_weight_does_not_leak(public):
    pred = torch.randn(2, 3, 12, 16)
    pred[0, :, :, 3] = float("nan")
    pred.requires_grad_()
    mask = torch.ones(2, 12, 16)
    mask[0, :, 3] = 0
    loss = public.weighted_loss(pred, torch.randn(2, 3, 12, 16), mask=mask, normalize="sample")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(pred.grad).all()
    assert not pred.grad[0, :, :, 3].any()


def test_an_empty_mask_gives_zero(public):
    pred = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss = public.weighted_loss(pred, torch.randn(2, 3, 8, 8), mask=torch.zeros(2, 8, 8), normalize="batch")
    loss.backward()
    assert loss == 0
    assert not pred.grad.any()


def test_modulate_gradient(public):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    confidence = torch.rand(2, 1, 32, 32)
    options = {"artifact_grad": 2.0, "clean_grad": 0.1, "threshold": 0.4}
    (got,) = torch.autograd.grad((public.modulate_gradient(x, confidence, **options) ** 3).sum(), x)
    (want,) = torch.autograd.grad((diffdoctor.reference.modulate_gradient(x, confidence, **options) ** 3).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_artifact_loss_through_autograd(public):
    logits = torch.randn(2, 1, 8, 8, requires_grad=True)
    public.artifact_loss(logits, size=(32, 32)).backward()
    want = logits.detach().clone().requires_grad_()
    diffdoctor.reference.artifact_loss(want, size=(32, 32)).backward()
    torch.testing.assert_close(logits.grad, want.grad, rtol=3e-5, atol=1e-9)


@pytest.fixture
def called_before():
    """A prediction and a target of which another backend has a plan, before and after the test."""
    pred, target = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    diffdoctor.weighted_loss(pred, target)
    yield pred, target
    torch.testing.assert_close(diffdoctor.weighted_loss(pred, target), torch.nn.functional.mse_loss(pred, target))


def test_a_failed_launch_is_raised_and_forgotten(called_before, public, shim):
    pred, target = called_before
    shim.fail_next(9)
    with pytest.raises(RuntimeError, match="CUDA could not launch weighted_loss: invalid configuration argument"):
        public.weighted_loss(pred, target)
    torch.testing.assert_close(public.weighted_loss(pred, target), torch.nn.functional.mse_loss(pred, target))


def test_targets_built_in_the_kernel(public):
    latents, noise, levels = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.rand(2)
    pred = torch.randn(2, 4, 8, 8)
    velocity = levels.sqrt()[:, None, None, None] * noise - (1 - levels).sqrt()[:, None, None, None] * latents
    torch.testing.assert_close(
        public.weighted_loss(pred, Target.velocity(latents, noise, levels)),
        torch.nn.functional.mse_loss(pred, velocity),
    )
