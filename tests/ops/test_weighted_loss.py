"""weighted_loss against its definition: every case on the CPU backend, and the promises around autograd."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import diffdoctor
from diffdoctor.lowering.plan import LOSS_KINDS
from support import case_lists, cases, later_calls
from support.backends import BACKENDS, needs_cpu
from support.launch import environment

ALL = case_lists.all_cases()
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def public_call(inputs, backend, **changes):
    kwargs = {**inputs, **changes}
    return diffdoctor.weighted_loss(kwargs.pop("model_pred"), kwargs.pop("target"), backend=backend, **kwargs)


def loss_and_grad(inputs, backend):
    pred = inputs["model_pred"].detach()
    if 0 in pred.stride():
        leaf = pred.clone()
    else:
        leaf = torch.empty_strided(pred.shape, pred.stride(), dtype=pred.dtype).copy_(pred)
    leaf.requires_grad_()
    loss = public_call({**inputs, "model_pred": leaf}, backend)
    loss.backward(cases.cotangent(inputs).to(loss.dtype))
    return loss.detach(), leaf.grad


@needs_cpu
@pytest.mark.parametrize("outputs", [7, 3, 1, 2], ids=["all", "loss+grad", "loss", "grad"])
@pytest.mark.parametrize("case", ALL, ids=[case.id for case in ALL])
def test_cpu_fills_every_output_as_the_reference(case, outputs):
    from diffdoctor.backends.cpu import weighted_loss as _cpu

    inputs = cases.build(case)
    problem = cases.lower(inputs, outputs=outputs, weight_mean=_cpu.weight_mean)
    _cpu.weighted_loss(problem)
    cases.check(problem, cases.expected(inputs))


@needs_cpu
@pytest.mark.parametrize("kind", later_calls.KINDS)
def test_later_calls_equal_the_reference(kind):
    later_calls.check(kind)


@needs_cpu
@pytest.mark.parametrize("case", ALL, ids=[case.id for case in ALL])
def test_public_call_equals_the_reference(case):
    inputs = cases.build(case)
    want = cases.expected(inputs)
    loss, grad = loss_and_grad(inputs, "cpu")
    tolerance = 1e-12 if inputs["model_pred"].dtype == F64 else 3e-6
    torch.testing.assert_close(loss, want["loss"], rtol=tolerance, atol=tolerance)
    # bf16 rounds twice where g is not 1: once when the gradient is kept, once when it is scaled.
    rounding = {F32: 3e-5, BF16: 2 * 2**-8, F16: 2**-10, F64: 1e-12}[grad.dtype]
    floor = 2**-25 if grad.dtype == F16 else 0.0
    scale = want["grad"].double().abs().max().item()
    torch.testing.assert_close(grad.double(), want["grad"].double(), rtol=0, atol=rounding * scale + floor)


@needs_cpu
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_passes_the_cases(isa):
    script = (
        "from support import case_lists, cases as c\n"
        "from diffdoctor.backends.cpu import weighted_loss as _cpu\n"
        "for case in case_lists.all_cases():\n"
        "    inputs = c.build(case)\n"
        "    problem = c.lower(inputs, weight_mean=_cpu.weight_mean)\n"
        "    _cpu.weighted_loss(problem)\n"
        "    c.check(problem, c.expected(inputs))\n"
        "from diffdoctor.backends import native\n"
        "print(native.load().instruction_set())\n"
    )
    env = environment(DIFFDOCTOR_CPU_ISA=isa)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if isa == "generic":
        assert done.stdout.strip() == "generic"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=["f32", "bf16", "f16", "f64"])
def test_plain_call_is_mse_loss(backend, dtype):
    pred, target = torch.randn(2, 4, 9, 9, dtype=dtype), torch.randn(2, 4, 9, 9, dtype=dtype)
    up = (lambda x: x) if dtype == F64 else torch.Tensor.float
    want = F.mse_loss(up(pred), up(target))
    got = diffdoctor.weighted_loss(pred, target, backend=backend)
    assert got.dtype == want.dtype and got.shape == ()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_plain_reference_equals_mse_loss():
    torch.manual_seed(0)
    pred, target = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    got = diffdoctor.reference.weighted_loss(pred, target)
    torch.testing.assert_close(got, F.mse_loss(pred, target), rtol=2.5e-7, atol=0)  # the mean's order: 2 ulp


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ["l2", "huber", "pseudo_huber", "log_cosh", {"l2": 0.5, "smooth_l1": 2.0}])
def test_gradcheck(backend, loss_type):
    torch.manual_seed(0)
    pred = torch.randn(2, 3, 4, 4, dtype=F64, requires_grad=True)
    target, c, v = torch.randn(2, 3, 4, 4, dtype=F64), torch.rand(2, 9, 7, dtype=F64), torch.rand(2, dtype=F64) + 0.5

    def loss(x):
        return diffdoctor.weighted_loss(
            x, target, c, artifact_weight=2.0, weighting=v, loss_type=loss_type, huber_c=0.7, normalize="sample",
            threshold=0.3, reduction="sample", backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (pred,))


@needs_cpu
def test_same_bits_twice_and_for_any_number_of_threads():
    torch.manual_seed(0)
    pred = torch.randn(3, 5, 129, 127, requires_grad=True)
    target, c = torch.randn(3, 5, 129, 127), torch.rand(3, 64, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            pred.grad = None
            loss, stats = diffdoctor.weighted_loss(
                pred, target, c, artifact_weight=2.0, normalize="batch", return_stats=True, backend="cpu"
            )
            loss.backward()
            found.append((loss.detach(), pred.grad, stats.numerator, stats.weight_sum, stats.loss_artifact))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
def test_second_backward_over_a_retained_graph_gives_the_same_gradient(backend, dtype):
    pred = torch.randn(2, 3, 8, 8).to(dtype).requires_grad_()
    loss = diffdoctor.weighted_loss(pred, torch.randn(2, 3, 8, 8), reduction="sample", backend=backend)
    g = torch.tensor([1.0, -3.0])
    (first,) = torch.autograd.grad(loss, pred, g, retain_graph=True)
    (ones,) = torch.autograd.grad(loss, pred, torch.ones(2), retain_graph=True)
    (second,) = torch.autograd.grad(loss, pred, g, retain_graph=True)
    kept = second.clone()
    (third,) = torch.autograd.grad(loss, pred, g)
    assert torch.equal(first, kept) and torch.equal(kept, third)
    torch.testing.assert_close(ones[1] * -3.0, first[1], rtol=2**-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulating_into_grad_does_not_touch_what_is_kept(backend):
    pred = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss = diffdoctor.weighted_loss(pred, torch.zeros(2, 3, 8, 8), backend=backend)
    loss.backward(retain_graph=True)
    once = pred.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(pred.grad, 3 * once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend):
    pred = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = diffdoctor.weighted_loss(pred, torch.randn(1, 2, 4, 4), backend=backend)
    (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_functorch_is_refused(backend):
    target = torch.randn(1, 2, 4, 4)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: diffdoctor.weighted_loss(x, target, backend=backend))(torch.randn(1, 2, 4, 4))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda x: diffdoctor.weighted_loss(x, target, backend=backend))(torch.randn(3, 1, 2, 4, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_without_grad_mode(backend):
    pred = torch.randn(1, 2, 4, 4, requires_grad=True)
    with torch.no_grad():
        assert not diffdoctor.weighted_loss(pred, torch.randn(1, 2, 4, 4), backend=backend).requires_grad
    loss = diffdoctor.weighted_loss(pred.detach(), torch.randn(1, 2, 4, 4), backend=backend)
    assert not loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["mask", "weighting", "sample weighting", "clean_weight", "normalizer"])
def test_nan_under_zero_weight_does_not_leak(backend, where):
    pred = torch.randn(2, 3, 4, 4)
    pred[1] = float("nan")
    pred[1, 0] = float("inf")
    pred.requires_grad_()
    target = torch.randn(2, 3, 4, 4)
    target[1, 1] = float("nan")
    kept = torch.tensor([1.0, 0.0])
    options = {
        "mask": {"mask": kept.reshape(2, 1, 1).expand(2, 4, 4)},
        "weighting": {"weighting": kept.reshape(2, 1, 1, 1).expand(2, 3, 4, 4)},
        "sample weighting": {"weighting": kept},
        "clean_weight": {
            "confidence": kept.reshape(2, 1, 1).expand(2, 4, 4),
            "artifact_weight": 2.0,
            "clean_weight": 0.0,
        },
        "normalizer": {"normalizer": kept},
    }[where]
    for loss_type in ("l2", "huber", "log_cosh"):
        pred.grad = None
        loss, stats = diffdoctor.weighted_loss(
            pred, target, reduction="sample", loss_type=loss_type, return_stats=True, backend=backend, **options
        )
        loss.sum().backward()
        assert torch.isfinite(loss).all() and loss[1] == 0 and loss[0] > 0
        if where != "normalizer":
            assert torch.isfinite(stats.numerator).all() and stats.nonfinite == 0
        assert torch.isfinite(pred.grad[0]).all() and (pred.grad[0] != 0).any() and (pred.grad[1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_where_the_gradient_is_switched_off_stays_out_of_it(backend):
    pred = torch.randn(1, 2, 4, 4)
    pred[..., 0] = float("nan")
    pred.requires_grad_()
    c = torch.ones(1, 4, 4)
    c[..., 0] = 0
    loss = diffdoctor.weighted_loss(
        pred, torch.zeros(1, 2, 4, 4), c, artifact_weight=1.0, clean_grad=0.0, backend=backend
    )
    loss.backward()
    assert loss.isnan() and (pred.grad[..., 0] == 0).all() and (pred.grad[..., 1:] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 5, 6)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sample", "sum"])
def test_empty_gives_zero(backend, shape, reduction):
    pred = torch.randn(shape, requires_grad=True)
    loss, stats = diffdoctor.weighted_loss(
        pred, torch.randn(shape), reduction=reduction, return_stats=True, backend=backend
    )
    assert loss.shape == ((shape[0],) if reduction == "sample" else ()) and (loss == 0).all()
    loss.sum().backward()
    assert pred.grad.shape == shape
    assert stats.numerator.shape == (shape[0],) and stats.nonfinite == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["sample", "batch"])
def test_an_empty_mask_gives_zero(backend, normalize):
    pred = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = diffdoctor.weighted_loss(
        pred, torch.randn(2, 3, 4, 4), mask=torch.zeros(2, 32, 32), normalize=normalize, backend=backend
    )
    loss.backward()
    assert loss == 0 and (pred.grad == 0).all()


@needs_cpu
def test_offsets_beyond_two_to_the_31():
    # Virtual memory only: two pages of each are touched.
    far = 2**31 + 8
    pred = torch.empty(far + 8, dtype=BF16).as_strided((1, 1, 2, 8), (far, far, far, 1))
    c = torch.empty(far + 8, dtype=torch.uint8).as_strided((1, 2, 8), (far, far, 1))
    values, levels = torch.randn(1, 1, 2, 8).to(BF16), torch.randint(0, 256, (1, 2, 8), dtype=torch.uint8)
    pred.copy_(values)
    c.copy_(levels)
    target = torch.randn(1, 1, 2, 8)
    far_leaf, leaf = pred.detach().requires_grad_(), values.clone().requires_grad_()
    want = diffdoctor.weighted_loss(leaf, target, levels, artifact_weight=2.0, backend="reference")
    got = diffdoctor.weighted_loss(far_leaf, target, c, artifact_weight=2.0, backend="cpu")
    torch.testing.assert_close(got, want)
    want.backward()
    got.backward()
    torch.testing.assert_close(far_leaf.grad, leaf.grad)


def _relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_under_a_loss_scale_keeps_its_gradient(backend):
    # A normalised fp16 gradient would lose all but 14 % of itself here (facts of the design: 0.14 against 2e-4).
    torch.manual_seed(0)
    shape = (1, 16, 300, 1000)
    pred = torch.randn(shape).half().requires_grad_()
    target = torch.randn(shape)
    (diffdoctor.weighted_loss(pred, target, backend=backend) * 65536).backward()
    want = 2 * (pred.detach().double() - target.double()) * 65536 / pred.numel()
    assert _relative(pred.grad, want) < 5e-4


@needs_cpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("loss_type", LOSS_KINDS)
def test_low_precision_is_no_worse_than_twice_plain_pytorch(dtype, loss_type):
    torch.manual_seed(0)
    pred, target = torch.randn(2, 4, 32, 32).to(dtype), torch.randn(2, 4, 32, 32).to(dtype)
    c, v = torch.rand(2, 32, 32), torch.rand(2) + 0.5
    options = {"weighting": v, "loss_type": loss_type, "huber_c": 0.5, "artifact_weight": 3.0}
    exact = pred.double().requires_grad_()
    diffdoctor.reference.weighted_loss(exact, target.double(), c.double(), **options).backward()
    plain = pred.clone().requires_grad_()
    diffdoctor.reference.weighted_loss(plain, target, c, **options).backward()
    ours = pred.clone().requires_grad_()
    diffdoctor.weighted_loss(ours, target, c, backend="cpu", **options).backward()
    rounding = _relative(exact.grad.to(dtype), exact.grad)
    assert _relative(ours.grad, exact.grad) <= 2 * max(_relative(plain.grad, exact.grad), rounding)


@needs_cpu
def test_inputs_are_not_modified():
    inputs = cases.build(next(case for case in ALL if case.id == "reduce-sample-f16"))
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    loss_and_grad(inputs, "cpu")
    assert all(torch.equal(before[k], inputs[k]) for k in before)


@needs_cpu
def test_one_gradient_is_all_that_is_kept():
    # fp32 keeps the gradient; fp16 keeps the inputs, which are there anyway.
    for dtype, kept in ((F32, 1), (F16, 0)):
        pred = torch.randn(2, 4, 64, 64).to(dtype).requires_grad_()
        target, c = torch.randn(2, 4, 64, 64), torch.rand(2, 64, 64)
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, seen=seen: seen.append(x) or x, lambda x: x):
            diffdoctor.weighted_loss(pred, target, c, artifact_weight=2.0, backend="cpu")
        known = {pred.data_ptr(), target.data_ptr(), c.data_ptr()}
        new = [x for x in seen if x.numel() == pred.numel() and x.data_ptr() not in known]
        assert len(new) == kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    pred, target = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    plain = diffdoctor.weighted_loss(pred, target, loss_type="log_cosh", backend=backend)
    with torch.autocast("cpu", dtype=BF16):
        under = diffdoctor.weighted_loss(pred, target, loss_type="log_cosh", backend=backend)
    assert torch.equal(plain, under)


@needs_cpu
def test_works_under_checkpointing_and_saved_tensor_hooks():
    from torch.utils.checkpoint import checkpoint

    pred, target = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8)
    want = 2 * (pred.detach() - target) / pred.numel()
    checkpoint(lambda x: diffdoctor.weighted_loss(x, target), pred, use_reentrant=False).backward()
    torch.testing.assert_close(pred.grad, want)
    pred.grad = None
    with torch.autograd.graph.save_on_cpu():
        diffdoctor.weighted_loss(pred, target).backward()
    torch.testing.assert_close(pred.grad, want)
