"""Errors that the command line prints as one line."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what to change.

    The command line prints the message without a traceback and ends with exit code 2.
    """


def missing_extra(module: str, extra: str) -> UserError:
    """The error for an optional dependency that is not installed."""
    return UserError(f"{module} is not installed: run `pip install 'diffdoctor[{extra}]'`")


def first_line(error: BaseException) -> str:
    """An exception's message, cut to its first line; its class's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
