"""Functions of users' own, from their files or as they are: what they are called, and what tells one from another."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

from diffdoctor.runs.errors import UserError, expected, first_line


def name_of(function: Callable) -> str:
    """For messages."""
    return getattr(function, "__qualname__", type(function).__name__)


def identity_of(function: Callable) -> str:
    """Its name and its source, where there is one: a run is resumed only with the same function."""
    try:
        return name_of(function) + inspect.getsource(function)
    except (OSError, TypeError):
        return name_of(function)


def function_from_file(source: str) -> tuple[Callable, str]:
    """The function of FILE.py:FUNCTION and its identity. The file's code is run: only give files that you trust.

    Raises:
        UserError: there is no such file or function, or the file cannot be run.
    """
    path, _, name = source.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{source}: no such file")
    spec = importlib.util.spec_from_file_location(f"_diffdoctor_user_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{file}: cannot be run ({type(error).__name__}: {first_line(error)})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(expected(source, "the name of a function in the file", repr(name)))
    return function, f"{source} {hashlib.sha256(file.read_bytes()).hexdigest()}"
