"""Learning from pairs of which one picture is better: what stands behind the losses of both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdoctor.ops.checks import check_choice, check_number, kind_error, value_error

__all__ = ["dpo_loss"]


def dpo_loss(
    preferred: Tensor,
    rejected: Tensor,
    preferred_ref: Tensor,
    rejected_ref: Tensor,
    beta: float = 2500.0,
    reduction: str = "mean",
) -> Tensor:
    """Diffusion-DPO (arXiv 2311.12908, equation 14) of per-sample denoising losses.

    -log sigmoid(-beta / 2 * ((preferred - preferred_ref) - (rejected - rejected_ref))): the model is to denoise the
    preferred picture better than a frozen reference does, and the rejected one not. With losses of the damaged region
    alone (`weighted_loss(..., mask=region, normalize="sample", reduction="sample")`) nothing else is learnt.

    Args:
        preferred: (B,) losses of the model on the preferred pictures, with a graph.
        rejected: (B,) on the rejected ones, with the same noise and timesteps.
        preferred_ref: (B,) of the reference on the preferred pictures; no gradient passes through it.
        rejected_ref: (B,) of the reference on the rejected pictures, likewise.
        beta: how strongly the model is held to the reference; positive. Diffusion-DPO takes 2000 to 5000.
        reduction: "mean" -> (), "sample" -> (B,), "sum" -> ().

    Returns:
        The loss, fp32 (fp64 for fp64).

    Raises:
        TypeError: losses that are no floating-point tensors, a beta that is no number.
        ValueError: losses of several shapes or not of shape (B,), a beta that is not positive, another reduction.
    """
    losses = {
        "preferred": preferred, "rejected": rejected, "preferred_ref": preferred_ref, "rejected_ref": rejected_ref,
    }  # fmt: skip
    for name, value in losses.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise kind_error(name, "a floating-point tensor", value)
        if value.ndim != 1 or value.shape != preferred.shape:
            shape = "(B,)" if name == "preferred" else f"preferred's shape {tuple(preferred.shape)}"
            raise value_error(name, shape, tuple(value.shape))
    check_number("beta", beta, 0.0, float("inf"), True)
    check_choice("reduction", reduction, ("mean", "sample", "sum"))
    dtype = torch.float64 if preferred.dtype == torch.float64 else torch.float32
    ours, theirs = preferred.to(dtype) - rejected.to(dtype), preferred_ref.to(dtype) - rejected_ref.to(dtype)
    loss = -F.logsigmoid(-beta / 2 * (ours - theirs.detach()))
    return {"mean": loss.mean, "sum": loss.sum, "sample": lambda: loss}[reduction]()
