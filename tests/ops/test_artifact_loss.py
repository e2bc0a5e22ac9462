"""artifact_loss against the same steps in PyTorch, on every backend that is there."""

import pytest
import torch
import torch.nn.functional as F

import diffdoctor
from support import artifact
from support.backends import BACKENDS

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
ALL = artifact.every_case()
F64 = torch.float64


def plain(logits, size, threshold, method):
    """The steps as DiffDoctor's paper and code describe them, up to the reduction over pictures."""
    up = F.interpolate(logits.to(F64)[:, None], size=size, mode="bilinear", align_corners=False)
    c = torch.sigmoid(up).flatten(1)
    if method == "threshold":
        gate = (c > torch.tensor(threshold, dtype=torch.float32)).double()
        return (c * gate).sum(1) / (gate.sum(1) + 1e-5)
    return {"mean": c.mean(1), "sum": c.sum(1), "max": c.amax(1)}[method]


@pytest.mark.parametrize("case", ALL, ids=[case.id for case in ALL])
def test_equals_the_steps_in_pytorch(backend, case):
    logits = artifact.build(case)
    leaf = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype).copy_(logits).requires_grad_()
    loss = diffdoctor.artifact_loss(
        leaf, size=case.size, threshold=case.threshold, method=case.method, reduction=case.reduction, backend=backend
    )
    exact = logits.detach().to(F64).requires_grad_()
    per_picture = plain(exact, case.size, case.threshold, case.method)
    want = {"mean": per_picture.mean, "sum": per_picture.sum, "sample": lambda: per_picture}[case.reduction]()
    g = (
        torch.linspace(0.5, -1.5, logits.shape[0], dtype=F64)
        if case.reduction == "sample"
        else torch.tensor(1.25, dtype=F64)
    )
    assert loss.dtype == (F64 if case.dtype == F64 else torch.float32)
    rtol = 1e-12 if case.dtype == F64 else 3e-6
    torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=rtol)
    loss.backward(g.to(loss.dtype))
    want.backward(g)
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10, F64: 1e-11}.get(case.dtype, 1e-5)
    torch.testing.assert_close(
        leaf.grad.double(), exact.grad, rtol=0, atol=rounding * max(exact.grad.abs().max().item(), 1e-12)
    )


@pytest.mark.parametrize("method", ["threshold", "mean", "sum", "max"])
def test_gradcheck(backend, method):
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 3, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: diffdoctor.artifact_loss(x, size=(9, 8), method=method, reduction="sample", backend=backend),
        (logits,),
    )


def test_ties_of_the_maximum_share_the_gradient(backend):
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    diffdoctor.artifact_loss(logits, method="max", backend=backend).backward()
    torch.testing.assert_close(logits.grad, torch.full((1, 2, 2), 0.25 / 4))


def test_forms_of_the_logits_and_sizes(backend):
    logits = torch.randn(2, 1, 5, 6)
    assert torch.equal(
        diffdoctor.artifact_loss(logits, backend=backend), diffdoctor.artifact_loss(logits[:, 0], backend=backend)
    )
    assert diffdoctor.artifact_loss(logits, size=[10, 12], reduction="sample", backend=backend).shape == (2,)
    assert diffdoctor.artifact_loss(logits[:0], backend=backend) == 0
    assert diffdoctor.artifact_loss(logits[:0], reduction="sample", backend=backend).shape == (0,)


def test_same_bits_twice_and_retained_graph(backend):
    logits = torch.randn(3, 1, 17, 13, requires_grad=True)
    loss = diffdoctor.artifact_loss(logits, size=(70, 50), backend=backend)
    (first,) = torch.autograd.grad(loss * 3, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 3, logits)
    again = diffdoctor.artifact_loss(logits, size=(70, 50), backend=backend)
    assert torch.equal(first, second)
    assert torch.equal(loss, again)


def test_any_number_of_threads(backend):
    logits, before, found = torch.randn(2, 1, 64, 64, requires_grad=True), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss = diffdoctor.artifact_loss(logits, size=(256, 256), backend=backend)
            found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    finally:
        torch.set_num_threads(before)
    same = torch.equal if backend == "cpu" else torch.allclose
    assert all(same(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_extreme_logits(backend):
    logits = torch.tensor([[[-200.0, -90.0], [90.0, 200.0]]], requires_grad=True)
    loss = diffdoctor.artifact_loss(logits, method="mean", backend=backend)
    torch.testing.assert_close(loss, torch.tensor(0.5))
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_second_derivative_and_functorch_are_refused(backend):
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(diffdoctor.artifact_loss(logits, backend=backend), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: diffdoctor.artifact_loss(x, backend=backend))(torch.randn(1, 1, 4, 4))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "logits: expected a tensor, got list", {"logits": [1.0]}),
        (TypeError, "logits: expected a tensor of dtype", {"logits": torch.ones(1, 1, 4, 4, dtype=torch.int32)}),
        (ValueError, r"logits: expected shape \(B, 1, h, w\) or \(B, h, w\), got", {"logits": torch.ones(1, 2, 4, 4)}),
        (ValueError, "at least one pixel", {"logits": torch.ones(1, 1, 0, 4)}),
        (TypeError, "size: expected a pair of ints", {"size": 32}),
        (ValueError, "size: expected a pair of positive ints", {"size": (0, 4)}),
        (ValueError, r"threshold: expected a number in \[0, 1\]", {"threshold": -0.1}),
        (ValueError, "method: expected one of .* got 'median'", {"method": "median"}),
        (ValueError, "reduction: expected one of", {"reduction": "none"}),
    ],
    ids=["kind", "dtype", "channels", "empty", "size kind", "size", "threshold", "method", "reduction"],
)
def test_bad_argument(backend, error, message, change):
    arguments = {"logits": torch.randn(1, 1, 4, 4), **change}
    with pytest.raises(error, match=message):
        diffdoctor.artifact_loss(arguments.pop("logits"), backend=backend, **arguments)


@pytest.mark.parametrize("method", ["threshold", "mean", "max"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_logit_that_is_not_finite_reaches_no_neighbour_of_the_same_size(backend, method, value):
    logits = torch.randn(2, 1, 13, 12, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 2, 3] = value
    options = {"size": (13, 12), "method": method, "reduction": "sample"}
    leaf, same = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = diffdoctor.artifact_loss(leaf, backend=backend, **options)
    expected = diffdoctor.artifact_loss(same, backend="reference", **options)
    torch.testing.assert_close(loss, expected, rtol=3e-6, atol=0, equal_nan=True)
    if method != "max" or value == float("inf"):
        loss.sum().backward()
        expected.sum().backward()
        elsewhere = torch.ones_like(logits, dtype=torch.bool)
        elsewhere[0, 0, 2, 3] = False
        torch.testing.assert_close(leaf.grad[elsewhere], same.grad[elsewhere], rtol=3e-5, atol=1e-9)


@pytest.mark.parametrize("case", artifact.nan_cases(), ids=lambda case: case.id)
def test_a_nan_logit_gives_the_gradient_that_the_reference_gives(backend, case):
    logits = artifact.build_with_nan(case)
    leaf = logits.clone().requires_grad_()
    options = {"size": case.size, "threshold": case.threshold, "method": case.method, "reduction": "sample"}
    loss = diffdoctor.artifact_loss(leaf, backend=backend, **options)
    loss.backward(torch.ones(2))
    assert leaf.grad[0, 4, 5].isnan()
    artifact.check(case, loss.detach(), leaf.grad, artifact.expected(case, logits, torch.ones(2)))
