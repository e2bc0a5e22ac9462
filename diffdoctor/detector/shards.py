"""Labelled pictures in WebDataset tar shards, with a Parquet manifest: written whole, read defensively.

A sample is `key.png|jpg|webp`, `key.mask.png` (uint8 soft map) and `key.json`. Any WebDataset reader can read them; the
one here needs only the standard library, numpy and Pillow, never extracts a file, and refuses what a hostile archive
may hold. `manifest.parquet` says where each picture stands, so that any of them can be read alone.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from diffdoctor._errors import UserError, missing_extra
from diffdoctor._io import atomic_dir, atomic_path

PICTURE_TYPES = ("png", "jpg", "jpeg", "webp")
LABELS = ("real", "injected", "human", "pseudo")
MANIFEST = "manifest.parquet"
# Bounds against decompression bombs: a member's bytes, and a picture's pixels.
MAX_MEMBER_BYTES = 256 * 2**20
MAX_PIXELS = 2**27
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]*")
_COLUMNS = (
    *("key", "shard", "label", "category", "generator", "prompt", "round"),
    *("height", "width", "mask_mean", "mask_max"),
)
_OFFSETS = ("picture_offset", "picture_size", "mask_offset", "mask_size", "json_offset", "json_size")


@dataclasses.dataclass
class SkipCounts:
    """What a reader left out, by reason; filled while reading.

    Attributes:
        reasons: {reason: count}.
        examples: {reason: the first place where it happened}.
    """

    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, where: str, strict: bool) -> None:
        """Count one, or with `strict` raise `UserError`."""
        if strict:
            raise UserError(f"{where}: {reason}")
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.examples.setdefault(reason, where)

    @property
    def total(self) -> int:
        return sum(self.reasons.values())


def write_shards(
    samples: Iterable[dict[str, Any]], folder: str | Path, *, shard_size: int = 1000, picture_type: str = "png"
) -> int:
    """Write labelled pictures as tar shards and a manifest; the folder appears when all is written.

    Args:
        samples: dicts with `picture` (H, W, 3) uint8 and `mask` (H, W) float in [0, 1] or uint8 (absent: clean), and
            any of `key` (a unique name of letters, digits, _ and -), `prompt`, `category`, `generator`, `label` (real,
            injected, human, pseudo), `round`, and further JSON values, which come back as they are.
        folder: where to; an existing folder is replaced.
        shard_size: pictures in a shard.
        picture_type: png (exact), webp (written without loss) or jpg (quality 95).

    Returns:
        The number of pictures written.

    Raises:
        ValueError: a sample's picture, mask, key or label is not as described.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: expected >= 1 pictures, got {shard_size}")
    if picture_type not in PICTURE_TYPES:
        raise ValueError(f"picture_type: expected one of {', '.join(PICTURE_TYPES)}, got {picture_type!r}")
    with atomic_dir(folder) as temporary:
        writer = _Writer(temporary, shard_size, picture_type)
        try:
            for sample in samples:
                writer.add(sample)
        finally:
            writer.close()
        writer.write_manifest()
    return writer.count


class _Writer:
    def __init__(self, folder: Path, shard_size: int, picture_type: str):
        self.folder, self.shard_size, self.picture_type = folder, shard_size, picture_type
        self.count, self.tar, self.name, self.rows, self.keys = 0, None, "", [], set()

    def add(self, sample: dict[str, Any]) -> None:
        if self.count % self.shard_size == 0:
            self.close()
            self.name = f"shard-{self.count // self.shard_size:06d}.tar"
            self.tar = tarfile.open(self.folder / self.name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        picture, mask, meta = _checked(sample, self.count)
        key = meta["key"]
        if key in self.keys:
            raise ValueError(f"key: expected a unique name, got {key!r} twice")
        self.keys.add(key)
        places = {
            "picture": self._member(f"{key}.{self.picture_type}", encode_picture(picture, self.picture_type)),
            "mask": self._member(f"{key}.mask.png", encode_mask(mask)),
            "json": self._member(f"{key}.json", json.dumps(meta, allow_nan=False).encode()),
        }
        self.rows.append(
            {
                **{name: meta[name] for name in ("key", "label", "category", "generator", "prompt", "round")},
                "shard": self.name,
                "height": picture.shape[0],
                "width": picture.shape[1],
                "mask_mean": float(mask.mean()) / 255.0,
                "mask_max": float(mask.max()) / 255.0,
                **{f"{part}_offset": place[0] for part, place in places.items()},
                **{f"{part}_size": place[1] for part, place in places.items()},
            }
        )
        self.count += 1

    def _member(self, name: str, data: bytes) -> tuple[int, int]:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        offset = self.tar.offset + tarfile.BLOCKSIZE
        self.tar.addfile(info, io.BytesIO(data))
        return offset, len(data)

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()
            self.tar = None

    def write_manifest(self) -> None:
        write_manifest(self.folder / MANIFEST, self.rows)


def write_manifest(path: Path, rows: list[dict]) -> None:
    """Write the manifest's rows (one a picture) as Parquet."""
    pa, parquet = _pyarrow()
    text, real = pa.string(), pa.float32()
    types = dict.fromkeys(_COLUMNS, text) | {"round": pa.int32(), "height": pa.int32(), "width": pa.int32()}
    types |= {"mask_mean": real, "mask_max": real} | dict.fromkeys(_OFFSETS, pa.int64())
    schema = pa.schema(list(types.items()))
    with atomic_path(path) as temporary:
        parquet.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)


def read_manifest(folder: str | Path) -> dict[str, list]:
    """The manifest's columns as lists; raises `UserError` where there is none or it cannot be read."""
    pa, parquet = _pyarrow()
    path = Path(folder) / MANIFEST
    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: no manifest that can be read ({error})") from error
    missing = [name for name in (*_COLUMNS, *_OFFSETS) if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: the manifest lacks the columns {', '.join(missing)}")
    return {name: table.column(name).to_pylist() for name in (*_COLUMNS, *_OFFSETS)}


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "stages") from None
    return pyarrow, pyarrow.parquet


def _checked(sample: dict[str, Any], index: int) -> tuple[np.ndarray, np.ndarray, dict]:
    picture = np.asarray(sample["picture"])
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        raise ValueError(f"picture: expected (H, W, 3) uint8, got {picture.shape} {picture.dtype} at sample {index}")
    mask = sample.get("mask")
    mask = np.zeros(picture.shape[:2], np.uint8) if mask is None else np.asarray(mask)
    if mask.shape != picture.shape[:2]:
        raise ValueError(f"mask: expected {picture.shape[:2]}, got {mask.shape} at sample {index}")
    if mask.dtype != np.uint8:
        if not np.all((mask >= 0) & (mask <= 1)):
            raise ValueError(f"mask: expected values in [0, 1], got others at sample {index}")
        mask = np.rint(mask.astype(np.float64) * 255).astype(np.uint8)
    meta = {k: v for k, v in sample.items() if k not in ("picture", "mask")}
    meta.setdefault("key", f"{index:09d}")
    if not isinstance(meta["key"], str) or not _KEY.fullmatch(meta["key"]) or len(meta["key"]) > 80:
        raise ValueError(f"key: expected up to 80 letters, digits, _ and -, got {meta['key']!r}")
    for name in ("prompt", "category", "generator"):
        meta[name] = str(meta.get(name) or "")
    meta["label"] = meta.get("label") or ("injected" if mask.any() else "real")
    if meta["label"] not in LABELS:
        raise ValueError(f"label: expected one of {', '.join(LABELS)}, got {meta['label']!r}")
    meta["round"] = int(meta.get("round") or 0)
    return picture, mask, meta


def encode_picture(picture: np.ndarray, picture_type: str) -> bytes:
    """(H, W, 3) uint8 as PNG, lossless WebP or JPEG of quality 95."""
    from PIL import Image

    options = {"png": {"format": "PNG"}, "webp": {"format": "WEBP", "lossless": True}}
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, **options.get(picture_type, {"format": "JPEG", "quality": 95}))
    return buffer.getvalue()


def encode_mask(mask: np.ndarray) -> bytes:
    """(H, W) uint8 as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()


def decode(data: bytes, mode: str) -> np.ndarray:
    """A picture's bytes as uint8 (H, W, 3) for mode "RGB" or (H, W) for "L", turned upright as its camera flagged it.

    Raises:
        ValueError: not a PNG, JPEG or WebP picture, broken, or too large.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            return np.asarray(ImageOps.exif_transpose(image).convert(mode))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def shard_paths(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """The tar files of a folder (sorted by name), of one file, or of a list of files."""
    if not isinstance(source, (str, Path)):
        return [path for item in source for path in shard_paths(item)]
    source = Path(source)
    if source.is_dir():
        found = sorted(source.glob("*.tar"))
        if not found:
            raise UserError(f"{source}: no .tar shards in this folder")
        return found
    if not source.is_file():
        raise UserError(f"{source}: no such folder or shard")
    return [source]


def read_shards(
    source: str | Path | Iterable[str | Path],
    *,
    strict: bool = False,
    counts: SkipCounts | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, Any]]:
    """Stream labelled pictures from shards, in order; memory holds one sample at a time.

    Args:
        source: a folder of shards, one shard, or a list of these.
        strict: raise `UserError` at the first bad member instead of leaving it out and counting.
        counts: filled with what was left out.
        part: (index, number): this reader takes every number-th shard from index on, for workers and processes.

    Yields:
        The sample's JSON values with `picture` (H, W, 3) uint8, `mask` (H, W) float32 in [0, 1], `key`, `shard`.

    Raises:
        UserError: no shards there; with `strict`, anything that is not as it should be.
    """
    counts = SkipCounts() if counts is None else counts
    for path in shard_paths(source)[part[0] :: part[1]]:
        seen: set[str] = set()
        for key, members in _groups(path, strict, counts):
            where = f"{path.name}:{key}"
            if key in seen:
                counts.add("a key twice", where, strict)
                continue
            seen.add(key)
            sample = _decode_sample(members, where, strict, counts)
            if sample is not None:
                yield {**sample, "key": key, "shard": path.name}


def _groups(path: Path, strict: bool, counts: SkipCounts) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) of neighbouring members; what is not a plain, well-named, small file is left out."""
    current, members = None, {}
    try:
        with tarfile.open(path, "r:") as tar:
            ended = _has_end_mark(path)
            for info in tar:
                # The list that tarfile keeps of its members would grow with the shard.
                tar.members = []
                fault = _fault(info)
                if fault:
                    counts.add(fault, f"{path.name}:{info.name[:80]!r}", strict)
                    continue
                key, _, extension = info.name.partition(".")
                if key != current:
                    if current is not None:
                        yield current, members
                    current, members = key, {}
                data = tar.extractfile(info).read()
                if len(data) != info.size:
                    raise tarfile.ReadError("unexpected end of data")
                members[extension.lower()] = data
            if not ended:
                # tarfile takes a missing end for an end.
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, OSError, ValueError) as error:
        # The group being read may lack members: it is left out with the rest of the shard.
        counts.add("a shard cut short or not a tar file", f"{path.name} ({error})", strict)
        return
    if current is not None:
        yield current, members


def _has_end_mark(path: Path) -> bool:
    """Whether the archive ends in two blocks of zeros, as all complete ones do."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2 * tarfile.BLOCKSIZE))
        return file.read() == bytes(2 * tarfile.BLOCKSIZE)


def _fault(info: tarfile.TarInfo) -> str | None:
    if not info.isreg():
        return "a member that is not a plain file (link, device or folder)"
    name = PurePosixPath(info.name)
    if name.is_absolute() or ".." in name.parts or "\\" in info.name or "\0" in info.name:
        return "a member with an absolute path or '..'"
    key, _, extension = info.name.partition(".")
    if not _KEY.fullmatch(key) or not extension:
        return "a member whose name is not key.extension"
    if info.size > MAX_MEMBER_BYTES:
        return f"a member of more than {MAX_MEMBER_BYTES} bytes"
    return None


def _decode_sample(members: dict[str, bytes], where: str, strict: bool, counts: SkipCounts) -> dict[str, Any] | None:
    pictures = [name for name in PICTURE_TYPES if name in members]
    if not pictures:
        return counts.add("a sample without a picture", where, strict)
    try:
        meta = json.loads(members["json"]) if "json" in members else {}
        if not isinstance(meta, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError):
        return counts.add("a broken JSON member", where, strict)
    try:
        picture = decode(members[pictures[0]], "RGB")
    except ValueError:
        return counts.add("a broken picture", where, strict)
    if "mask.png" not in members:
        # Real pictures are clean by what they are; anything else without a mask is not labelled.
        if meta.get("label") != "real":
            return counts.add("a sample without a mask", where, strict)
        mask = np.zeros(picture.shape[:2], np.float32)
    else:
        try:
            mask = decode(members["mask.png"], "L").astype(np.float32) / 255.0
        except ValueError:
            return counts.add("a broken mask", where, strict)
    if mask.shape != picture.shape[:2]:
        return counts.add("a mask of another size than its picture", where, strict)
    return {**meta, "picture": picture, "mask": mask}


class ShardData:
    """Random access to a folder of shards with a manifest: `len(data)`, `data[i]` (see `samples.DetectorData`).

    Only the manifest's columns are held in memory (about 100 bytes a picture); a picture is read from its place in its
    shard when it is asked for.

    Args:
        folder: what `write_shards` wrote.

    Raises:
        UserError: no manifest, or (at `data[i]`) a picture that is not where the manifest says, or broken.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        rows = read_manifest(folder)
        self.keys, self.categories, self.generators = rows["key"], rows["category"], rows["generator"]
        self.labels, self.shards = rows["label"], rows["shard"]
        self.mask_max = np.array(rows["mask_max"], np.float32)
        self.places = np.array([rows[name] for name in _OFFSETS], np.int64).T.reshape(-1, 6)
        for shard in sorted(set(self.shards)):
            if PurePosixPath(shard).name != shard or not (self.folder / shard).is_file():
                raise UserError(f"{self.folder}: the manifest names the shard {shard!r}, which is not there")
        if (self.places < 0).any() or (self.places[:, 1::2] > MAX_MEMBER_BYTES).any():
            raise UserError(f"{self.folder}: the manifest holds impossible offsets or sizes")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        parts = []
        with open(self.folder / self.shards[index], "rb") as file:
            for offset, size in self.places[index].reshape(3, 2):
                file.seek(int(offset))
                parts.append(file.read(int(size)))
        members = {"png": parts[0], "mask.png": parts[1], "json": parts[2]}
        where = f"{self.shards[index]}:{self.keys[index]}"
        return {**_decode_sample(members, where, True, SkipCounts()), "key": self.keys[index]}
