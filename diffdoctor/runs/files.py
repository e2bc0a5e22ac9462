"""Files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import UserError, expected, first_line

# In the hidden names of what is being written, and of what is being replaced: `.NAME.diffdoctor-tmp-0a1b2c3d.png`.
_WRITING, _REPLACED = ".diffdoctor-tmp-", ".diffdoctor-old-"
_HIDDEN = re.compile(r"\..+\.diffdoctor-(tmp|old)-[0-9a-f]{8}(\.[^.]+)?")
# What a mount answers that has no such operation for folders (CIFS, drvfs, some FUSE), or none for this user.
_NO_FOLDER_SYNC = {
    errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM
}  # fmt: skip
_IS_WINDOWS = os.name == "nt"
# What no name of a file may hold there, end in, or be called before its first dot.
_NOT_ON_WINDOWS = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$|^(?=(con|prn|aux|nul|com\d|lpt\d) *(\.|$))', re.I)
# What is answered where a name from elsewhere is none for a file: too long, or of two one needs a folder there.
NO_SUCH_NAME = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL}
# What a write alone is answered.
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system has such a step."""
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


def _hidden(path: Path, mark: str, suffix: str = "") -> Path:
    return path.with_name(f"{_hidden_start(path.name)}{mark}{secrets.token_hex(4)}{suffix}")


def _hidden_start(name: str) -> str:
    # What is added must not make a long name too long: file systems take 255 bytes.
    return f".{name if len(os.fsencode(name)) <= 200 else name[:50]}"


def file_name(name: str, ending: str) -> str:
    """A result's name as that of its file: with the ending, and no part longer than the 255 bytes of a file system.

    Args:
        name: of the result, parts separated by slashes.
        ending: such as ".png".

    Returns:
        The name and the ending; where the last part would be too long, its beginning and a hash of the whole. On
        Windows a part that no file may be called there, or that would name a drive, gets a hash as well.
    """
    folder, slash, last = name.rpartition("/")
    parts = [_short(part, "") for part in folder.split("/")] if slash else []
    return "/".join([*parts, _short(last, ending)])


def _short(part: str, ending: str) -> str:
    allowed = _NOT_ON_WINDOWS.sub("_", part) if _IS_WINDOWS else part
    if allowed == part and len(os.fsencode(part + ending)) <= 255:
        return part + ending
    beginning = os.fsencode(allowed)[:200].decode("utf-8", "ignore")
    return f"{beginning}-{hashlib.sha256(os.fsencode(part)).hexdigest()[:16]}{ending}"


def ignores_case(folder) -> bool:
    """Whether a folder's file system takes names that differ in letter case alone for one, as on Windows and macOS.

    Args:
        folder: need not exist.
    """
    folder = Path(folder).absolute()
    for path in (folder, *folder.parents):
        other = path.with_name(path.name.swapcase()) if path.name else path
        if other.name != path.name and path.exists():
            with suppress(OSError):
                return os.path.samefile(path, other)
            return False
    return _IS_WINDOWS


def without_case(name: str) -> str:
    """What names have in common that a file system may take for one: letter case and composition left out."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


@contextmanager
def unicode_path(path) -> Iterator[Path]:
    """A path of the file or folder that is Unicode, for libraries that take no other: where need be, a link's."""
    path = Path(path)
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as place:
            # Of the same name as far as it goes: libraries look at suffixes.
            link = Path(place) / os.fsencode(path.name).decode("utf-8", "replace")
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


@contextmanager
def atomic_path(path) -> Iterator[Path]:
    """Yield a temporary file path beside `path`; it takes the name `path` when the block ends without an error.

    The file is flushed to the disk before it is renamed, and removed when the block raises. Its mode is the umask's,
    whoever writes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path, _WRITING, path.suffix)
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    try:
        with naming(path):
            yield temporary
            _finish_file(temporary, mode)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an error of a write, which names no file, names this one; so does one that a library made another of.

    Args:
        path: of the file, or of the folder of all that is written inside.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None and cause.errno in _NOT_WRITTEN and cause.filename is None:
            cause.filename = os.fspath(path)
        raise


def _finish_file(path: Path, mode: int) -> None:
    """Give a file its mode, where its writer gave it another, and flush it to the disk."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(PermissionError):  # a mount that has no modes
            os.chmod(path, mode)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def atomic_write_bytes(path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def create_exclusively(path, data: bytes) -> bool:
    """Write `data` to `path`, whole or not at all, unless it is there: of several processes, one succeeds.

    What is written is on the disk when its name is; the name may be lost where the power fails at once.

    Returns:
        Whether this process did.

    Raises:
        OSError: the file system has no hard links, among other reasons.
    """
    path = Path(path)
    temporary = _hidden(path, _WRITING, path.suffix)
    try:
        with open(temporary, "xb") as file, naming(path):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            # A network's file system may have linked it, lost the answer and asked again.
            return os.stat(temporary).st_nlink == 2
        return True
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path, text: str) -> None:
    """Write `text` to `path`, whole or not at all, in UTF-8; lone surrogates, as in some file names, as `\\udce9`."""
    atomic_write_bytes(path, text.encode("utf-8", "backslashreplace"))


def atomic_write_json(path, value) -> None:
    """Write `value` as indented JSON to `path`; numbers that are not finite become null, since JSON has none."""
    atomic_write_text(path, strict_json.dumps(value, indent=2) + "\n")


@contextmanager
def reading(path, advice: str = "remove it, and the same command makes it again") -> Iterator[None]:
    """Inside, what is raised because a file of a run's own is damaged becomes one line that names it.

    Args:
        path: the file or folder that is read.
        advice: what to do.

    Raises:
        UserError: for any error but one of the system.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # zip, pickle, NumPy and JSON raise their own
        raise UserError(f"{path}: is damaged ({type(error).__name__}: {first_line(error)}); {advice}") from error


@contextmanager
def atomic_dir(path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it replaces the folder `path` when the block ends without an error.

    A reader sees the old folder, no folder for the moment between two renames, or the whole new one; never a mixture.
    The temporary folder is removed when the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path, _WRITING)
    temporary.mkdir()
    try:
        with naming(path):
            yield temporary
            replace_dir(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_dir(new, path) -> None:
    """Give the folder `new`, which stands on the same disk, the name `path`; a folder of that name goes.

    What is in it is flushed to the disk before, and its files get the mode that `new` has, without the right to execute
    them: some libraries make theirs unreadable to others. A reader sees what `atomic_dir` says.
    """
    new, path = Path(new), Path(path)
    mode = stat.S_IMODE(new.stat().st_mode) & 0o666
    for file in new.rglob("*"):
        if file.is_file():
            _finish_file(file, mode)
        elif file.is_dir():
            sync_folder(file)
    sync_folder(new)
    old = None
    if path.exists():
        old = _hidden(path, _REPLACED)
        old.mkdir()
        os.replace(path, old / path.name)
    os.replace(new, path)
    sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def delete_dir(path) -> None:
    """Delete a folder; a kill leaves it whole, or under a name that `clear_leftovers` knows."""
    path = Path(path)
    hidden = _hidden(path, _WRITING)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def refuse_foreign(folder, names, folders: Mapping[str, Sequence[str]] | None = None) -> None:
    """Refuse to replace or clear a folder that holds anything but files of ours.

    Args:
        folder: need not exist.
        names: what belongs there, as names or patterns such as `part-*`.
        folders: the folders that belong there, by name, each with what belongs in it; None: there are none.

    Raises:
        UserError: something else is there, or a file stands where the folder is to be.
    """
    folder = Path(folder)
    refuse_file(folder)
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if folders and entry.name in folders and not entry.is_symlink():
            refuse_foreign(entry, folders[entry.name])
            continue
        known = any(fnmatch.fnmatchcase(entry.name, name) for name in names)
        if not known or (entry.is_dir() and not entry.is_symlink()):
            raise UserError(
                f"{folder}: would be replaced, but holds {entry.name!r}, which is none of the files that belong there; "
                "choose another output folder, or move it away"
            )


def refuse_file(folder) -> None:
    """Refuse a file where a folder is to be.

    Raises:
        UserError: if there is one.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UserError(expected(str(folder), "a folder or nothing", "a file") + "; choose another output folder")


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name was being written, or being replaced, when a process was killed."""
    return _HIDDEN.fullmatch(name) is not None


def leftovers(folder, name: str | None = None) -> list[Path]:
    """What `atomic_path`, `atomic_dir` and `delete_dir` left in `folder` when they were killed.

    Args:
        folder: where to look; need not exist.
        name: only what was to be the file or folder of this name; None: everything.
    """
    starts = "." if name is None else tuple(_hidden_start(name) + mark for mark in (_WRITING, _REPLACED))
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return [Path(entry) for entry in entries if entry.name.startswith(starts) and is_leftover(entry.name)]
    return []


def clear_leftovers(folder, name: str | None = None, *, deep: bool = False) -> None:
    """Remove what a kill left half-written in a folder that this program made.

    A folder that was killed between its two renames, and so is not there under its name, gets its old content back.
    Nobody else may be writing there.

    Args:
        folder: where to look; need not exist.
        name: only what was to be the file or folder of this name; None: everything. In a folder that may be somebody
            else's, only this name's may be removed.
        deep: look into subfolders too.
    """
    for entry in leftovers(folder, name):
        if not entry.is_dir() or entry.is_symlink():
            entry.unlink(missing_ok=True)
            continue
        if _REPLACED in entry.name:
            for replaced in entry.iterdir():
                if not (entry.parent / replaced.name).exists():
                    os.replace(replaced, entry.parent / replaced.name)
        shutil.rmtree(entry, ignore_errors=True)
    if deep:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    clear_leftovers(entry, name, deep=True)


def stamp(source: str | None) -> str | None:
    """A hash of the names, sizes and times of a file or of a folder's files; None where it is neither."""
    if source is None or not (path := Path(source)).exists():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    facts = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
