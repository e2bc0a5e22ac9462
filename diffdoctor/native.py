"""The compiled module, loaded at first use; why it could not be is remembered."""

from __future__ import annotations

import importlib
import json
import pathlib

_module = None
_reason: str | None = None
_tried = False


def load():
    """The compiled module `diffdoctor._native`, or None; see `reason`."""
    global _module, _reason, _tried
    if not _tried:
        _tried = True
        info = build_info()
        left_out = info.get("left_out", {}).get("cpu")
        if info.get("built") == []:
            # A module that lies here is left over from an earlier build.
            _reason = left_out
            return None
        try:
            _module = importlib.import_module("diffdoctor._native")
        except ImportError as error:
            _reason = left_out or (
                f"the compiled module is not there ({error}); DIFFDOCTOR_BUILD=none installs go without it"
            )
    return _module


def reason() -> str | None:
    """Why the compiled module is not there, or None where it is."""
    load()
    return _reason


def build_info() -> dict:
    """What the build put into the package and what it left out; empty for a tree that was never built."""
    path = pathlib.Path(__file__).with_name("_build_info.json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def describe() -> dict:
    """For `diffdoctor env`: whether the module loads, its instruction set, and the build's own account."""
    module = load()
    account = {"loaded": module is not None}
    if module is None:
        account["reason"] = _reason
    else:
        account["instruction_set"] = module.instruction_set()
    return {**account, "build": build_info()}
