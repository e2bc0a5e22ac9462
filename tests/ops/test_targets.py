"""Target, Packed: what they mean, and what they refuse."""

import pytest
import torch

import diffdoctor
from diffdoctor import Packed, Target
from support.backends import BACKENDS

SHAPE = (3, 4, 6, 6)


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(SHAPE, generator=g) for name in ("pred", "latents", "noise", "noisy")} | {
        "a": torch.rand(3, generator=g) * 0.9 + 0.05,
        "sigma": torch.rand(3, generator=g) + 0.1,
    }


def column(v):
    return v.view(-1, 1, 1, 1)


TARGETS = {
    "epsilon": lambda t: (Target.epsilon(t["noise"]), lambda x: x - t["noise"]),
    "sample": lambda t: (Target.sample(t["latents"]), lambda x: x - t["latents"]),
    "velocity": lambda t: (
        Target.velocity(t["latents"], t["noise"], t["a"]),
        lambda x: x - (column(t["a"].sqrt()) * t["noise"] - column((1 - t["a"]).sqrt()) * t["latents"]),
    ),
    "velocity one step": lambda t: (
        Target.velocity(t["latents"], t["noise"], 0.25),
        lambda x: x - (0.5 * t["noise"] - 0.75**0.5 * t["latents"]),
    ),
    "flow": lambda t: (Target.flow(t["latents"], t["noise"]), lambda x: x - (t["noise"] - t["latents"])),
    "flow reversed": lambda t: (
        Target.flow(t["latents"], t["noise"], reversed=True),
        lambda x: x - (t["latents"] - t["noise"]),
    ),
    "preconditioned": lambda t: (
        Target.preconditioned(t["latents"], t["noisy"], -t["sigma"], 1 / (t["sigma"] ** 2 + 1)),
        lambda x: column(-t["sigma"]) * x + t["noisy"] / column(t["sigma"] ** 2 + 1) - t["latents"],
    ),
    "own": lambda t: (
        Target((t["noise"], t["noisy"]), (t["a"], -2.0), pred_scale=3.0),
        lambda x: 3.0 * x - column(t["a"]) * t["noise"] + 2.0 * t["noisy"],
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TARGETS)
def test_residual(tensors, name, backend):
    target, residual = TARGETS[name](tensors)
    x, y = tensors["pred"].clone().requires_grad_(), tensors["pred"].clone().requires_grad_()
    want = (residual(x) ** 2).mean()
    got = diffdoctor.weighted_loss(y, target, backend=backend)
    torch.testing.assert_close(got, want, rtol=3e-6, atol=3e-6)
    want.backward()
    got.backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=0, atol=3e-5 * x.grad.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flow", [False, True], ids=["tensor", "flow"])
@pytest.mark.parametrize("reward", ["0", "half", "1", "map"])
def test_the_contrastive_target_has_the_gradient_of_diffusion_nft(tensors, reward, flow, backend):
    """r |v+ - v|^2 + (1 - r) |v- - v|^2 with v+- = (1 -+ beta) old +- beta model_pred (arXiv 2509.16117), per pixel."""
    beta, old = 0.7, tensors["noisy"]
    r = {"0": 0.0, "half": 0.5, "1": 1.0, "map": tensors["sigma"].clamp(max=1.0).view(-1, 1, 1, 1)}[reward]
    r = r + torch.zeros(3, 1, *SHAPE[2:])
    if reward == "map":
        r = (r * torch.linspace(0.2, 1.0, 36).view(6, 6)).clamp(0, 1)
    v = tensors["noise"] - tensors["latents"] if flow else tensors["noise"]
    x, y = tensors["pred"].clone().requires_grad_(), tensors["pred"].clone().requires_grad_()
    positive, negative = (1 - beta) * old + beta * x, (1 + beta) * old - beta * x
    (r * (positive - v) ** 2 + (1 - r) * (negative - v) ** 2).mean().backward()

    sample = Target.flow(tensors["latents"], tensors["noise"]) if flow else v
    target = Target.contrastive(sample, old, clean=1 / beta, artifact=-1 / beta)
    loss = diffdoctor.weighted_loss(y, target, confidence=1 - r, artifact_weight=1.0, backend=backend)
    (beta**2 * loss).backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=0, atol=3e-5 * x.grad.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_that_depends_on_the_map_needs_one_and_no_artifact_weight(tensors, backend):
    target = Target.contrastive(tensors["noise"], tensors["noisy"])
    with pytest.raises(ValueError, match="confidence: expected a map beside a target with artifact_coefs, got None"):
        diffdoctor.weighted_loss(tensors["pred"], target, backend=backend)
    level = torch.linspace(0, 1, 36).view(1, 6, 6)
    want = ((tensors["pred"] - tensors["noisy"] + level * (tensors["noise"] - tensors["noisy"])) ** 2).mean()
    for weight in ({}, {"artifact_weight": 1.0}):
        got = diffdoctor.weighted_loss(tensors["pred"], target, level, backend=backend, **weight)
        torch.testing.assert_close(got, want, rtol=3e-6, atol=0)
    half = diffdoctor.weighted_loss(tensors["pred"], target, torch.ones(1, 6, 6), artifact_weight=0.5, backend=backend)
    torch.testing.assert_close(half, 0.5 * ((tensors["pred"] - 2 * tensors["noisy"] + tensors["noise"]) ** 2).mean())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [torch.float16, torch.float32, torch.float64], ids=str)
def test_an_fp64_prediction_gets_a_target_in_fp64(tensors, given, backend):
    """Square roots taken in fp32 would be off by 1e-8."""
    latents, noise, pred = (tensors[name].double() for name in ("latents", "noise", "pred"))
    a = tensors["a"].to(given)
    exact = a.double()
    d = pred - (column(exact.sqrt()) * noise - column((1 - exact).sqrt()) * latents)
    x = pred.clone().requires_grad_()
    loss = diffdoctor.weighted_loss(x, Target.velocity(latents, noise, a), backend=backend)
    loss.backward()
    torch.testing.assert_close(loss.detach(), (d**2).mean(), rtol=1e-14, atol=0)
    torch.testing.assert_close(x.grad, 2 * d / d.numel(), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_in_fp32_is_sharper_than_one_built_in_bf16(backend):
    latents, noise = torch.randn(SHAPE).bfloat16(), torch.randn(SHAPE).bfloat16()
    pred = torch.randn(SHAPE)
    exact = ((pred.double() - (noise.double() - latents.double())) ** 2).mean()
    ours = diffdoctor.weighted_loss(pred, Target.flow(latents, noise), backend=backend)
    trainers = diffdoctor.weighted_loss(pred, noise - latents, backend=backend)
    assert abs(ours - exact) < 1e-6 * exact
    assert abs(trainers - exact) < 1e-3 * exact


@pytest.mark.parametrize("order", ["c ph pw", "ph pw c"])
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_packing_is_a_bijection_in_the_named_order(order, patch):
    layout = Packed(6, 12, patch, order)
    latents = torch.arange(2 * 5 * 6 * 12.0).reshape(2, 5, 6, 12)
    tokens = layout.pack(latents)
    assert tokens.shape == (2, layout.tokens, 5 * patch * patch)
    assert torch.equal(layout.unpack(tokens), latents)
    token = tokens[1, 12 // patch]  # the first token of the second row of tokens
    patch_pixels = latents[1, :, patch : 2 * patch, :patch]
    want = patch_pixels if order == "c ph pw" else patch_pixels.permute(1, 2, 0)
    assert torch.equal(token, want.reshape(-1))


def test_packing_is_diffusers_flux_order():
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    latents = torch.randn(2, 4, 6, 8)
    assert torch.equal(Packed(6, 8).pack(latents), flux.FluxPipeline._pack_latents(latents, 2, 4, 6, 8))


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "height: expected an int, got float", lambda: Packed(4.0, 4)),
        (ValueError, "width: expected a positive multiple of patch_size 2, got 5", lambda: Packed(4, 5)),
        (ValueError, "order: expected one of", lambda: Packed(4, 4, 2, "pw ph c")),
        (AttributeError, "Target: expected one of epsilon, .*got 'v_prediction', which is 'velocity' here",
         lambda: Target.v_prediction),
        (TypeError, "order: expected one of", lambda: Packed(4, 4, 2, 7)),
        (TypeError, "terms: expected tensors, got float", lambda: Target.epsilon(1.0)),
        (ValueError, "1 to 3 terms", lambda: Target((), ())),
        (ValueError, "1 to 3 terms", lambda: Target((torch.ones(1),) * 4, (1.0,) * 4)),
        (ValueError, "artifact_coefs: expected 1 factors, got 2",
         lambda: Target((torch.ones(1),), (1.0,), 1.0, (1.0, 2))),
        (TypeError, "artifact_coefs: expected a number", lambda: Target((torch.ones(1),), (1.0,), 1.0, ("1",))),
        (TypeError, "old_pred: expected a tensor", lambda: Target.contrastive(torch.ones(1), 1.0)),
        (TypeError, "target: expected a tensor or a Target", lambda: Target.contrastive(1.0, torch.ones(1))),
        (ValueError, "target: expected one or two terms",
         lambda: Target.contrastive(Target((torch.ones(1),) * 3, (1.0,) * 3), torch.ones(1))),
        (ValueError, "target: expected a target without pred_scale",
         lambda: Target.contrastive(Target((torch.ones(1),), (1.0,), 2.0), torch.ones(1))),
        (ValueError, "target: expected a target without artifact_coefs",
         lambda: Target.contrastive(Target.contrastive(torch.ones(1), torch.ones(1)), torch.ones(1))),
        (TypeError, "artifact: expected a number", lambda: Target.contrastive(torch.ones(1), torch.ones(1), 0.0, None)),
        (ValueError, "as many coefs", lambda: Target((torch.ones(1),), (1.0, 2.0))),
        (TypeError, "scale: expected a number or a tensor",
         lambda: Target.preconditioned(torch.ones(1), torch.ones(1), "1", 1)),
        (ValueError, r"alphas_cumprod: expected .* \(B,\), got shape \(2, 1\)",
         lambda: Target.velocity(torch.ones(1), torch.ones(1), torch.ones(2, 1))),
        (TypeError, "floating-point", lambda: Target.velocity(torch.ones(1), torch.ones(1), torch.ones(2).long())),
    ],
    ids=[
        "height", "width", "order", "constructor", "order kind", "term", "none", "four", "coefs", "artifact coefs",
        "artifact kind", "old", "target", "contrastive three", "contrastive scaled", "contrastive twice", "artifact",
        "scale", "alphas",
        "alphas dtype",
    ],
)  # fmt: skip
def test_bad_argument(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_packed_patch_size_zero_is_refused():
    with pytest.raises(ValueError, match="patch_size"):
        Packed(4, 4, 0)
