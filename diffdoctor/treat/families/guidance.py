"""Guidance that is counted from 0, as some pipelines have it."""

from __future__ import annotations

import torch


class GuidanceFromZero:
    """Of a `Family` whose pipeline adds the scale times the difference to the positive prediction: 0 is none."""

    def uses_negative(self, guidance_scale: float) -> bool:
        """Whether a negative prediction is needed at this guidance scale."""
        return guidance_scale > 0

    def combine(self, positive: torch.Tensor, negative: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """The guided prediction (B, C, h, w) of a positive and a negative one; differentiable."""
        return positive + guidance_scale * (positive - negative)
