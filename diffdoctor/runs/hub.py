"""Telling a path from the id of a repository on the Hugging Face hub, which looks like one."""

from __future__ import annotations

import difflib
from pathlib import Path


def is_hub_id(source: str | Path) -> bool:
    """Whether what is no file or folder here may be a hub id: owner/name, of an owner that is no folder here."""
    parts = str(source).split("/")
    looks_local = str(source).startswith((".", "~")) or "\\" in str(source)
    return len(parts) == 2 and all(parts) and not looks_local and not Path(parts[0]).exists()


def local_path(source: str | Path) -> Path:
    """A path with the home folder for its ~; one of a user who is not there stays as it is."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def near(source: str | Path) -> str:
    """What to say after "no such folder": the names beside it that are nearly the same; empty where there are none."""
    path = local_path(source)
    try:
        beside = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, beside, n=3)
    return f" ({path.parent} holds {', '.join(found)})" if found else ""
