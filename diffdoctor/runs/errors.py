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


def check_least(options: object, **least: float) -> None:
    """Refuse options that are below what is given here by their names; None passes.

    Raises:
        UserError: names the first of them, what was expected and what came.
    """
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and given < value:
            raise UserError(f"{name}: expected >= {value}, got {given}")
