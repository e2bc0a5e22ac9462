"""What the trainers' formulas share: their registry, a batch, and the comparison of a formula with a call of ours."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

B, C, H, W = 4, 3, 8, 6


def alphas_cumprod():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def make_batch(device):
    """A batch that is the same on every device."""
    g = torch.Generator("cpu").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, device="cpu")

    def uniform(*shape):
        return torch.rand(shape, generator=g, device="cpu")

    acp, timesteps = alphas_cumprod().cpu(), torch.tensor([3, 250, 600, 980], device="cpu")
    mask = uniform(B, 1, 8 * H, 8 * W)
    mask[:, :, : 2 * H] = 0
    batch = {name: normal(B, C, H, W) for name in ("pred", "target", "latents", "noise", "noisy", "prior")}
    batch |= {
        "mask": mask,
        "latent_mask": uniform(B, 1, H, W),
        "weights": uniform(B) + 0.25,
        "sigmas": uniform(B) * 0.9 + 0.05,
        "timesteps": timesteps,
        "acp": acp,
        "a": acp[timesteps],
        "snr": acp[timesteps] / (1 - acp[timesteps]),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class Formula:
    """One trainer's loss with one choice of its options.

    Attributes:
        id: The function's name and its options.
        compare: Called with a batch, a backend's name and `options`; fails where the call of ours is not the formula.
        options: Further arguments of `compare`.
    """

    id: str
    compare: Callable
    options: dict

    def run(self, backend, device="cpu"):
        """Compare value and gradient of the formula with ours by `backend` (None: the usual choice), on `device`."""
        torch.manual_seed(0)
        with torch.device(device):
            self.compare(make_batch(device), backend, **self.options)


class Formulas(list):
    """The formulas of one module."""

    def add(self, **axes):
        """Register the decorated function once for every combination of `axes`: values, or a dict of id to value."""
        axes = {name: axis if isinstance(axis, dict) else {str(x): x for x in axis} for name, axis in axes.items()}

        def register(function):
            for ids in itertools.product(*axes.values()):
                options = {name: axes[name][key] for name, key in zip(axes, ids, strict=True)}
                self.append(Formula("-".join([function.__name__, *ids]), function, options))
            return function

        return register


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
