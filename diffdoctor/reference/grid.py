"""The logical grid (B, C, T, H, W) that predictions, targets, maps and weightings are brought to."""

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic on a prediction of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_grid(x: Tensor, layout=None) -> Tensor:
    """A (B, C, H, W), (B, C, T, H, W) or token (B, N, D) tensor as a (B, C, T, H, W) view.

    Tokens are unpacked by `layout`; without one they are a row of N positions with D channels.
    """
    if x.ndim == 3:
        if layout is None:
            return x.transpose(1, 2)[:, :, None, None]
        x = layout.unpack(x)
    return x[:, :, None] if x.ndim == 4 else x


def map_to_grid(values: Tensor, size: tuple[int, int, int], interpolation: str, dtype: torch.dtype) -> Tensor:
    """A map as floats of `dtype`, resampled to (B or 1, 1, T, H, W); T may stay 1 where one map serves all frames.

    `values` is (B, H', W'), (B, 1, H', W') or (B, 1, T', H', W'), or (B, N) for tokens; uint8 is divided by 255.
    """
    scale = 255 if values.dtype == torch.uint8 else 1
    values = values.to(dtype) / scale
    if values.ndim == 2:
        values = values[:, None]  # one row of N positions
    if values.ndim == 3:
        values = values[:, None]
    if values.ndim == 4:
        values = values[:, :, None]
    return resample(values, size, interpolation)


def resample(values: Tensor, size: tuple[int, int, int], interpolation: str) -> Tensor:
    """What `torch.nn.functional.interpolate` gives in space, and in time where the map has frames."""
    if tuple(values.shape[2:]) == tuple(size):
        return values
    if values.shape[2] == 1 and tuple(values.shape[3:]) == tuple(size[1:]):
        return values
    if interpolation in ("nearest", "nearest-exact"):
        # Written out because interpolate's own rounding of ties differs between its 1-, 2- and 3-D forms in fp64.
        offset = 0.0 if interpolation == "nearest" else 0.5
        for dim, out in zip((2, 3, 4), size, strict=True):
            index = nearest_index(values.shape[dim], out, offset).to(values.device)
            values = values.index_select(dim, index)
        return values
    if interpolation == "bilinear":
        for dim, out in ((4, size[2]), (3, size[1])):
            values = linear(values, dim, out)
        return values if values.shape[2] == 1 else linear(values, 2, size[0], selects=True)
    if values.shape[2] == 1:
        plane = F.interpolate(values[:, :, 0], size=size[1:], mode=interpolation)
        return plane[:, :, None]
    return F.interpolate(values, size=size, mode=interpolation)


def linear(values: Tensor, dim: int, size: int, selects: bool = False) -> Tensor:
    """Linear resampling of one dim to `size` (align_corners=False).

    Written out because interpolate's positions are rounded differently by dtype and by machine, so that one that is a
    whole number may come out beside it, and a neighbour that weighs nothing gets a weight.

    Args:
        values: floating point.
        dim: of values.
        size: of that dim in the result.
        selects: where the second neighbour weighs 0, take the first as it is, whatever the second holds.
    """
    length, exact = values.shape[dim], {"dtype": values.dtype, "device": values.device}
    scale = torch.tensor(length, **exact) / torch.tensor(size, **exact)
    position = (scale * (torch.arange(size, **exact) + 0.5) - 0.5).clamp(min=0)
    first = position.long().clamp(max=length - 1)
    share = (position - first).clamp(0, 1).reshape(-1, *(1,) * (values.ndim - 1 - dim % values.ndim))
    low, high = (values.index_select(dim, index) for index in (first, (first + 1).clamp(max=length - 1)))
    mixed = (1 - share) * low + share * high
    return torch.where(share == 0, low, mixed) if selects else mixed


def nearest_index(size_in: int, size_out: int, offset: float) -> Tensor:
    """floor((i + offset) * in / out) in fp32, as ATen computes it for images."""
    fp32 = {"dtype": torch.float32, "device": "cpu"}
    scale = torch.tensor(size_in, **fp32) / torch.tensor(size_out, **fp32)
    index = torch.floor((torch.arange(size_out, **fp32) + offset) * scale)
    return index.long().clamp(max=size_in - 1)


def artifact_level(confidence: Tensor, threshold: float, gamma: float) -> Tensor:
    """u = c ** gamma where c >= threshold (rounded to fp32), else 0; c is clamped to [0, 1], a NaN counts as 0."""
    threshold = torch.tensor(threshold, dtype=torch.float32, device="cpu").item()
    above = confidence >= threshold
    level = unit_interval(confidence)
    level = level if gamma == 1.0 else level.pow(gamma)
    return torch.where(above, level, torch.zeros_like(level))


def unit_interval(values: Tensor) -> Tensor:
    """A map's values, resampled, as the formulas take them: clamped to [0, 1], a NaN as 0."""
    return torch.where(values > 0, values, torch.zeros_like(values)).clamp(max=1)
