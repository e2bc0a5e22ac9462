"""One placement (resize, crop, flip) for a picture and its map."""

from __future__ import annotations

import math
import operator
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffdoctor.maps.files import read_map, read_picture

_RESAMPLES = ("bilinear", "bicubic", "lanczos", "box", "nearest")


@dataclass(frozen=True)
class Placement:
    """Where the training crop lies in a picture.

    Attributes:
        box: (left, top, right, bottom) in the picture's pixels; fractions of a pixel are meant.
        size: (height, width) in pixels that the box is resized to.
        flip: mirrored left to right afterwards.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    flip: bool = False

    def of(self, image, picture_size: tuple[int, int], resample):
        """Cut a PIL picture of any band format that shows the same scene as the picture of (height, width) pixels."""
        from PIL import Image

        scale_y, scale_x = image.height / picture_size[0], image.width / picture_size[1]
        left, top, right, bottom = self.box
        # min(): the product can land one rounding above the image's own side.
        box = (
            left * scale_x,
            top * scale_y,
            min(right * scale_x, image.width),
            min(bottom * scale_y, image.height),
        )
        image = image.resize((self.size[1], self.size[0]), resample, box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image


def aspect_buckets(pixels: int, *, multiple: int = 64, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """Sizes (height, width) of at most `pixels` pixels, sides multiples of `multiple`, aspects up to `max_aspect`.

    For each width the tallest height that fits, and no size that another one contains.
    """
    if multiple < 1 or pixels < multiple * multiple:
        raise ValueError(f"pixels: expected at least multiple² = {multiple * multiple}, got {pixels}")
    if max_aspect < 1:
        raise ValueError(f"max_aspect: expected >= 1, got {max_aspect}")
    sizes = []
    for width in range(multiple, math.isqrt(int(pixels * max_aspect)) + multiple, multiple):
        height = min(pixels // width, int(width * max_aspect)) // multiple * multiple
        if height and width / height <= max_aspect:
            sizes.append((height, width))
    contained = {a for a in sizes for b in sizes if a != b and a[0] <= b[0] and a[1] <= b[1]}
    return [size for size in sizes if size not in contained]


class PairedTransform:
    """Resize, crop and flip a picture and its map by one and the same placement.

    Args:
        size: side in pixels of a square, or (height, width).
        buckets: sizes (height, width) instead of `size`; a picture gets the one nearest in aspect.
        crop: "random" or "center", of the largest box in the target's proportions.
        flip: probability of a left-right mirror; leave it at 0 for lettering.
        resample: the picture's filter: bilinear, bicubic, lanczos, box or nearest. Maps are always resampled
            bilinearly (antialiased where they shrink), which cannot leave [0, 1].
    """

    def __init__(self, size=512, *, buckets=None, crop: str = "random", flip: float = 0.0, resample: str = "lanczos"):
        sizes = [size] if buckets is None else list(buckets)
        self.buckets = [_checked_size("size" if buckets is None else "buckets", each) for each in sizes]
        if not self.buckets:
            raise ValueError("buckets: expected at least one (height, width), got none")
        if crop not in ("random", "center"):
            raise ValueError(f"crop: expected 'random' or 'center', got {crop!r}")
        if not 0.0 <= flip <= 1.0:
            raise ValueError(f"flip: expected a probability in [0, 1], got {flip!r}")
        if resample not in _RESAMPLES:
            raise ValueError(f"resample: expected one of {', '.join(_RESAMPLES)}, got {resample!r}")
        self.crop, self.flip, self.resample = crop, flip, resample

    def bucket(self, height: int, width: int) -> int:
        """Index of the bucket nearest in aspect to a picture of height x width pixels."""
        aspect = math.log(height / width)
        distances = [abs(math.log(h / w) - aspect) for h, w in self.buckets]
        return distances.index(min(distances))

    def place(self, height: int, width: int, rng: np.random.Generator) -> Placement:
        """Draw the placement of a picture of height x width pixels. Draws the same numbers for every picture."""
        size = self.buckets[self.bucket(height, width)]
        scale = min(height / size[0], width / size[1])
        box_height, box_width = min(size[0] * scale, height), min(size[1] * scale, width)
        shift_y, shift_x, mirror = rng.uniform(size=3)
        if self.crop == "center":
            shift_y = shift_x = 0.5
        top, left = shift_y * (height - box_height), shift_x * (width - box_width)
        box = (left, top, left + box_width, top + box_height)
        return Placement(box, size, bool(mirror < self.flip))

    def __call__(self, picture, confidence=None, rng: np.random.Generator | None = None) -> dict:
        """Transform one pair.

        Args:
            picture: file, PIL picture or uint8 (H, W, 3).
            confidence: file, PIL-free array or None, see `read_map`; any size in the picture's proportions. None is
                a map of zeros: nothing was found.
            rng: of the crop and the flip; None draws anew.

        Returns:
            `pixel_values` (3, h, w) fp32 in [-1, 1]; `confidence` (1, h, w) fp32 in [0, 1]; `has_map`, bool;
            `original_size`, `crop_top_left` and `target_size`, (2,) int64, the numbers that SDXL is conditioned on
            (the crop in pixels of the resized, flipped picture).
        """
        from PIL import Image

        image = read_picture(picture)
        rng = np.random.default_rng() if rng is None else rng
        picture_size = (image.height, image.width)
        placement = self.place(*picture_size, rng)
        pixels = placement.of(image, picture_size, getattr(Image.Resampling, self.resample.upper()))
        values = torch.from_numpy(np.asarray(pixels, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0)
        if confidence is None:
            level = torch.zeros(1, *placement.size)
        else:
            level = read_map(confidence)
            check_proportions(level.shape, picture_size, confidence)
            level = placement.of(Image.fromarray(level), picture_size, Image.Resampling.BILINEAR)
            # Antialiasing weights sum to one only up to rounding.
            level = torch.from_numpy(np.array(level, dtype=np.float32)[None]).clamp_(0.0, 1.0)
        left, top, right, bottom = placement.box
        scale = placement.size[0] / (bottom - top)
        crop_left = (image.width - right if placement.flip else left) * scale
        return {
            "pixel_values": values.contiguous(),
            "confidence": level,
            "has_map": confidence is not None,
            "original_size": torch.tensor(picture_size),
            "crop_top_left": torch.tensor([round(top * scale), round(crop_left)]),
            "target_size": torch.tensor(placement.size),
        }


def _checked_size(name: str, size) -> tuple[int, int]:
    try:
        pair = (operator.index(size),) * 2
    except TypeError:
        try:
            pair = tuple(operator.index(side) for side in size)
        except TypeError:
            pair = ()
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name}: expected a side or (height, width) in pixels, got {size!r}")
    return pair


def check_proportions(map_size, picture_size, name="confidence") -> None:
    """Raise ValueError unless a map of (height, width) is the whole picture at another scale, to less than a pixel."""
    (map_height, map_width), (height, width) = map_size, picture_size
    if abs(map_width - width * map_height / height) < 1 or abs(map_height - height * map_width / width) < 1:
        return
    turned = abs(map_height - width * map_width / height) < 1
    hint = "it fits the picture turned by 90 degrees" if turned else "was it cropped or squashed?"
    name = name if isinstance(name, (str, os.PathLike)) else "confidence"
    raise ValueError(
        f"{name}: expected the proportions of its picture, {height} x {width} pixels, "
        f"got {map_height} x {map_width}: {hint}"
    )


def attach_map(picture, confidence=None):
    """The picture with its map as a fourth band, for transforms that are not ours.

    Any geometric transform of a PIL picture (resize, crop, pad, flip, rotate; torchvision's among them) moves all bands
    alike and draws the same random numbers as without the map. Mode RGBX is used because RGBA would be resampled with
    its colours multiplied by alpha. Changes of colour must come before this, or after `detach_map`.

    Args:
        picture: file, PIL picture or uint8 (H, W, 3).
        confidence: see `read_map`; resized to the picture where it has another size. None: zeros.

    Returns:
        A PIL picture, mode RGBX, whose fourth band is 0 where clean and 255 where broken.
    """
    from PIL import Image

    image = read_picture(picture)
    if confidence is None:
        band = Image.new("L", image.size)
    else:
        level = read_map(confidence)
        check_proportions(level.shape, (image.height, image.width), confidence)
        band = Image.fromarray(level)
        if band.size != image.size:
            band = band.resize(image.size, Image.Resampling.BILINEAR)
        band = Image.fromarray(np.rint(np.asarray(band) * 255.0).astype(np.uint8))
    return Image.merge("RGBX", [*image.split(), band])


def detach_map(pixels: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> tuple[Tensor, Tensor]:
    """Split what became of an `attach_map` picture into the picture and its map.

    Args:
        pixels: (4, H, W) or (B, 4, H, W), floating point, all bands in `value_range`.
        value_range: (low, high) of a black and a white pixel: (-1, 1) after `Normalize([0.5], [0.5])`, else (0, 1).

    Returns:
        (pixel_values, confidence): the first three bands, and (1, H, W) or (B, 1, H, W) in [0, 1].
    """
    if not isinstance(pixels, Tensor):
        raise TypeError(f"pixels: expected a torch.Tensor, got {type(pixels).__name__}")
    if pixels.ndim not in (3, 4) or pixels.shape[-3] != 4:
        raise ValueError(
            f"pixels: expected (4, H, W) or (B, 4, H, W), got {tuple(pixels.shape)}: was the picture converted to RGB "
            "after attach_map?"
        )
    low, high = value_range
    picture, band = pixels.split([3, 1], dim=-3)
    return picture, ((band - low) / (high - low)).clamp(0.0, 1.0)
