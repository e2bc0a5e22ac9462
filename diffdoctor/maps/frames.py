"""Maps of videos, and the latents of causal autoencoders, whose first latent frame is the first frame alone."""

from __future__ import annotations

import torch

from diffdoctor.runs.errors import expected


def causal_frames(maps: torch.Tensor, stride: int = 4) -> torch.Tensor:
    """A video's maps with the first frame repeated, so that each latent frame gets the frames it encodes.

    The autoencoders of Wan, HunyuanVideo and CogVideoX encode T = 1 + k stride frames as 1 + k latent ones: the first
    frame, then `stride` at a time. With stride - 1 copies of the first frame before it, the maps have stride frames for
    every latent one, which is what `weighted_loss`, `modulate_gradient` and `policy_loss` average (area).

    Args:
        maps: (..., T, H, W), of any dtype.
        stride: frames in a latent frame.

    Returns:
        (..., T + stride - 1, H, W), of the same dtype; one frame as it is.

    Raises:
        TypeError: maps that are not a tensor.
        ValueError: maps without frames, another number of frames than such an autoencoder encodes, or a stride below 1.
    """
    if not isinstance(maps, torch.Tensor):
        raise TypeError(expected("maps", "a tensor", type(maps).__name__))
    if maps.ndim < 3 or not maps.shape[-3]:
        raise ValueError(expected("maps", "shape (..., T, H, W) of at least one frame", tuple(maps.shape)))
    if stride < 1:
        raise ValueError(expected("stride", "at least 1 frame", stride))
    if maps.shape[-3] == 1:
        return maps
    if (maps.shape[-3] - 1) % stride:
        raise ValueError(expected("maps", f"1 frame more than a multiple of {stride}", f"{maps.shape[-3]} frames"))
    first = maps[..., :1, :, :]
    return torch.cat([first.expand(*first.shape[:-3], stride - 1, *first.shape[-2:]), maps], -3)
