"""The end of a command: its last line on the terminal."""

from __future__ import annotations

import sys

from diffdoctor.runs.errors import DoubtfulResult


def print_doubts(doubts: list[str], *, strict: bool) -> None:
    """Print why a result is not worth what it seems, on standard error; the last thing that a command does.

    Args:
        doubts: a sentence each.
        strict: raise the first one instead.

    Raises:
        DoubtfulResult: with `strict`, where there is one.
    """
    if strict and doubts:
        raise DoubtfulResult("; ".join(doubts))
    for doubt in doubts:
        print(f"warning: {doubt}", file=sys.stderr)


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
