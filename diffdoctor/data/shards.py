"""Labelled pictures in WebDataset tar shards, with a Parquet manifest: written whole, read defensively.

A sample is `key.png|jpg|webp`, `key.mask.png` (uint8 soft map) and `key.json`. Any WebDataset reader can read them; the
one here needs only the standard library, numpy and Pillow, never extracts a file, and refuses what a hostile archive
may hold. `manifest.parquet` says where each picture stands, so that any of them can be read alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from diffdoctor.data.codec import PICTURE_TYPES, decode
from diffdoctor.data.manifest import OFFSETS, read_columns
from diffdoctor.data.tar import MAX_MEMBER_BYTES, SkipCounts, read_groups
from diffdoctor.runs.errors import UserError


class BrokenSample(UserError):
    """A sample that is not as it should be; `reason` says how, `where` says which.

    Args:
        reason: what is wrong.
        where: the shard and the key.
    """

    def __init__(self, reason: str, where: str):
        super().__init__(reason, where)
        self.reason, self.where = reason, where

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


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
    masks: str = "required",
) -> Iterator[dict[str, Any]]:
    """Stream labelled pictures from shards, in order; memory holds one sample at a time.

    Args:
        source: a folder of shards, one shard, or a list of these.
        strict: raise `UserError` at the first bad member instead of leaving it out and counting.
        counts: filled with what was left out.
        part: (index, number): this reader takes every number-th shard from index on, for workers and processes.
        masks: "required", as training needs them; "optional": what has none counts as clean; "ignored".

    Yields:
        The sample's JSON values with `picture` (H, W, 3) uint8, `mask` (H, W) float32 in [0, 1], `key`, `shard`.

    Raises:
        UserError: no shards there; with `strict`, anything that is not as it should be.
    """
    counts = SkipCounts() if counts is None else counts
    for path in shard_paths(source)[part[0] :: part[1]]:
        for key, members in read_groups(path, strict, counts):
            try:
                yield {**decode_sample(members, f"{path.name}:{key}", masks), "key": key, "shard": path.name}
            except BrokenSample as error:
                counts.add(error.reason, error.where, strict)


def decode_sample(members: dict[str, bytes], where: str, masks: str = "required") -> dict[str, Any]:
    """A sample's JSON values, `picture` (H, W, 3) uint8 and `mask` (H, W) float32 in [0, 1].

    Args:
        members: {extension: bytes}, as `tar.read_groups` gives them.
        where: what errors call it.
        masks: see `read_shards`; "ignored" gives no `mask`.

    Raises:
        BrokenSample: no picture, no mask, or one of the parts is broken.
    """
    pictures = [name for name in PICTURE_TYPES if name in members]
    if not pictures:
        raise BrokenSample("a sample without a picture", where)
    try:
        meta = json.loads(members["json"]) if "json" in members else {}
        if not isinstance(meta, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError):
        raise BrokenSample("a broken JSON member", where) from None
    try:
        picture = decode(members[pictures[0]], "RGB")
    except ValueError:
        raise BrokenSample("a broken picture", where) from None
    if masks == "ignored":
        return {**meta, "picture": picture}
    if "mask.png" not in members:
        # Real pictures are clean by what they are; anything else without a mask is not labelled.
        if masks == "required" and meta.get("label") != "real":
            raise BrokenSample("a sample without a mask", where)
        mask = np.zeros(picture.shape[:2], np.float32)
    else:
        try:
            mask = decode(members["mask.png"], "L").astype(np.float32) / 255.0
        except ValueError:
            raise BrokenSample("a broken mask", where) from None
    if mask.shape != picture.shape[:2]:
        raise BrokenSample("a mask of another size than its picture", where)
    return {**meta, "picture": picture, "mask": mask}


class ShardData:
    """Random access to a folder of shards with a manifest: `len(data)`, `data[i]` (see `samples.DetectorData`).

    Only the manifest's columns are held in memory (about 200 bytes a picture); a picture is read from its place in its
    shard when it is asked for.

    Args:
        folder: what `write_shards` wrote.

    Raises:
        UserError: no manifest, or one that does not fit the shards.
        BrokenSample: at `data[i]`, a picture that is not where the manifest says, or broken.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        rows = read_columns(folder, (*_KEPT, *OFFSETS))
        self.keys, self.categories, self.generators = rows["key"], rows["category"], rows["generator"]
        self.labels, self.shards, self.mask_max = rows["label"], rows["shard"], rows["mask_max"]
        self.sizes = np.stack([rows["height"], rows["width"]], axis=1)
        self.places = np.stack([rows[name] for name in OFFSETS], axis=1)
        for shard in sorted(set(self.shards)):
            if PurePosixPath(shard).name != shard or not (self.folder / shard).is_file():
                raise UserError(f"{self.folder}: the manifest names the shard {shard!r}, which is not there")
        if (self.places < 0).any() or (self.places[:, 1::2] > MAX_MEMBER_BYTES).any():
            raise UserError(f"{self.folder}: the manifest holds impossible offsets or sizes")

    def __len__(self) -> int:
        return len(self.keys)

    def fingerprint(self) -> str:
        """A hash of which pictures the set holds and where, from the manifest alone."""
        digest = hashlib.sha256()
        for begin in range(0, len(self), _BLOCK):
            block = slice(begin, begin + _BLOCK)
            for column in (self.keys[block], self.shards[block].astype(str), self.places[block]):
                digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        parts = []
        key, where = str(self.keys[index]), f"{self.folder / self.shards[index]}:{self.keys[index]}"
        try:
            with open(self.folder / self.shards[index], "rb") as file:
                for offset, size in self.places[index].reshape(3, 2):
                    file.seek(int(offset))
                    parts.append(file.read(int(size)))
        except OSError as error:
            raise BrokenSample(f"cannot be read ({error.strerror})", where) from error
        return {**decode_sample({"png": parts[0], "mask.png": parts[1], "json": parts[2]}, where), "key": key}


def one_size(sets: Sequence[ShardData], option: str) -> None:
    """Refuse sets whose pictures differ in size, where the option of this name says no size to bring them to."""
    sizes = np.unique(np.concatenate([one.sizes for one in sets]), axis=0)
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for height, width in sizes[:3])
        raise UserError(
            f"{option}: expected a side in pixels, since the pictures in {', '.join(str(s.folder) for s in sets)} have "
            f"{len(sizes)} sizes ({shown}{', ...' if len(sizes) > 3 else ''})"
        )


_BLOCK = 2**16  # pictures whose shards' names are held as an array
_KEPT = ("key", "category", "generator", "label", "shard", "mask_max", "height", "width")
