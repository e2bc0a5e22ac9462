"""Users' own kinds of damage, from Python files that a command is given."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from diffdoctor.runs.errors import UserError, expected, first_line


def load_plugins(files: Sequence[str] | None) -> list[str]:
    """Run Python files that register kinds by `damage_kind`, each once in a process.

    Args:
        files: their paths; None: none.

    Returns:
        A digest of each file's text.

    Raises:
        UserError: one cannot be read, raises, or calls exit.
    """
    digests = []
    for file in files or ():
        try:
            digests.append(hashlib.sha256(Path(file).read_bytes()).hexdigest())
        except OSError as error:
            raise UserError(f"plugins: {file}: cannot be read ({error.strerror})") from None
        # The name depends on the text too, since the file may have changed by the next call.
        path_and_text = f"{Path(file).resolve()} {digests[-1]}".encode("utf-8", "surrogatepass")
        name = f"diffdoctor_plugin_{hashlib.sha256(path_and_text).hexdigest()[:16]}"
        if name not in sys.modules:
            _run(name, file)
    return digests


def _run(name: str, file: str) -> None:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(expected(f"plugins: {file}", "a Python file (.py)", "a file with another suffix"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"plugins: {file}: {type(error).__name__}: {first_line(error)}") from error
