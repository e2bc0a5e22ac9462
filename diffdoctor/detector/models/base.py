"""The base class of detectors: differentiable preprocessing, confidence maps, tiles, files."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from diffdoctor.detector.models.files import CONFIG_NAME, WEIGHTS_NAME, read_detector
from diffdoctor.detector.models.inputs import as_images
from diffdoctor.detector.models.preprocess import MAX_NETWORK_PIXELS, PreprocessConfig
from diffdoctor.detector.pixel_range import check_pixel_range
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_dir

if TYPE_CHECKING:
    from diffdoctor.detector.models.inputs import Picture

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Detector(nn.Module):
    """A network from pictures to artifact logits.

    A subclass sets `kind`, its name in a detector's files, and implements `network`, `of_size`, `config_dict` and
    `from_config`.

    Args:
        preprocess: how pictures are resized for the network.

    Attributes:
        preprocess_config: the same.
    """

    kind: str = ""
    # The first tensor that `confidence` gets is looked at: a wrong range is a mistake of the program, not of a picture.
    _range_is_known = False

    def __init__(self, preprocess: PreprocessConfig):
        super().__init__()
        self.preprocess_config = preprocess
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def network(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the logits of normalised pictures.

        Args:
            pixel_values: (B, 3, H, W), from `preprocess`.

        Returns:
            (B, 1, h, w).
        """
        raise NotImplementedError

    def recomputable(self) -> list[nn.Module]:
        """The modules whose activations a treatment may compute again in backward instead of keeping them."""
        return [self]

    def config_dict(self) -> dict:
        """The options from which `from_config` builds this network again, as JSON values."""
        raise NotImplementedError

    @classmethod
    def of_size(cls, size: str, **options) -> Detector:
        """A detector with fresh weights.

        Args:
            size: one of the names that `models.files.ARCHITECTURES` has for this class.
            **options: of the class.
        """
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: dict, preprocess: PreprocessConfig) -> Detector:
        """A detector with fresh weights.

        Args:
            config: from `config_dict`.
            preprocess: how pictures are resized for the network.
        """
        raise NotImplementedError

    def to_file_keys(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict under the names that the file has."""
        return state

    def from_file_keys(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `to_file_keys`."""
        return state

    def preprocess(self, images: torch.Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> torch.Tensor:
        """Resize pictures for the network and normalise them by ImageNet's mean and deviation, differentiably.

        Args:
            images: (B, 3, H, W), floating point, in `value_range`.
            value_range: (low, high) of a black and a white pixel: (0, 1) or, for what a VAE decodes, (-1, 1).

        Returns:
            (B, 3, h, w) in the network's dtype.

        Raises:
            TypeError: `images` is no floating-point tensor.
            ValueError: another shape or value range, or pictures that are too large to be diagnosed whole.
        """
        if not isinstance(images, torch.Tensor):
            raise TypeError(expected("images", "a torch.Tensor", type(images).__name__))
        if not images.is_floating_point():
            raise TypeError(expected("images", f"a floating-point dtype with values in {value_range}", images.dtype))
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(expected("images", "shape (B, 3, H, W)", tuple(images.shape)))
        low, high = value_range
        if not low < high:
            raise ValueError(expected("value_range", "(low, high) with low < high", value_range))
        dtype = next(self.parameters()).dtype
        pixels = images if images.dtype == torch.float64 else images.float()
        if (low, high) != (0, 1):
            pixels = (pixels - low) / (high - low)
        size = self.preprocess_config.network_size(*pixels.shape[2:])
        if size[0] * size[1] > MAX_NETWORK_PIXELS:
            got = f"{size[0]} x {size[1]}: give tile, or a detector with max_side"
            raise ValueError(expected("images", f"at most {MAX_NETWORK_PIXELS:,} pixels for the network", got))
        if size != tuple(pixels.shape[2:]):
            shrinks = size[0] < pixels.shape[2] or size[1] < pixels.shape[3]
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
        return ((pixels - self.image_mean) / self.image_std).to(dtype)

    def forward(self, images: torch.Tensor, *, value_range: tuple[float, float] = (0.0, 1.0)) -> torch.Tensor:
        """Artifact logits of pictures; sigmoid makes them confidences. Differentiable with respect to the pictures.

        Args:
            images: (B, 3, H, W), floating point, in `value_range`.
            value_range: (low, high) of a black and a white pixel.

        Returns:
            logits (B, 1, h, w), at a quarter of the network's size for SegFormer.
        """
        return self.network(self.preprocess(images, value_range))

    def confidence(
        self,
        images: torch.Tensor | Picture | Sequence[Picture],
        *,
        value_range: tuple[float, float] = (0.0, 1.0),
        tile: int | None = None,
        overlap: float = 0.25,
    ) -> torch.Tensor:
        """The confidence of an artifact at each pixel.

        Args:
            images: (B, 3, H, W), floating point, in `value_range`; or a picture, or several of one size, each a path, a
                PIL image or a uint8 array (H, W, 3).
            value_range: (low, high) of a black and a white pixel of a tensor.
            tile: for large pictures, the side in pixels of overlapping square tiles that are diagnosed one by one and
                blended; None diagnoses the picture whole.
            overlap: share of a tile's side that it has in common with the next, in [0, 0.5].

        Returns:
            (B, 1, H, W) in [0, 1], fp32 (fp64 for an fp64 network), of the pictures' own height and width, whatever the
            network's; B is 1 for one picture.

        Raises:
            TypeError: see `preprocess`.
            ValueError: `tile` or `overlap` is out of range, pictures differ in size, or the first tensor is plainly in
                another range than `value_range`; see also `preprocess`.
            UserError: a file is no picture that can be read.
        """
        if not isinstance(images, torch.Tensor):
            images, value_range = as_images(images, self.image_mean.device), (0.0, 1.0)
        elif not self._range_is_known:
            check_pixel_range(images, value_range)
            self._range_is_known = True
        if tile is not None and max(images.shape[2:]) > tile:
            return self._tiled_confidence(images, value_range, tile, overlap)
        logits = self(images, value_range=value_range)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if logits.shape[2:] != images.shape[2:]:
            logits = F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)
        return logits.sigmoid()

    def takes(self, height: int, width: int, tile: int | None = None) -> bool:
        """Whether `confidence` takes pictures of this size in pixels, with this `tile`."""
        if tile is not None:
            height, width = min(height, tile), min(width, tile)
        rows, columns = self.preprocess_config.network_size(height, width)
        return rows * columns <= MAX_NETWORK_PIXELS

    def _tiled_confidence(
        self, images: torch.Tensor, value_range: tuple[float, float], tile: int, overlap: float
    ) -> torch.Tensor:
        if tile < 16:
            raise ValueError(expected("tile", ">= 16 pixels", tile))
        if not 0 <= overlap <= 0.5:
            raise ValueError(expected("overlap", "a share in [0, 0.5]", overlap))
        rows, columns = (_tile_starts(side, tile, overlap) for side in images.shape[2:])
        tiles = {}
        for y in rows:
            for x in columns:
                crop = images[:, :, y : y + tile, x : x + tile]
                h, w = crop.shape[2:]
                blend = torch.minimum(_ramp(h, tile * overlap, images)[:, None], _ramp(w, tile * overlap, images))
                tiles[y, x] = self.confidence(crop, value_range=value_range) * blend, blend
        # Cell by cell between the tiles' edges, so that a tile costs what its own pixels cost, also backward.
        strips = []
        for top, bottom, ys in _cells(rows, images.shape[2], tile):
            cells = []
            for left, right, xs in _cells(columns, images.shape[3], tile):
                total = weight = 0.0
                for y in ys:
                    for x in xs:
                        confidence, blend = tiles[y, x]
                        cell = (..., slice(top - y, bottom - y), slice(left - x, right - x))
                        total, weight = total + confidence[cell], weight + blend[cell]
                cells.append(total / weight)
            strips.append(torch.cat(cells, dim=3))
        return torch.cat(strips, dim=2)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the configuration and the weights (safetensors) to `folder`, completely or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        config = {
            "detector": self.kind,
            "format": 1,
            "preprocess": dataclasses.asdict(self.preprocess_config),
            "network": self.config_dict(),
        }
        state = self.to_file_keys({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()})
        with atomic_dir(folder) as temporary:
            try:
                save_file(state, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
            except SafetensorError as error:
                # safetensors' own class for errors of the file system.
                raise OSError(f"{folder}: the weights could not be written ({error})") from error
            (temporary / CONFIG_NAME).write_text(strict_json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Detector:
        """Load what `save_pretrained` wrote, frozen, in evaluation mode on the CPU.

        Args:
            source: a folder, or the id of a repository on the Hugging Face hub that holds such a folder's files.

        Raises:
            UserError: the folder is not a detector's, is one of another class, or has missing or unexpected weights.
        """
        detector = read_detector(source)
        if not isinstance(detector, cls):
            raise UserError(expected(source, f"a detector of class {cls.__name__}", type(detector).__name__))
        return detector


def _tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    if length <= tile:
        return [0]
    count = -(-(length - tile) // max(1, int(tile * (1 - overlap)))) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _cells(starts: list[int], length: int, tile: int) -> list[tuple[int, int, list[int]]]:
    """The pieces between all edges of tiles along a side: (start, end, starts of the tiles that hold it)."""
    edges = sorted({*starts, *(min(start + tile, length) for start in starts)})
    return [
        (low, high, [start for start in starts if start <= low and high <= start + tile])
        for low, high in itertools.pairwise(edges)
    ]


def _ramp(length: int, rim: float, like: torch.Tensor) -> torch.Tensor:
    """(length,) weights > 0 that rise linearly over `rim` pixels from both ends."""
    position = torch.arange(length, device=like.device, dtype=torch.float32) + 0.5
    distance = torch.minimum(position, length - position)
    return (distance / max(rim, 0.5)).clamp(max=1.0)
