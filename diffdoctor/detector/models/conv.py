"""A small convolutional detector: another architecture for the judge, and a light one for small pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from diffdoctor.detector.models.base import Detector
from diffdoctor.detector.models.preprocess import PreprocessConfig


class _Block(nn.Module):
    """Two 3x3 convolutions with GroupNorm and SiLU, beside a 1x1 shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.first_norm = nn.GroupNorm(8, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.second_norm = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.first_norm(self.first(x)))
        return F.silu(self.second_norm(self.second(h)) + self.shortcut(x))


class ConvDetector(Detector):
    """A U-Net (arXiv 1505.04597) of residual blocks with GroupNorm; logits come at the network's size / `patch`.

    Args:
        channels: widths of the levels, each half as fine as the one before; multiples of 8.
        patch: side in pixels of the squares that the first level takes together; 2 costs a quarter of 1.
        preprocess: a `PreprocessConfig`; or give its fields by name. By default pictures are taken at their own size,
            rounded to what the levels need.
    """

    kind = "conv"

    def __init__(
        self,
        channels: tuple[int, ...] = (32, 64, 96),
        patch: int = 1,
        *,
        preprocess: PreprocessConfig | None = None,
        **fields,
    ):
        if preprocess is not None and fields:
            raise TypeError("preprocess: expected either a PreprocessConfig or its fields by name, got both")
        channels = tuple(channels)
        if not channels or any(c < 8 or c % 8 for c in channels):
            raise ValueError(f"channels: expected positive multiples of 8, got {channels}")
        if not isinstance(patch, int) or isinstance(patch, bool) or patch < 1:
            raise ValueError(f"patch: expected an int >= 1 pixels, got {patch!r}")
        multiple = patch * 2 ** (len(channels) - 1)
        super().__init__(preprocess or PreprocessConfig(**{"min_side": 16, "multiple": multiple, **fields}))
        if self.preprocess_config.multiple % multiple:
            raise ValueError(f"multiple: expected a multiple of {multiple}, got {self.preprocess_config.multiple}")
        self.channels, self.patch = channels, patch
        self.down = nn.ModuleList(_Block(i, o) for i, o in zip((3 * patch**2, *channels[:-1]), channels, strict=True))
        self.up = nn.ModuleList(_Block(channels[i + 1] + channels[i], channels[i]) for i in range(len(channels) - 1))
        self.head = nn.Conv2d(channels[0], 1, 1)
        self.eval()

    @classmethod
    def of_size(cls, size: str = "conv", **options) -> ConvDetector:
        """A fresh detector; there is one size, "conv". Options as for the class."""
        if size != "conv":
            raise ValueError(f"size: expected conv, got {size!r}")
        return cls(**options)

    def network(self, pixel_values: torch.Tensor) -> torch.Tensor:
        levels = []
        h = F.pixel_unshuffle(pixel_values, self.patch)
        for index, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if index else h)
            levels.append(h)
        for index in reversed(range(len(self.up))):
            h = self.up[index](torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), levels[index]], dim=1))
        return self.head(h)

    def config_dict(self) -> dict:
        return {"channels": list(self.channels), "patch": self.patch}

    @classmethod
    def from_config(cls, config: dict, preprocess: PreprocessConfig) -> ConvDetector:
        return cls(tuple(config["channels"]), config.get("patch", 1), preprocess=preprocess)
