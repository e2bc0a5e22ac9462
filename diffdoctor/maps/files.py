"""Pictures, captions and maps on the disk."""

from __future__ import annotations

import functools
import os
import posixpath
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch

from diffdoctor.data.captions import METADATA_NAME, captions_of, own_caption, read_metadata
from diffdoctor.data.codec import (
    SUFFIXES,
    UnreadablePicture,
    as_array,
    decode,
    grey_levels,
    open_picture,
    picture_size,
)
from diffdoctor.data.folders import MAP_ENDING, find_files, is_read, is_shard, names_of
from diffdoctor.data.tar import SkipCounts
from diffdoctor.data.text import is_unicode
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected, first_line
from diffdoctor.runs.files import atomic_path, atomic_write_text, file_name
from diffdoctor.runs.record import kind_of_run

if TYPE_CHECKING:
    from PIL import Image

_OTHER_METADATA = ("metadata.csv", "metadata.parquet")  # which `imagefolder` reads too
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
def _finder(folder: Path, root: Path, maps: Path | None, stamp: int) -> _MapFinder:
    """Of one folder's pictures; `stamp` changes when a file is added."""
    return _MapFinder(find_files(folder, SkipCounts(), deep=False, videos=True), root, maps)


class _MapFinder:
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


class ShardRecords(Sequence):
    """The pictures of shards with a manifest as records, each read when it is indexed.

    Args:
        folder: what `diffdoctor.data.shard_writer.write_shards` wrote; the masks are the confidence maps, in which what
            is not decided (`ignore`) counts as clean.
    """

    def __init__(self, folder: str | os.PathLike):
        from diffdoctor.data.shards import ShardData

        self.data = ShardData(folder)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        sample = self.data[index]
        return Record(sample["picture"], sample["mask"], str(sample.get("prompt") or ""))


def read_folder(folder: str | os.PathLike, maps: str | os.PathLike | None = None, *, caption: str = "") -> list[Record]:
    """The pictures of a folder and its subfolders, each with its caption and its map.

    Args:
        folder: of pictures. Captions are read from `metadata.jsonl` (`file_name` and `text`, `caption` or `prompt`), or
            from a `.txt` file beside each picture. Which files are read is in docs/detector.md, "What is read".
        maps: folder of the maps, mirroring `folder`; None searches beside each picture for `<stem>.mask.png`.
        caption: for pictures that have none.

    Returns:
        Records in the order of their paths; the map of a picture that has none is None. Warns of files that look like
        pictures and were left out, and where pictures have no caption and there is other metadata, which is not read:
        a `metadata.csv`, or metadata in a subfolder.

    Raises:
        UserError: no folder, no picture in it, a caption that cannot be read, or an output folder of a command.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(expected(folder, "a folder of pictures", "none"))
    if maps is not None:
        require_maps(maps)
    if kind := kind_of_run(folder):
        got = f"an output folder of {kind}" + (" (see ShardRecords)" if kind == "inject" else "")
        raise UserError(expected(folder, "a folder of pictures", got))
    counts = SkipCounts()
    files = find_files(folder, counts, without=[] if maps is None else [Path(maps)], videos=True)
    finder, records, bare = _MapFinder(files, folder, None if maps is None else Path(maps)), [], 0
    files = [path for path in files if is_read(path)]  # videos count in names alone
    captions = captions_of(folder, (path.relative_to(folder).as_posix() for path in files), counts)
    for path in files:
        if is_shard(path):
            counts.add("a shard, see ShardRecords", str(path))
            continue
        text = own_caption(path, folder, captions)
        bare += text is None
        records.append(Record(path, finder.of(path), caption if text is None else text))
    if not records:
        aside = f" (left out: {counts.sentence()})" if counts.total else ""
        raise UserError(expected(folder, f"pictures ({', '.join(SUFFIXES)})", f"none{aside}"))
    if counts.total:
        warnings.warn(f"{folder}: left out: {counts.sentence()}", stacklevel=2)
    unread = _unread_metadata(folder) if bare else []
    if unread:
        warnings.warn(
            f"{bare} of {len(records)} pictures have no caption of their own, and {unread[0]} is not read", stacklevel=2
        )
    return records


def write_metadata(folder: str | os.PathLike, maps: str | os.PathLike) -> int:
    """Write `folder/metadata.jsonl`, from which Hugging Face's `imagefolder` reads the columns image, text, confidence.

    Existing rows keep their order and their other columns, a `text` included; pictures without a row come after them.
    A picture that a row names in another column, such as the `cond_image_file_name` of an editing model's set, gets
    no row and needs no map.

    Args:
        folder: of pictures with captions, as `read_folder` reads them.
        maps: folder of the maps, inside `folder`.

    Returns:
        The number of pictures.

    Raises:
        UserError: maps outside the folder, which the loader would not find; a picture without a map; a row without its
            picture; a `metadata.csv`, `metadata.parquet` or metadata in a subfolder, whose captions would be lost.
    """
    folder, maps = Path(folder).resolve(), Path(maps).resolve()
    if folder not in maps.parents:
        raise UserError(expected(maps, f"a folder inside {folder}", "another; move or copy the maps there"))
    if unread := _unread_metadata(folder):
        what = f"all captions in {folder / METADATA_NAME}"
        raise UserError(expected(unread[0], what, "further metadata; move the captions there"))
    named = read_metadata(folder)
    known = {name for name, _ in named}
    other_columns = _named_in_other_columns(row for _, row in named) - known
    records = {}
    for record in read_folder(folder, maps):
        name = record.picture.relative_to(folder).as_posix()
        if name in other_columns:
            continue
        if record.confidence is None:
            raise UserError(expected(record.picture, f"a map in {maps}", "none"))
        records[name] = record
    for name, _ in named:
        if name not in records:
            raise UserError(expected(folder / METADATA_NAME, "a picture for each row", f"none for {name}"))
    named += [(name, {"file_name": name}) for name in records if name not in known]
    for name, row in named:
        row["confidence_file_name"] = records[name].confidence.relative_to(folder).as_posix()
        if row.get("text") is None:
            row["text"] = records[name].caption
    atomic_write_text(folder / METADATA_NAME, "".join(_as_line(row) for _, row in named))
    return len(records)


def _named_in_other_columns(rows: Iterable[dict]) -> set[str]:
    """The files that rows name beside their picture: `<column>_file_name`, or a list in `<column>_file_names`."""
    files = set()
    for row in rows:
        for column, value in row.items():
            if column.endswith(("_file_name", "_file_names")):
                values = value if isinstance(value, list) else [value]
                files.update(posixpath.normpath(each) for each in values if isinstance(each, str))
    return files


def _as_line(row: dict) -> str:
    line = strict_json.dumps(row, ensure_ascii=False)
    # File names may be no Unicode.
    return (line if is_unicode(line) else strict_json.dumps(row)) + "\n"


def _unread_metadata(folder: Path) -> list[Path]:
    found = [path for name in _OTHER_METADATA for path in folder.rglob(name)]
    return sorted([*found, *(path for path in folder.rglob(METADATA_NAME) if path.parent != folder)])
