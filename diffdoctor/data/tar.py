"""Reading untrusted tar shards: members in memory only; hostile and broken ones are counted and left out."""

from __future__ import annotations

import dataclasses
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffdoctor.data.codec import PICTURE_TYPES
from diffdoctor.runs.errors import UserError

MEMBERS = (*PICTURE_TYPES, "mask.png", "json")
# Refuses archives that were made to exhaust memory.
MAX_MEMBER_BYTES = 256 * 2**20
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]*")


@dataclasses.dataclass
class SkipCounts:
    """What a reader skipped, by reason; filled while reading.

    Attributes:
        reasons: {reason: count}.
        examples: {reason: the shard and key, or the file, of the first case}.
    """

    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, where: str, strict: bool) -> None:
        """Count one skipped sample.

        Args:
            reason: why it was skipped.
            where: the shard and the key, or the file.
            strict: raise `UserError` instead.
        """
        if strict:
            raise UserError(f"{where}: {reason}")
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.examples.setdefault(reason, where)

    @property
    def total(self) -> int:
        """How many were skipped."""
        return sum(self.reasons.values())


def read_groups(
    path: Path, strict: bool, counts: SkipCounts, start: float = 0.0
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard: neighbouring members that share a key; each key once.

    A member that is not a plain, well-named, small file is skipped and counted; one that does not belong to a sample
    (see `MEMBERS`) is not read at all.

    Args:
        path: of the tar file.
        strict: raise `UserError` instead of counting.
        counts: filled with what was skipped.
        start: where to begin, as a share of the file's bytes in [0, 1); what lies before is read at the end.

    Yields:
        (key, {extension: bytes}).
    """
    first, seen = int(start * path.stat().st_size), set()
    for begin, end in ((first, None), (0, first))[: 2 if first else 1]:
        # Headers are read in both passes; their faults are counted in the first.
        counted_in = (strict, counts) if end is None else (False, SkipCounts())
        try:
            with open(path, "rb", buffering=2**18) as file:
                for key, members in _groups(file, path.name, begin, end, *counted_in):
                    if key in seen:
                        counts.add("a key twice", f"{path.name}:{key}", strict)
                        continue
                    seen.add(key)
                    yield key, members
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            # The group being read may lack members: it is left out with the rest of the shard.
            counted_in[1].add("a shard cut short or not a tar file", f"{path.name} ({error})", counted_in[0])


def _groups(file: BinaryIO, name: str, begin: int, end: int | None, strict: bool, counts: SkipCounts):
    """The groups whose first member starts at byte `begin` or later, and before `end`."""
    ended = _has_end_mark(file)
    file.seek(0)
    current, members, wanted = None, {}, False
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
        while (info := tar.next()) is not None:
            # The list that tarfile keeps of its members would grow with the shard.
            tar.members.clear()
            fault = _fault(info)
            key, _, extension = info.name.partition(".")
            extension = extension.lower()
            if not fault and key == current and extension in members:
                fault = "a member twice"
            if fault:
                counts.add(fault, f"{name}:{info.name[:80]!r}", strict)
                continue
            if key != current:
                if wanted:
                    yield current, members
                if end is not None and info.offset >= end:
                    return
                current, members, wanted = key, {}, info.offset >= begin
            if not wanted or extension not in MEMBERS:
                continue
            file.seek(info.offset_data)
            members[extension] = file.read(info.size)
            if len(members[extension]) != info.size:
                raise tarfile.ReadError("unexpected end of data")
        # tarfile takes a missing end mark, or a header that it cannot read, for the end.
        file.seek(tar.offset)
        if not ended or file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark" if not ended else "a header that cannot be read")
    if wanted:
        yield current, members


class _Header(tarfile.TarInfo):
    """A member's header, parsed in a third of the time where it is that of a plain file without extensions."""

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


def _has_end_mark(file: BinaryIO) -> bool:
    """Whether the archive ends in two blocks of zeros, as all complete ones do."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
    return file.read() == bytes(2 * tarfile.BLOCKSIZE)


def _fault(info: tarfile.TarInfo) -> str | None:
    if not info.isreg() or info.issparse():
        return "a member that is not a plain file (link, device, folder or sparse)"
    if info.name.startswith("/") or ".." in info.name.split("/") or "\\" in info.name or "\0" in info.name:
        return "a member with an absolute path or '..'"
    key, _, extension = info.name.partition(".")
    if not KEY.fullmatch(key) or not extension:
        return "a member whose name is not key.extension"
    if info.size > MAX_MEMBER_BYTES:
        return f"a member of more than {MAX_MEMBER_BYTES} bytes"
    return None
