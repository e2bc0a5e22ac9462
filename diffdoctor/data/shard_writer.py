"""Writing labelled pictures as WebDataset tar shards with a manifest."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.data.codec import PICTURE_TYPES, encode_mask, encode_picture
from diffdoctor.data.manifest import MANIFEST, ManifestWriter
from diffdoctor.data.tar import KEY
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_dir, clear_leftovers, refuse_foreign
from diffdoctor.runs.record import CONFIG, METRICS, RUN, RunFolder

# What `inject` puts beside the shards.
RECORDS = (SHEET := "contact_sheet.png", RUN, CONFIG, METRICS)
LABELS = ("real", "injected", "human", "pseudo")


def write_shards(
    samples: Iterable[dict[str, Any]], folder: str | Path, *, shard_size: int = 1000, picture_type: str = "png"
) -> int:
    """Write labelled pictures as tar shards and a manifest; the folder appears when all is written.

    Args:
        samples: dicts with `picture` (H, W, 3) uint8 and `mask` (H, W) float in [0, 1] or uint8 (absent: clean), and
            any of `key` (a unique name of letters, digits, _ and -), `prompt`, `category`, `generator`, `label` (real,
            injected, human, pseudo), `round`, and further JSON values, which come back as they are.
        folder: where to; a set that is there is replaced, and nothing else.
        shard_size: pictures in a shard.
        picture_type: png (exact), webp (written without loss) or jpg (quality 95).

    Returns:
        The number of pictures written.

    Raises:
        ValueError: a sample's picture, mask, key or label is not as described.
        UserError: at `folder` stands a file, or a folder that holds something else than a set.
    """
    check_options(shard_size, picture_type)
    # What a writer that was killed left beside the folder.
    clear_leftovers(Path(folder).parent, Path(folder).name)
    refuse_no_set(folder)
    keys, count = _Unique(), 0
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
        finally:
            manifest.close()
    return count


def refuse_no_set(folder: str | Path) -> None:
    """Refuse to replace what is no set of shards; a folder that is empty or not there is fine.

    Raises:
        UserError: it is a file, holds no manifest, or holds more than a set's files.
    """
    refuse_foreign(folder, ("shard-*.tar", MANIFEST, *RECORDS))
    # Refuses a run.json that is no set's.
    RunFolder(folder, "inject", {}, {}).check()
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: would be replaced, but is no set of shards (no {MANIFEST}); choose another folder")


def check_options(shard_size: int, picture_type: str) -> None:
    """Raise `ValueError` for options that `write_shards` does not take."""
    if shard_size < 1:
        raise ValueError(f"shard_size: expected >= 1 pictures, got {shard_size}")
    if picture_type not in PICTURE_TYPES:
        raise ValueError(f"picture_type: expected one of {', '.join(PICTURE_TYPES)}, got {picture_type!r}")


def in_shards(samples: Iterable, shard_size: int, first: int = 0) -> Iterator[tuple[int, Iterator]]:
    """(number, samples) of each shard, numbered from `first` on; take all samples of one before the next."""
    samples = iter(samples)
    for number in itertools.count(first):
        for sample in samples:
            yield number, itertools.chain([sample], itertools.islice(samples, shard_size - 1))
            break
        else:
            return


def shard_name(number: int) -> str:
    """The file name of a set's shard."""
    return f"shard-{number:06d}.tar"


class ShardFile:
    """One shard being written, as a context.

    Args:
        path: where to.
        name: of the shard in the manifest.
        picture_type: see `write_shards`.
    """

    def __init__(self, path: Path, name: str, picture_type: str):
        self.name, self.picture_type = name, picture_type
        self.tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, sample: dict[str, Any], index: int) -> dict[str, Any]:
        """Write a sample, the set's `index`-th; returns its row of the manifest."""
        picture, mask, meta = _checked(sample, index)
        key = meta["key"]
        places = {
            "picture": self._member(f"{key}.{self.picture_type}", encode_picture(picture, self.picture_type)),
            "mask": self._member(f"{key}.mask.png", encode_mask(mask)),
            "json": self._member(f"{key}.json", json.dumps(meta, allow_nan=False).encode()),
        }
        return {
            **{name: meta[name] for name in ("key", "label", "category", "generator", "prompt", "round")},
            "shard": self.name,
            "height": picture.shape[0],
            "width": picture.shape[1],
            "mask_mean": float(mask.mean()) / 255.0,
            "mask_max": float(mask.max()) / 255.0,
            **{f"{part}_offset": place[0] for part, place in places.items()},
            **{f"{part}_size": place[1] for part, place in places.items()},
        }

    def _member(self, name: str, data: bytes) -> tuple[int, int]:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        offset = self.tar.offset + tarfile.BLOCKSIZE
        self.tar.addfile(info, io.BytesIO(data))
        # The list that tarfile keeps of its members would grow with the shard.
        self.tar.members.clear()
        return offset, len(data)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_) -> None:
        self.tar.close()


class _Unique:
    """Refuses a key that was there before, at 8 bytes a key: by hash (two of ten million collide once in 400,000 sets).

    The keys of the last thousands are held as they are; the others as one sorted array.
    """

    RECENT = 4096

    def __init__(self):
        self.old, self.recent = np.empty(0, np.uint64), set()

    def add(self, key: str) -> None:
        code = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        place = int(np.searchsorted(self.old, np.uint64(code)))
        if code in self.recent or (place < len(self.old) and int(self.old[place]) == code):
            raise ValueError(f"key: expected a unique name, got {key!r} twice")
        self.recent.add(code)
        if len(self.recent) >= self.RECENT:
            self.old = np.sort(np.concatenate([self.old, np.fromiter(self.recent, np.uint64)]))
            self.recent.clear()


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
    if not isinstance(meta["key"], str) or not KEY.fullmatch(meta["key"]) or len(meta["key"]) > 80:
        raise ValueError(f"key: expected up to 80 letters, digits, _ and -, got {meta['key']!r}")
    for name in ("prompt", "category", "generator"):
        meta[name] = str(meta.get(name) or "")
    meta["label"] = meta.get("label") or ("injected" if mask.any() else "real")
    if meta["label"] not in LABELS:
        raise ValueError(f"label: expected one of {', '.join(LABELS)}, got {meta['label']!r}")
    meta["round"] = int(meta.get("round") or 0)
    return picture, mask, meta
