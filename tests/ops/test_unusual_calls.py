"""Tensors whose memory does not hold their values, other default devices, and every road to a second derivative."""

import collections
import contextlib

import pytest
import torch
import torch.nn.functional as F

import diffdoctor

pytestmark = pytest.mark.usefixtures("default_backend")
TARGET, MAP = torch.randn(2, 1, 6, 8), torch.rand(2, 1, 12, 16)
NEGATED = torch.randn(2, 1, 6, 8, dtype=torch.complex64).conj().imag

OPS = {
    "weighted_loss": lambda x: diffdoctor.weighted_loss(x, TARGET, MAP, artifact_weight=3.0),
    "weighted_loss-fp16": lambda x: diffdoctor.weighted_loss(x.half(), TARGET, MAP, artifact_weight=3.0),
    "weighted_loss-normalize": lambda x: diffdoctor.weighted_loss(
        x, TARGET, MAP, artifact_weight=3.0, normalize="batch"
    ),
    "policy_loss": lambda x: diffdoctor.policy_loss(x, TARGET, TARGET, None, MAP, coefs=(1.0, 0.5, 0.3)),
    "policy_loss-fp16": lambda x: diffdoctor.policy_loss(
        x.half(), TARGET, TARGET, None, MAP, coefs=(1.0, 0.5, 0.3), level="sample"
    ),
    "artifact_loss": lambda x: diffdoctor.artifact_loss(x, size=(12, 16), method="mean"),
    "modulate_gradient": lambda x: (diffdoctor.modulate_gradient(x, MAP, artifact_grad=2.0) ** 2).sum(),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def prediction():
    return torch.randn(TARGET.shape, device="cpu", requires_grad=True)


@pytest.mark.parametrize("options", [{}, {"return_stats": True}, {"interpolation": "nearest"}], ids=str)
def test_the_default_device_need_not_be_the_tensors(op, options):
    x = prediction()
    want = torch.autograd.grad(op(x), x)[0]
    with torch.device("meta"):
        got = torch.autograd.grad(op(x), x)[0]
        for _ in range(2):
            loss = diffdoctor.weighted_loss(x, TARGET, MAP, artifact_weight=3.0, **options)
            loss = loss[0] if options.get("return_stats") else loss
            assert loss.device.type == "cpu"
    assert torch.equal(got, want)


def test_a_gradient_that_is_negated_lazily_arrives_negated(op):
    x = prediction()

    def gradient(function):
        z = torch.complex(torch.zeros(()), function(x)).conj()
        return torch.autograd.grad(z.imag, x)[0]

    torch.testing.assert_close(gradient(op), -torch.autograd.grad(op(x), x)[0])


def test_a_modulated_tensor_under_a_complex_conjugate():
    x, phase = prediction(), torch.randn(TARGET.shape, dtype=torch.complex64)

    def gradient(function):
        z = torch.complex(torch.zeros_like(x), function(x, MAP, artifact_grad=2.0)).conj()
        return torch.autograd.grad((z * phase).real.sum(), x)[0]

    torch.testing.assert_close(
        gradient(diffdoctor.modulate_gradient), gradient(diffdoctor.reference.modulate_gradient), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("value", [NEGATED, TARGET.to_sparse()], ids=["negated", "sparse"])
@pytest.mark.parametrize("name", ["model_pred", "target", "confidence", "mask", "weighting", "logits"])
def test_memory_that_does_not_hold_the_values_is_refused(name, value):
    error = ValueError if value.layout == torch.strided else TypeError
    # an equal call whose plan is there already
    diffdoctor.weighted_loss(TARGET, TARGET, TARGET, mask=TARGET, weighting=TARGET, artifact_weight=2.0)
    arguments = dict.fromkeys(("model_pred", "target", "confidence", "mask", "weighting"), TARGET)
    with pytest.raises(error, match=f"^{name}: expected "):
        if name == "logits":
            diffdoctor.artifact_loss(value)
        else:
            diffdoctor.weighted_loss(**arguments | {name: value}, artifact_weight=2.0)


def test_a_term_that_is_negated_lazily_is_refused():
    with pytest.raises(ValueError, match=r"target\.resolve_neg"):
        diffdoctor.weighted_loss(TARGET, diffdoctor.Target.epsilon(NEGATED))
    same = diffdoctor.weighted_loss(TARGET, diffdoctor.Target.epsilon(NEGATED.resolve_neg()))
    torch.testing.assert_close(same, F.mse_loss(TARGET, NEGATED))


@pytest.mark.parametrize("make", [dict, collections.OrderedDict, lambda **x: collections.defaultdict(float, x)])
def test_any_dict_names_a_mixture(make):
    got = diffdoctor.weighted_loss(TARGET, MAP[..., :6, :8], loss_type=make(l2=1.0, l1=0.5))
    want = diffdoctor.reference.weighted_loss(TARGET, MAP[..., :6, :8], loss_type={"l2": 1.0, "l1": 0.5})
    torch.testing.assert_close(got, want)


def test_strengths_of_zero_give_zero_and_a_graph():
    x = prediction()
    loss, stats = diffdoctor.weighted_loss(x, TARGET, loss_type={"l2": 0.0}, return_stats=True)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    assert stats.numerator.eq(0).all()


def test_second_derivatives_are_refused_by_hessian_and_hvp(op):
    x = torch.randn(TARGET.shape)
    for ask in (
        lambda: torch.autograd.functional.hvp(op, x, torch.ones_like(x)),
        lambda: torch.autograd.functional.hessian(op, x),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            ask()


@pytest.mark.parametrize("kept", [True, False], ids=["prediction kept", "prediction gone"])
def test_a_gradient_of_parameters_alone_is_not_differentiated_in_silence(op, kept):
    layer = torch.nn.Conv2d(1, 1, 1)
    pictures = torch.randn(TARGET.shape)

    def step():
        made = layer(pictures)
        loss = op(made)
        if not kept:
            del made
        first = torch.autograd.grad(loss, layer.parameters(), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), layer.parameters())

    with pytest.raises(RuntimeError, match="no second derivative"):
        step()


def test_a_gradient_with_a_graph_that_nobody_differentiates_is_fine(op):
    x = prediction()
    (got,) = torch.autograd.grad(op(x), x, create_graph=True)
    (want,) = torch.autograd.grad(op(x), x)
    assert torch.equal(got, want)


def test_batched_gradients_are_refused(default_backend):
    x = prediction()
    loss = diffdoctor.weighted_loss(x, TARGET, reduction="sample")
    if default_backend == "reference":
        assert torch.autograd.grad(loss, x, torch.eye(2), is_grads_batched=True)[0].shape == (2, *x.shape)
    else:
        with pytest.raises(RuntimeError, match="is_grads_batched"):
            torch.autograd.grad(loss, x, torch.eye(2), is_grads_batched=True)


@pytest.mark.parametrize("name", ["artifact_weight", "clean_weight", "artifact_grad", "threshold", "gamma", "huber_c"])
def test_a_bool_is_no_number_whatever_was_called_before(name):
    for _ in range(2):
        with pytest.raises(TypeError, match=f"{name}: expected a number, got bool"):
            diffdoctor.weighted_loss(prediction(), TARGET, MAP, **{"artifact_weight": 2.0, name: True})
        diffdoctor.weighted_loss(prediction(), TARGET, MAP, **{"artifact_weight": 2.0, name: 1.0})


def test_forward_mode_is_refused(op):
    x = torch.randn(TARGET.shape)
    with torch.autograd.forward_ad.dual_level():
        assert op(x).isfinite().all()
        with pytest.raises(RuntimeError, match=r"forward-mode|forward AD|jvp"):
            op(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def test_a_tangent_of_a_target_is_refused():
    latents = torch.randn(TARGET.shape)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(latents, torch.ones_like(latents))
        for target in (dual, diffdoctor.Target.flow(dual, latents)):
            with pytest.raises(RuntimeError, match="forward-mode"):
                diffdoctor.weighted_loss(latents, target)


def interleaved(x):
    """A copy of every second element of a tensor of twice the size."""
    return torch.stack([x, x], -1)[..., 0]


LAID_OUT = {
    "contiguous": (lambda x: x, lambda x: x, lambda x: x),
    "channels_last": (lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x, lambda x: x),
    "expanded target": (lambda x: x, lambda x: x[:1].expand(x.shape), lambda x: x),
    "transposed map": (lambda x: x, lambda x: x, lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)),
}


@pytest.mark.parametrize("unpack", [torch.Tensor.contiguous, interleaved], ids=["contiguous", "interleaved"])
@pytest.mark.parametrize("layout", LAID_OUT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_saved_tensors_may_come_back_in_other_strides(dtype, layout, unpack):
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 2, 4, 6, 6, generator=generator)
    lay_pred, lay_target, lay_map = LAID_OUT[layout]
    pred, target = lay_pred(pred.to(dtype)), lay_target(target.to(dtype))
    confidence = lay_map(torch.rand(2, 6, 6, generator=generator))
    weighting, scale = torch.rand(2, generator=generator), torch.tensor([3.0, 5.0])

    def gradient(loss_function, hooks):
        x = pred.clone(memory_format=torch.preserve_format).requires_grad_()
        with hooks:
            loss = loss_function(x, target, confidence, artifact_weight=3.0, weighting=weighting, reduction="sample")
        return torch.autograd.grad((loss * scale).sum(), x)[0].double()

    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack)
    got = gradient(diffdoctor.weighted_loss, hooks)
    want = gradient(diffdoctor.reference.weighted_loss, contextlib.nullcontext())
    torch.testing.assert_close(got, want, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)


def test_artifact_loss_takes_saved_tensors_in_other_strides():
    logits = torch.randn(2, 1, 4, 6)

    def gradient(loss_function, hooks):
        x = logits.clone().requires_grad_()
        with hooks:
            loss = loss_function(x, size=(8, 12), method="mean", reduction="sample")
        return torch.autograd.grad((loss * torch.tensor([2.0, 3.0])).sum(), x)[0]

    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, interleaved)
    got = gradient(diffdoctor.artifact_loss, hooks)
    torch.testing.assert_close(got, gradient(diffdoctor.reference.artifact_loss, contextlib.nullcontext()))
