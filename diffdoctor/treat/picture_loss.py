"""The loss of decoded pictures, and its gradient at the latents that they are decoded from."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffdoctor.detector.confidence import by_frame
from diffdoctor.ops.artifact_loss import artifact_loss
from diffdoctor.treat.config import TreatConfig
from diffdoctor.treat.sampling import Sampling


class StraightThroughClamp(torch.autograd.Function):
    """Clamp to [0, 1] whose gradient passes where the value was outside.

    Without it a pixel that the decoder puts slightly above white or below black could not be treated at all.
    """

    @staticmethod
    def forward(ctx, pictures):
        return pictures.clamp(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def picture_loss(sampling: Sampling, pictures: torch.Tensor, config: TreatConfig) -> torch.Tensor:
    """The artifact loss (B,) of pictures (B, 3, H, W), or of videos (B, 3, T, H, W), not yet clamped."""
    logits = sampling.logits(StraightThroughClamp.apply(pictures.float()))
    return loss_of_logits(
        logits,
        tuple(pictures.shape[-2:]),
        threshold=config.artifact_threshold,
        method=config.artifact_method,
        reduction="sample",
    )


def loss_of_logits(logits: torch.Tensor, size: tuple[int, int], **options) -> torch.Tensor:
    """`artifact_loss` of logits (B, 1, h, w); of (B, 1, T, h, w) that of all frames' pixels together.

    Args:
        logits: of pictures or videos.
        size: (H, W) of a frame.
        **options: of `artifact_loss`.
    """
    if logits.ndim == 5:
        # frame below frame, each at its own size already: none is mixed with the next
        logits, size = resized(logits, size).flatten(2, 3), None
    return artifact_loss(logits, size=size, **options)


def resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps (B, 1, h, w) or (B, 1, T, h, w) at another size, bilinearly, frame by frame."""
    return by_frame(lambda frames: F.interpolate(frames, size, mode="bilinear"), maps)


def latents_gradient(
    sampling: Sampling,
    latents: torch.Tensor,
    config: TreatConfig,
    divisor: float,
    partners: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Gradient and value of the loss at final latents, summed over pictures and divided by `divisor`.

    The decoder's graph is gone before the denoiser's is used; with `vae_slicing` it is made picture by picture.

    Args:
        sampling: decodes and judges the pictures.
        latents: (M, C, h, w), or (M, C, t, h, w) of videos, without a graph.
        config: of the loss.
        divisor: number of pictures that the sum is divided by.
        partners: (M, C, h, w) latents whose decoded pictures' gradient is taken in place of the pictures' own.

    Returns:
        The gradient (M, C, h, w) and the loss.
    """
    family = sampling.family
    ends = latents.requires_grad_()
    loss = 0.0
    for rows in torch.arange(len(ends)).split(1 if config.vae_slicing else len(ends)):
        pictures = family.decode(ends[rows[0] : rows[-1] + 1])
        if partners is None:
            term = picture_loss(sampling, pictures, config).sum() / divisor
            term.backward()
            loss += float(term.detach())
        else:
            gradient, value = _partners_gradient(sampling, partners[rows[0] : rows[-1] + 1], config)
            pictures.backward(gradient.to(pictures.dtype) / divisor)
            loss += value / divisor
    return ends.grad, loss


def _partners_gradient(sampling: Sampling, latents: torch.Tensor, config: TreatConfig) -> tuple[torch.Tensor, float]:
    with torch.no_grad():
        pictures = sampling.family.decode(latents)
    pictures = pictures.detach().float().requires_grad_()
    value = picture_loss(sampling, pictures, config).sum()
    return torch.autograd.grad(value, pictures)[0], float(value.detach())
