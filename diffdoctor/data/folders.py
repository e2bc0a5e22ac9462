"""Which files of a folder are read as pictures and shards, and what they are called in results."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from diffdoctor.data.codec import SUFFIXES
from diffdoctor.data.shard_writer import SHEET
from diffdoctor.data.tar import SkipCounts
from diffdoctor.data.text import readable
from diffdoctor.data.video import ANIMATION_SUFFIXES, VIDEO_SUFFIXES, is_video
from diffdoctor.runs.files import without_case
from diffdoctor.runs.record import kind_of_run

MAP_ENDING = ".mask.png"  # beside a picture, as in shards
SHARD = ".tar"
# Pictures and archives that are not read, and so are counted: else nothing would say it.
_OTHER_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".jp2", ".j2k", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".psd", ".svg", ".eps", ".ico"),
    *(".exr", ".hdr", ".dds", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    *(".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"),
)
# Folders in which systems keep thumbnails and attributes of the pictures.
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")


def is_shard(path: Path) -> bool:
    """Whether a file is a shard, by its name."""
    return path.suffix.lower() == SHARD


def is_read(path: Path, *, videos: bool = False) -> bool:
    """Whether a file is a picture, a shard or, with `videos`, a video, by its name."""
    suffixes = (*SUFFIXES, *VIDEO_SUFFIXES) if videos else SUFFIXES
    return path.suffix.lower() in suffixes or is_shard(path)


def is_map(path: Path) -> bool:
    """Whether a file is the map of the picture or video beside it, by its name."""
    is_moving = path.suffix.lower() in (*VIDEO_SUFFIXES, *ANIMATION_SUFFIXES) and path.stem.lower().endswith(".mask")
    return is_moving or path.name.lower().endswith(MAP_ENDING)


def find_files(
    folder: Path, counts: SkipCounts, *, without: Iterable[Path] = (), deep: bool = True, videos: bool = False
) -> list[Path]:
    """The pictures and shards of a folder and its subfolders, sorted by their paths.

    Hidden files and folders are not read, nor are maps beside pictures, the contact sheet beside shards, and output
    folders of this program that lie inside. A linked folder is read as any other, and each folder once.

    Args:
        folder: where to look.
        counts: filled with what was left out, except for what is hidden and what is no picture by its name.
        without: folders that are not looked into.
        deep: look into subfolders too.
        videos: find videos too.
    """
    kept_out = [os.path.realpath(path) for path in without]
    seen = {os.path.realpath(folder), *kept_out}
    found, waiting = [], [folder]
    while waiting:
        place = waiting.pop()
        names = set()
        for entry in _entries(place, counts):
            if os.path.isdir(entry):
                if deep and _is_entered(entry, seen, kept_out, counts):
                    waiting.append(entry)
            elif is_map(entry):
                continue
            elif not is_read(entry, videos=videos):
                if entry.suffix.lower() in _OTHER_SUFFIXES:
                    counts.add("a file of a format that is not read", readable(entry))
            elif not os.path.isfile(entry):
                counts.add("a name that leads to no file", readable(entry))
            else:
                names.add(entry)
        if any(map(is_shard, names)):
            names.discard(place / SHEET)
        found += names
    return sorted(found)


def _entries(folder: Path, counts: SkipCounts) -> Iterator[Path]:
    """What lies in a folder and is not hidden, sorted by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        counts.add("a folder that cannot be read", readable(folder), detail=error.strerror or str(error))
        return
    yield from (folder / name for name in names if not (name.startswith(".") or name in _SYSTEM_FOLDERS))


def _is_entered(folder: Path, seen: set[str], kept_out: list[str], counts: SkipCounts) -> bool:
    real = os.path.realpath(folder)
    if real in seen:
        if folder.is_symlink():
            counts.add("a linked folder that is read already", readable(folder))
        return False
    seen.add(real)
    kind = kind_of_run(folder)
    # One whose maps were asked for is no surprise.
    if kind and not any(path.startswith(real + os.sep) for path in kept_out):
        counts.add(f"an output folder of {kind}", readable(folder))
    return not kind


def names_of(files: list[Path], folder: Path) -> list[str]:
    r"""What files are called in results: their paths below the folder, without suffix unless that would be ambiguous.

    The suffix is kept where two files differ in nothing else, or in letter case besides, and where a name would be that
    of another picture, or of one in another shard or video. Bytes of a file name that are not Unicode are written as
    \udcff.
    """
    full = [readable(path.relative_to(folder).as_posix()) for path in files]
    names = [readable(path.relative_to(folder).with_suffix("").as_posix()) for path in files]
    # Of one folder, the files that a file system could take for one if they had no suffix.
    alike = [(path.parent, without_case(path.stem)) for path in files]
    whole: dict[tuple[Path, str], set[str]] = {}
    for key, path in zip(alike, files, strict=True):
        whole.setdefault(key, set()).add(without_case(path.name))
    names = [full[i] if len(whole[key]) > 1 else name for i, (key, name) in enumerate(zip(alike, names, strict=True))]
    while True:
        count = collections.Counter(names)
        # Pictures in a shard are called SHARD/KEY, and the maps of a video lie in VIDEO/.
        folders = {parent for name in names for parent in _parents(name)}
        ambiguous = [
            index
            for index, name in enumerate(names)
            if name != full[index]
            and (count[name] > 1 or (name in folders and (is_shard(files[index]) or is_video(files[index]))))
        ]
        if not ambiguous:
            return names
        for index in ambiguous:
            names[index] = full[index]


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]
