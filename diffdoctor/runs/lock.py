"""One process at a time in an output folder.

Not filelock: it locks a file of its own, which stays in the folder, where nothing of ours may lie before a run begins.
"""

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

_acquired: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """Keeps a folder to this process, so that no other clears away what is being written there.

    The lock is the system's and lies on the folder itself: nothing is written, and it goes with the process, however
    that ends. Where the system has no such locks (Windows, some network file systems) nothing is held.

    Args:
        folder: need not exist yet.
    """

    def __init__(self, folder: str | Path):
        self.folder, self._descriptor = Path(folder), None

    def acquire(self, *, shared: bool = False) -> None:
        """Lock the folder, if it is there and not locked by this object already.

        Args:
            shared: with other processes that take it so; none of them may clear away what it did not write.

        Raises:
            UserError: if another process holds it, and not both share it.
        """
        while fcntl is not None and self._descriptor is None and self.folder.is_dir():
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise UserError(
                        f"{self.folder}: another process is at work there; wait for it, or choose another folder"
                    ) from None
                return
            if not _is_at(descriptor, self.folder):
                # Its last owner removed it meanwhile, and another may hold the one that is there now.
                os.close(descriptor)
                continue
            self._descriptor = descriptor
            _acquired.add(self)

    def share(self) -> None:
        """From now on, let others have the folder who share it; does nothing where it is not held."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def release(self) -> None:
        """Let others have the folder; does nothing where it is not held."""
        if self._descriptor is not None:
            # Closing alone would leave it to a child that was forked a moment ago and has not closed its own yet.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = None
        _acquired.discard(self)


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False


def _close_in_child() -> None:
    for lock in list(_acquired):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def make_folder(folder: str | Path) -> None:
    """Make a folder, unless it is there.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None


@contextmanager
def locked_folder(folder: str | Path, *, main: bool = True, shared: bool = False) -> Iterator[FolderLock | None]:
    """Make a folder, and inside keep it to this process.

    Args:
        main: of several processes that share the work, only the main one locks the folder; the others do nothing here.
        shared: see `FolderLock.acquire`.

    Yields:
        The lock, where this process has it.

    Raises:
        UserError: if another process holds it, or it cannot be made.
    """
    if not main:
        yield None
        return
    lock = FolderLock(folder)
    make_folder(folder)
    lock.acquire(shared=shared)
    try:
        yield lock
    finally:
        lock.release()
