"""Errors that the command line prints as one line."""

from __future__ import annotations

from collections.abc import Mapping

# What `pip install` is given: a checkout's folder; the project's name once that is on an index.
_PROJECT = "."


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what to change.

    The command line prints the message without a traceback and ends with exit code 2.
    """

    exit_code = 2


class DoubtfulResult(UserError):
    """A command's work is done and written, but its result is not worth what it seems; raised with `strict` alone.

    The command line prints the message without a traceback and ends with exit code 3.
    """

    exit_code = 3


def expected(name: object, what: str, got: object) -> str:
    """The sentence in which an argument, option or file is refused: `name: expected what, got got`.

    Args:
        name: of the argument, or the path of the file.
        what: what would have been accepted, such as "a float in [0, 1]".
        got: what came instead; a string stands as it is.
    """
    return f"{name}: expected {what}, got {got}"


def install_command(extra: str) -> str:
    """What to type, in a checkout, to install an extra."""
    return f"pip install '{_PROJECT}[{extra}]'"


def in_our_words(got: str, words: Mapping[str, str]) -> str:
    """A name that is none of ours as an error shows it, with the one that is meant where it is known.

    Args:
        got: what came.
        words: what a user may write, in lower case with underscores, and what it is called here.
    """
    word = words.get(got.lower().replace("-", "_").replace(" ", "_"))
    return repr(got) if word is None else f"{got!r}, which is {word!r} here"


def missing_extra(module: str, extra: str) -> UserError:
    """The error for an optional dependency that is not installed."""
    return UserError(f"{module} is not installed: run `{install_command(extra)}`")


def first_line(error: BaseException) -> str:
    """An exception's message, cut to its first line; its class's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_least(options: object, **least: float) -> None:
    """Refuse options that are below what is given here by their names; None passes.

    Raises:
        UserError: names the first of them, what was expected and what came.
    """
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and not given >= value:
            raise UserError(expected(name, f">= {value}", given))
