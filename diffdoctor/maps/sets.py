"""Sets of pictures with captions and maps: folders, and shards with a manifest."""

from __future__ import annotations

import os
import posixpath
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffdoctor.data.captions import METADATA_NAME, captions_of, own_caption, read_metadata
from diffdoctor.data.codec import SUFFIXES
from diffdoctor.data.folders import find_files, is_read, is_shard
from diffdoctor.data.tar import SkipCounts
from diffdoctor.data.text import is_unicode
from diffdoctor.maps.files import MapFinder, Record, require_maps
from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_write_text
from diffdoctor.runs.record import kind_of_run

_OTHER_METADATA = ("metadata.csv", "metadata.parquet")  # which `imagefolder` reads too


class ShardRecords(Sequence):
    """The pictures of shards with a manifest as records, each read when it is indexed.

    Args:
        folder: what `diffdoctor.data.shard_writer.write_shards` wrote; the masks are the confidence maps, in which what
            is not decided (`ignore`) counts as clean.
    """

    def __init__(self, folder: str | os.PathLike):
        from diffdoctor.data.shards import ShardData

        self.data = ShardData(folder)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        sample = self.data[index]
        return Record(sample["picture"], sample["mask"], str(sample.get("prompt") or ""))


def read_folder(folder: str | os.PathLike, maps: str | os.PathLike | None = None, *, caption: str = "") -> list[Record]:
    """The pictures of a folder and its subfolders, each with its caption and its map.

    Args:
        folder: of pictures. Captions are read from `metadata.jsonl` (`file_name` and `text`, `caption` or `prompt`), or
            from a `.txt` file beside each picture. Which files are read is in docs/detector.md, "What is read".
        maps: folder of the maps, mirroring `folder`; None searches beside each picture for `<stem>.mask.png`.
        caption: for pictures that have none.

    Returns:
        Records in the order of their paths; the map of a picture that has none is None. Warns of files that look like
        pictures and were left out, and where pictures have no caption and there is other metadata, which is not read:
        a `metadata.csv`, or metadata in a subfolder.

    Raises:
        UserError: no folder, no picture in it, a caption that cannot be read, or an output folder of a command.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(expected(folder, "a folder of pictures", "none"))
    if maps is not None:
        require_maps(maps)
    if kind := kind_of_run(folder):
        got = f"an output folder of {kind}" + (" (see ShardRecords)" if kind == "inject" else "")
        raise UserError(expected(folder, "a folder of pictures", got))
    counts = SkipCounts()
    files = find_files(folder, counts, without=[] if maps is None else [Path(maps)], videos=True)
    finder, records, bare = MapFinder(files, folder, None if maps is None else Path(maps)), [], 0
    files = [path for path in files if is_read(path)]  # videos count in names alone
    captions = captions_of(folder, (path.relative_to(folder).as_posix() for path in files), counts)
    for path in files:
        if is_shard(path):
            counts.add("a shard, see ShardRecords", str(path))
            continue
        text = own_caption(path, folder, captions)
        bare += text is None
        records.append(Record(path, finder.of(path), caption if text is None else text))
    if not records:
        aside = f" (left out: {counts.sentence()})" if counts.total else ""
        raise UserError(expected(folder, f"pictures ({', '.join(SUFFIXES)})", f"none{aside}"))
    if counts.total:
        warnings.warn(f"{folder}: left out: {counts.sentence()}", stacklevel=2)
    unread = _unread_metadata(folder) if bare else []
    if unread:
        warnings.warn(
            f"{bare} of {len(records)} pictures have no caption of their own, and {unread[0]} is not read", stacklevel=2
        )
    return records


def write_metadata(folder: str | os.PathLike, maps: str | os.PathLike) -> int:
    """Write `folder/metadata.jsonl`, from which Hugging Face's `imagefolder` reads the columns image, text, confidence.

    Existing rows keep their order and their other columns, a `text` included; pictures without a row come after them.
    A picture that a row names in another column, such as the `cond_image_file_name` of an editing model's set, gets
    no row and needs no map.

    Args:
        folder: of pictures with captions, as `read_folder` reads them.
        maps: folder of the maps, inside `folder`.

    Returns:
        The number of pictures.

    Raises:
        UserError: maps outside the folder, which the loader would not find; a picture without a map; a row without its
            picture; a `metadata.csv`, `metadata.parquet` or metadata in a subfolder, whose captions would be lost.
    """
    folder, maps = Path(folder).resolve(), Path(maps).resolve()
    if folder not in maps.parents:
        raise UserError(expected(maps, f"a folder inside {folder}", "another; move or copy the maps there"))
    if unread := _unread_metadata(folder):
        what = f"all captions in {folder / METADATA_NAME}"
        raise UserError(expected(unread[0], what, "further metadata; move the captions there"))
    named = read_metadata(folder)
    known = {name for name, _ in named}
    other_columns = _named_in_other_columns(row for _, row in named) - known
    records = {}
    for record in read_folder(folder, maps):
        name = record.picture.relative_to(folder).as_posix()
        if name in other_columns:
            continue
        if record.confidence is None:
            raise UserError(expected(record.picture, f"a map in {maps}", "none"))
        records[name] = record
    for name, _ in named:
        if name not in records:
            raise UserError(expected(folder / METADATA_NAME, "a picture for each row", f"none for {name}"))
    named += [(name, {"file_name": name}) for name in records if name not in known]
    for name, row in named:
        row["confidence_file_name"] = records[name].confidence.relative_to(folder).as_posix()
        if row.get("text") is None:
            row["text"] = records[name].caption
    atomic_write_text(folder / METADATA_NAME, "".join(_as_line(row) for _, row in named))
    return len(records)


def _named_in_other_columns(rows: Iterable[dict]) -> set[str]:
    """The files that rows name beside their picture: `<column>_file_name`, or a list in `<column>_file_names`."""
    files = set()
    for row in rows:
        for column, value in row.items():
            if column.endswith(("_file_name", "_file_names")):
                values = value if isinstance(value, list) else [value]
                files.update(posixpath.normpath(each) for each in values if isinstance(each, str))
    return files


def _as_line(row: dict) -> str:
    line = strict_json.dumps(row, ensure_ascii=False)
    # File names may be no Unicode.
    return (line if is_unicode(line) else strict_json.dumps(row)) + "\n"


def _unread_metadata(folder: Path) -> list[Path]:
    found = [path for name in _OTHER_METADATA for path in folder.rglob(name)]
    return sorted([*found, *(path for path in folder.rglob(METADATA_NAME) if path.parent != folder)])
