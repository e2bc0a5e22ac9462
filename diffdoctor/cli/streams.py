"""Standard output and error that cannot end a command's work: whatever they cannot take is lost, the work goes on."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Stream:
    """A standard stream; after its first error all else that is written is dropped.

    Attributes:
        error: why; None: nothing was lost. That nobody reads any more, as behind `| head`, is no error.
    """

    def __init__(self, stream: Any):
        self._stream, self._lost, self.error = stream, False, None
        # Letters beyond what the terminal or log can hold, and file names that are no UTF-8, as \xe9 and \udce9.
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        if not self._lost:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: it was closed
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if not self._lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._lost = True
        self.error = None if isinstance(error, BrokenPipeError) else error
        # What is in the buffer would fail once more when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant_streams() -> Iterator[list[Exception]]:
    """Inside, `sys.stdout` and `sys.stderr` raise nothing; yields a list that gets what they lost when the block ends.

    Where the shell closed one (`>&-`), its number is taken, so that no file that is opened later gets what is printed.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    before, lost = (sys.stdout, sys.stderr), []
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        streams = sys.stdout, sys.stderr = tuple(_Stream(nowhere if stream is None else stream) for stream in before)
        try:
            yield lost
        finally:
            for stream in streams:
                stream.flush()
            lost += [stream.error for stream in streams if stream.error is not None]
            sys.stdout, sys.stderr = before
