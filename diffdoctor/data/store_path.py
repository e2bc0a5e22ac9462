"""What a path of the command line leads to: a `Path` of this machine, or a `StorePath`, which reads as one does."""

from __future__ import annotations

import fnmatch
import os
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, TypeAlias

from diffdoctor.data.store import Store, is_url, store_of
from diffdoctor.data.store_cache import cached
from diffdoctor.runs.errors import UserError, expected


class Facts(NamedTuple):
    """What is known of an object.

    Attributes:
        st_size: its bytes.
        stamp: what changes with its content.
    """

    st_size: int
    stamp: str


class StorePath:
    """An object or what would be a folder in a store, with those methods of `pathlib.Path` that reading needs.

    An object is read from a copy on this machine (see `store_cache`), made when it is first opened.

    Args:
        url: such as s3://bucket/set.
        facts: of the object, where they are known; a path with facts stays that very object, and opening it fails
            once another has taken its name.

    Raises:
        UserError: the URL names no bucket.
    """

    def __init__(self, url: str, facts: Facts | None = None):
        protocol, _, inside = url.partition("://")
        inside = posixpath.normpath(inside).lstrip("/")
        if inside in ("", ".") or inside.startswith(".."):
            raise UserError(expected(url, f"{protocol}://BUCKET/...", "no bucket"))
        self.url, self.facts = f"{protocol.lower()}://{inside}", facts

    @property
    def store(self) -> Store:
        """Where it lies."""
        return store_of(self.url)

    @property
    def _inside(self) -> PurePosixPath:
        return PurePosixPath(self.url.partition("://")[2])

    name = property(lambda self: self._inside.name)
    stem = property(lambda self: self._inside.stem)
    suffix = property(lambda self: self._inside.suffix)

    @property
    def parent(self) -> StorePath:
        """The folder it lies in; of a bucket, the bucket."""
        parent = self._inside.parent
        return StorePath(f"{self.protocol}://{parent if parent.name else self._inside}")

    @property
    def protocol(self) -> str:
        """The URL's beginning."""
        return self.url.partition("://")[0]

    def __truediv__(self, name: object) -> StorePath:
        if is_url(name):
            return StorePath(str(name))
        joined = posixpath.normpath(f"{self._inside}/{name}")
        if joined.split("/")[0] != self._inside.parts[0]:
            raise UserError(expected(f"{self.url}/{name}", f"a place in {self._inside.parts[0]}", "one outside"))
        return StorePath(f"{self.protocol}://{joined}")

    def relative_to(self, other: StorePath) -> PurePosixPath:
        """The path from another, below which it lies."""
        return self._inside.relative_to(other._inside)

    def stat(self) -> Facts:
        """Its size and stamp.

        Raises:
            FileNotFoundError: nothing is there.
        """
        return self.facts or Facts(*self.store.info(self.url))

    def is_file(self) -> bool:
        """Whether it is an object."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return bool(self.store.listing(self.url))

    def iterdir(self) -> Iterator[StorePath]:
        """The objects that lie in it, sorted by name, with their facts."""
        return self._below(deep=False)

    def rglob(self, pattern: str) -> Iterator[StorePath]:
        """The objects that lie in it, at any depth, and whose names match."""
        return (path for path in self._below(deep=True) if fnmatch.fnmatchcase(path.name, pattern))

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """The objects that lie in it and whose names match."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def _below(self, deep: bool) -> Iterator[StorePath]:
        for name, facts in self.store.listing(self.url, deep=deep).items():
            yield StorePath(f"{self.url}/{name}", Facts(*facts))

    def open(self, mode: str = "rb", buffering: int = -1) -> BinaryIO:
        """The object, opened for reading.

        Raises:
            FileNotFoundError: nothing is there.
            UserError: the store fails, or the cache has no room.
        """
        if mode != "rb":
            raise ValueError(expected("mode", "'rb'", repr(mode)))
        facts = self.stat()

        def fetch(path: Path) -> None:
            self.store.fetch(self.url, path, facts.st_size)
            if self.store.info(self.url) != facts:
                raise UserError(f"{self.url}: another object has taken its place meanwhile; run this again")

        while True:
            try:
                path = cached(self.url, *facts, fetch)
            except FileNotFoundError:
                raise FileNotFoundError(2, "no such object", self.url) from None
            try:
                return open(path, "rb", buffering)
            except FileNotFoundError:  # another process has made room right now
                continue

    def read_bytes(self) -> bytes:
        """A small object, read anew each time."""
        return self.store.read(self.url)

    def read_text(self, encoding: str = "utf-8") -> str:
        """A small object as text."""
        return self.read_bytes().decode(encoding)

    def __str__(self) -> str:
        return self.url

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and other.url == self.url

    def __lt__(self, other: StorePath) -> bool:
        return self.url < other.url

    def __hash__(self) -> int:
        return hash(self.url)


Location: TypeAlias = "Path | StorePath"


def at(path: object) -> Path | StorePath:
    """The place that a path or URL names."""
    if isinstance(path, (Path, StorePath)):
        return path
    return StorePath(str(path)) if is_url(path) else Path(path)  # type: ignore[arg-type]


def absolute(place: object) -> str:
    """A place by the name that it has from everywhere on this machine."""
    place = at(place)
    return place.url if isinstance(place, StorePath) else os.path.abspath(place)


def beside(folder: Path | StorePath, name: str) -> Path | StorePath:
    """The file that is called so in a folder, where it may be a URL of its own."""
    return StorePath(name) if is_url(name) else folder / name


def stored_files(folder: Path | StorePath, names: Iterable[str]) -> dict[str, StorePath]:
    """Those of some names that are objects of stores and are there, with their facts: one listing for each folder.

    Args:
        folder: from which the names are.
        names: paths or URLs.
    """
    result, listed = {}, {}
    for name in names:
        path = beside(folder, name)
        if isinstance(path, StorePath):
            if path.parent not in listed:
                listed[path.parent] = {each.name: each for each in path.parent.iterdir()}
            if path.name in listed[path.parent]:
                result[name] = listed[path.parent][path.name]
    return result
