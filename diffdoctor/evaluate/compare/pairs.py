"""Pairs of pictures: two of one name, with the prompt that both were drawn for and what has been measured of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffdoctor.data.captions import caption_file
from diffdoctor.data.codec import UnreadablePicture, decode
from diffdoctor.data.columns import ParquetColumns
from diffdoctor.data.manifest import MANIFEST, read_columns
from diffdoctor.data.shards import picture_ranges
from diffdoctor.data.sources import Source, find_sources, listed_sources, read_caption, refuse_output_among
from diffdoctor.evaluate.model.store import TABLE
from diffdoctor.runs.errors import UserError, expected

SIDES = ("a", "b")
_LONGEST = 2**15


@dataclass(frozen=True)
class Place:
    """Where a picture lies.

    Attributes:
        file: a picture, or a shard that holds it.
        offset: of a shard's picture, in bytes.
        size: of the picture in bytes.
    """

    file: Path
    offset: int = 0
    size: int = 0

    def read(self) -> np.ndarray:
        """The picture (H, W, 3) uint8.

        Raises:
            UserError: it cannot be read.
        """
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                return decode(file.read(self.size), "RGB")
        except (OSError, UnreadablePicture) as error:
            raise UserError(f"{self.file}: cannot be read ({error})") from None


@dataclass(frozen=True)
class Pair:
    """Two pictures of one name.

    Attributes:
        name: of both.
        prompt: of both; "" where none is known.
        category: of both, likewise.
        a, b: where they lie.
        scores: {name: (of a, of b)}.
    """

    name: str
    prompt: str
    category: str
    a: Place
    b: Place
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    place: Place
    prompt: str
    category: str


def find_pairs(a: str, b: str, scores: str | None = None, output: str | None = None) -> list[Pair]:
    """All pairs, sorted by name.

    Args:
        a, b: folders, patterns, or Parquet files that list pictures, see `EvaluateCompareConfig`.
        scores: see there.
        output: folder of the results, which may hold none of the pictures; None: not known.

    Raises:
        UserError: one of the two holds no pictures, there is no name that both have, two of one name have different
            prompts, or pictures lie in the output folder.
    """
    sides = [_pictures(given, output) for given in (a, b)]
    names = sorted({*sides[0]} & {*sides[1]})
    if not names:
        got = f"{min(sides[0])!r} and {min(sides[1])!r}, …"
        raise UserError(expected("a, b", "pictures of the same names", got))
    tables = [_table(scores, side) for side in (a, b)]
    found = []
    for name in names:
        both = [side[name] for side in sides]
        rows = [table(picture.place.file) for table, picture in zip(tables, both, strict=True)]
        prompts = {row.get("prompt") or picture.prompt for picture, row in zip(both, rows, strict=True)} - {""}
        if len(prompts) > 1:
            got = " and ".join(repr(text[:60]) for text in sorted(prompts))
            raise UserError(expected(f"a, b: {name}", "pictures of one prompt", got))
        category = rows[0].get("category") or both[0].category
        numbers = [{key: row[key] for key in row if isinstance(row[key], (int, float))} for row in rows]
        pairs = {key: (float(numbers[0][key]), float(numbers[1][key])) for key in numbers[0] if key in numbers[1]}
        found.append(Pair(name, "".join(prompts), category, both[0].place, both[1].place, pairs))
    return found


def chosen_pairs(pairs: list[Pair], count: int | None, seed: int) -> list[Pair]:
    """So many of the pairs, drawn by lot: the same for a larger number, and more."""
    order = sorted(pairs, key=lambda pair: lot(seed, "pair", pair.name))
    return order[:count]


def lot(seed: int, *words: str) -> int:
    """A whole number below 2^64 that is the same for the same words, and otherwise random."""
    return int.from_bytes(hashlib.sha256("\0".join([str(seed), *words]).encode("utf-8", "surrogatepass")).digest()[:8])


def _pictures(given: str, output: str | None) -> dict[str, _Found]:
    listed = Path(given).suffix.lower() == ".parquet"
    sources = listed_sources(given) if listed else find_sources([given])
    refuse_output_among(output, sources)
    found: dict[str, _Found] = {}
    for source in sources:
        for name, picture in _in_shard(source) if source.is_shard else _in_file(source, listed):
            if name in found:
                raise UserError(expected(given, "pictures of different names", f"two that are called {name!r}"))
            found[name] = picture
    return found


def _in_file(source: Source, listed: bool):
    prompt = source.caption
    if prompt is None:
        path = caption_file(source.path)
        prompt = "" if path is None else read_caption(path)
    category = source.category if listed else source.name.rpartition("/")[0]
    yield source.name, _Found(Place(source.path, 0, source.path.stat().st_size), prompt, category)


def _in_shard(source: Source):
    texts = _of_manifest(source.path.parent)
    for key, (offset, size) in picture_ranges(source.path).items():
        yield key, _Found(Place(source.path, offset, size), *texts.get(key, ("", "")))


@functools.lru_cache(maxsize=2)
def _of_manifest(folder: Path) -> dict[str, tuple[str, str]]:
    """{key: (prompt, category)} of a set of shards; {} where there is no manifest."""
    if not (folder / MANIFEST).is_file():
        return {}
    columns = read_columns(folder, ("key", "prompt", "category"))
    return {str(key): (prompt or "", category or "") for key, prompt, category in zip(*columns.values(), strict=True)}


def _table(scores: str | None, side: str) -> Callable[[Path], dict]:
    """From a picture's file to its row in a table of scores; {} where it has none."""
    beside = Path(side).resolve().parent.parent / TABLE
    path = Path(scores) if scores is not None else beside if beside.is_file() else None
    if path is None:
        return lambda file: {}
    rows = _rows(path.resolve())
    return lambda file: rows.get(file.resolve(), {})


@functools.lru_cache(maxsize=2)
def _rows(path: Path) -> dict[Path, dict]:
    with ParquetColumns(path) as table:
        if "file" not in table.names:
            raise UserError(expected(path, "a column `file`", ", ".join(table.names) or "none"))
        files = table.texts("file", longest=4096)
        columns = {}
        for name in ("prompt", "category"):
            if name in table.names:
                columns[name] = table.texts(name, longest=_LONGEST)
        for name in table.names:
            if name not in (*columns, "file", "index", "seed", "side", "label", "flagged"):
                columns[name] = _numbers(table, name)
        return {
            path.parent.joinpath(file).resolve(): dict(zip(columns, row, strict=True))
            for file, *row in zip(files, *columns.values(), strict=True)
        }


def _numbers(table: ParquetColumns, name: str) -> list[float | None]:
    """A column of numbers; None in every row where it holds something else, which is no score."""
    try:
        return table.numbers(name).tolist()
    except UserError:
        return [None] * table.rows
