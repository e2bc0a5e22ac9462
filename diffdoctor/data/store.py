"""Object stores by their URLs, through fsspec: whole objects, tried again where the network or the store fails.

A store has no folders, no rename and no links: an object is there as a whole or not at all, and can be created
exclusively. fsspec is imported when the first URL is opened.
"""

from __future__ import annotations

import datetime
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from diffdoctor.runs.errors import UserError, expected, first_line, missing_extra

Result = TypeVar("Result")

# URL's beginning, and the package that serves it.
PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "memory": "fsspec"}
ATTEMPTS, FIRST_PAUSE = 5, 0.5  # seconds, doubled after each attempt but for a random part
# What will be no other the next time. Theirs by name: their packages may not be installed.
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError, IsADirectoryError)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "GatedRepoError")
# What changes with an object's content, the surest first.
_STAMPS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "mtime", "created")


def is_url(path: object) -> bool:
    """Whether a path is the URL of something in a store."""
    protocol, found, _ = str(path).partition("://")
    return bool(found) and protocol.lower() in PROTOCOLS


class Store:
    """The stores of one protocol, as this process sees them.

    Every method raises `UserError` where the store fails `ATTEMPTS` times or refuses access, and `FileNotFoundError`
    where nothing is there.

    Args:
        protocol: one of `PROTOCOLS`.

    Raises:
        UserError: what serves it is not installed.
    """

    def __init__(self, protocol: str):
        package = PROTOCOLS[protocol]
        try:
            import fsspec

            # Others write here too: what was listed before may be no longer so.
            self.files = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            if protocol in ("gs", "hf"):
                raise UserError(f"{protocol}://: {package} is not installed: run `pip install {package}`") from error
            raise missing_extra(package, "store") from error

    def info(self, url: str) -> tuple[int, str]:
        """(size in bytes, stamp) of an object; the stamp changes with its content."""
        return _facts(self._info(url))

    def _info(self, url: str) -> dict[str, Any]:
        found = self._tried(url, "read", lambda: self.files.info(self._path(url)))
        if found["type"] != "file":
            raise FileNotFoundError(url)
        return found

    def listing(self, url: str, *, deep: bool = False) -> dict[str, tuple[int, str]]:
        """What `info` gives of all objects below a URL, by their names from there, sorted; empty where there is none.

        Args:
            url: of what would be a folder.
            deep: those of its folders too.
        """
        folder = self._path(url).rstrip("/")

        def find() -> dict[str, Any]:
            self.files.invalidate_cache()
            try:
                return self.files.find(folder, maxdepth=None if deep else 1, detail=True)
            except FileNotFoundError:
                return {}

        found = self._tried(url, "listed", find)
        names = {name.removeprefix("/")[len(folder.removeprefix("/")) :].lstrip("/"): name for name in found}
        return {name: _facts(found[names[name]]) for name in sorted(names) if name}

    def written_at(self, url: str) -> float | None:
        """When an object was written, in seconds since 1970 by the store's clock; None where it does not say."""

        def ask() -> float | None:
            try:
                return self.files.modified(self._path(url)).timestamp()
            except NotImplementedError:
                return None

        return self._tried(url, "read", ask)

    def read(self, url: str) -> bytes:
        """A small object."""
        return self._tried(url, "read", lambda: self.files.cat_file(self._path(url)))

    def fetch(self, url: str, path: Path, size: int) -> None:
        """Write an object of `size` bytes to a file."""

        def get() -> None:
            self.files.get_file(self._path(url), os.fspath(path))
            if (got := path.stat().st_size) != size:
                raise OSError(f"{got:,} bytes came of {size:,}")

        self._tried(url, "read", get)

    def put(self, path: Path, url: str) -> None:
        """Write a file as an object, whole or not at all."""
        size = path.stat().st_size

        def put() -> None:
            self.files.put_file(os.fspath(path), self._path(url))
            if (got := self.files.info(self._path(url))["size"]) != size:
                raise OSError(f"{got:,} bytes arrived of {size:,}")

        self._tried(url, "written", put)

    def write(self, url: str, data: bytes) -> None:
        """Write a small object, whole or not at all."""
        self._tried(url, "written", lambda: self.files.pipe_file(self._path(url), data))

    def create(self, url: str, data: bytes) -> bool:
        """Write a small object unless it is there: of several processes, one succeeds.

        Args:
            url: of the object.
            data: which no other process writes.

        Returns:
            Whether this process did.
        """

        def create() -> bool:
            try:
                self.files.pipe_file(self._path(url), data, mode="create")
            except Exception as error:
                if not _is_there_already(error):
                    raise
                # An earlier attempt may have made it, whose answer was lost.
                return self.files.cat_file(self._path(url)) == data
            return True

        return self._tried(url, "written", create)

    def delete(self, url: str) -> None:
        """Delete an object, if it is there."""
        with suppress(FileNotFoundError):
            self._tried(url, "deleted", lambda: self.files.rm_file(self._path(url)))

    def _path(self, url: str) -> str:
        return self.files._strip_protocol(url)

    def _tried(self, url: str, done: str, work: Callable[[], Result]) -> Result:
        """What `work` returns, at the first attempt that does not fail."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1))
            try:
                return work()
            except UserError:
                raise
            except Exception as error:  # those of the store's own libraries are of many kinds
                last = error
                if isinstance(error, FileNotFoundError) and done != "written":  # else there is no such bucket
                    raise
                if isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES:
                    raise UserError(f"{url}: cannot be {done} ({_said(error)})") from error
        raise UserError(f"{url}: cannot be {done} ({_said(last)}); tried {ATTEMPTS} times") from last


def _is_there_already(error: Exception) -> bool:
    """Whether it says that an object cannot be created since it exists; not all S3 stores say so as Amazon's does."""
    answer = getattr(error.__cause__, "response", None)  # botocore's
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    return isinstance(error, FileExistsError) or status == 412  # a condition that does not hold


def _said(error: Exception) -> str:
    name = type(error).__name__
    return name if first_line(error) == name else f"{name}: {first_line(error)}"


def _facts(info: dict[str, Any]) -> tuple[int, str]:
    mark = next((info[name] for name in _STAMPS if info.get(name)), "")
    mark = mark.timestamp() if isinstance(mark, datetime.datetime) else mark
    return int(info["size"]), f"{info['size']}@{mark}"


_stores: dict[tuple[str, int], Store] = {}


def store_of(url: str) -> Store:
    """The store in which a URL lies.

    Raises:
        UserError: it is of no known protocol, or what serves that is not installed.
    """
    protocol = url.partition("://")[0].lower()
    if not is_url(url):
        raise UserError(expected(url, f"a URL of {', '.join(f'{name}://' for name in PROTOCOLS)}", "another"))
    # A connection does not survive a fork.
    key = protocol, os.getpid()
    if key not in _stores:
        _stores[key] = Store(protocol)
    return _stores[key]
