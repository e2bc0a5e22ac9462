"""modulate_gradient and GradientModulator: identity forward, the map on the gradient backward."""

import pytest
import torch
import torch.nn.functional as F

import diffdoctor
from diffdoctor import GradientModulator, Packed, modulate_gradient
from support import cases

pytestmark = pytest.mark.usefixtures("default_backend")


def factor(c, size, mode="area", artifact_grad=1.0, clean_grad=0.2, threshold=0.0, gamma=1.0):
    up = c if tuple(c.shape[-2:]) == tuple(size) else F.interpolate(c[:, None], size=size, mode=mode)[:, 0]
    u = torch.where(up >= threshold, up**gamma, 0.0)
    return clean_grad + (artifact_grad - clean_grad) * u


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("view", ["contiguous", "transposed", "channels_last", "sliced"])
def test_gradient_is_multiplied_by_the_map(dtype, view):
    x = torch.randn(2, 3, 8, 6).to(dtype).requires_grad_()
    c = torch.rand(2, 64, 48)
    g = cases.lay_out(torch.randn(2, 3, 8, 6).to(dtype), view)
    y = modulate_gradient(x, c, artifact_grad=1.5, clean_grad=0.25, threshold=0.3, gamma=2.0)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad(y, x, g)
    want = g.double() * factor(c, (8, 6), artifact_grad=1.5, clean_grad=0.25, threshold=0.3, gamma=2.0)[:, None]
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(grad.double(), want, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("mode", ["area", "bilinear", "nearest", "nearest-exact"])
def test_interpolation(mode):
    x, c = torch.randn(1, 2, 5, 7, requires_grad=True), torch.rand(1, 9, 13)
    modulate_gradient(x, c, artifact_grad=2.0, interpolation=mode).sum().backward()
    want = factor(c, (5, 7), mode, artifact_grad=2.0, clean_grad=1.0)[:, None].expand(1, 2, 5, 7)
    torch.testing.assert_close(x.grad, want, rtol=1e-6, atol=1e-6)


def test_packed_tokens_and_video():
    c = torch.rand(2, 4, 6)
    for order in ("c ph pw", "ph pw c"):
        layout = Packed(4, 6, 2, order)
        x = torch.randn(2, 6, 12, requires_grad=True)
        modulate_gradient(x, c, artifact_grad=1.0, clean_grad=0.0, layout=layout).sum().backward()
        torch.testing.assert_close(layout.unpack(x.grad), c[:, None].expand(2, 3, 4, 6))
    x = torch.randn(2, 3, 5, 4, 6, requires_grad=True)
    modulate_gradient(x, c, artifact_grad=1.0, clean_grad=0.0).sum().backward()
    torch.testing.assert_close(x.grad, c[:, None, None].expand(2, 3, 5, 4, 6))


def test_nan_where_the_factor_is_zero_is_stopped():
    x = torch.randn(1, 1, 2, 2, requires_grad=True)
    c = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    g = torch.tensor([[[[1.0, float("nan")], [2.0, float("inf")]]]])
    modulate_gradient(x, c, artifact_grad=1.0, clean_grad=0.0).backward(g)
    assert torch.equal(x.grad, torch.tensor([[[[1.0, 0.0], [2.0, 0.0]]]]))


def test_only_the_gradient_of_x_changes_and_it_is_exact_at_one():
    x, c = torch.randn(2, 3, 4, 4, requires_grad=True), torch.rand(2, 4, 4)
    g = torch.randn(2, 3, 4, 4)
    (grad,) = torch.autograd.grad(modulate_gradient(x, c, artifact_grad=1.0, clean_grad=1.0), x, g)
    assert torch.equal(grad, g)


def test_modulator_takes_its_map_after_the_forward():
    modulator = GradientModulator(artifact_grad=1.0, clean_grad=0.1, threshold=0.5)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = modulator(modulator(x) * 2.0).sum()  # two steps, each modulated
    with pytest.raises(RuntimeError, match=r"call modulator\.set"):
        y.backward(retain_graph=True)
    c = torch.rand(2, 1, 16, 16)
    modulator.set(c)
    y.backward(retain_graph=True)
    m = factor(c[:, 0], (4, 4), artifact_grad=1.0, clean_grad=0.1, threshold=0.5)[:, None].expand_as(x)
    torch.testing.assert_close(x.grad, 2 * m**2)
    modulator.set(torch.ones(1, 4, 4))
    x.grad = None
    y.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))
    modulator.set(None)
    with pytest.raises(RuntimeError, match=r"call modulator\.set"):
        y.backward()


def test_a_map_with_a_graph_is_cut_off():
    modulator = GradientModulator(artifact_grad=1.0, clean_grad=0.0)
    x, c = torch.randn(1, 1, 2, 2, requires_grad=True), torch.rand(1, 2, 2, requires_grad=True)
    y = modulator(x)
    modulator.set(c * 1.0)
    y.sum().backward()
    assert c.grad is None
    torch.testing.assert_close(x.grad[:, 0], c.detach())


def test_second_derivative_and_functorch_are_refused():
    x, c = torch.randn(1, 1, 4, 4, requires_grad=True), torch.rand(1, 4, 4)
    (grad,) = torch.autograd.grad((modulate_gradient(x, c, artifact_grad=0.5) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda y: modulate_gradient(y, c, artifact_grad=0.5).sum())(torch.randn(1, 1, 4, 4))


def test_empty():
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    modulate_gradient(x, torch.rand(1, 4, 4), artifact_grad=0.5).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x: expected a tensor", {"x": 1.0}),
        (ValueError, "x: expected shape", {"x": torch.ones(3)}),
        (TypeError, "confidence: expected a tensor", {"confidence": 0.5}),
        (ValueError, "confidence: expected shape", {"confidence": torch.rand(3, 4, 4)}),
        (
            ValueError,
            "confidence: expected a tensor that requires no gradient",
            {"confidence": torch.rand(2, 4, 4, requires_grad=True)},
        ),
        (TypeError, "artifact_grad: expected a number", {"artifact_grad": None}),
        (ValueError, "gamma: expected a finite number > 0", {"gamma": -1.0}),
        (ValueError, "interpolation: expected one of", {"interpolation": "bicubic"}),
        (TypeError, "layout: expected None or a diffdoctor.Packed", {"layout": (4, 4)}),
    ],
    ids=["kind", "rank", "map kind", "map shape", "map grad", "number", "gamma", "interpolation", "layout"],
)
def test_bad_argument(error, message, change):
    arguments = {"x": torch.randn(2, 3, 4, 4), "confidence": torch.rand(2, 4, 4), "artifact_grad": 0.5, **change}
    with pytest.raises(error, match=message):
        modulate_gradient(arguments.pop("x"), arguments.pop("confidence"), **arguments)


def test_modulator_checks_its_map():
    modulator = GradientModulator(artifact_grad=1.0)
    with pytest.raises(TypeError, match="confidence: expected a tensor or None"):
        modulator.set([0.5])
    y = modulator(torch.randn(2, 3, 4, 4, requires_grad=True))
    modulator.set(torch.rand(3, 4, 4))
    with pytest.raises(ValueError, match="confidence: expected shape"):
        y.sum().backward()


def test_in_a_sampling_loop_it_holds_the_clean_half_still():
    # A linear "denoiser": the gradient of its input is known in closed form.
    modulator = GradientModulator(artifact_grad=1.0, clean_grad=0.0)
    start = torch.randn(1, 2, 4, 4, requires_grad=True)
    latents = start
    for _ in range(3):
        latents = modulator(latents) * 0.5
    broken = torch.zeros(1, 4, 4)
    broken[..., :2] = 1
    modulator.set(broken)
    diffdoctor.weighted_loss(latents, torch.zeros_like(latents), reduction="sum").backward()
    assert (start.grad[..., 2:] == 0).all()
    torch.testing.assert_close(start.grad[..., :2], (2 * latents * 0.125)[..., :2].detach())
