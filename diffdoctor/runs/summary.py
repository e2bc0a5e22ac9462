"""The end of a command: its last line on the terminal."""

from __future__ import annotations

import sys


def print_summary(line: str, skipped: dict[str, int] | None = None) -> None:
    """Print a command's result, and what was skipped, on standard error.

    Args:
        line: the result.
        skipped: {reason: count}.
    """
    counts = ", ".join(f"{count} x {reason}" for reason, count in (skipped or {}).items())
    print(f"{line}; left out: {counts}" if counts else line, file=sys.stderr)
