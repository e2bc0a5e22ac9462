"""What a compiled backend receives of a call of artifact_loss: `ArtifactProblem`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdoctor.lowering.numbers import round_to_fp32
from diffdoctor.reference.grid import accumulation_dtype

# Values shared with csrc and kernels/artifact_loss.py.
ARTIFACT_METHODS = {"threshold": 0, "mean": 1, "sum": 2, "max": 3}


@dataclass(slots=True)
class ArtifactProblem:
    """One call of artifact_loss. Outputs are allocated and uninitialised; no size is zero.

    Attributes:
        logits: (B, h, w), any strides.
        size: (H, W) of the up-sampled map.
        threshold: rounded to fp32.
        method: a key of ARTIFACT_METHODS.
        reduction: a key of plan.REDUCTIONS.
        loss: () for mean and sum, (B,) for sample; of the accumulation dtype, as the outputs below.
        unit_grad: (B, h, w) contiguous, the gradient of the picture's un-normalised sum; None: not wanted.
        factor: (B,); the gradient of logits is g_b * factor[b] * unit_grad[b].
        keeps_workspace: as Problem's.
    """

    logits: Tensor
    size: tuple[int, int]
    threshold: float
    method: str
    reduction: str
    loss: Tensor
    unit_grad: Tensor | None = None
    factor: Tensor | None = None
    keeps_workspace: bool = True


def lower(
    logits: Tensor, size: tuple[int, int], threshold: float, method: str, reduction: str, want_grad: bool
) -> ArtifactProblem:
    """The problem of checked arguments, its outputs allocated.

    Args:
        logits: (B, 1, h, w) or (B, h, w).
        size: (H, W) of the up-sampled map.
        threshold: confidence up to it does not count.
        method: a key of ARTIFACT_METHODS.
        reduction: "mean", "sample" or "sum".
        want_grad: whether a gradient is wanted.
    """
    x = logits.detach()
    x = x[:, 0] if x.ndim == 4 else x
    new = {"dtype": accumulation_dtype(x.dtype), "device": x.device}
    batch = x.shape[0]
    return ArtifactProblem(
        logits=x,
        size=tuple(size),
        threshold=round_to_fp32(threshold),
        method=method,
        reduction=reduction,
        loss=torch.empty((batch,) if reduction == "sample" else (), **new),
        unit_grad=torch.empty(x.shape, **new) if want_grad else None,
        factor=torch.empty(batch, **new) if want_grad else None,
    )
