"""The detector's training losses on soft masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def detector_loss(
    logits: torch.Tensor, mask: torch.Tensor, *, mse: float = 1.0, bce: float = 0.0, dice: float = 0.0
) -> torch.Tensor:
    """A weighted sum of per-picture losses between the confidence and the soft mask, averaged over the batch.

    Args:
        logits: (B, 1, h, w); resized bilinearly to the mask's size.
        mask: (B, 1, H, W) in [0, 1]; a pixel below 0 is not decided, and has weight 0.
        mse: weight of the mean squared difference of confidence and mask (the paper's loss).
        bce: weight of the binary cross entropy, soft masks as targets.
        dice: weight of 1 - (2 sum cm + 1) / (sum c^2 + sum m^2 + 1), the squared form (arXiv 1606.04797), whose
            minimum is at c = m for soft masks too.

    Returns:
        A scalar, fp32 (fp64 for fp64).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    mask = mask.to(logits.dtype)
    if logits.shape[2:] != mask.shape[2:]:
        logits = F.interpolate(logits, size=mask.shape[2:], mode="bilinear", align_corners=False)
    undecided = ~(mask >= 0)
    # Selected, not multiplied, and equal to the bit where all is decided.
    logits, mask = logits.masked_fill(undecided, -40.0), mask.masked_fill(undecided, 0.0)
    confidence = logits.sigmoid()
    loss = logits.new_zeros(logits.shape[0])
    if mse:
        loss = loss + mse * (confidence - mask).square().flatten(1).mean(dim=1)
    if bce:
        loss = loss + bce * F.binary_cross_entropy_with_logits(logits, mask, reduction="none").flatten(1).mean(dim=1)
    if dice:
        overlap = (confidence * mask).flatten(1).sum(dim=1)
        sizes = (confidence.square() + mask.square()).flatten(1).sum(dim=1)
        loss = loss + dice * (1 - (2 * overlap + 1) / (sizes + 1))
    return loss.mean()
