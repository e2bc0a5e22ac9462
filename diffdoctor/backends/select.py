"""Which backend serves a call, and why not another."""

from __future__ import annotations

import importlib
import os
import warnings
from bisect import bisect_right
from collections.abc import Mapping
from types import ModuleType

import torch

from diffdoctor.backends import native
from diffdoctor.backends.preferences import FIRST
from diffdoctor.runs.errors import expected, in_our_words

#: Fastest first. `reference` serves everything and comes last.
NAMES = ("cuda", "triton", "cpu", "reference")

_BY_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_WORDS = {
    "torch": "reference", "pytorch": "reference", "eager": "reference", "native": "cpu", "cpp": "cpu", "c++": "cpu",
    "cu": "cuda", "nvidia": "cuda", **{name: name for name in NAMES},
}  # fmt: skip
_SERVES = {"cpu": "CPU tensors", "triton": "CUDA tensors", "cuda": "CUDA tensors"}
_reasons: dict[str, str | None] = {}  # by backend: why it cannot be used, None where it can
_modules: dict[tuple[str, str], ModuleType] = {}  # by backend and op
_chosen: dict[tuple, ModuleType | None] = {}  # by device type and op, and the step of FIRST but for the first
_warned: set[str] = set()


# os.environ.get encodes and decodes at 0.8 us a call, a tenth of what an eager call may cost; the table under it is
# kept up to date by os.environ itself.
_environment = getattr(os.environ, "_data", os.environ)
_VARIABLE = os.environ.encodekey("DIFFDOCTOR_BACKEND") if _environment is not os.environ else "DIFFDOCTOR_BACKEND"


class BackendUnavailable(RuntimeError):
    """A backend asked for by name cannot serve the call; the message says why."""


def why_not(name: str, op: str | None = None) -> str | None:
    """Why the named backend cannot be used on this machine, or None where it can.

    Args:
        name: one of NAMES.
        op: the file of the backend that is to serve; None asks for the backend as a whole.
    """
    if name == "reference":
        return None
    if name not in _reasons:
        try:
            _reasons[name] = importlib.import_module(f"{__package__}.{name}").unavailable()
        except ImportError as error:
            _reasons[name] = str(error)
    if _reasons[name] is not None or op is None or (name, op) in _modules:
        return _reasons[name]
    try:
        _modules[name, op] = importlib.import_module(f"{__package__}.{name}.{op}")
    except ImportError as error:
        return str(error)
    return None


def _load(name: str, op: str) -> ModuleType | None:
    """The backend's module for an op, or None where `why_not` says why there is none."""
    return _modules[name, op] if why_not(name, op) is None else None


def overridden() -> bool:
    """Whether DIFFDOCTOR_BACKEND names a backend."""
    return bool(_environment.get(_VARIABLE))


def requested(backend: str | None) -> str | None:
    """The backend asked for by the argument, else by DIFFDOCTOR_BACKEND, else None.

    Raises:
        TypeError: the argument is no text.
        ValueError: there is no backend of this name.
    """
    if backend is None and not overridden():
        return None
    name = backend if backend is not None else os.environ["DIFFDOCTOR_BACKEND"]
    if name in NAMES:
        return name
    source = "backend" if backend is not None else "DIFFDOCTOR_BACKEND"
    if not isinstance(name, str):
        raise TypeError(expected(source, f"None or one of {', '.join(NAMES)}", type(name).__name__))
    raise ValueError(expected(source, f"one of {', '.join(NAMES)}", in_our_words(name, _WORDS)))


def name_of(module: ModuleType) -> str:
    """The backend that a module belongs to."""
    return module.__name__.split(".")[-2]


def _fastest_first(device_type: str, op: str, step: int) -> tuple[str, ...]:
    """A device's backends, beginning with the one of a step of FIRST."""
    names, steps = _BY_DEVICE.get(device_type, ()), FIRST.get((device_type, op), ())
    return tuple(sorted(names, key=lambda name: name != steps[step][1])) if steps else names


def _step_of(device_type: str, op: str, elements: int) -> int:
    steps = FIRST.get((device_type, op), ())
    return bisect_right(steps, elements, key=lambda step: step[0]) - 1 if len(steps) > 1 else 0


def for_device(device_type: str, op: str, elements: int = 0) -> ModuleType | None:
    """The fastest usable module that serves `op` on a type of device at a size; None means the reference."""
    step = _step_of(device_type, op, elements)
    key = (device_type, op, step) if step else (device_type, op)
    try:
        return _chosen[key]
    except KeyError:
        pass
    found = (_load(name, op) for name in _fastest_first(device_type, op, step))
    module = _chosen[key] = next((module for module in found if module is not None), None)
    return module


def pick(
    name: str | None, op: str, device_type: str, served_by: str | None = None, elements: int = 0
) -> ModuleType | None:
    """The module that serves an op, or None for the reference.

    Args:
        name: of the backend that was asked for; None takes the fastest.
        op: the public name.
        device_type: of the tensors.
        served_by: the file of a backend that serves the op, where it is another op's.
        elements: of the tensor that gets the gradient, by which the fastest is chosen.

    Raises:
        BackendUnavailable: a backend asked for by name cannot serve.
    """
    if name == "reference":
        return None
    file = served_by or op
    if name is None:
        module = for_device(device_type, file, elements)
        if module is None and device_type == "cuda" and op not in _warned:
            _warned.add(op)
            reasons = "; ".join(f"{n}: {why_not(n, file) or 'not usable'}" for n in _BY_DEVICE["cuda"])
            warnings.warn(f"diffdoctor.{op} on a CUDA tensor is served by the slow reference ({reasons})", stacklevel=4)
        return module
    module = _load(name, file)
    if module is None:
        raise BackendUnavailable(f"backend {name!r} cannot be used here: {why_not(name, file)}")
    if name not in _BY_DEVICE.get(device_type, ()) and not (device_type == "cpu" and _is_interpreted(name)):
        raise BackendUnavailable(f"backend {name!r} serves {_SERVES[name]}, got a tensor on {device_type}")
    return module


def _is_interpreted(name: str) -> bool:
    """Whether a loaded backend runs its kernels on the CPU (TRITON_INTERPRET=1), where it serves CPU tensors."""
    return name == "triton" and importlib.import_module(f"{__package__}.triton.launch").INTERPRETS


def available_backends() -> dict[str, str | None]:
    """Each backend's name with None where it can be used here, else the reason why not."""
    return {name: why_not(name) for name in NAMES}


def _servers(device: str, file: str) -> str:
    """The backend that serves a device, or those that do by size: "triton, from 1048576 elements cuda"."""
    told = ""
    for step, (elements, _) in enumerate(FIRST.get((device, file), ((0, ""),))):
        name = next((n for n in _fastest_first(device, file, step) if why_not(n, file) is None), "reference")
        if step == 0:
            told = name
        elif name != told.split()[-1]:
            told += f", from {elements} elements {name}"
    return told


def _server(device: str, op: str, file: str) -> str:
    """The backend that a call without `backend=` gets, or "nothing" with the error that it raises."""
    try:
        name = requested(None)
        if name is None:
            return _servers(device, file)
        pick(name, op, device, file)
    except (ValueError, BackendUnavailable) as error:
        return f"nothing: {error}"
    return name


def describe(ops: Mapping[str, str]) -> dict:
    """What `diffdoctor env` says of the backends: which can be used, which serves each op by device, the build.

    Args:
        ops: each public name with the file of a backend that serves it (`diffdoctor.ops.OPS`).
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "backends": {name: reason or "usable" for name, reason in available_backends().items()},
        "serves": {device: {op: _server(device, op, file) for op, file in ops.items()} for device in devices},
        "dtypes": ["float32", "bfloat16", "float16", "float64"],
        "native": native.describe(),
    }
