"""Which detectors there are, and how one is made fresh or loaded from its files.

A further architecture is a module with a subclass of `Detector`, its line in `_CLASSES`, and the names that it is made
by in `_FRESH`. The classes are named here and not imported, since they import what is here.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffdoctor.detector.models.preprocess import PreprocessConfig
from diffdoctor.runs.errors import UserError

if TYPE_CHECKING:
    from diffdoctor.detector.models.base import Detector

CONFIG_NAME = "detector.json"
WEIGHTS_NAME = "model.safetensors"

# kind, as it stands in a detector's files -> "module:class".
_CLASSES = {
    "segformer": "diffdoctor.detector.models.segformer:ArtifactDetector",
    "conv": "diffdoctor.detector.models.conv:ConvDetector",
}
# Name of an architecture -> kind.
_FRESH = dict.fromkeys(("tiny", "b0", "b1", "b2", "b3", "b4", "b5"), "segformer") | {"conv": "conv"}
ARCHITECTURES = tuple(_FRESH)


def new_detector(architecture: str, **options) -> Detector:
    """A detector with fresh weights.

    Args:
        architecture: one of `ARCHITECTURES`.
        **options: of the class's `of_size`.
    """
    return _class(_CLASSES[_FRESH[architecture]]).of_size(architecture, **options)


def open_detector(source: str) -> Detector:
    """A detector from a folder, a hub id, or the published checkpoint's file."""
    if Path(source).is_file():
        return _class(_CLASSES["segformer"]).from_official(source)
    return load_detector(source)


def load_detector(source: str | Path) -> Detector:
    """Load a detector of any class from a folder or a hub id; its own files say which class it is.

    Returns:
        The detector, in evaluation mode on the CPU.

    Raises:
        UserError: no detector is there, or its weights do not fit its configuration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = _find_folder(source)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        cls = _class(_CLASSES[config["detector"]])
        if config["format"] != 1:
            raise UserError(f"{source}: written in format {config['format']}, this version reads format 1")
        detector = cls.from_config(config["network"], PreprocessConfig(**config["preprocess"]))
        state = load_file(folder / WEIGHTS_NAME)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{source}: not a complete detector ({type(error).__name__}: {error})") from error
    load_exactly(detector, detector.from_file_keys(state), source)
    return detector.eval()


def load_exactly(module: nn.Module, state: dict[str, torch.Tensor], source: object) -> None:
    """`load_state_dict` that names what is missing, left over or of another shape in one line."""
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
        raise UserError(f"{source}: expected a folder with a detector, or a hub id such as owner/name")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except ImportError:
        raise UserError(f"{source}: no such folder (hub ids need `pip install 'diffdoctor[stages]'`)") from None
    except Exception as error:  # the hub client raises its own, httpx's and requests' classes
        raise UserError(f"{source}: no such folder, and the hub gave no detector ({type(error).__name__})") from error


def _class(place: str) -> type[Detector]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
