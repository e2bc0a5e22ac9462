"""Writing labelled pictures as WebDataset tar shards with a manifest."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.data.codec import WRITTEN_TYPES, decode, encode_mask, encode_picture, suffix_of
from diffdoctor.data.manifest import MANIFEST, PICTURE_FILE, ManifestWriter
from diffdoctor.data.tar import IGNORE, MASK
from diffdoctor.data.tar_writer import TarWriter
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_dir, clear_leftovers, refuse_foreign
from diffdoctor.runs.record import CONFIG, METRICS, RUN, RunFolder

# What `inject` puts beside the shards.
RECORDS = (SHEET := "contact_sheet.png", RUN, CONFIG, METRICS)
LABELS = ("real", "injected", "human", "pseudo")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,79}")


def write_shards(
    samples: Iterable[dict[str, Any]], folder: str | Path, *, shard_size: int = 1000, picture_type: str = "png"
) -> int:
    """Write labelled pictures as tar shards and a manifest; the folder appears when all is written.

    Args:
        samples: dicts with `picture` (H, W, 3) uint8 and `mask` (H, W) float in [0, 1] or uint8 (absent: clean), and
            any of `ignore` (H, W) bool (where it is not known whether the picture is broken), `key` (a unique name of
            letters, digits, _ and -), `prompt`, `category`, `generator`, `label` (real, injected, human, pseudo),
            `round`, and further JSON values, which are read back unchanged.
        folder: the folder to write; an existing set is replaced, anything else is refused.
        shard_size: pictures in a shard.
        picture_type: png (exact), webp (lossless) or jpg (quality 95).

    Returns:
        The number of pictures written.

    Raises:
        ValueError: a sample's picture, mask, key or label is not as described; or no mask has a value above 1/255,
            although some are not empty, as where masks of 0 and 1 are given as uint8 or were read from files.
        UserError: `folder` is a file, or holds anything but a set.
    """
    check_options(shard_size, picture_type)
    # Leftover files of a writer that was killed.
    clear_leftovers(Path(folder).parent, Path(folder).name)
    refuse_no_set(folder)
    keys, count, largest = _UniqueKeys(), 0, 0.0
    with atomic_dir(folder) as temporary:
        manifest = ManifestWriter(temporary / MANIFEST, min(shard_size, 1000))
        try:
            for number, inside in in_shards(samples, shard_size):
                with ShardFile(temporary / shard_name(number), shard_name(number), picture_type) as shard:
                    for sample in inside:
                        row = shard.add(sample, count)
                        keys.add(row["key"])
                        manifest.add(row)
                        count += 1
                        # a detector that is sure of nothing gives such maps
                        largest = max(largest, 0.0 if row["label"] == "pseudo" else row["mask_max"])
        finally:
            manifest.close()
        if 0 < largest <= 1 / 255:
            what = "255 where a picture is broken in masks of uint8 and of files, or bool"
            raise ValueError(expected("mask", what, f"nothing above 1 in {count} masks"))
        # Something may have been put there meanwhile.
        refuse_no_set(folder)
    return count


def refuse_no_set(folder: str | Path) -> None:
    """Refuse to replace anything but a set of shards; a folder that is empty or missing is accepted.

    Raises:
        UserError: it is a file, holds no manifest, or holds other files than a set's.
    """
    refuse_foreign(folder, ("shard-*.tar", MANIFEST, *RECORDS))
    # Refuses a run.json that is no set's.
    RunFolder(folder, "inject", {}, {}).check()
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: would be replaced, but is no set of shards (no {MANIFEST}); choose another folder")


def check_options(shard_size: int, picture_type: str) -> None:
    """Check `write_shards`'s options.

    Raises:
        ValueError: one of them is out of range.
    """
    if shard_size < 1:
        raise ValueError(expected("shard_size", ">= 1 pictures", shard_size))
    if picture_type not in WRITTEN_TYPES:
        raise ValueError(expected("picture_type", f"one of {', '.join(WRITTEN_TYPES)}", repr(picture_type)))


def is_key(value: Any) -> bool:
    """Whether it can be the key of a written sample: up to 80 letters, digits, _ and -."""
    return isinstance(value, str) and _KEY.fullmatch(value) is not None


def in_shards(samples: Iterable, shard_size: int, first: int = 0) -> Iterator[tuple[int, Iterator]]:
    """Split samples into shards.

    Args:
        samples: any number of them.
        shard_size: samples in a shard.
        first: index of the first shard.

    Yields:
        (index, samples) of each shard; take all samples of one before the next.
    """
    samples = iter(samples)
    for number in itertools.count(first):
        for sample in samples:
            yield number, itertools.chain([sample], itertools.islice(samples, shard_size - 1))
            break
        else:
            return


def shard_name(number: int) -> str:
    """The file name of a set's shard, by its index."""
    return f"shard-{number:06d}.tar"


class ShardFile:
    """One shard being written, as a context.

    Args:
        path: the file to write.
        name: of the shard in the manifest.
        picture_type: see `write_shards`.
    """

    def __init__(self, path: Path, name: str, picture_type: str):
        self.name, self.picture_type = name, picture_type
        self.tar = TarWriter(path)

    def add(
        self,
        sample: dict[str, Any],
        index: int,
        picture_at: tuple[str, int, int] | None = None,
        *,
        labelled: bool = True,
    ) -> dict[str, Any]:
        """Write a sample.

        Args:
            sample: see `write_shards`.
            index: of the sample in the set, which is its key where it has none.
            picture_at: file, offset and size in bytes of the picture, which is not written: this is a label set's
                shard, and the file a path from its folder.
            labelled: whether it is known what is broken; else no mask and no label are written.

        Returns:
            Its row of the manifest.

        Raises:
            ValueError: the sample is not as described.
        """
        picture, mask, ignore, meta = _checked(sample, index)
        if not labelled:
            meta["label"] = ""
        key = meta["key"]
        byte_ranges = {
            "picture": self._picture(key, picture) if picture_at is None else picture_at[1:],
            "mask": self.tar.add(f"{key}.{MASK}", encode_mask(mask)) if labelled else (0, 0),
            **({} if ignore is None else {"ignore": self.tar.add(f"{key}.{IGNORE}", encode_mask(ignore))}),
            "json": self.tar.add(f"{key}.json", strict_json.dumps(meta).encode()),
        }
        row = self._row(meta, picture, mask, byte_ranges)
        return row if picture_at is None else {**row, PICTURE_FILE: picture_at[0]}

    def copy(self, values: dict[str, Any], members: dict[str, bytes]) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """Write a sample of another set as its bytes are.

        Args:
            values: its JSON values, with a `key`.
            members: see `ShardData.members`.

        Returns:
            Its row of the manifest, its picture (H, W, 3) uint8 and its mask (H, W) uint8, zeros where it has none.

        Raises:
            ValueError: a member is broken.
        """
        picture = decode(members["png"], "RGB")
        mask = decode(members[MASK], "L") if MASK in members else np.zeros(picture.shape[:2], np.uint8)
        kinds = {"mask": MASK, "ignore": IGNORE}
        ranges = {"picture": self.tar.add(f"{values['key']}.{suffix_of(members['png'])}", members["png"])}
        for name, kind in kinds.items():
            ranges[name] = self.tar.add(f"{values['key']}.{kind}", members[kind]) if kind in members else (0, 0)
        ranges["json"] = self.tar.add(f"{values['key']}.json", strict_json.dumps(values).encode())
        return self._row(values, picture, mask, ranges), picture, mask

    def _row(self, meta, picture, mask, byte_ranges) -> dict[str, Any]:
        return {
            "key": meta["key"],
            **{name: str(meta.get(name) or "") for name in ("label", "category", "generator", "prompt")},
            "round": int(meta.get("round") or 0),
            "shard": self.name,
            "height": picture.shape[0],
            "width": picture.shape[1],
            "mask_mean": float(mask.mean()) / 255.0,
            "mask_max": float(mask.max()) / 255.0,
            **{f"{name}_offset": offset for name, (offset, _) in byte_ranges.items()},
            **{f"{name}_size": size for name, (_, size) in byte_ranges.items()},
        }

    def _picture(self, key: str, picture: np.ndarray) -> tuple[int, int]:
        return self.tar.add(f"{key}.{self.picture_type}", encode_picture(picture, self.picture_type))

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_) -> None:
        self.tar.close()


class _UniqueKeys:
    """Refuses duplicate keys by 8-byte hashes, two of which collide in one of 400,000 sets of ten million keys.

    Up to `RECENT` hashes are held in a set, the others in a sorted array.
    """

    RECENT = 4096

    def __init__(self):
        self.old, self.recent = np.empty(0, np.uint64), set()

    def add(self, key: str) -> None:
        code = key_hash(key)
        index = int(np.searchsorted(self.old, np.uint64(code)))
        if code in self.recent or (index < len(self.old) and int(self.old[index]) == code):
            raise ValueError(expected("key", "a unique name", f"{key!r} twice"))
        self.recent.add(code)
        if len(self.recent) >= self.RECENT:
            self.old = np.sort(np.concatenate([self.old, np.fromiter(self.recent, np.uint64)]))
            self.recent.clear()


def key_hash(key: str) -> int:
    """A hash of 64 bits of a sample's key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _checked(sample: dict[str, Any], index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, dict]:
    picture = np.asarray(sample["picture"])
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
        got = f"{picture.shape} {picture.dtype} at sample {index}"
        raise ValueError(expected("picture", "(H, W, 3) uint8", got))
    mask = sample.get("mask")
    mask = np.zeros(picture.shape[:2], np.uint8) if mask is None else np.asarray(mask)
    if mask.shape != picture.shape[:2]:
        raise ValueError(expected("mask", str(picture.shape[:2]), f"{mask.shape} at sample {index}"))
    if mask.dtype != np.uint8:
        if not np.all((mask >= 0) & (mask <= 1)):
            raise ValueError(expected("mask", "values in [0, 1]", f"others at sample {index}"))
        mask = np.rint(mask.astype(np.float64) * 255).astype(np.uint8)
    ignore = sample.get("ignore")
    if ignore is not None:
        ignore = np.asarray(ignore)
        if ignore.shape != mask.shape or ignore.dtype != bool:
            raise ValueError(
                expected("ignore", f"{mask.shape} bool", f"{ignore.shape} {ignore.dtype} at sample {index}")
            )
        ignore = ignore * np.uint8(255) if ignore.any() else None
    meta = {k: v for k, v in sample.items() if k not in ("picture", "mask", "ignore")}
    meta.setdefault("key", f"{index:09d}")
    if not is_key(meta["key"]):
        raise ValueError(expected("key", "up to 80 letters, digits, _ and -", repr(meta["key"])))
    for name in ("prompt", "category", "generator"):
        meta[name] = str(meta.get(name) or "")
    meta["label"] = meta.get("label") or ("injected" if mask.any() else "real")
    if meta["label"] not in LABELS:
        raise ValueError(expected("label", f"one of {', '.join(LABELS)}", repr(meta["label"])))
    meta["round"] = int(meta.get("round") or 0)
    return picture, mask, ignore, meta
