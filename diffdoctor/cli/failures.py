"""The one place where whatever ends a command becomes one line on standard error and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator

from diffdoctor.runs.errors import UserError
from diffdoctor.runs.progress import close_displays
from diffdoctor.version import __version__

USER_ERROR = 2
INTERRUPTED = 130
TRACEBACK = "DIFFDOCTOR_TRACEBACK"

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)


def fail(message: object, name: str | None = None, code: int = USER_ERROR) -> int:
    """Print why a command ends, in one line; returns the exit code."""
    prefix = f"diffdoctor {name}" if name else "diffdoctor"
    print(f"{prefix}: error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _shows_tracebacks() -> bool:
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def report(error: BaseException, name: str) -> int:
    """Print an error that ended a command, in one line; returns the exit code.

    An error that nobody foresaw is a fault of ours: its traceback goes to a file, which the line names. With
    DIFFDOCTOR_TRACEBACK=1 every traceback is printed.

    Args:
        error: what was raised.
        name: the command's.
    """
    close_displays()
    if _shows_tracebacks():
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        print(f"diffdoctor {name}: interrupted; the same command resumes after what was finished", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, UserError):
        return fail(_message(error) or type(error).__name__, name, error.exit_code)
    system = _of_the_system(error)
    if system is not None:
        path = f"{os.fsdecode(system.filename)}: " if isinstance(system.filename, (str, bytes)) else ""
        return fail(f"{path}{system.strerror or system}", name)
    if isinstance(error, MemoryError):
        return fail("memory ran out; smaller batches and pictures need less", name)
    kept = _keep_traceback(error, name)
    where = f"traceback in {kept}" if kept else f"{TRACEBACK}=1 shows the traceback"
    message = _message(error)
    kind = "" if _of_a_worker(error) else type(error).__name__ + ": " * bool(message)
    return fail(f"{kind}{message} ({where})", name)


def _of_the_system(error: BaseException) -> OSError | None:
    """The error of the system that an exception is, or that a library made another one of: the disk is full."""
    if isinstance(error, OSError):
        return error
    seen: set[int] = set()
    cause = error.__cause__ or error.__context__
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, OSError) and cause.errno in _DISK:
            return cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return None


def _of_a_worker(error: BaseException) -> bool:
    return "Traceback (most recent call last)" in str(error)


def _message(error: BaseException) -> str:
    """What an exception says; of one that a data loader's process raised, which is a whole traceback, the last line."""
    lines = str(error).strip().splitlines() or [""]
    if _of_a_worker(error):
        return lines[-1].removeprefix(f"{UserError.__module__}.UserError: ")
    return " ".join(lines) if isinstance(error, UserError) else lines[0]


def _keep_traceback(error: BaseException, name: str) -> str | None:
    lines = [f"diffdoctor {__version__}, {name}: {sys.argv}\n", *traceback.format_exception(error)]
    try:
        descriptor, path = tempfile.mkstemp(prefix="diffdoctor-traceback-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
    except OSError:
        return None
    return path


@contextlib.contextmanager
def watched_threads() -> Iterator[list[BaseException]]:
    """Inside, what ends a thread or an object's removal prints no traceback; yields the threads' errors, as a list.

    TensorBoard writes from a thread of its own, which ends when the disk is full; a writer of Parquet files that could
    not write fails once more when it is removed.
    """
    before, found = (threading.excepthook, sys.unraisablehook), []

    def note(args):
        if args.exc_value is not None and args.exc_type is not SystemExit:
            found.append(args.exc_value)

    threading.excepthook = note
    if not _shows_tracebacks():
        sys.unraisablehook = lambda args: None
    try:
        yield found
    finally:
        threading.excepthook, sys.unraisablehook = before


def report_threads(found: list[BaseException], name: str) -> int:
    """Say what ended other threads, where the command itself went well; returns the exit code.

    Only what kept files from being written is an error: other libraries' threads end for reasons of their own.
    """
    for error in found:
        system = _of_the_system(error)
        if system is not None and system.errno in _DISK:
            return report(error, name)
    return 0
