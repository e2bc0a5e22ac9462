"""Pictures from files, folders, globs and shards, one at a time and in a fixed order."""

from __future__ import annotations

import dataclasses
import glob
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from diffdoctor.data.captions import caption_file, captions_of, read_caption
from diffdoctor.data.codec import SUFFIXES, PictureReader, SizeCheck, UnreadablePicture, decode
from diffdoctor.data.columns import ParquetColumns
from diffdoctor.data.folders import SHARD, find_files, is_map, is_read, is_shard, names_of
from diffdoctor.data.shards import read_shards, shard_paths
from diffdoctor.data.store_path import Location, StorePath, absolute, at, beside
from diffdoctor.data.tar import SkipCounts
from diffdoctor.data.text import readable
from diffdoctor.data.video import VIDEO_SUFFIXES, is_video
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.record import kind_of_run

# Runs whose output folder is one of pictures; None: no run's.
_SETS = (None, "inject", "sample", "set join")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where pictures come from: one picture file, one video, or one shard of many pictures.

    Attributes:
        path: the file.
        name: in results, see `folders.names_of`.
        category: name of the folder that contains the picture; "" for one named on the command line.
        caption: from the folder's metadata; None: from the text file beside the picture, if there is one.
        is_video: whether it is read as a video.
    """

    path: Location
    name: str
    category: str = ""
    caption: str | None = None
    is_video: bool = False

    @property
    def is_shard(self) -> bool:
        """Whether it is a shard."""
        return is_shard(self.path)

    def stamp(self) -> str:
        """Size and time of the file, and of the text beside a picture, which change when a file is replaced."""
        if isinstance(self.path, StorePath):
            return self.path.stat().stamp
        files = [self.path] if self.is_shard else [self.path, caption_file(self.path) or self.path.with_suffix(".txt")]
        stats = [file.stat() if file.is_file() else None for file in files]
        stamps = [f"{stat.st_size}@{stat.st_mtime_ns}" if stat else "-" for stat in stats]
        if self.caption is not None:
            stamps.append(f"{zlib.crc32(self.caption.encode()):08x}")
        return " ".join(stamps)


def refuse_output_among(output: str | os.PathLike | None, sources: Iterable[Source]) -> None:
    """Refuse an output folder that holds pictures of the input: it would be no folder of pictures from then on.

    Raises:
        UserError: a source lies in it, though not in a folder below.
    """
    if output is None:
        return
    folder = os.path.realpath(output)
    for place in {os.path.dirname(str(source.path)) for source in sources}:
        if os.path.realpath(place) == folder:
            raise UserError(expected("output", "a folder that holds no picture of the input", output))


def find_sources(
    paths: Sequence[str | Path], counts: SkipCounts | None = None, *, videos: bool = False
) -> list[Source]:
    """Picture files and shards that are named, lie in a named folder (at any depth) or match a pattern.

    A pattern that matches folders and no file names these folders; of nested ones, the outermost. A file that is named
    twice is read once. Of a store, named by a URL, shards are read and nothing else.

    Args:
        paths: files, folders and patterns.
        counts: filled with what was left out, see `folders.find_files`.
        videos: find videos too; an animated GIF or WebP picture is one then, and else its first frame.

    Returns:
        The sources, in the order of `paths` and sorted within a folder.

    Raises:
        UserError: a path that does not exist or holds neither pictures nor shards, except for files among several
            paths, which a shell's pattern may have named; an output folder of another command than `inject`,
            `sample` and `set join`; two pictures of one name.
    """
    counts = SkipCounts() if counts is None else counts
    found: list[Source] = []
    for given in paths:
        path, left_out = at(given), SkipCounts()
        if isinstance(path, StorePath):
            found += _in_store(path)
            continue
        if path.is_dir():
            if (kind := kind_of_run(path)) not in _SETS:
                got = f"an output folder of {kind}; give the folder in it that is meant"
                raise UserError(expected(given, "a folder of pictures", got))
            inside = _in_folder(path, left_out, videos)
        elif path.is_file():
            inside = _named([path], left_out, videos)
        else:
            inside = _matching(str(given), left_out, videos)
        if not inside and not (path.is_file() and len(paths) > 1):
            where = "in this folder" if path.is_dir() else "here" if path.is_file() else "in the folders that match"
            aside = f" (left out: {left_out.sentence()})" if left_out.total else ""
            suffixes = ", ".join((*SUFFIXES, *VIDEO_SUFFIXES) if videos else SUFFIXES)
            what = f"pictures ({suffixes}) or {SHARD} shards"
            raise UserError(expected(given, what, f"none {where}{aside}"))
        counts.join(left_out)
        found += inside
    if not found:
        raise UserError(expected("pictures", f"files named {', '.join(SUFFIXES)} or {SHARD}", f"{len(paths)} others"))
    return _once(_with_videos(found) if videos else found)


def _with_videos(found: list[Source]) -> list[Source]:
    return [dataclasses.replace(source, is_video=not source.is_shard and is_video(source.path)) for source in found]


def listed_sources(file: str | Path, *, videos: bool = False) -> list[Source]:
    """The picture files and shards that a Parquet file lists, in its order, without looking through folders.

    Args:
        file: with a column `path` (from the file's folder, where it is not absolute), and perhaps `name` (as results
            call it; else the path as it stands), `category` and `prompt`.
        videos: as in `find_sources`.

    Raises:
        UserError: the file cannot be read or has no such column, a path is none of a picture or shard, or two have one
            name.
    """
    with ParquetColumns(file) as table:
        if "path" not in table.names:
            raise UserError(expected(file, "a column `path`", ", ".join(table.names) or "none"))
        columns = {name: [None] * table.rows for name in ("path", "name", "category", "prompt")}
        columns |= {name: table.texts(name, longest=2**15).tolist() for name in columns if name in table.names}
    found = []
    for number, (path, name, category, prompt) in enumerate(zip(*columns.values(), strict=True), start=1):
        if path is None or not is_read(Path(path), videos=videos):
            what = f"a path ending in {', '.join(SUFFIXES)} or {SHARD}"
            raise UserError(expected(f"{file}: row {number}", what, path))
        found.append(Source(beside(Path(file).parent, path), name or path, category or "", prompt))
    if not found:
        raise UserError(expected(file, "at least one picture", "none"))
    return _once(_with_videos(found) if videos else found)


def _once(found: list[Source]) -> list[Source]:
    """The sources without those of a file that stands there already."""
    paths: set[str] = set()
    names: dict[str, Source] = {}
    for source in found:
        path = absolute(source.path)
        if path in paths:
            continue
        if source.name in names:
            same = f"has the same name as {names[source.name].path}; give the folder above them"
            raise UserError(f"{source.path}: {same}")
        paths.add(path)
        names[source.name] = source
    for source in names.values():
        parts = source.name.split("/")
        for count in range(1, len(parts)):
            shard = names.get("/".join(parts[:count]))
            if shard is not None and (shard.is_shard or shard.is_video):
                raise UserError(f"{source.path}: could be taken for a picture of {shard.path}; give the folder above")
    return list(names.values())


def _in_store(place: StorePath) -> list[Source]:
    """A shard, or all below what would be a folder."""
    if is_shard(place):
        if not place.is_file():
            raise UserError(expected(place, "a shard", "nothing there"))
        return [Source(StorePath(place.url, place.stat()), place.stem)]
    if is_read(Path(place.name), videos=True):
        raise UserError(expected(place, f"shards ({SHARD}): single pictures are read from folders alone", place.name))
    if (kind := kind_of_run(place)) not in _SETS:
        raise UserError(expected(place, "a folder of pictures", f"an output folder of {kind}"))
    files = [path for path in place.rglob("*") if is_shard(path) and not path.name.startswith(".")]
    kept = {folder: {path.name for path in shard_paths(folder)} for folder in {path.parent for path in files}}
    files = [path for path in files if path.name in kept[path.parent]]
    if not files:
        raise UserError(expected(place, f"{SHARD} shards", "none there"))
    return [Source(path, name) for path, name in zip(files, names_of(files, place), strict=True)]


def _in_folder(folder: Path, counts: SkipCounts, videos: bool) -> list[Source]:
    files = find_files(folder, counts, videos=videos)
    relative = [file.relative_to(folder) for file in files]
    captions = captions_of(folder, (path.as_posix() for path in relative), counts)
    found = []
    for file, path, name in zip(files, relative, names_of(files, folder), strict=True):
        category = "" if is_shard(file) else readable(path.parent.name)
        found.append(Source(file, name, category, captions.get(path.as_posix())))
    return found


def _named(files: list[Path], counts: SkipCounts, videos: bool) -> list[Source]:
    """Files that are named one by one or by a pattern, where `*` also matches captions and what else lies there."""
    taken = []
    for file in files:
        if is_read(file, videos=videos) and not (is_map(file) and len(files) > 1):
            taken.append(file)
        elif file.suffix.lower() != ".txt":
            counts.add("a file that is no picture by its name", readable(file))
    return [Source(file, readable(file.stem)) for file in taken]


def _matching(pattern: str, counts: SkipCounts, videos: bool) -> list[Source]:
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in matches if path.is_file()]
    folders = [path for path in matches if path.is_dir()]
    if not (files or folders):
        raise UserError(expected(pattern, "an existing file or folder, or a pattern that matches one", "none"))
    if files:
        return _named(files, counts, videos)
    found = []
    for folder in folders:
        if set(folder.parents) & set(folders):
            continue
        if (kind := kind_of_run(folder)) not in _SETS:
            counts.add(f"an output folder of {kind}", readable(folder))
            continue
        found += _in_folder(folder, counts, videos)
    return found


def read_source(
    source: Source,
    *,
    strict: bool = False,
    counts: SkipCounts | None = None,
    masks: str = "optional",
    check: SizeCheck | None = None,
    read: PictureReader | None = None,
    placed: bool = False,
) -> Iterator[dict]:
    """The pictures of a source.

    The prompt of a picture file is its caption: from the metadata of the folder that was given, or else from a text
    file of the same name beside it (`cat.png`, `cat.txt`). Where that cannot be read, the picture has none.

    Args:
        source: where to read.
        strict: raise `UserError` at a picture that cannot be read instead of skipping and counting it.
        counts: filled with what was skipped.
        masks: see `shards.read_shards`.
        check: see `codec.decode`.
        read: reads pictures in place of `codec.decode`, with masks "ignored".
        placed: see `shards.read_shards`; of a picture file it changes nothing.

    Yields:
        Dicts with `picture` (H, W, 3) uint8, `name`, and of a shard's sample all its other values.
    """
    counts = SkipCounts() if counts is None else counts
    if source.is_shard:
        pictures, before = 0, counts.total
        options = {"strict": strict, "counts": counts, "masks": masks, "check": check, "read": read, "placed": placed}
        for sample in read_shards(source.path, **options):
            pictures += 1
            yield {**sample, "name": readable(f"{source.name}/{sample['key']}")}
        if not pictures and counts.total == before:
            counts.add("a shard without pictures", readable(source.path), strict)
        return
    try:
        picture = decode(source.path, "RGB", check=check) if read is None else read(source.path)
    except UnreadablePicture as error:
        counts.add(error.reason, readable(source.path), strict, error.detail)
        return
    prompt = caption_of(source, strict, counts)
    yield {"picture": picture, "name": source.name, "category": source.category, "prompt": prompt}


def caption_of(source: Source, strict: bool, counts: SkipCounts) -> str:
    """The caption of a picture file or video; "" where there is none.

    Args:
        source: the file.
        strict: raise `UserError` where it cannot be read instead of counting that.
        counts: filled with what cannot be read.
    """
    if source.caption is not None:
        return source.caption
    path = caption_file(source.path)
    try:
        return "" if path is None else read_caption(path)
    except UserError as error:
        # The message begins with the path.
        fault = str(error).removeprefix(str(path)).lstrip(",: ")
        counts.add("a caption that cannot be read", readable(path), strict, fault)
        return ""
