"""A small convolutional detector: another architecture for the judge, and a fast one for small pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from diffdoctor.detector.models.base import Detector
from diffdoctor.detector.models.limits import check_conv
from diffdoctor.detector.models.preprocess import PreprocessConfig
from diffdoctor.runs.errors import expected


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
        channels: widths of the scales, each at half the resolution of the one before; multiples of 8.
        patch: side in pixels of the squares that are one position of the first scale; 2 costs a quarter of 1.
        preprocess: how pictures are resized for the network. By default they keep their size, rounded to what the
            scales need.
        **fields: of a `PreprocessConfig`, instead of `preprocess`.

    Raises:
        TypeError: both `preprocess` and its fields.
        ValueError: an option is out of range.
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
            raise TypeError(expected("preprocess", "either a PreprocessConfig or its fields by name", "both"))
        channels = tuple(channels)
        if not channels or any(c < 8 or c % 8 for c in channels):
            raise ValueError(expected("channels", "positive multiples of 8", channels))
        if not isinstance(patch, int) or isinstance(patch, bool) or patch < 1:
            raise ValueError(expected("patch", "an int >= 1 pixels", repr(patch)))
        multiple = patch * 2 ** (len(channels) - 1)
        super().__init__(preprocess or PreprocessConfig(**{"min_side": 16, "multiple": multiple, **fields}))
        if self.preprocess_config.multiple % multiple:
            raise ValueError(expected("multiple", f"a multiple of {multiple}", self.preprocess_config.multiple))
        self.channels, self.patch = channels, patch
        self.down = nn.ModuleList(_Block(i, o) for i, o in zip((3 * patch**2, *channels[:-1]), channels, strict=True))
        self.up = nn.ModuleList(_Block(channels[i + 1] + channels[i], channels[i]) for i in range(len(channels) - 1))
        self.head = nn.Conv2d(channels[0], 1, 1)
        self.eval()

    @classmethod
    def of_size(cls, size: str = "conv", **options) -> ConvDetector:
        """A detector with fresh weights.

        Args:
            size: "conv", the only one.
            **options: of the class.

        Raises:
            ValueError: another size.
        """
        if size != "conv":
            raise ValueError(expected("size", "conv", repr(size)))
        return cls(**options)

    def network(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, h, w) of normalised pictures (B, 3, H, W)."""
        scales = []
        h = F.pixel_unshuffle(pixel_values, self.patch)
        for index, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if index else h)
            scales.append(h)
        for index in reversed(range(len(self.up))):
            h = self.up[index](torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), scales[index]], dim=1))
        return self.head(h)

    def recomputable(self) -> list[nn.Module]:
        """See `Detector.recomputable`."""
        return [*self.down, *self.up]

    def config_dict(self) -> dict:
        """See `Detector.config_dict`."""
        return {"channels": list(self.channels), "patch": self.patch}

    @classmethod
    def from_config(cls, config: dict, preprocess: PreprocessConfig) -> ConvDetector:
        """See `Detector.from_config`."""
        channels, patch = config["channels"], config.get("patch", 1)
        check_conv(channels, patch)
        return cls(tuple(channels), patch, preprocess=preprocess)
