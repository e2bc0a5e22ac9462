"""The registry of detector architectures, and how a detector is made or loaded from its files.

A further architecture is a module with a subclass of `Detector` and its line in `_REGISTRY`. The classes are named here
and not imported, since they import from here.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffdoctor.detector.models.preprocess import PreprocessConfig
from diffdoctor.runs.errors import UserError, expected

if TYPE_CHECKING:
    from diffdoctor.detector.models.base import Detector

CONFIG_NAME = "detector.json"
WEIGHTS_NAME = "model.safetensors"

# A class's `kind`, its name in a detector's files -> ("module:class", the sizes that its `of_size` takes).
_REGISTRY = {
    "segformer": (
        "diffdoctor.detector.models.segformer:ArtifactDetector",
        ("tiny", "b0", "b1", "b2", "b3", "b4", "b5"),
    ),
    "conv": ("diffdoctor.detector.models.conv:ConvDetector", ("conv",)),
}
ARCHITECTURES = tuple(size for _, sizes in _REGISTRY.values() for size in sizes)


def new_detector(architecture: str, **options) -> Detector:
    """A detector with fresh weights.

    Args:
        architecture: one of `ARCHITECTURES`.
        **options: of the class's `of_size`.

    Raises:
        ValueError: there is no such architecture.
    """
    for kind, (_, sizes) in _REGISTRY.items():
        if architecture in sizes:
            return _class(kind).of_size(architecture, **options)
    raise ValueError(expected("architecture", f"one of {', '.join(ARCHITECTURES)}", repr(architecture)))


def open_detector(source: str) -> Detector:
    """A detector from a folder, a hub id, or the published checkpoint's file.

    Raises:
        UserError: no detector is there, or it cannot be loaded.
    """
    if Path(source).is_file():
        return _class("segformer").from_official(source)
    return load_detector(source)


def load_detector(source: str | Path) -> Detector:
    """Load a detector of any class, which its own files name.

    Args:
        source: a folder, or a hub id such as owner/name.

    Returns:
        The detector, frozen (its parameters require no gradient, so that its confidences can be weights of a loss), in
        evaluation mode on the CPU. `train_detector` unfreezes it.

    Raises:
        UserError: no detector is there, or its weights do not fit its configuration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = _find_folder(source)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        cls = _class(config["detector"])
        if config["format"] != 1:
            raise UserError(expected(source, "a detector in format 1", f"format {config['format']}"))
        detector = cls.from_config(config["network"], PreprocessConfig(**config["preprocess"]))
        state = load_file(folder / WEIGHTS_NAME)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{source}: not a complete detector ({type(error).__name__}: {error})") from error
    load_exactly(detector, detector.from_file_keys(state), source)
    return detector.eval().requires_grad_(False)


def load_exactly(module: nn.Module, state: dict[str, torch.Tensor], source: object) -> None:
    """`load_state_dict` whose error names missing, unexpected and mismatched keys in one line.

    Args:
        module: to load into.
        state: tensors by name.
        source: path or hub id, for the error.

    Raises:
        UserError: the keys or shapes do not match.
    """
    own = module.state_dict()
    faults = [f"missing {key}" for key in own if key not in state]
    faults += [f"unexpected {key}" for key in state if key not in own]
    faults += [
        f"{key} of shape {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{source}: the weights do not fit: {'; '.join(faults[:5])}{more}")
    module.load_state_dict(state)


def _find_folder(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or str(source).startswith((".", "~")):
        raise UserError(expected(source, "a folder with a detector, or a hub id such as owner/name", "neither"))
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except ImportError:
        raise UserError(f"{source}: no such folder (hub ids need `pip install 'diffdoctor[stages]'`)") from None
    except Exception as error:  # the hub client raises its own, httpx's and requests' classes
        raise UserError(f"{source}: no such folder, and the hub gave no detector ({type(error).__name__})") from error


def _class(kind: str) -> type[Detector]:
    module, _, name = _REGISTRY[kind][0].partition(":")
    return getattr(importlib.import_module(module), name)
