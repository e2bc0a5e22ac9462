"""Pictures of whole numbers as networks take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def to_images(pictures: torch.Tensor | np.ndarray | Sequence[np.ndarray], device=None) -> torch.Tensor:
    """Pictures in uint8 as float32 in [0, 1], channels first.

    Args:
        pictures: a tensor (B, 3, H, W) uint8; or an array (B, H, W, 3) uint8, or (H, W, 3) uint8 arrays of one size.
        device: where to; None: where they are.

    Returns:
        (B, 3, H, W) float32.
    """
    if not isinstance(pictures, torch.Tensor):
        pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    if pictures.dtype != torch.uint8:
        raise TypeError(f"pictures: expected uint8, got {pictures.dtype}")
    # Moved as bytes: a quarter of what floats would be.
    return pictures.to(device, non_blocking=True).float() / 255.0
