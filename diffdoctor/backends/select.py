"""Which backend serves a call, and why not another."""

from __future__ import annotations

import importlib
import os
import warnings

import torch

#: Fastest first. `reference` serves everything and comes last.
NAMES = ("cuda", "triton", "cpu", "reference")
OPS = ("weighted_loss", "modulate_gradient", "artifact_loss")

_MODULES = {name: f"diffdoctor.backends.{name}.weighted_loss" for name in ("cuda", "triton", "cpu")}
_BY_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_SERVES = {"cpu": "CPU tensors", "triton": "CUDA tensors", "cuda": "CUDA tensors"}
_loaded: dict[str, object] = {}
_missing: dict[str, str] = {}
_chosen: dict[str, object] = {}
_warned: set[str] = set()


# os.environ.get encodes and decodes at 0.8 us a call, a tenth of what an eager call may cost; the table under it is
# kept up to date by os.environ itself.
_environment = getattr(os.environ, "_data", os.environ)
_VARIABLE = os.environ.encodekey("DIFFDOCTOR_BACKEND") if _environment is not os.environ else "DIFFDOCTOR_BACKEND"


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot serve the call; the message says why."""


def _load(name: str):
    """The backend's module, or None with the reason kept in `_missing`."""
    if name in _loaded:
        return _loaded[name]
    if name in _missing:
        return None
    try:
        module = importlib.import_module(_MODULES[name])
        reason = module.unavailable()
    except ImportError as error:
        reason = str(error)
    if reason is not None:
        _missing[name] = reason
        return None
    _loaded[name] = module
    return module


def why_not(name: str) -> str | None:
    """Why the named backend cannot be used on this machine, or None where it can."""
    return None if name == "reference" or _load(name) is not None else _missing[name]


def overridden() -> bool:
    """Whether DIFFDOCTOR_BACKEND names a backend."""
    return bool(_environment.get(_VARIABLE))


def requested(backend: str | None) -> str | None:
    """The backend asked for by the argument, else by DIFFDOCTOR_BACKEND, else None."""
    if backend is None and not overridden():
        return None
    name = backend if backend is not None else os.environ["DIFFDOCTOR_BACKEND"]
    if name in NAMES:
        return name
    source = "backend" if backend is not None else "DIFFDOCTOR_BACKEND"
    if not isinstance(name, str):
        raise TypeError(f"{source} must be None or one of {', '.join(NAMES)}, got {type(name).__name__}")
    raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")


def for_device(device_type: str):
    """The fastest usable backend module for a device type; None means the reference."""
    try:
        return _chosen[device_type]
    except KeyError:
        pass
    module = next((m for m in map(_load, _BY_DEVICE.get(device_type, ())) if m is not None), None)
    _chosen[device_type] = module
    return module


def pick(name: str | None, op: str, device_type: str):
    """The module that serves `op` on tensors of `device_type`, or None for the reference.

    Raises `BackendUnavailable` where a backend asked for by name cannot serve.
    """
    if name == "reference":
        return None
    if name is None:
        module = for_device(device_type)
        if module is None and device_type == "cuda" and op not in _warned:
            _warned.add(op)
            reasons = "; ".join(f"{n}: {_missing.get(n, 'not usable')}" for n in _BY_DEVICE["cuda"])
            warnings.warn(f"diffdoctor.{op} on a CUDA tensor is served by the slow reference ({reasons})", stacklevel=4)
        return module
    module = _load(name)
    if module is None:
        raise BackendUnavailable(f"backend {name!r} cannot be used here: {_missing[name]}")
    if name not in _BY_DEVICE.get(device_type, ()):
        raise BackendUnavailable(f"backend {name!r} serves {_SERVES[name]}, got a tensor on {device_type}")
    return module


def available_backends() -> dict[str, str | None]:
    """Each backend's name with None where it can be used here, else the reason why not."""
    return {name: why_not(name) for name in NAMES}


def _server(device: str, op: str, usable: dict[str, str | None]) -> str:
    """The backend that a call without `backend=` gets, or "nothing" with the error that it raises."""
    try:
        name = requested(None)
        if name is None:
            return next((n for n in _BY_DEVICE[device] if usable[n] is None), "reference")
        pick(name, op, device)
    except (ValueError, BackendUnavailable) as error:
        return f"nothing: {error}"
    return name


def describe() -> dict:
    """What `diffdoctor env` says of the backends: which can be used, which serves each op by device, the build."""
    from diffdoctor.backends import native

    usable = available_backends()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "backends": {name: reason or "usable" for name, reason in usable.items()},
        "serves": {device: {op: _server(device, op, usable) for op in OPS} for device in devices},
        "dtypes": ["float32", "bfloat16", "float16", "float64"],
        "native": native.describe(),
    }
