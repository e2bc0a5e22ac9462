"""The registry of detector architectures, and how a detector is read from its files.

A further architecture is a module with a subclass of `Detector` and its line in `REGISTRY`. The classes are named here
and not imported, since they import from here.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
from torch import nn

from diffdoctor.detector.confidence import check_finite_weights
from diffdoctor.detector.models.limits import MAX_FILE_BYTES
from diffdoctor.detector.models.preprocess import PreprocessConfig
from diffdoctor.runs.errors import UserError, expected, first_line, install_command
from diffdoctor.runs.files import unicode_path
from diffdoctor.runs.hub import is_hub_id, local_path, near

CONFIG_NAME = "detector.json"
WEIGHTS_NAME = "model.safetensors"

# A class's `kind`, its name in a detector's files -> ("module:class", the sizes that its `of_size` takes).
REGISTRY = {
    "segformer": (
        "diffdoctor.detector.models.segformer:ArtifactDetector",
        ("tiny", "b0", "b1", "b2", "b3", "b4", "b5"),
    ),
    "conv": ("diffdoctor.detector.models.conv:ConvDetector", ("conv",)),
}
ARCHITECTURES = tuple(size for _, sizes in REGISTRY.values() for size in sizes)


def read_detector(source: str | Path) -> nn.Module:
    """Load a detector of any class, which its own files name; see `load.load_detector`.

    Args:
        source: a detector's folder, the output folder of a training, or a hub id such as owner/name.

    Returns:
        The detector, frozen, in evaluation mode on the CPU.

    Raises:
        UserError: no detector is there, its weights do not fit its configuration, or one is not finite.
    """
    from safetensors.torch import load_file

    folder = _find_folder(source)
    try:
        config = _read_config(folder / CONFIG_NAME)
        cls = class_of(config["detector"])
        if config["format"] != 1:
            raise UserError(expected(source, "a detector in format 1", f"format {config['format']}"))
        detector = cls.from_config(config["network"], PreprocessConfig(**config["preprocess"]))
        with unicode_path(folder / WEIGHTS_NAME) as weights:
            state = load_file(weights)
    except UserError:
        raise
    except Exception as error:  # JSON, configuration and weights may hold anything
        raise UserError(f"{source}: not a complete detector ({type(error).__name__}: {first_line(error)})") from error
    load_exactly(detector, detector.from_file_keys(state), source)
    return detector.eval().requires_grad_(False)


def load_exactly(module: nn.Module, state: dict[str, torch.Tensor], source: object) -> None:
    """`load_state_dict` whose error names missing, unexpected and mismatched keys, or broken weights, in one line.

    Args:
        module: to load into.
        state: tensors by name.
        source: path or hub id, for the error.

    Raises:
        UserError: the keys or shapes do not match, or a weight is not finite.
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
    check_finite_weights(state, source)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{source}: the weights do not fit: {first_line(error)}") from error


def _read_config(path: Path) -> dict:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(expected(path.name, f"at most {MAX_FILE_BYTES:,} bytes", f"{path.stat().st_size:,}"))
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not all(isinstance(config.get(k), dict) for k in ("network", "preprocess")):
        raise ValueError(expected(path.name, "an object with the objects `network` and `preprocess`", "something else"))
    return config


def _find_folder(source: str | Path) -> Path:
    if not str(source).strip():
        raise UserError(
            expected("detector", "a folder with a detector, or a hub id such as owner/name", repr(str(source)))
        )
    path = local_path(source)
    if path.is_dir():
        return _folder_inside(path)
    if path.is_file():
        is_ours = (path.parent / CONFIG_NAME).is_file()
        raise UserError(
            expected(source, "a folder with a detector", f"a file{f'; give {path.parent}' if is_ours else ''}")
        )
    if not is_hub_id(source):
        what = "a folder with a detector, or a hub id such as owner/name"
        raise UserError(expected(source, what, f"neither{near(source)}"))
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except ImportError:
        raise UserError(f"{source}: no such folder (hub ids need `{install_command('stages')}`)") from None
    except Exception as error:  # the hub client raises its own, httpx's and requests' classes
        raise UserError(f"{source}: no such folder, and the hub gave no detector ({type(error).__name__})") from error


def _folder_inside(path: Path) -> Path:
    """The folder itself, or the detector's in the output folder of a training."""
    for folder in (path, path / "detector"):
        if (folder / CONFIG_NAME).is_file():
            return folder
    found = f"no {CONFIG_NAME}"
    if (path / "best" / CONFIG_NAME).is_file() or (path / "checkpoints").is_dir():
        found = "a training that has not finished: the same command resumes it"
        if (path / "best" / CONFIG_NAME).is_file():
            found += f", and {path / 'best'} is its best detector so far"
    elif (path / "model_index.json").is_file():
        found = "a diffusers pipeline"
    elif (path / "config.json").is_file():
        kind = _kind_of_model(path / "config.json")
        found = f"a model of transformers ({kind})"
        if kind == "segformer":
            found = "a plain SegFormer of transformers, which `train-detector --encoder` begins with"
    raise UserError(f"{path}: not a complete detector: {found}")


def _kind_of_model(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return "of an unknown kind"


def class_of(kind: str) -> type[nn.Module]:
    """The class of detectors with this `kind`."""
    module, _, name = REGISTRY[kind][0].partition(":")
    return getattr(importlib.import_module(module), name)
