"""The pictures that tasks are chosen from: found, described by a diagnosis, and located in their files."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.annotate.select import Candidate
from diffdoctor.data.captions import caption_file, read_caption
from diffdoctor.data.codec import PICTURE_TYPES, UnreadablePicture, decode
from diffdoctor.data.sources import find_sources
from diffdoctor.data.store_path import absolute, at
from diffdoctor.data.tar import IGNORE, MASK, SkipCounts
from diffdoctor.data.video import is_video
from diffdoctor.engine.sets import read_sample
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import file_name, reading
from diffdoctor.runs.record import RUN, read_json

_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
# Confidence between which a pixel is undecided.
BAND = (0.2, 0.8)


class Diagnosis:
    """What `diffdoctor diagnose` wrote.

    Args:
        folder: its output folder.

    Attributes:
        records: {name: record}, see `detector.predict.describe_map`.
        weights: digest of the detector.

    Raises:
        UserError: the folder is none.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "diagnosis.jsonl"
        if not path.is_file():
            raise UserError(expected(folder, "an output folder of `diffdoctor diagnose`", f"no {path.name}"))
        with reading(path), open(path, encoding="utf-8") as lines:
            self.records = {record["name"]: record for record in map(json.loads, lines)}
        run = read_json(self.folder / RUN) if (self.folder / RUN).is_file() else {}
        self.weights = str((run.get("identity") or {}).get("weights", ""))

    @functools.cached_property
    def _names(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, record in self.records.items():
            found.setdefault(record["path"], []).append(name)
        return found

    def names_in(self, path: str) -> list[str]:
        """The names of the pictures of a file or shard."""
        return self._names.get(path, [])

    def map(self, name: str) -> np.ndarray | None:
        """The map (H, W) uint8 of a picture, from its file or the label set; None where there is none.

        Raises:
            UserError: its file is broken.
        """
        path, record = self.folder / "maps" / file_name(name, ".png"), self.records.get(name, {})
        try:
            if not path.is_file() and "unit" in record:
                return np.rint(read_sample(self.folder, record["unit"], record["key"])["mask"] * 255).astype(np.uint8)
            return decode(path, "L") if path.is_file() else None
        except UnreadablePicture as error:
            raise UserError(f"{path}: {error}") from None


def find_candidates(pool: list[str], diagnosis: Diagnosis | None, counts: SkipCounts) -> list[Candidate]:
    """The pictures of a pool, in a fixed order.

    Args:
        pool: as `find_sources` takes it.
        diagnosis: of the pool; pictures that it does not have are left out and counted. None: the pictures as they are.
        counts: filled with what is left out.
    """
    sources = []
    for source in find_sources(pool, counts):
        if not source.is_shard and is_video(source.path):
            counts.add("an animation, which would be judged by its first frame", source.path)
        else:
            sources.append(source)
    if diagnosis is None:
        found = []
        for source in sources:
            path = absolute(source.path)
            if source.is_shard:
                found += [Candidate(f"{source.name}/{key}", path, key, **texts) for key, texts in _shard_texts(path)]
            else:
                found.append(Candidate(source.name, path, category=source.category, prompt=_caption(source)))
        return found
    paths = {absolute(source.path): source for source in sources}
    found, seen = [], set()
    for name in sorted(diagnosis.records):
        record = diagnosis.records[name]
        source = paths.get(record["path"])
        if source is None:
            continue
        seen.add(record["path"])
        texts = {key: str(record.get(key) or "") for key in ("category", "generator", "prompt")}
        numbers = {"mean": record["mean"], "flagged": record["flagged"]}
        numbers |= {key: record.get(key, 0.0) for key in ("uncertainty", "disagreement")}
        key = _key_of(name, record["path"]) if source.is_shard else ""
        found.append(Candidate(name, record["path"], key, **texts, **numbers))
    for path in sorted(set(paths) - seen):
        counts.add("a file of the pool that was not diagnosed", path)
    return found


def _caption(source) -> str:
    if source.caption is not None:
        return source.caption
    path = caption_file(source.path)
    try:
        return "" if path is None else read_caption(path)
    except UserError:
        return ""


@functools.lru_cache(maxsize=64)
def _members(path: str) -> dict[str, dict[str, tuple[int, int]]]:
    """{key: {extension: (offset, size)}} of a shard's plain files."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with at(path).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members = []
                match = _NAME.fullmatch(os.path.normpath(info.name))
                if info.isreg() and not info.issparse() and match:
                    found.setdefault(match[1], {})[match[2].lower()] = (info.offset_data, info.size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: is no shard that can be read ({error})") from None
    return found


def _key_of(name: str, path: str) -> str:
    """The key of a shard's picture whose name ends with it."""
    members, parts = _members(path), name.split("/")
    for first in range(1, len(parts)):
        key = "/".join(parts[first:])
        if key in members:
            return key
    raise UserError(expected(path, f"the picture {name} of the diagnosis", "a shard without it"))


def _shard_texts(path: str) -> Iterator[tuple[str, dict[str, str]]]:
    with at(path).open("rb") as file:
        for key, members in _members(path).items():
            meta: Any = {}
            if "json" in members:
                offset, size = members["json"]
                file.seek(offset)
                with reading(path, "write the shard anew"):
                    meta = json.loads(file.read(min(size, 2**22)))
            meta = meta if isinstance(meta, dict) else {}
            yield key, {name: str(meta.get(name) or "") for name in ("category", "generator", "prompt")}


def place_of(path: str, key: str = "") -> dict[str, Any]:
    """Where a picture lies, as `project.read_place` takes it.

    Args:
        path: of its file, or of its shard.
        key: of a shard's picture.

    Raises:
        UserError: the shard has no such picture.
    """
    if not key:
        return {"file": path}
    members = _members(path).get(key, {})
    for extension in (*PICTURE_TYPES, *members):
        if extension in members and extension not in ("json", MASK, IGNORE):
            offset, size = members[extension]
            return {"file": path, "offset": offset, "size": size, "key": key}
    raise UserError(expected(path, f"a picture {key}", "none"))


def place_text(candidate: Candidate) -> str:
    """Where a candidate's picture lies, as the store keeps it.

    Raises:
        UserError: see `place_of`.
    """
    return strict_json.dumps(place_of(candidate.path, candidate.key))


def undecided_share(confidence: np.ndarray) -> float:
    """The share of a map's pixels (H, W) uint8 whose confidence is between 0.2 and 0.8."""
    low, high = (255 * bound for bound in BAND)
    return float(np.mean((confidence > low) & (confidence < high)))


def disagreement(first: np.ndarray, second: np.ndarray) -> float:
    """The mean absolute difference of two maps (H, W) uint8 of one picture, in [0, 1]."""
    return float(np.abs(first.astype(np.int16) - second).mean()) / 255


@dataclasses.dataclass
class Measures:
    """What maps say of a candidate beyond its record: undecided share, and disagreement with an earlier detector.

    Attributes:
        diagnosis: by this round's detector.
        previous: by the last round's; None: no disagreement.
    """

    diagnosis: Diagnosis
    previous: Diagnosis | None = None

    def __call__(self, candidate: Candidate) -> list[float]:
        """The measures, higher where a label tells more."""
        confidence = self.diagnosis.map(candidate.name)
        if confidence is None:
            return [0.0] * (1 + (self.previous is not None))
        values = [undecided_share(confidence)]
        if self.previous is not None:
            before = self.previous.map(candidate.name)
            same = before is not None and before.shape == confidence.shape
            values.append(disagreement(confidence, before) if same else 0.0)
        return values
