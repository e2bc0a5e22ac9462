"""The compiled module, loaded at first use; why it could not be is remembered."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
import warnings

from diffdoctor.runs.errors import expected

_INSTRUCTION_SETS = ("generic", "avx2", "avx512")
_module = None
_reason: str | None = None
_tried = False
_ignored: str | None = None


def load():
    """The compiled module `diffdoctor._native`, or None; see `reason`. Warns where DIFFDOCTOR_CPU_ISA has no effect."""
    global _module, _reason, _tried, _ignored
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
            _reason = left_out or _not_loaded(error)
        else:
            _ignored = _ignored_instruction_set(_module)
            if _ignored:
                warnings.warn(_ignored, stacklevel=2)
    return _module


def _not_loaded(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the compiled module is not there ({error}); DIFFDOCTOR_BUILD=none installs go without it"
    # It is there, and a library that it needs is not, or is too old.
    return f"the compiled module cannot be loaded ({error}); {_advice(str(error), sys.platform)}"


def _advice(message: str, system: str) -> str:
    if system == "win32":
        return "install the Microsoft Visual C++ Redistributable (vc_redist.x64.exe), which holds the library it misses"
    if "libgomp" in message:
        return "install OpenMP's library (Debian and Ubuntu: libgomp1; Fedora: libgomp)"
    if "GLIBC" in message:  # and GLIBCXX
        return "it was built for a newer system: install from source here, or use an older build"
    return "install it again: pip install --force-reinstall --no-deps --no-cache-dir diffdoctor"


def _ignored_instruction_set(module) -> str | None:
    wanted = os.environ.get("DIFFDOCTOR_CPU_ISA")
    if not wanted or wanted == module.instruction_set():
        return None
    if wanted in _INSTRUCTION_SETS:
        what = "one that this CPU and this build have"
    else:
        what = f"one of {', '.join(_INSTRUCTION_SETS)}"
    return f"{expected('DIFFDOCTOR_CPU_ISA', what, repr(wanted))}; {module.instruction_set()} is used"


def reason() -> str | None:
    """Why the compiled module is not there, or None where it is."""
    load()
    return _reason


def build_info() -> dict:
    """What the build put into the package and what it left out; empty for a tree that was never built."""
    path = pathlib.Path(__file__).resolve().parent.parent / "_build_info.json"
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
        if _ignored:
            account["ignored"] = _ignored
    return {**account, "build": build_info()}
