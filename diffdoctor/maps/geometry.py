"""One placement (resize, crop, flip) for a picture and its map."""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffdoctor.maps.check import MapWarning
from diffdoctor.maps.files import MapLike, PictureLike, read_map, read_picture, size_of_picture
from diffdoctor.runs.errors import expected

if TYPE_CHECKING:
    from PIL import Image

_RESAMPLES = ("bilinear", "bicubic", "lanczos", "box", "nearest")


@dataclass(frozen=True)
class Placement:
    """The crop of a picture, its size and its orientation.

    Attributes:
        box: (left, top, right, bottom) of the crop in the picture's pixels, with fractions.
        size: (height, width) in pixels that the crop is resized to.
        flip: whether the result is mirrored left to right.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    flip: bool = False

    def of(self, image: Image.Image, picture_size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        """Crop, resize and flip the picture, or its map.

        Args:
            image: a PIL picture of any mode, in the picture's proportions.
            picture_size: (height, width) in pixels of the picture that `box` refers to.
            resample: the filter.
        """
        from PIL import Image

        scale_y, scale_x = image.height / picture_size[0], image.width / picture_size[1]
        left, top, right, bottom = self.box
        # min(): rounding can make the product larger than the image's side.
        box = (
            left * scale_x,
            top * scale_y,
            min(right * scale_x, image.width),
            min(bottom * scale_y, image.height),
        )
        image = image.resize((self.size[1], self.size[0]), resample, box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image

    def conditions(self, picture_size: tuple[int, int]) -> dict[str, Tensor]:
        """What SDXL is conditioned on: `original_size`, `crop_top_left` and `target_size`, (2,) int64 each.

        Args:
            picture_size: (height, width) in pixels of the picture that `box` refers to.
        """
        left, top, right, bottom = self.box
        scale = self.size[0] / (bottom - top)
        crop_left = (picture_size[1] - right if self.flip else left) * scale
        return {
            "original_size": torch.tensor(picture_size),
            "crop_top_left": torch.tensor([round(top * scale), round(crop_left)]),
            "target_size": torch.tensor(self.size),
        }


def placed_picture(picture: Image.Image | np.ndarray, placement: Placement, resample: str) -> Tensor:
    """A picture in RGB, or uint8 (H, W, 3), placed: (3, h, w) fp32 in [-1, 1].

    Args:
        picture: to place.
        placement: of it.
        resample: the filter's name.
    """
    from PIL import Image

    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    pixels = placement.of(image, (image.height, image.width), getattr(Image.Resampling, resample.upper()))
    return torch.from_numpy(np.asarray(pixels, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0)


def placed_map(values: np.ndarray, placement: Placement, picture_size: tuple[int, int]) -> Tensor:
    """A map (H, W) in [0, 1] placed as its picture, bilinearly: (1, h, w) fp32 in [0, 1].

    Args:
        values: the map, in the picture's proportions.
        placement: of the picture.
        picture_size: (height, width) in pixels of the picture.
    """
    from PIL import Image

    placed = placement.of(Image.fromarray(values), picture_size, Image.Resampling.BILINEAR)
    # Antialiasing weights sum to one only up to rounding.
    return torch.from_numpy(np.array(placed, dtype=np.float32)[None]).clamp_(0.0, 1.0)


def aspect_buckets(pixels: int, *, multiple: int = 64, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """Sizes (height, width) of at most `pixels` pixels, sides multiples of `multiple`, aspects up to `max_aspect`.

    For each width the largest height that fits, and no size that another one contains.

    Args:
        pixels: largest area, in pixels.
        multiple: of which both sides are multiples, in pixels.
        max_aspect: largest quotient of the longer and the shorter side.

    Returns:
        (height, width) of each bucket, in pixels.

    Raises:
        ValueError: an argument is out of range.
    """
    if multiple < 1 or pixels < multiple * multiple:
        raise ValueError(expected("pixels", f"at least multiple² = {multiple * multiple}", pixels))
    if max_aspect < 1:
        raise ValueError(expected("max_aspect", ">= 1", max_aspect))
    sizes = []
    for width in range(multiple, math.isqrt(int(pixels * max_aspect)) + multiple, multiple):
        height = min(pixels // width, int(width * max_aspect)) // multiple * multiple
        if height and width / height <= max_aspect:
            sizes.append((height, width))
    contained = {a for a in sizes for b in sizes if a != b and a[0] <= b[0] and a[1] <= b[1]}
    return [size for size in sizes if size not in contained]


class PairedTransform:
    """Resize, crop and flip a picture and its map by the same placement.

    Args:
        size: side in pixels of a square, or (height, width).
        buckets: sizes (height, width) instead of `size`; a picture gets the one nearest in aspect.
        crop: "random" or "center", of the largest box in the target's proportions.
        flip: probability of a left-right mirror; leave it at 0 for lettering.
        resample: the picture's filter: bilinear, bicubic, lanczos, box or nearest. Maps are always resampled
            bilinearly (antialiased where they shrink), which cannot leave [0, 1].

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 512,
        *,
        buckets: Iterable[tuple[int, int]] | None = None,
        crop: str = "random",
        flip: float = 0.0,
        resample: str = "lanczos",
    ):
        sizes = [size] if buckets is None else list(buckets)
        self.buckets = [_checked_size("size" if buckets is None else "buckets", each) for each in sizes]
        if not self.buckets:
            raise ValueError(expected("buckets", "at least one (height, width)", "none"))
        if crop not in ("random", "center"):
            raise ValueError(expected("crop", "'random' or 'center'", repr(crop)))
        if not 0.0 <= flip <= 1.0:
            raise ValueError(expected("flip", "a probability in [0, 1]", repr(flip)))
        if resample not in _RESAMPLES:
            raise ValueError(expected("resample", f"one of {', '.join(_RESAMPLES)}", repr(resample)))
        self.crop, self.flip, self.resample = crop, flip, resample

    def bucket(self, height: int, width: int) -> int:
        """Index of the bucket nearest in aspect to a picture of height x width pixels."""
        aspect = math.log(height / width)
        distances = [abs(math.log(h / w) - aspect) for h, w in self.buckets]
        return distances.index(min(distances))

    def size_of(self, picture: PictureLike) -> tuple[int, int]:
        """(height, width) in pixels of a picture; of a file only the header is read."""
        return size_of_picture(picture)

    def read_map(self, confidence: MapLike) -> np.ndarray:
        """A picture's map (H, W) in [0, 1]."""
        return read_map(confidence)

    def place(self, height: int, width: int, rng: np.random.Generator) -> Placement:
        """Draw the placement of a picture of height x width pixels.

        For every picture `rng` draws the same number of values.
        """
        size = self.buckets[self.bucket(height, width)]
        scale = min(height / size[0], width / size[1])
        box_height, box_width = min(size[0] * scale, height), min(size[1] * scale, width)
        shift_y, shift_x, mirror = rng.uniform(size=3)
        if self.crop == "center":
            shift_y = shift_x = 0.5
        top, left = shift_y * (height - box_height), shift_x * (width - box_width)
        box = (left, top, left + box_width, top + box_height)
        return Placement(box, size, bool(mirror < self.flip))

    def __call__(
        self, picture: PictureLike, confidence: MapLike | None = None, rng: np.random.Generator | None = None
    ) -> dict[str, Tensor | bool]:
        """Transform one pair.

        Args:
            picture: file, PIL picture or uint8 (H, W, 3).
            confidence: see `read_map`; any size in the picture's proportions. None is a map of zeros: clean.
            rng: of the crop and the flip; None: a new, unseeded generator.

        Returns:
            `pixel_values` (3, h, w) fp32 in [-1, 1]; `confidence` (1, h, w) fp32 in [0, 1]; `has_map`, bool;
            `original_size`, `crop_top_left` and `target_size`, (2,) int64, on which SDXL is conditioned (the crop in
            pixels of the resized, flipped picture).

        Raises:
            ValueError: the map is not in the picture's proportions.
        """
        image = read_picture(picture)
        rng = np.random.default_rng() if rng is None else rng
        picture_size = (image.height, image.width)
        placement = self.place(*picture_size, rng)
        values = placed_picture(image, placement, self.resample)
        if confidence is None:
            map_values = torch.zeros(1, *placement.size)
        else:
            full_map = read_map(confidence)
            check_proportions(full_map.shape, picture_size, confidence)
            map_values = placed_map(full_map, placement, picture_size)
        return {
            "pixel_values": values.contiguous(),
            "confidence": map_values,
            "has_map": confidence is not None,
            **placement.conditions(picture_size),
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
        raise ValueError(expected(name, "a side or (height, width) in pixels", repr(size)))
    return pair


def check_proportions(map_size: tuple[int, int], picture_size: tuple[int, int], name: object = "confidence") -> None:
    """Check that a map is the whole picture at another scale, to less than a pixel.

    Args:
        map_size: (height, width) of the map.
        picture_size: (height, width) of the picture.
        name: the map's path, for the error; anything but a path is called "confidence".

    Raises:
        ValueError: the proportions differ.
    """
    (map_height, map_width), (height, width) = map_size, picture_size
    if abs(map_width - width * map_height / height) < 1 or abs(map_height - height * map_width / width) < 1:
        return
    turned = abs(map_height - width * map_width / height) < 1
    hint = "it fits the picture turned by 90 degrees" if turned else "was it cropped or squashed?"
    name = name if isinstance(name, (str, os.PathLike)) else "confidence"
    what = f"the proportions of its picture, {height} x {width} pixels"
    raise ValueError(expected(name, what, f"{map_height} x {map_width}: {hint}"))


def attach_map(picture: PictureLike, confidence: MapLike | None = None) -> Image.Image:
    """The picture with its map as a fourth band, for other libraries' transforms.

    Any geometric transform of a PIL picture (resize, crop, pad, flip, rotate; torchvision's among them) transforms all
    bands alike and draws the same random numbers as without the map. The mode is RGBX because RGBA would be resampled
    with its colours multiplied by alpha. Changes of colour must come before this, or after `detach_map`.

    Args:
        picture: file, PIL picture or uint8 (H, W, 3).
        confidence: see `read_map`; resized to the picture where it has another size. None: zeros.

    Returns:
        A PIL picture, mode RGBX, whose fourth band is 0 where clean and 255 where broken.

    Raises:
        ValueError: the map is not in the picture's proportions.
    """
    from PIL import Image

    image = read_picture(picture)
    if confidence is None:
        band = Image.new("L", image.size)
    else:
        full_map = read_map(confidence)
        check_proportions(full_map.shape, (image.height, image.width), confidence)
        band = Image.fromarray(full_map)
        if band.size != image.size:
            band = band.resize(image.size, Image.Resampling.BILINEAR)
        band = Image.fromarray(np.rint(np.asarray(band) * 255.0).astype(np.uint8))
    return Image.merge("RGBX", [*image.split(), band])


def detach_map(pixels: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> tuple[Tensor, Tensor]:
    """Split a transformed `attach_map` picture into the picture and its map.

    Args:
        pixels: (4, H, W) or (B, 4, H, W), floating point, all bands in `value_range`.
        value_range: (low, high) of a black and a white pixel: (-1, 1) after `Normalize([0.5], [0.5])`, else (0, 1).

    Returns:
        (pixel_values, confidence): the first three bands, and (1, H, W) or (B, 1, H, W) in [0, 1].

    Raises:
        TypeError: `pixels` is no tensor.
        ValueError: it does not have four bands; or on the CPU, its values are not in `value_range`.
    """
    if not isinstance(pixels, Tensor):
        raise TypeError(expected("pixels", "a torch.Tensor", type(pixels).__name__))
    if pixels.ndim not in (3, 4) or pixels.shape[-3] != 4:
        got = f"{tuple(pixels.shape)}: was the picture converted to RGB after attach_map?"
        raise ValueError(expected("pixels", "(4, H, W) or (B, 4, H, W)", got))
    low, high = value_range
    picture, band = pixels.split([3, 1], dim=-3)
    if pixels.device.type == "cpu" and pixels.numel():
        _check_bands(picture, band, low, high)
    return picture, ((band - low) / (high - low)).clamp(0.0, 1.0)


def _check_bands(picture: Tensor, band: Tensor, low: float, high: float) -> None:
    least, most = (float(value) for value in band.aminmax())
    rounding = 0.02 * (high - low)
    if least < low - rounding or most > high + rounding:
        what = f"values in the value_range [{low:g}, {high:g}]"
        raise ValueError(expected("pixels", what, f"{least:.3g} to {most:.3g} in the map's band"))
    # Of values in [0, 1] taken for [-1, 1] every map would be at least 0.5 everywhere.
    if low < 0 <= min(least, float(picture.min())) and high == 1:
        warnings.warn(
            "pixels: nothing is below 0, so they may be in [0, 1], and the whole picture then counts as broken: pass "
            "value_range=(0, 1)",
            MapWarning,
            stacklevel=3,
        )
