"""Pictures and maps on the disk."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch

from diffdoctor.data.codec import (
    SUFFIXES,
    UnreadablePicture,
    as_array,
    decode,
    grey_levels,
    open_picture,
    picture_size,
)
from diffdoctor.data.folders import MAP_ENDING, find_files, names_of
from diffdoctor.data.tar import SkipCounts
from diffdoctor.runs.errors import UserError, expected, first_line
from diffdoctor.runs.files import atomic_path, file_name

if TYPE_CHECKING:
    from PIL import Image

_PICTURES = f"a picture ({', '.join(SUFFIXES)})"


# A file, a PIL picture or a uint8 array (H, W, 3).
PictureLike: TypeAlias = "str | os.PathLike | Image.Image | np.ndarray"
# A file, a PIL picture, or an array or tensor; see `read_map`.
MapLike: TypeAlias = "str | os.PathLike | Image.Image | np.ndarray | torch.Tensor"


@dataclass(frozen=True)
class Record:
    """One training picture, or one video.

    Attributes:
        picture: a file, a PIL picture or a uint8 array (H, W, 3); of a video a file or (T, H, W, 3).
        confidence: its map: a file, an array (uint8 0..255, bool, or float in [0, 1]) of shape (H', W') in
            the picture's proportions; None where there is no map.
        caption: its prompt.
    """

    picture: PictureLike
    confidence: MapLike | None = None
    caption: str = ""


def find_map(
    picture: str | os.PathLike, maps: str | os.PathLike | None = None, root: str | os.PathLike | None = None
) -> Path | None:
    """The map file of a picture, or None.

    Args:
        picture: the picture's file, such as `set/cat.jpg`.
        maps: the folder of maps; None searches beside the picture.
        root: folder that `maps` mirrors, so that `root/a/cat.jpg` has its map in `maps/a`; None: the picture's folder.

    Returns:
        The first that exists of `cat.mask.png`, and in a folder of maps also of `cat.png` and `cat.npy`. Where there
        are `cat.jpg` and `cat.png`, the picture's own, such as `cat.jpg.mask.png`, goes first.

    Raises:
        UserError: there is no such folder of maps.
    """
    picture = Path(picture)
    if maps is not None:
        require_maps(maps)
    root = picture.parent if root is None else Path(root)
    stamp = os.stat(picture.parent).st_mtime_ns if picture.parent.is_dir() else 0
    return _finder(picture.parent, root, None if maps is None else Path(maps), stamp).of(picture)


def require_maps(maps: str | os.PathLike) -> None:
    """Refuse a folder of maps that is not there: without it every picture would count as clean.

    Raises:
        UserError: there is none.
    """
    if not Path(maps).is_dir():
        raise UserError(expected(maps, "a folder of maps", "none"))


@functools.lru_cache(maxsize=8)
def _finder(folder: Path, root: Path, maps: Path | None, stamp: int) -> MapFinder:
    """Of one folder's pictures; `stamp` changes when a file is added."""
    return MapFinder(find_files(folder, SkipCounts(), deep=False, videos=True), root, maps)


class MapFinder:
    """The maps of the pictures of one folder, by the names that `diagnose` gives them.

    Args:
        files: all pictures, shards and videos.
        root: of the folder.
        maps: folder of the maps, which mirrors it; None: the maps lie beside the pictures.
    """

    def __init__(self, files: list[Path], root: Path, maps: Path | None):
        self.root, self.maps = root, maps
        self.names = dict(zip(files, names_of(files, root), strict=True))
        self._taken = set(self.names.values())

    def of(self, picture: Path) -> Path | None:
        """The map file of a picture, or None."""
        stem = picture.relative_to(self.root).with_suffix("").as_posix()
        name = self.names.get(picture, stem)
        endings = (MAP_ENDING,) if self.maps is None else (MAP_ENDING, ".png", ".npy")
        folder = self.root if self.maps is None else self.maps
        # A map of the stem is that of all pictures with this stem, unless another picture has this name.
        names = dict.fromkeys([name, stem] if stem not in self._taken else [name])
        candidates = (folder / file_name(each, ending) for each in names for ending in endings)
        return next((path for path in candidates if path.is_file()), None)


def read_picture(picture: PictureLike) -> Image.Image:
    """Read a picture, rotated upright by its EXIF orientation, as the detector sees it.

    Args:
        picture: a file, a PIL picture or a uint8 array (H, W, 3).

    Returns:
        A PIL picture in mode RGB.

    Raises:
        ValueError: an array of another shape or dtype.
        UserError: a file that is no picture or is broken, which is named.
    """
    from PIL import Image

    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(expected("picture", "(H, W, 3) uint8", f"{picture.shape} {picture.dtype}"))
        return Image.fromarray(picture)
    try:
        pixels = as_array(picture, "RGB") if isinstance(picture, Image.Image) else decode(picture, "RGB")
    except UnreadablePicture as error:
        name = "picture" if isinstance(picture, Image.Image) else os.fspath(picture)
        raise UserError(expected(name, _PICTURES, error)) from error
    return Image.fromarray(pixels)


def size_of_picture(picture: PictureLike) -> tuple[int, int]:
    """(height, width) in pixels of a picture; of a file only the header is read.

    Raises:
        UserError: a file that is no picture.
    """
    if isinstance(picture, (str, os.PathLike)):
        try:
            with open_picture(picture) as image:
                return picture_size(image)
        except UnreadablePicture as error:
            raise UserError(expected(picture, "a picture", error)) from error
    image = read_picture(picture)
    return image.height, image.width


def read_map(confidence: MapLike) -> np.ndarray:
    """Read a confidence map.

    Args:
        confidence: a PNG of one band (8 or 16 bits; or three equal bands), such a picture in PIL, an `.npy` file,
            or an array or tensor: uint8 0..255, bool, or floats in [0, 1]; shape (H, W), (H, W, 1) or (1, H, W).

    Returns:
        (H, W) float32 in [0, 1].

    Raises:
        TypeError: an array of another dtype.
        ValueError: a coloured or transparent picture (a heat map is not a map), other shapes, values outside [0, 1].
        UserError: a file that cannot be read, which is named.
    """
    name = "confidence" if not isinstance(confidence, (str, os.PathLike)) else os.fspath(confidence)
    if isinstance(confidence, (str, os.PathLike)):
        confidence = _map_file(Path(confidence))
    elif hasattr(confidence, "getbands"):  # a PIL picture, recognised without importing PIL
        confidence = _bands(confidence, name)
    elif isinstance(confidence, torch.Tensor):
        confidence = confidence.detach().cpu()
        if confidence.dtype.is_floating_point and confidence.dtype.itemsize < 4:  # numpy has no bfloat16
            confidence = confidence.float()
    values = np.asarray(confidence)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[:, :, 0]
    if values.ndim != 2 or not values.size:
        raise ValueError(expected(name, "a map of shape (H, W)", tuple(np.shape(confidence))))
    if values.dtype == np.uint8:
        return values.astype(np.float32) / 255.0
    if values.dtype == np.bool_:
        return values.astype(np.float32)
    if not np.issubdtype(values.dtype, np.floating):
        raise TypeError(expected(name, "uint8, bool or floating-point values", values.dtype))
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):
        hint = "; give 0..255 as uint8" if high > 1.0 else ""
        raise ValueError(expected(name, "values in [0, 1]", f"{low:g}..{high:g}{hint}"))
    return values.astype(np.float32)


def read_array(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """The array of an `.npy` file, with `mmap_mode` "r" on the disk.

    Raises:
        UserError: it holds none, or not one of numbers.
    """
    try:
        return np.load(path, allow_pickle=False, mmap_mode=mmap_mode)
    # A header may ask for any memory, and promise what is not there.
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise UserError(expected(path, "an .npy file of numbers", first_line(error))) from error


def _map_file(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        return read_array(path)
    try:
        with open_picture(path) as image:
            image.load()
            opened = image.copy()
    except UnreadablePicture as error:
        raise UserError(expected(path, "a map as a PNG or .npy file", error)) from error
    return _bands(opened, str(path))


def _bands(image, name: str) -> np.ndarray:
    image = image.convert("RGB") if image.mode == "P" else image
    if image.mode[0] in "IF":
        try:
            return (grey_levels(image, 65535) / 65535.0).astype(np.float32)
        except UnreadablePicture as error:
            raise ValueError(expected(name, "a grey picture of 8 or 16 bits", error)) from error
    if image.mode in ("1", "L"):
        return np.asarray(image).astype(np.float32) / (1.0 if image.mode == "1" else 255.0)
    bands = np.asarray(image)
    if bands.ndim == 3 and bands.shape[2] == 3 and (bands == bands[:, :, :1]).all():
        return bands[:, :, 0]
    what = "a grey picture (0 clean .. 255 artifact)"
    raise ValueError(expected(name, what, f"mode {image.mode} with colours"))


def write_map(path: str | os.PathLike, confidence: MapLike) -> None:
    """Write a map as an 8-bit grey PNG, completely or not at all.

    Args:
        path: the file to write.
        confidence: see `read_map`.
    """
    from PIL import Image

    values = np.rint(read_map(confidence) * 255.0).astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(values).save(temporary, format="PNG", optimize=True)
