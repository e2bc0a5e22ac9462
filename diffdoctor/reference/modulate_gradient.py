"""The definition of `diffdoctor.modulate_gradient`."""

import torch
from torch import Tensor

from diffdoctor.reference.grid import accumulation_dtype, artifact_level, map_to_grid, to_grid


class _ScaleGradient(torch.autograd.Function):
    """Identity forward; backward multiplies by m in m's type and rounds once. m = 0 is selected: no NaN passes it."""

    @staticmethod
    def forward(ctx, x, m):
        ctx.save_for_backward(m)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (m,) = ctx.saved_tensors
        product = (grad.to(m.dtype) * m).to(grad.dtype)
        return torch.where(m == 0, torch.zeros_like(grad), product), None


def scale_gradient(x: Tensor, m: Tensor) -> Tensor:
    """x with its gradient multiplied by m, which broadcasts to x."""
    return _ScaleGradient.apply(x, m)


def modulate_gradient(
    x: Tensor,
    confidence: Tensor,
    *,
    artifact_grad: float,
    clean_grad: float = 1.0,
    threshold: float = 0.0,
    gamma: float = 1.0,
    interpolation: str = "area",
    layout=None,
) -> Tensor:
    """x unchanged; its gradient is multiplied by clean_grad + (artifact_grad - clean_grad) * u on x's grid."""
    dtype = accumulation_dtype(x.dtype)
    grid = to_grid(x, layout)
    c = map_to_grid(confidence, tuple(grid.shape[2:]), interpolation, dtype)
    m = clean_grad + (artifact_grad - clean_grad) * artifact_level(c, threshold, gamma)
    m = m.expand(m.shape[0], 1, *grid.shape[2:])
    if x.ndim == 3:
        ones = m.expand(grid.shape)
        m = ones[:, :, 0, 0].transpose(1, 2) if layout is None else layout.pack(ones[:, :, 0])
    elif x.ndim == 4:
        m = m[:, :, 0]
    return scale_gradient(x, m)
