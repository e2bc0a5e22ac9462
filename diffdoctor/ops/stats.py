"""What `return_stats=True` adds to a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LossStats", "PolicyStats"]


@dataclass
class LossStats:
    """Detached tensors on the loss's device; reading one on a GPU is what synchronises.

    An element is counted where its spatial weight and its weighting are not 0.

    Attributes:
        numerator: (B,), the sum of weighting * spatial weight * element loss, before any division.
        weight_sum: (B,), the sum of the spatial weight over all elements. With reduction="sum" and
            normalizer=weight_sum.sum() (over all ranks and accumulation steps) the result is one global weighted mean.
        loss_artifact: (), mean element loss weighted by the artifact level u; 0 where nothing is flagged.
        loss_clean: (), likewise weighted by 1 - u.
        artifact_share: (), mean of u over all elements: 0 says that the map did nothing.
        nonfinite: (), int64, how many counted elements have a loss that is not finite.
        map_nan: (), int64, at how many elements, counted or not, confidence or mask is NaN. It is taken as 0.
        map_outside: (), int64, likewise below 0 or above 1. It is taken as 0 or 1.
    """

    numerator: Tensor
    weight_sum: Tensor
    loss_artifact: Tensor
    loss_clean: Tensor
    artifact_share: Tensor
    nonfinite: Tensor
    map_nan: Tensor
    map_outside: Tensor

    @classmethod
    def from_sums(cls, sums: Tensor, elements: int) -> LossStats:
        """From the per-sample sums (B, 10) that every backend fills, with so many elements in the batch."""
        total = sums.sum(0)
        losses, weights = total[2:6].view(2, 2).unbind(1)
        loss_artifact, loss_clean = torch.where(weights == 0, 0.0, losses / weights).unbind()
        nonfinite, map_nan, map_outside = total[7:].to(torch.int64).unbind()
        return cls(
            numerator=sums[:, 0],
            weight_sum=sums[:, 1],
            loss_artifact=loss_artifact,
            loss_clean=loss_clean,
            artifact_share=total[6] / max(elements, 1),
            nonfinite=nonfinite,
            map_nan=map_nan,
            map_outside=map_outside,
        )


@dataclass
class PolicyStats:
    """Detached tensors () on the loss's device; reading one on a GPU is what synchronises.

    A pixel is counted where its mask and its sample's sigma are not 0. At level "sample" a pixel has the ratio of its
    sample.

    Attributes:
        ratio: mean of the counted pixels' ratios; 0 where none is counted, as those below.
        ratio_max: the largest of them.
        clipped: share of the counted pixels whose gradient the clipping takes away.
        kl: mean KL divergence from ref_pred's policy, before kl_weight; 0 without a ref_pred.
        nonfinite: int64, how many counted pixels have a loss that is not finite or an advantage that is NaN (and is
            taken as 0).
    """

    ratio: Tensor
    ratio_max: Tensor
    clipped: Tensor
    kl: Tensor
    nonfinite: Tensor

    @classmethod
    def from_sums(cls, sums: Tensor) -> PolicyStats:
        """From the per-sample sums (B, 6) that every backend fills."""
        counted, ratio, _, clipped, kl, nonfinite = sums.sum(0).unbind()
        some = counted.clamp(min=1)
        # A row of 0 in front: an empty batch has no largest.
        ratio_max = torch.cat([sums.new_zeros(1), sums[:, 2]]).amax()
        return cls(ratio / some, ratio_max, clipped / some, kl / some, nonfinite.to(torch.int64))
