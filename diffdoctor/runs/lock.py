"""One process at a time in an output folder."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffdoctor.runs.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_taken: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """Keeps a folder to this process, so that no other clears away what is being written there.

    The lock is the system's and lies on the folder itself: nothing is written, and it goes with the process, however
    that ends. Where the system has no such locks (Windows, some network file systems) nothing is held.

    Args:
        folder: need not exist yet.
    """

    def __init__(self, folder: str | Path):
        self.folder, self._descriptor = Path(folder), None

    def take(self) -> None:
        """Take the lock, if the folder is there and it is not held already.

        Raises:
            UserError: if another process holds it.
        """
        if fcntl is None or self._descriptor is not None or not self.folder.is_dir():
            return
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"{self.folder}: another process is at work there; wait for it, or choose another folder"
                ) from None
            return
        self._descriptor = descriptor
        _taken.add(self)

    def release(self) -> None:
        """Let others have the folder; does nothing where it is not held."""
        if self._descriptor is not None:
            # Closing alone would leave it to a child that was forked a moment ago and has not closed its own yet.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = None
        _taken.discard(self)


def _close_in_child() -> None:
    for lock in list(_taken):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def held(folder: str | Path, *, main: bool = True) -> Iterator[None]:
    """Make a folder, and inside keep it to this process.

    Args:
        main: of several processes that share the work, only the main one holds the folder; the others do nothing here.

    Raises:
        UserError: if another process holds it, or it cannot be made.
    """
    if not main:
        yield
        return
    lock = FolderLock(folder)
    try:
        lock.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    lock.take()
    try:
        yield
    finally:
        lock.release()
