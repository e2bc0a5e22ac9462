"""Element losses of the residual d = prediction - target; c is the Huber threshold, broadcast against d."""

import math

import torch
from torch import Tensor


def l2(d: Tensor, c: Tensor) -> Tensor:
    return d * d


def l1(d: Tensor, c: Tensor) -> Tensor:
    return d.abs()


def huber(d: Tensor, c: Tensor) -> Tensor:
    a = d.abs()
    return torch.where(a <= c, 0.5 * d * d, c * (a - 0.5 * c))


def smooth_l1(d: Tensor, c: Tensor) -> Tensor:
    a = d.abs()
    inner = a < c
    return torch.where(inner, 0.5 * d * d / torch.where(c == 0, 1.0, c), a - 0.5 * c)


def pseudo_huber(d: Tensor, c: Tensor) -> Tensor:
    """sqrt(d^2 + c^2) - c without its cancellation: the naive form is 0.0 in fp32 at d = 1e-4, c = 1."""
    safe = torch.where(c == 0, 1.0, c)
    return torch.where(c == 0, d.abs(), d * d / ((d * d + safe * safe).sqrt() + safe))


def log_cosh(d: Tensor, c: Tensor) -> Tensor:
    """log(cosh(d)), exact near 0, where |d| + log1p(exp(-2 |d|)) - ln 2 loses all digits."""
    a = d.abs()
    near = a < 1
    small = torch.where(near, d, 0.0)
    large = torch.where(near, 1.0, a)
    return torch.where(
        near,
        torch.log1p(2 * torch.sinh(small / 2) ** 2),
        large + torch.log1p(torch.exp(-2 * large)) - math.log(2),
    )


ELEMENT_LOSSES = {
    "l2": l2,
    "l1": l1,
    "huber": huber,
    "smooth_l1": smooth_l1,
    "pseudo_huber": pseudo_huber,
    "log_cosh": log_cosh,
}


def element_loss(loss_type, d: Tensor, c: Tensor) -> Tensor:
    """The loss named by `loss_type`, or the mixture {name: strength}."""
    mixture = {loss_type: 1.0} if isinstance(loss_type, str) else loss_type
    losses = [strength * ELEMENT_LOSSES[name](d, c) for name, strength in mixture.items() if strength != 0]
    # Connected to the graph also where all strengths are 0.
    return sum(losses) if losses else d * 0
