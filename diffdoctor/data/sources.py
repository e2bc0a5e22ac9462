"""Pictures from files, folders, globs and shards, one at a time and in a fixed order."""

from __future__ import annotations

import collections
import dataclasses
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffdoctor.data.codec import decode
from diffdoctor.data.shards import read_shards
from diffdoctor.data.tar import SkipCounts
from diffdoctor.runs.errors import UserError, expected

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True)
class Source:
    r"""Where pictures come from: one picture file, or one shard of many.

    Attributes:
        path: the file.
        name: in results: its path below the folder it was found in, without the suffix, which is kept where two files
            differ in nothing else. Bytes of a file name that are not Unicode are written as \udcff.
        category: name of the folder that contains the picture; "" for one named on the command line.
    """

    path: Path
    name: str
    category: str = ""

    @property
    def is_shard(self) -> bool:
        """Whether it is a shard."""
        return self.path.suffix == ".tar"

    def stamp(self) -> str:
        """Size and time of the file, and of the text beside a picture, which change when a file is replaced."""
        files = [self.path] if self.is_shard else [self.path, self.path.with_suffix(".txt")]
        stats = [file.stat() if file.is_file() else None for file in files]
        return " ".join(f"{stat.st_size}@{stat.st_mtime_ns}" if stat else "-" for stat in stats)


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """Picture files and shards that are named, lie in a named folder (at any depth) or match a pattern.

    A pattern that matches folders and no file names these folders; of nested ones, the outermost.

    Args:
        paths: files, folders and patterns.

    Returns:
        The sources, in the order of `paths` and sorted within a folder.

    Raises:
        UserError: a path that does not exist or holds neither pictures nor shards; two pictures of one name.
    """
    found: list[Source] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = _in_folder(path)
        elif path.is_file():
            inside = [Source(path, _readable(path.stem))]
        else:
            inside = _matching(str(given))
        if not inside:
            where = "in this folder" if path.is_dir() else "in the folders that match"
            raise UserError(expected(given, f"pictures ({', '.join(SUFFIXES)}) or .tar shards", f"none {where}"))
        found += inside
    names: dict[str, Path] = {}
    for source in found:
        if source.name in names:
            raise UserError(f"{source.path}: has the same name as {names[source.name]}; give the folder above them")
        names[source.name] = source.path
    return found


def _in_folder(folder: Path) -> list[Source]:
    inside = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (*SUFFIXES, ".tar") and p.is_file())
    # Hidden files are an interrupted write's leftovers, or the system's.
    inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    # Pictures beside shards belong to them, such as the contact sheet.
    shard_folders = {p.parent for p in inside if p.suffix == ".tar"}
    inside = [p for p in inside if p.suffix == ".tar" or p.parent not in shard_folders]
    same_stem = collections.Counter(file.with_suffix("") for file in inside)
    found = []
    for file in inside:
        relative = file.relative_to(folder)
        category = relative.parent.name if file.suffix != ".tar" else ""
        name = relative.with_suffix("") if same_stem[file.with_suffix("")] == 1 else relative
        found.append(Source(file, _readable(name), _readable(category)))
    return found


def _matching(pattern: str) -> list[Source]:
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in matches if path.is_file()]
    folders = [path for path in matches if path.is_dir()]
    if not (files or folders):
        raise UserError(expected(pattern, "an existing file or folder, or a pattern that matches one", "none"))
    if files:
        return [Source(path, _readable(path.stem)) for path in files]
    outermost = [path for path in folders if not set(path.parents) & set(folders)]
    return [source for folder in outermost for source in _in_folder(folder)]


def _readable(name: str | Path) -> str:
    return str(name).encode("utf-8", "backslashreplace").decode()


def read_source(
    source: Source, *, strict: bool = False, counts: SkipCounts | None = None, masks: str = "optional"
) -> Iterator[dict]:
    """The pictures of a source.

    The prompt of a picture file is read from a text file of the same name beside it (`cat.png`, `cat.txt`), if there
    is one.

    Args:
        source: where to read.
        strict: raise `UserError` at a picture that cannot be read instead of skipping and counting it.
        counts: filled with what was skipped.
        masks: see `shards.read_shards`.

    Yields:
        Dicts with `picture` (H, W, 3) uint8, `name`, and of a shard's sample all its other values.
    """
    counts = SkipCounts() if counts is None else counts
    if source.is_shard:
        for sample in read_shards(source.path, strict=strict, counts=counts, masks=masks):
            yield {**sample, "name": f"{source.name}/{sample['key']}"}
        return
    try:
        picture = decode(source.path.read_bytes(), "RGB")
    except (OSError, ValueError):
        counts.add("a broken picture", str(source.path), strict)
        return
    caption = source.path.with_suffix(".txt")
    prompt = caption.read_text(encoding="utf-8", errors="replace").strip() if caption.is_file() else ""
    yield {"picture": picture, "name": source.name, "category": source.category, "prompt": prompt}
