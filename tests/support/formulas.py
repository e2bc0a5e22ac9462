"""What the trainers' formulas share: a batch, and the comparison of a formula with a call of ours."""

import pytest
import torch

B, C, H, W = 4, 3, 8, 6


def alphas_cumprod():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


@pytest.fixture
def device():
    """Where the tensors of a test are; a module that runs the formulas elsewhere has a fixture of its own."""
    return "cpu"


@pytest.fixture
def batch(device):
    """A batch on the device, where lies too what a test then makes without naming one."""
    g = torch.Generator("cpu").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, device="cpu")

    def uniform(*shape):
        return torch.rand(shape, generator=g, device="cpu")

    acp, timesteps = alphas_cumprod().cpu(), torch.tensor([3, 250, 600, 980], device="cpu")
    mask = uniform(B, 1, 8 * H, 8 * W)
    mask[:, :, : 2 * H] = 0
    found = {name: normal(B, C, H, W) for name in ("pred", "target", "latents", "noise", "noisy", "prior")}
    found |= {
        "mask": mask,
        "latent_mask": uniform(B, 1, H, W),
        "weights": uniform(B) + 0.25,
        "sigmas": uniform(B) * 0.9 + 0.05,
        "timesteps": timesteps,
        "acp": acp,
        "a": acp[timesteps],
        "snr": acp[timesteps] / (1 - acp[timesteps]),
    }
    torch.manual_seed(0)
    with torch.device(device):
        yield {name: tensor.to(device) for name, tensor in found.items()}


def check(pred, formula, call):
    """Value within 3e-6, gradient within 3e-5 of its largest entry."""
    x, y = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    want, got = formula(x), call(y)
    torch.testing.assert_close(got, want, rtol=3e-6, atol=3e-6)
    g = torch.ones_like(want)
    want.backward(g)
    got.backward(g)
    torch.testing.assert_close(y.grad, x.grad, rtol=0, atol=3e-5 * x.grad.abs().max().item())


def b4(v):
    return v.view(-1, 1, 1, 1)
