"""What tests build at some length and keep for the next run: in build/tests, a folder for each state of its sources."""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable

from filelock import FileLock

from support.paths import ROOT

CACHE = ROOT / "build" / "tests"


def native_sources(*folders: pathlib.Path) -> list[pathlib.Path]:
    """The C++ and CUDA files below the folders."""
    suffixes = (".h", ".cuh", ".cpp", ".cu")
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes)


def native_headers(*folders: pathlib.Path) -> list[pathlib.Path]:
    """Those of them that others include."""
    return [path for path in native_sources(*folders) if path.suffix in (".h", ".cuh")]


def digest(*parts: str | pathlib.Path) -> str:
    """A short hash of texts and of files with their names."""
    found = hashlib.sha256()
    for part in parts:
        texts = (part.name.encode(), part.read_bytes()) if isinstance(part, pathlib.Path) else (part.encode(),)
        for text in texts:
            found.update(len(text).to_bytes(8, "little") + text)
    return found.hexdigest()[:16]


def kept(name: str, key: str, build: Callable[[pathlib.Path], pathlib.Path]) -> pathlib.Path:
    """The file `name` of the sources with the hash `key`.

    Where there is none, one process calls `build` with a folder to work in and takes the file that it made there, whose
    path it returns; others wait.
    """
    target = CACHE / key / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f"{name}.lock"):
        if not target.is_file():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                os.replace(build(pathlib.Path(folder)), target)
    return target
