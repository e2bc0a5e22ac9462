"""Objects of stores on this machine's disk: whole files, the longest unread of which go when there is no more room."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_path, clear_leftovers, is_leftover

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FOLDER, LIMIT = "DIFFDOCTOR_CACHE", "DIFFDOCTOR_CACHE_GIB"
_DEFAULT_GIB = 50.0
_LOCKS = 256
# Seconds after which a file counts as read again, and one that is being written as left by a kill.
_READ_AGAIN, _LEFT = 60.0, 3600.0


def cache_folder() -> Path:
    """Where this machine keeps what it reads of stores, and what it is about to write to them."""
    given = os.environ.get(FOLDER)
    return Path(given) if given else Path.home() / ".cache" / "diffdoctor"


def made_folder(name: str = "") -> Path:
    """A folder of the cache, which is made unless it is there.

    Raises:
        UserError: it cannot be made.
    """
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); set {FOLDER} to another folder") from None
    return folder


def _limit() -> int:
    text = os.environ.get(LIMIT, "")
    try:
        gib = float(text or _DEFAULT_GIB)
        if not 0 < gib < 2**30:
            raise ValueError
    except ValueError:
        raise UserError(expected(LIMIT, "a number of GiB above 0", repr(text))) from None
    return int(gib * 2**30)


def cached(url: str, size: int, stamp: str, fetch: Callable[[Path], None]) -> Path:
    """The file of an object, which is fetched unless it is there; several processes fetch it once.

    Args:
        url: of the object.
        size: in bytes.
        stamp: what changes with its content.
        fetch: writes it to a file.

    Returns:
        The file; another process may delete it at any moment, but for one that has it open.

    Raises:
        UserError: it is larger than the cache may be, or the cache cannot be written.
    """
    folder = cache_folder() / "objects"
    path = folder / hashlib.sha256(f"{url}\n{stamp}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
    if _is_there(path):
        return path
    made_folder("objects")
    with fetching(folder, path.name):
        if not _is_there(path):
            clear_leftovers(folder, path.name)
            _make_room(folder, size, url)
            with atomic_path(path) as temporary:
                fetch(temporary)
    return path


def _is_there(path: Path) -> bool:
    try:
        if time.time() - path.stat().st_mtime > _READ_AGAIN:
            os.utime(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _make_room(folder: Path, size: int, url: str) -> None:
    """Delete the files that were not read for the longest, until one of `size` bytes finds room."""
    if size > (limit := _limit()):
        gib = f"{size / 2**30:.3g}"
        raise UserError(expected(LIMIT, f"at least {gib} for {url}, which has {size:,} bytes", f"{limit / 2**30:g}"))
    files, now = [], time.time()
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if not entry.name.startswith("lock-"):
                    facts = entry.stat()
                    files.append((facts.st_mtime, facts.st_size, entry.path, is_leftover(entry.name)))
    total = sum(facts[1] for facts in files)
    for read, bytes_there, path, is_written in sorted(files):
        if total + size <= limit:
            return
        if is_written and now - read < _LEFT:
            continue
        with suppress(FileNotFoundError, PermissionError):  # on Windows, one that is open stays
            os.unlink(path)
            total -= bytes_there


@contextmanager
def fetching(folder: Path, name: str) -> Iterator[None]:
    """Inside, this is the only process and thread of the machine that makes an entry of this name, in hexadecimal."""
    if fcntl is None:
        yield
        return
    with open(folder / f"lock-{int(name[:8], 16) % _LOCKS:02x}", "ab") as file:
        with suppress(OSError):  # a file system without locks: an object may be fetched twice
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
