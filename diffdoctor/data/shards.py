"""Reading labelled pictures from WebDataset tar shards with a Parquet manifest, defensively.

A sample is `key.png|jpg|webp|...`, `key.mask.png` (uint8 soft map), `key.json`, and where a person could not decide
`key.ignore.png` (above 0: not decided). Any WebDataset reader can read them;
the one here needs only the standard library, numpy and Pillow, never extracts a file, and refuses what a hostile
archive may hold. `manifest.parquet` has the byte range of each picture, so that any of them can be read alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np

from diffdoctor.data.codec import PICTURE_TYPES, SUFFIXES, PictureReader, SizeCheck, UnreadablePicture, decode
from diffdoctor.data.manifest import IGNORE_OFFSETS, MANIFEST, OFFSETS, PICTURE_FILE, read_columns
from diffdoctor.data.store_path import Location, StorePath, at, beside, stored_files
from diffdoctor.data.tar import IGNORE, MASK, MAX_MEMBER_BYTES, SkipCounts, group_ranges, placed_groups
from diffdoctor.data.text import is_unicode
from diffdoctor.runs.errors import UserError, expected, first_line


class BrokenSample(UserError):
    """A sample that cannot be used.

    Attributes:
        reason: what is wrong.
        where: the shard and the key.
        detail: of this case; "": nothing more.
    """

    def __init__(self, reason: str, where: str, detail: str = ""):
        super().__init__(reason, where, detail)
        self.reason, self.where, self.detail = reason, where, detail

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def shard_paths(source: str | Location | Iterable[str | Location]) -> list[Location]:
    """The tar files of a folder (sorted by name), of one file, or of a list of these.

    In a store, those of a set with a manifest are the ones that it names: others may be what a killed process left.

    Raises:
        UserError: no shards there.
    """
    if not isinstance(source, (str, Path, StorePath)):
        return [path for item in source for path in shard_paths(item)]
    source = at(source)
    if source.is_dir():
        # Hidden ones are what a kill left, or the system's.
        found = sorted(p for p in source.iterdir() if p.suffix.lower() == ".tar" and not p.name.startswith("."))
        if isinstance(source, StorePath) and (source / MANIFEST).is_file():
            named = {*read_columns(source, ("shard",))["shard"]}
            found = [path for path in found if path.name in named]
        if not found:
            raise UserError(expected(source, "a folder with .tar shards", "a folder without"))
        return found
    if not source.is_file():
        raise UserError(expected(source, "a folder of shards or a shard", "nothing there"))
    return [source]


def read_shards(
    source: str | Location | Iterable[str | Location],
    *,
    strict: bool = False,
    counts: SkipCounts | None = None,
    split: tuple[int, int] = (0, 1),
    masks: str = "required",
    check: SizeCheck | None = None,
    read: PictureReader | None = None,
    placed: bool = False,
) -> Iterator[dict[str, Any]]:
    """Stream labelled pictures from shards, in order; memory holds one sample at a time.

    Args:
        source: a folder of shards, one shard, or a list of these.
        strict: raise `UserError` at the first bad member instead of skipping and counting it.
        counts: filled with what was skipped.
        split: (index, count): this reader takes every count-th shard from index on, for workers and processes.
        masks: "required", as training needs them; "optional": a picture without a mask counts as clean; "ignored".
        check: see `codec.decode`.
        read: see `decode_sample`.
        placed: say where the picture lies in its shard.

    Yields:
        The sample's JSON values with `picture` (H, W, 3) uint8, `mask` (H, W) float32 in [0, 1], `key`, `shard`,
        `ignore` (H, W) bool where the sample has it, and with `placed` `picture_at`, (offset, size) in bytes.

    Raises:
        UserError: no shards there; with `strict`, a broken member or sample.
    """
    counts = SkipCounts() if counts is None else counts
    for path in shard_paths(source)[split[0] :: split[1]]:
        for key, found in placed_groups(path, strict, counts):
            where, members = f"{path.name}:{key}", {name: data for name, (data, _) in found.items()}
            try:
                sample = decode_sample(members, where, masks, check, read) | {"key": key, "shard": path.name}
                if placed:
                    data, offset = found[_picture_member(members, where)]
                    sample["picture_at"] = offset, len(data)
                yield sample
            except BrokenSample as error:
                counts.add(error.reason, error.where, strict, error.detail)


def decode_sample(
    members: dict[str, bytes],
    where: str,
    masks: str = "required",
    check: SizeCheck | None = None,
    read: PictureReader | None = None,
) -> dict[str, Any]:
    """A sample's JSON values, `picture` (H, W, 3) uint8, `mask` (H, W) float32 in [0, 1], and `ignore` (H, W) bool.

    Args:
        members: {extension: bytes}, as `tar.read_groups` gives them.
        where: the shard and the key, for errors.
        masks: see `read_shards`; "ignored" gives neither `mask` nor `ignore`.
        check: see `codec.decode`.
        read: reads the picture in place of `codec.decode`, with masks "ignored".

    Raises:
        BrokenSample: no picture, no mask, or a broken member.
    """
    name = _picture_member(members, where)
    meta = _meta(members.get("json"), where)
    picture = _decoded(members[name], "RGB", "picture", where, check, read)
    if masks == "ignored":
        return {**meta, "picture": picture}
    if MASK not in members:
        # Real pictures are clean; any other without a mask is not labelled.
        if masks == "required" and meta.get("label") != "real":
            raise BrokenSample("a sample without a mask", where)
        mask = np.zeros(picture.shape[:2], np.float32)
    else:
        mask = _decoded(members[MASK], "L", "mask", where).astype(np.float32) / 255.0
    if mask.shape != picture.shape[:2]:
        raise BrokenSample("a mask of another size than its picture", where)
    sample = {**meta, "picture": picture, "mask": mask}
    if IGNORE in members:
        sample["ignore"] = _decoded(members[IGNORE], "L", "mask", where) > 0
        if sample["ignore"].shape != picture.shape[:2]:
            raise BrokenSample("a mask of another size than its picture", where)
    return sample


def _picture_member(members: Collection[str], where: str) -> str:
    """The name of the member that is the sample's picture, such as "jpg", or "input.jpg" in others' shards."""
    for name in PICTURE_TYPES:
        if name in members:
            return name
    found = [name for name in members if name not in ("json", MASK, IGNORE)]
    if not found:
        raise BrokenSample("a sample without a picture", where)
    if len(found) > 1:
        raise BrokenSample("a sample of several pictures", where, ", ".join(sorted(found)[:4]))
    return found[0]


def _decoded(
    data: bytes,
    mode: str,
    what: str,
    where: str,
    check: SizeCheck | None = None,
    read: PictureReader | None = None,
) -> Any:
    try:
        return decode(data, mode, check=check) if read is None else read(data)
    except UnreadablePicture as error:
        raise BrokenSample(error.reason.replace("picture", what), where, error.detail) from None


def _meta(data: bytes | None, where: str) -> dict[str, Any]:
    """A sample's JSON values, of which those that are known have their type."""
    if data is None:
        return {}
    try:
        if len(data) > _MAX_JSON_BYTES:
            raise ValueError(f"more than {_MAX_JSON_BYTES:,} bytes")
        meta = json.loads(data)
        if not isinstance(meta, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise BrokenSample("a broken JSON member", where, first_line(error)) from None
    for name in _TEXTS:
        value = meta.get(name)
        if not (value is None or (isinstance(value, str) and is_unicode(value))):
            # Numbers name a class; of anything else nothing is known.
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BrokenSample("a JSON value that is no text", where, name)
            meta[name] = str(value)
    number = meta.get("round", 0)
    if not (number is None or (type(number) is int and abs(number) < 2**31)):
        raise BrokenSample("a JSON value that is no whole number", where, "round")
    return meta


class ShardData:
    """Random access to a folder of shards with a manifest: `len(data)`, `data[i]` (see `samples.DetectorData`).

    Only the manifest's columns are held in memory (about 200 bytes a picture; by `mapped.MappedData` none); a picture
    is read from its byte range in its shard when it is asked for.

    Args:
        folder: what `shard_writer.write_shards` wrote; in a store, its URL.
        manifest: path of the manifest from the folder, where it is that of a part of the set.

    Attributes:
        keys: (N,) names of the samples.
        categories: (N,) what the pictures show; "" where it is not known.
        generators: (N,) what made the pictures; "" where it is not known.
        labels: (N,) real, injected, human or pseudo.
        shards: (N,) file names of the samples' shards.
        mask_max: (N,) float32 in [0, 1], largest value of each mask.
        sizes: (N, 2) height and width in pixels.
        byte_ranges: (N, 6) int64, offset and size in bytes of picture, mask and JSON in their shard.
        ignore_ranges: (N, 2) int64, the same of what says where a picture is not decided; size 0: there is none.
        picture_files: (N,) of a label set, paths from its folder of the files in which the pictures' ranges lie; "" for
            a picture that lies with its mask.

    Raises:
        UserError: no manifest, or one that does not match the shards.
        BrokenSample: at `data[i]`, a picture that does not lie where the manifest has it, or is broken.
    """

    def __init__(self, folder: str | Location, manifest: str = MANIFEST):
        self.folder = at(folder)
        for name, column in self._columns(manifest).items():
            setattr(self, name, column)
        shards, files = set(self.shards), set(self.picture_files) - {""}
        self._stored = stored_files(self.folder, sorted(shards | files))
        for shard in sorted(shards):
            if PurePosixPath(shard).name != shard or not self.file(shard).is_file():
                raise UserError(f"{self.folder}: the manifest names the shard {shard!r}, which is not there")
        for name in sorted(files):
            if PurePosixPath(name).suffix.lower() not in (".tar", *SUFFIXES) or not self.file(name).is_file():
                raise UserError(f"{self.folder}: the pictures of this label set are not there ({name})")
        for ranges in (self.byte_ranges, self.ignore_ranges):
            if (ranges < 0).any() or (ranges[:, 1::2] > MAX_MEMBER_BYTES).any():
                raise UserError(f"{self.folder}: the manifest holds impossible offsets or sizes")

    def _columns(self, manifest: str) -> dict[str, Any]:
        """The attributes that are columns of the manifest."""
        return attributes_of(read_columns(self.folder, MANIFEST_COLUMNS, manifest))

    def file(self, name: str) -> Location:
        """A file that the manifest names."""
        return self._stored.get(name) or beside(self.folder, name)

    def __len__(self) -> int:
        return len(self.keys)

    def fingerprint(self) -> str:
        """A hash of which pictures the set holds and where, from the manifest alone."""
        digest = hashlib.sha256(self.ignore_ranges.tobytes() if self.ignore_ranges.any() else b"")
        for begin in range(0, len(self), _BLOCK):
            block = slice(begin, begin + _BLOCK)
            for column in (self.keys[block], self.shards[block].astype(str), self.byte_ranges[block]):
                digest.update(np.ascontiguousarray(column).tobytes())
            if any(self.picture_files[block]):
                digest.update("\n".join(self.picture_files[block]).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**decode_sample(self.members(index), self._where(index)), "key": str(self.keys[index])}

    def picture(self, index: int) -> np.ndarray:
        """A picture (H, W, 3) uint8 alone.

        Raises:
            BrokenSample: it is not there, or broken.
        """
        return decode_sample(self.members(index), self._where(index), masks="ignored")["picture"]

    def members(self, index: int) -> dict[str, bytes]:
        """A sample's bytes, {extension: bytes}: the picture, of whatever type, as "png", mask.png, json, ignore.png.

        Raises:
            BrokenSample: a file cannot be read.
        """
        ranges = [*self.byte_ranges[index].reshape(3, 2), self.ignore_ranges[index]]
        pieces = []
        try:
            if self.picture_files[index]:
                pieces += _pieces(self.file(self.picture_files[index]), ranges[:1])
                ranges = ranges[1:]
            pieces += _pieces(self.file(self.shards[index]), ranges)
        except OSError as error:
            raise BrokenSample(f"cannot be read ({error.strerror})", self._where(index)) from error
        named = zip(("png", MASK, "json", IGNORE), pieces, strict=True)
        # A mask that is not there is for `decode_sample` to judge.
        return {name: data for name, data in named if data or name not in (MASK, IGNORE)}

    def _where(self, index: int) -> str:
        return f"{self.folder / self.shards[index]}:{self.keys[index]}"


def attributes_of(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of `ShardData` by its attributes' names, from those of the manifest."""
    columns = {name: rows[column] for name, column in COLUMN_OF.items()}
    columns["sizes"] = np.stack([rows["height"], rows["width"]], axis=1)
    columns["byte_ranges"] = np.stack([rows[name] for name in OFFSETS], axis=1)
    columns["ignore_ranges"] = np.stack([rows[name] for name in IGNORE_OFFSETS], axis=1)
    return columns


def _pieces(path: Location, ranges: Iterable[Sequence[int]]) -> list[bytes]:
    """What lies at (offset, size) in a file, of each of the ranges; in one read, where they follow one another."""
    pieces, ranges = [], [(int(offset), int(size)) for offset, size in ranges]
    there = [(offset, offset + size) for offset, size in ranges if size] or [(0, 0)]
    begin, end = min(first for first, _ in there), max(last for _, last in there)
    with path.open("rb") as file:
        if end - begin <= sum(size for _, size in ranges) + _BETWEEN * len(there):
            file.seek(begin)
            data = file.read(end - begin)
            return [data[offset - begin : offset - begin + size] if size else b"" for offset, size in ranges]
        for offset, size in ranges:
            file.seek(offset)
            pieces.append(file.read(size))
    return pieces


def picture_ranges(path: Location) -> dict[str, tuple[int, int]]:
    """Where the pictures of a shard lie, (offset, size) in bytes by key; without those that `read_shards` skips."""
    ranges: dict[str, tuple[int, int]] = {}
    for key, members in group_ranges(path):
        try:
            ranges[key] = members[_picture_member(members, key)]
        except BrokenSample:
            continue
    return ranges


def require_uniform_size(sets: Sequence[ShardData], option: str) -> None:
    """Check that the pictures of all sets have one size.

    Args:
        sets: the sets.
        option: that would resize them, for the error.

    Raises:
        UserError: the pictures differ in size.
    """
    sizes = np.unique(np.concatenate([each.sizes for each in sets]), axis=0)
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for height, width in sizes[:3])
        folders = ", ".join(str(each.folder) for each in sets)
        got = f"none for {folders} with {len(sizes)} sizes ({shown}{', ...' if len(sizes) > 3 else ''})"
        raise UserError(expected(option, "a side in pixels to resize the pictures to", got))


_BLOCK = 2**16  # pictures whose shards' names are held as an array
# Of values that may come from elsewhere; larger ones are no description of a picture.
_MAX_JSON_BYTES = 2**22
_TEXTS = ("prompt", "category", "generator", "label", "kind")
# Attributes of `ShardData` that are columns as they stand.
COLUMN_OF = {
    "keys": "key",
    "categories": "category",
    "generators": "generator",
    "labels": "label",
    "shards": "shard",
    "mask_max": "mask_max",
    "picture_files": PICTURE_FILE,
}
MANIFEST_COLUMNS = (*COLUMN_OF.values(), "height", "width", *OFFSETS, *IGNORE_OFFSETS)
_BETWEEN = 2 * BLOCKSIZE  # bytes between two members at most: the end of one's last block, and the next one's header
