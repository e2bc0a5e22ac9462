"""Files that are either whole or absent: written under a temporary name, then renamed."""

import errno
import fnmatch
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from diffdoctor.runs.errors import UserError

# The names that atomic_path and atomic_dir give: the final name, what mkstemp draws, and what it is.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.(?P<what>tmp|old)(\.[^.]+)?")
# What a mount answers that has no such operation for folders (CIFS, drvfs, some FUSE), or none for this user.
_NO_FOLDER_SYNC = {
    errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM
}  # fmt: skip


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once the folder that holds the name has reached the disk.
    # Windows cannot open a folder, and needs no such step.
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextmanager
def atomic_path(path):
    """Yield a temporary file path beside `path`; it takes the name `path` when the block ends without an error.

    The file is flushed to the disk before it is renamed, and removed when the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".tmp{path.suffix}")
    os.close(descriptor)
    os.chmod(name, 0o666 & ~_umask())
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path, value) -> None:
    """Write `value` as indented JSON to `path`; NaN and infinities are refused, since JSON has none."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def atomic_dir(path):
    """Yield a temporary folder beside `path`; it replaces the folder `path` when the block ends without an error.

    A reader sees the old folder, no folder for the moment between two renames, or the whole new one; never a mixture.
    The temporary folder is removed when the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    os.chmod(temporary, 0o777 & ~_umask())
    try:
        yield temporary
        replace_dir(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_dir(new, path) -> None:
    """Give the folder `new`, which stands on the same disk, the name `path`; a folder of that name goes.

    What is in it is flushed to the disk before. A reader sees what `atomic_dir` says.
    """
    new, path = Path(new), Path(path)
    for file in new.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        elif file.is_dir():
            _sync_folder(file)
    _sync_folder(new)
    old = None
    if path.exists():
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
        os.replace(path, old / "was")
    os.replace(new, path)
    _sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def refuse_foreign(folder, names) -> None:
    """Refuse to replace or clear a folder that holds anything but files of ours.

    Args:
        folder: need not exist.
        names: what belongs there, as names or patterns such as `part-*`; a folder inside never does.

    Raises:
        UserError: something else is there, or a file stands where the folder is to be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder}: expected a folder or nothing, got a file; choose another output folder")
        return
    for entry in sorted(folder.iterdir()):
        known = any(fnmatch.fnmatchcase(entry.name, name) for name in names)
        if not known or (entry.is_dir() and not entry.is_symlink()):
            raise UserError(
                f"{folder}: would be replaced, but holds {entry.name!r}, which is none of the files that belong there; "
                "choose another output folder, or move it away"
            )


def clear_temporaries(folder, name: str | None = None, *, deep: bool = False) -> None:
    """Remove what `atomic_path` and `atomic_dir` left in `folder` when they were killed.

    A folder that was killed between its two renames, and so is not there under its name, gets its old content back.
    Nobody else may be writing there.

    Args:
        folder: where to look; need not exist.
        name: only what was to be the file or folder of this name; None: everything.
        deep: look into subfolders too.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    for entry in list(folder.iterdir()):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None:
            if deep and entry.is_dir() and not entry.is_symlink():
                clear_temporaries(entry, name, deep=True)
        elif name is None or match["name"] == name:
            was = entry / "was"
            if match["what"] == "old" and was.exists() and not (folder / match["name"]).exists():
                os.replace(was, folder / match["name"])
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
