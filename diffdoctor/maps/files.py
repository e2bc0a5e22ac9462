"""Pictures, captions and maps on the disk."""

from __future__ import annotations

import json
import posixpath
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_path, atomic_write_text

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAP_ENDING = ".mask.png"  # the ending that maps have in shards too
METADATA_NAME = "metadata.jsonl"
_OTHER_METADATA = ("metadata.csv", "metadata.parquet")  # which `imagefolder` reads too
_CAPTION_FIELDS = ("text", "caption", "prompt")
_MODES_OF_ONE_BAND = {"1": 1.0, "L": 255.0, "I;16": 65535.0, "I": 65535.0}


@dataclass(frozen=True)
class Record:
    """One training picture.

    Attributes:
        picture: a file, a PIL picture or a uint8 array (H, W, 3).
        confidence: its map: a file, an array (uint8 0..255, bool, or float in [0, 1]) of shape (H', W') in
            the picture's proportions; None where there is no map.
        caption: the prompt that belongs to it.
    """

    picture: Any
    confidence: Any = None
    caption: str = ""


def find_map(picture, maps=None, root=None) -> Path | None:
    """The map file of a picture, or None.

    Args:
        picture: the picture's file, such as `set/cat.jpg`.
        maps: the folder of maps; None looks beside the picture.
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


def read_picture(picture):
    """A picture (file, PIL picture or uint8 (H, W, 3) array) as a PIL picture in mode RGB, upright.

    A camera's rotation flag is carried out, since what the detector saw was upright as well.
    """
    from PIL import Image, ImageOps

    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(f"picture: expected (H, W, 3) uint8, got {picture.shape} {picture.dtype}")
        return Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return ImageOps.exif_transpose(picture).convert("RGB")
    with Image.open(picture) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def read_map(confidence) -> np.ndarray:
    """A confidence map as float32 (H, W) in [0, 1].

    Args:
        confidence: a PNG of one band (8 or 16 bits; or three equal bands), such a picture in PIL, an `.npy` file,
            or an array or tensor: uint8 0..255, bool, or floats in [0, 1]; shape (H, W), (H, W, 1) or (1, H, W).

    Raises:
        TypeError: an array of another dtype.
        ValueError: a coloured or transparent picture (a heat map is not a map), other shapes, values outside [0, 1].
    """
    name = "confidence" if not isinstance(confidence, (str, Path)) else str(confidence)
    if isinstance(confidence, (str, Path)):
        path = Path(confidence)
        confidence = np.load(path, allow_pickle=False) if path.suffix == ".npy" else _open_bands(path)
    elif hasattr(confidence, "getbands"):  # a PIL picture, without importing PIL to ask
        confidence = _bands(confidence, name)
    elif isinstance(confidence, torch.Tensor):
        confidence = confidence.detach().cpu()
        if confidence.dtype.is_floating_point and confidence.dtype.itemsize < 4:  # numpy has no bfloat16
            confidence = confidence.float()
    values = np.asarray(confidence)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[:, :, 0]
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name}: expected a map of shape (H, W), got {tuple(np.shape(confidence))}")
    if values.dtype == np.uint8:
        return values.astype(np.float32) / 255.0
    if values.dtype == np.bool_:
        return values.astype(np.float32)
    if not np.issubdtype(values.dtype, np.floating):
        raise TypeError(f"{name}: expected uint8, bool or floating-point values, got {values.dtype}")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):
        hint = "; give 0..255 as uint8" if high > 1.0 else ""
        raise ValueError(f"{name}: expected values in [0, 1], got {low:g}..{high:g}{hint}")
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
    raise ValueError(f"{name}: expected a grey picture (0 clean .. 255 artifact), got mode {image.mode} with colours")


def write_map(path, confidence) -> None:
    """Write a map (see `read_map` for what it may be) as an 8-bit grey PNG, whole or not at all."""
    from PIL import Image

    values = np.rint(read_map(confidence) * 255.0).astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(values).save(temporary, format="PNG", optimize=True)


class ShardRecords(Sequence):
    """The pictures of shards with a manifest as records, read one by one when they are asked for.

    Args:
        folder: what `diffdoctor.data.shard_writer.write_shards` wrote; the masks are the confidence maps.
    """

    def __init__(self, folder):
        from diffdoctor.data.shards import ShardData

        self.data = ShardData(folder)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        sample = self.data[index]
        return Record(sample["picture"], sample["mask"], sample.get("prompt", ""))


def read_folder(folder, maps=None, *, caption: str = "") -> list[Record]:
    """The pictures of a folder and its subfolders, each with its caption and its map.

    Args:
        folder: of pictures. Captions stand in `metadata.jsonl` (`file_name` and `text`, `caption` or `prompt`), or
            beside each picture in a `.txt` file.
        maps: folder of the maps, mirroring `folder`; None looks beside each picture for `<stem>.mask.png`.
        caption: for pictures that have none.

    Returns:
        Records in the order of their paths; the map of a picture that has none is None. Warns where pictures have no
        caption and other metadata stands there, which is not read: a `metadata.csv`, or one in a subfolder.

    Raises:
        UserError: no folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of pictures, there is none")
    if maps is not None and not Path(maps).is_dir():
        raise UserError(f"{maps}: expected a folder of maps, there is none")
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
        raise UserError(f"{folder}: expected pictures ({', '.join(PICTURE_SUFFIXES)}), found none")
    unread = _unread_metadata(folder) if bare else []
    if unread:
        warnings.warn(
            f"{bare} of {len(records)} pictures have no caption of their own, and {unread[0]} is not read", stacklevel=2
        )
    return records


def write_metadata(folder, maps) -> int:
    """Write `folder/metadata.jsonl`, with which Hugging Face's `imagefolder` gives the columns image, text, confidence.

    Rows that stand there already keep their order and their other columns, a `text` included; pictures without a row
    come after them.

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
        raise UserError(f"{maps}: expected a folder inside {folder}, move or copy the maps there")
    if unread := _unread_metadata(folder):
        raise UserError(f"{unread[0]}: expected all captions in {folder / METADATA_NAME}, move them there")
    records = {}
    for record in read_folder(folder, maps):
        if record.confidence is None:
            raise UserError(f"{record.picture}: expected a map in {maps}, there is none")
        records[record.picture.relative_to(folder).as_posix()] = record
    named = _read_metadata(folder)
    for name, _ in named:
        if name not in records:
            raise UserError(f"{folder / METADATA_NAME}: expected a picture for each row, {name} is none")
    known = {name for name, _ in named}
    named += [(name, {"file_name": name}) for name in records if name not in known]
    for name, row in named:
        row["confidence_file_name"] = records[name].confidence.relative_to(folder).as_posix()
        if row.get("text") is None:
            row["text"] = records[name].caption
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in named)
    atomic_write_text(folder / METADATA_NAME, lines)
    return len(records)


def _unread_metadata(folder: Path) -> list[Path]:
    found = [path for name in _OTHER_METADATA for path in folder.rglob(name)]
    return sorted([*found, *(path for path in folder.rglob(METADATA_NAME) if path.parent != folder)])


def _read_metadata(folder: Path) -> list[tuple[str, dict]]:
    """The rows in their order, each with its picture's path below the folder."""
    path = folder / METADATA_NAME
    rows = []
    # Not splitlines(), which cuts at U+2028 inside a caption too.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n") if path.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((posixpath.normpath(row["file_name"]), row))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: expected a JSON object with a file_name ({error})") from None
    return rows


def _caption(row: dict) -> str | None:
    return next((row[field] for field in _CAPTION_FIELDS if row.get(field) is not None), None)
