"""Reading untrusted tar shards: members in memory only; hostile and broken ones are counted and left out.

Names are read as WebDataset reads them: `dir/cat.mask.png` is the member `mask.png` of the sample `dir/cat`.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias, TypeVar

from diffdoctor.data.codec import PICTURE_TYPES
from diffdoctor.data.store_path import Location
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.summary import skipped_in_words

Taken = TypeVar("Taken")
Placed: TypeAlias = tuple[bytes, int]

MASK = "mask.png"
IGNORE = "ignore.png"
# Refuses archives that were made to exhaust memory: in all members of a sample together, and in a header.
MAX_MEMBER_BYTES = 256 * 2**20
_MAX_HEADER_BYTES = 2**16
_MAX_HEADERS = 16
_MAX_NAME = 1024
# WebDataset's rule: a name is split at the first dot behind the last slash.
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)


@dataclasses.dataclass
class SkipCounts:
    """What a reader skipped, by reason; filled while reading.

    Attributes:
        reasons: {reason: count}.
        examples: {reason: the shard and key, or the file, of the first case}.
    """

    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, where: str, strict: bool = False, detail: str = "") -> None:
        """Count one skipped sample.

        Args:
            reason: why it was skipped, in words that are the same for all such samples.
            where: the shard and the key, or the file.
            strict: raise `UserError` instead.
            detail: of this case; "": nothing more.
        """
        detail = f" ({detail})" if detail else ""
        if strict:
            raise UserError(f"{where}: {reason}{detail}")
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.examples.setdefault(reason, f"{where}{detail}")

    def join(self, other: SkipCounts) -> None:
        """Add what another reader skipped."""
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
            self.examples.setdefault(reason, other.examples.get(reason, ""))

    def sentence(self) -> str:
        """What was skipped, in words, each reason with its first case."""
        return skipped_in_words(self.reasons, self.examples)

    @property
    def total(self) -> int:
        """How many were skipped."""
        return sum(self.reasons.values())


def is_wanted(extension: str) -> bool:
    """Whether a member of this extension belongs to a sample: a picture, its mask or its JSON values."""
    return extension == "json" or extension.rpartition(".")[2] in PICTURE_TYPES


def read_groups(
    path: Location, strict: bool, counts: SkipCounts, start: float = 0.0
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard: neighbouring members that share a key; each key once.

    A member that is not a plain, well-named, small file is skipped and counted; hidden ones, folders, and what does not
    belong to a sample (see `is_wanted`) are not read at all.

    Args:
        path: of the tar file.
        strict: raise `UserError` instead of counting.
        counts: filled with what was skipped.
        start: where to begin, as a share of the file's bytes in [0, 1); what lies before is read at the end.

    Yields:
        (key, {extension: bytes}).
    """
    return _each_group(path, strict, counts, start, _contents)


def placed_groups(path: Location, strict: bool, counts: SkipCounts) -> Iterator[tuple[str, dict[str, Placed]]]:
    """What `read_groups` gives, each member's bytes with where they lie: (key, {extension: (bytes, offset)})."""
    return _each_group(path, strict, counts, 0.0, lambda file, info: (_contents(file, info), info.offset_data))


def group_ranges(path: Location) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Where the members of the samples lie that `read_groups` gives: (key, {extension: (offset, size) in bytes})."""
    return _each_group(path, False, SkipCounts(), 0.0, lambda _, info: (info.offset_data, info.size))


def _contents(file: BinaryIO, info: tarfile.TarInfo) -> bytes:
    file.seek(info.offset_data)
    data = file.read(info.size)
    if len(data) != info.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _each_group(
    path: Location, strict: bool, counts: SkipCounts, start: float, take: Callable[[BinaryIO, tarfile.TarInfo], Taken]
) -> Iterator[tuple[str, dict[str, Taken]]]:
    try:
        first, seen = int(start * path.stat().st_size), set()
    except OSError as error:
        counts.add("a shard that cannot be read", path.name, strict, error.strerror or str(error))
        return
    for begin, end in ((first, None), (0, first))[: 2 if first else 1]:
        # Headers are read in both passes; their faults are counted in the first.
        counted_in = (strict, counts) if end is None else (False, SkipCounts())
        try:
            with path.open("rb", buffering=2**18) as file:
                for key, members in _groups(file, path.name, begin, end, take, *counted_in):
                    if key in seen:
                        counts.add("a key twice", f"{path.name}:{key}", strict)
                        continue
                    seen.add(key)
                    yield key, members
        except (tarfile.TarError, OSError, EOFError, ValueError, MemoryError) as error:
            if isinstance(error, UserError):
                raise
            # The group being read may lack members: it is left out with the rest of the shard.
            reason = "a shard cut short or not a tar file"
            counted_in[1].add(reason, path.name, counted_in[0], str(error) or type(error).__name__)


def _groups(file: BinaryIO, name: str, begin: int, end: int | None, take, strict: bool, counts: SkipCounts):
    """The groups whose first member starts at byte `begin` or later, and before `end`."""
    ended = _has_end_mark(file)
    file.seek(0)
    current, members, wanted, size = None, {}, False, 0
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
        while (info := tar.next()) is not None:
            # The list that tarfile keeps of its members would grow with the shard.
            tar.members.clear()
            tar.extending = 0
            if _is_passed_over(info):
                continue
            fault, key, extension = _named(info)
            if not fault and key == current and extension in members:
                fault = "a member twice"
            if not fault and key == current and info.size + size > MAX_MEMBER_BYTES:
                fault = _too_large()
            if fault:
                counts.add(fault, f"{name}:{info.name[:80]!r}", strict)
                continue
            if key != current:
                if wanted and members:
                    yield current, members
                if end is not None and info.offset >= end:
                    return
                current, members, wanted, size = key, {}, info.offset >= begin, 0
            if not wanted or not is_wanted(extension):
                continue
            members[extension] = take(file, info)
            size += info.size
        # tarfile takes a missing end mark, or a header that it cannot read, for the end.
        file.seek(tar.offset)
        if not ended or file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark" if not ended else "a header that cannot be read")
    if wanted and members:
        yield current, members


class _Header(tarfile.TarInfo):
    """A member's header, parsed in a third of the time where it is that of a plain file without extensions.

    The headers before it that extend it are bounded in number (counted by the archive's `extending`) and size.
    """

    __slots__ = ()

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        """As `tarfile.TarInfo.frombuf`, which parses every header that is not as plain as our own writer's."""
        # Bytes of a ustar header: name 0, size 124, checksum 148, type 156, magic 257, prefix 345.
        plain = len(buf) == tarfile.BLOCKSIZE and buf[156:157] in (b"0", b"\0") and buf[257:263] == b"ustar\0"
        size, checksum = buf[124:135], buf[148:154]
        if plain and not buf[345] and size.isdigit() and checksum.isdigit():
            info = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
            info.size, info.chksum = int(size, 8), int(checksum, 8)
            if sum(buf) - sum(buf[148:156]) + 8 * 32 == info.chksum:
                return info
        return super().frombuf(buf, encoding, errors)

    def _proc_member(self, tar):
        if self.type in _EXTENDING:
            tar.extending = getattr(tar, "extending", 0) + 1
            if tar.extending > _MAX_HEADERS:
                raise tarfile.ReadError(f"more than {_MAX_HEADERS} headers for one member")
            if self.size > _MAX_HEADER_BYTES:
                raise tarfile.ReadError(f"a header of more than {_MAX_HEADER_BYTES:,} bytes")
        # What it extends may have its size from it.
        member = self if self.size < 0 else super()._proc_member(tar)
        if member.size < 0:
            raise tarfile.ReadError("a member of negative size")
        return member

    def _proc_sparse(self, tar):
        # Whose parts go on in blocks without end; sparse files are left out anyway.
        if self._sparse_structs[1]:
            raise tarfile.ReadError("a sparse file of many parts")
        return super()._proc_sparse(tar)

    def _proc_gnusparse_00(self, following, *_):
        following.sparse = []

    def _proc_gnusparse_01(self, following, *_):
        following.sparse = []

    def _proc_gnusparse_10(self, following, *_):
        following.sparse = []


_EXTENDING = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _has_end_mark(file: BinaryIO) -> bool:
    """Whether the archive ends in two blocks of zeros, as all complete ones do."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
    return file.read() == bytes(2 * tarfile.BLOCKSIZE)


def _is_passed_over(info: tarfile.TarInfo) -> bool:
    """Whether it is a folder, or hidden: what systems put into archives of their own."""
    parts = info.name.split("/")
    hidden = parts[-1].startswith(".") and not parts[-1].startswith("..")
    return info.isdir() or hidden or "__MACOSX" in parts


def _named(info: tarfile.TarInfo) -> tuple[str | None, str, str]:
    """A member's fault or None, its key and its extension in lower case."""
    if not info.isreg() or info.issparse():
        return "a member that is not a plain file (link, device or sparse)", "", ""
    if info.name.startswith("/") or ".." in info.name.split("/") or "\\" in info.name or "\0" in info.name:
        return "a member with an absolute path or '..'", "", ""
    if len(info.name) > _MAX_NAME:
        return f"a member whose name has more than {_MAX_NAME} letters", "", ""
    found = _NAME.fullmatch(posixpath.normpath(info.name))
    if found is None or not found[2]:
        return "a member whose name is not key.extension", "", ""
    return _too_large() if info.size > MAX_MEMBER_BYTES else None, found[1], found[2].lower()


def _too_large() -> str:
    return f"a sample of more than {MAX_MEMBER_BYTES} bytes"
