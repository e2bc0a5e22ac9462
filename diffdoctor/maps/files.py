"""Pictures, captions and maps on the disk."""

from __future__ import annotations

import json
import os
import posixpath
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_path, atomic_write_text

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAP_ENDING = ".mask.png"  # as in shards
METADATA_NAME = "metadata.jsonl"
_OTHER_METADATA = ("metadata.csv", "metadata.parquet")  # which `imagefolder` reads too
_CAPTION_FIELDS = ("text", "caption", "prompt")
_MODES_OF_ONE_BAND = {"1": 1.0, "L": 255.0, "I;16": 65535.0, "I": 65535.0}


# A file, a PIL picture or a uint8 array (H, W, 3).
PictureLike: TypeAlias = "str | os.PathLike | Image.Image | np.ndarray"
# A file, a PIL picture, or an array or tensor; see `read_map`.
MapLike: TypeAlias = "str | os.PathLike | Image.Image | np.ndarray | torch.Tensor"


@dataclass(frozen=True)
class Record:
    """One training picture.

    Attributes:
        picture: a file, a PIL picture or a uint8 array (H, W, 3).
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
        The first that exists of `cat.mask.png`, and in a folder of maps also of `cat.png` and `cat.npy`.
    """
    picture = Path(picture)
    if maps is None:
        candidates = [picture.with_name(picture.stem + MAP_ENDING)]
    else:
        folder = Path(maps) / (picture.parent.relative_to(root) if root is not None else "")
        candidates = [folder / (picture.stem + ending) for ending in (MAP_ENDING, ".png", ".npy")]
    return next((path for path in candidates if path.is_file()), None)


def read_picture(picture: PictureLike) -> Image.Image:
    """Read a picture, rotated upright by its EXIF orientation, as the detector sees it.

    Args:
        picture: a file, a PIL picture or a uint8 array (H, W, 3).

    Returns:
        A PIL picture in mode RGB.

    Raises:
        ValueError: an array of another shape or dtype.
    """
    from PIL import Image, ImageOps

    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(expected("picture", "(H, W, 3) uint8", f"{picture.shape} {picture.dtype}"))
        return Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return ImageOps.exif_transpose(picture).convert("RGB")
    with Image.open(picture) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


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
    """
    name = "confidence" if not isinstance(confidence, (str, Path)) else str(confidence)
    if isinstance(confidence, (str, Path)):
        path = Path(confidence)
        confidence = np.load(path, allow_pickle=False) if path.suffix == ".npy" else _open_bands(path)
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


def _open_bands(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return _bands(image, str(path))


def _bands(image, name: str) -> np.ndarray:
    image = image.convert("RGB") if image.mode == "P" else image
    if image.mode in _MODES_OF_ONE_BAND:
        return np.asarray(image).astype(np.float32) / _MODES_OF_ONE_BAND[image.mode]
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
        folder: what `diffdoctor.data.shard_writer.write_shards` wrote; the masks are the confidence maps.
    """

    def __init__(self, folder: str | os.PathLike):
        from diffdoctor.data.shards import ShardData

        self.data = ShardData(folder)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        sample = self.data[index]
        return Record(sample["picture"], sample["mask"], sample.get("prompt", ""))


def read_folder(folder: str | os.PathLike, maps: str | os.PathLike | None = None, *, caption: str = "") -> list[Record]:
    """The pictures of a folder and its subfolders, each with its caption and its map.

    Args:
        folder: of pictures. Captions are read from `metadata.jsonl` (`file_name` and `text`, `caption` or `prompt`), or
            from a `.txt` file beside each picture.
        maps: folder of the maps, mirroring `folder`; None searches beside each picture for `<stem>.mask.png`.
        caption: for pictures that have none.

    Returns:
        Records in the order of their paths; the map of a picture that has none is None. Warns where pictures have no
        caption and there is other metadata, which is not read: a `metadata.csv`, or metadata in a subfolder.

    Raises:
        UserError: no folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(expected(folder, "a folder of pictures", "none"))
    if maps is not None and not Path(maps).is_dir():
        raise UserError(expected(maps, "a folder of maps", "none"))
    captions = {name: text for name, row in _read_metadata(folder) if (text := _caption(row)) is not None}
    records, bare = [], 0
    for path in sorted(folder.rglob("*")):
        is_map = path.name.endswith(MAP_ENDING) or (maps is not None and Path(maps).resolve() in path.resolve().parents)
        if path.suffix.lower() not in PICTURE_SUFFIXES or is_map or not path.is_file():
            continue
        text = captions.get(path.relative_to(folder).as_posix())
        if text is None:
            beside = path.with_suffix(".txt")
            bare += not beside.is_file()
            text = beside.read_text(encoding="utf-8").strip() if beside.is_file() else caption
        records.append(Record(path, find_map(path, maps, folder), text))
    if not records:
        raise UserError(expected(folder, f"pictures ({', '.join(PICTURE_SUFFIXES)})", "none"))
    unread = _unread_metadata(folder) if bare else []
    if unread:
        warnings.warn(
            f"{bare} of {len(records)} pictures have no caption of their own, and {unread[0]} is not read", stacklevel=2
        )
    return records


def write_metadata(folder: str | os.PathLike, maps: str | os.PathLike) -> int:
    """Write `folder/metadata.jsonl`, from which Hugging Face's `imagefolder` reads the columns image, text, confidence.

    Existing rows keep their order and their other columns, a `text` included; pictures without a row come after them.

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
    records = {}
    for record in read_folder(folder, maps):
        if record.confidence is None:
            raise UserError(expected(record.picture, f"a map in {maps}", "none"))
        records[record.picture.relative_to(folder).as_posix()] = record
    named = _read_metadata(folder)
    for name, _ in named:
        if name not in records:
            raise UserError(expected(folder / METADATA_NAME, "a picture for each row", f"none for {name}"))
    known = {name for name, _ in named}
    named += [(name, {"file_name": name}) for name in records if name not in known]
    for name, row in named:
        row["confidence_file_name"] = records[name].confidence.relative_to(folder).as_posix()
        if row.get("text") is None:
            row["text"] = records[name].caption
    lines = "".join(strict_json.dumps(row, ensure_ascii=False) + "\n" for _, row in named)
    atomic_write_text(folder / METADATA_NAME, lines)
    return len(records)


def _unread_metadata(folder: Path) -> list[Path]:
    found = [path for name in _OTHER_METADATA for path in folder.rglob(name)]
    return sorted([*found, *(path for path in folder.rglob(METADATA_NAME) if path.parent != folder)])


def _read_metadata(folder: Path) -> list[tuple[str, dict]]:
    """The rows in their order, each with its picture's path relative to the folder."""
    path = folder / METADATA_NAME
    rows = []
    # Not splitlines(), which also splits at U+2028 inside a caption.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n") if path.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((posixpath.normpath(row["file_name"]), row))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            got = f"{line[:80]!r} ({error})"
            raise UserError(expected(f"{path}, line {number}", "a JSON object with a file_name", got)) from None
    return rows


def _caption(row: dict) -> str | None:
    return next((row[field] for field in _CAPTION_FIELDS if row.get(field) is not None), None)
