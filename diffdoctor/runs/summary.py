"""The end of a command: its last line on the terminal, and its numbers as JSON values."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def print_summary(line: str, skipped: dict[str, int] | None = None, examples: dict[str, str] | None = None) -> None:
    """Print a command's result, and what was skipped, on standard error.

    Args:
        line: the result.
        skipped: {reason: count}.
        examples: {reason: the file, or the shard and key, of the first case}.
    """
    counts = skipped_in_words(skipped or {}, examples or {})
    print(f"{line}; left out: {counts}" if counts else line, file=sys.stderr)


def skipped_in_words(skipped: dict[str, int], examples: dict[str, str]) -> str:
    """What was skipped, each reason with its number and its first case."""
    return ", ".join(
        f"{count} x {reason}" + (f" (first: {examples[reason]})" if examples.get(reason) else "")
        for reason, count in skipped.items()
    )


def nan_to_none(value: Any) -> Any:
    """Replace numbers that are not finite by None, since JSON has no NaN, and NumPy's numbers by Python's.

    Args:
        value: a number, or nested dicts, lists and tuples of numbers and other JSON values.

    Returns:
        The same with string keys and lists.
    """
    if isinstance(value, dict):
        return {str(key): nan_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_none(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
