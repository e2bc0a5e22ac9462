"""The one loader of networks that come from elsewhere: by a list of formats, without running any code that they bring.

A `.pt2` file of torch.export is none of the formats: its operators, its guards and its symbols are evaluated as Python,
and its tensors may be pickles.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from diffdoctor.runs.errors import UserError, expected, first_line, missing_extra
from diffdoctor.runs.hub import is_hub_id, near

_MODEL = "a folder or hub id of a model of transformers"
FORMATS = f"{_MODEL}, or a TorchScript file"

# What TorchScript can do beside computing: write and map files, call other machines, and make objects that do.
_FORBIDDEN_IN_SCRIPTS = re.compile(r"\b(save|from_file|rpc_\w+)\b|\btorch\s*\.\s*classes\s*\.\s*(?!quantized\b)")
# The form in which TorchScript itself writes the name of a submodule; any other might put a forbidden name together.
_PLAIN_GETATTR = re.compile(r"\bgetattr\([\w.]+, \"\w*\"\)")
_MAX_SCRIPT_BYTES = 64 << 20

_MAX_LAYERS = 1000
_MAX_SIZE = 10_000_000


def load_state_dict_file(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `torch.save` wrote, on the CPU; nothing else is unpickled.

    Raises:
        UserError: it holds something else, or cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and each layer below raise their own
        what = "a state dict that can be loaded safely (weights_only=True)"
        raise UserError(expected(path, what, f"{type(error).__name__}: {first_line(error)}")) from error
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise UserError(expected(path, "a state dict of tensors by name", "other values"))
    return state


def load_script(option: str, path: str | Path) -> torch.nn.Module:
    """A TorchScript network that only computes, on the CPU in evaluation mode.

    Args:
        option: the command line's name for it, for messages.
        path: the file.

    Raises:
        UserError: it is no TorchScript, or does more than compute.
    """
    try:
        _check_script(Path(path))
        with warnings.catch_warnings():
            # torch 2.13 warns that TorchScript is deprecated, but most existing files are TorchScript.
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(path), map_location="cpu").eval()
    except Exception as error:  # the reader of archives and the compiler raise their own
        raise UserError(expected(f"{option} {path}", FORMATS, first_line(error))) from error


def _check_script(path: Path) -> None:
    """Refuse what is no TorchScript archive, or whose code does more than compute: loading alone may run it."""
    if path.suffix.lower() == ".pt2":
        raise ValueError("a .pt2 file, which cannot be loaded without running code that it holds")
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError("a file of another format")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        code = [name for name in names if re.fullmatch(r"[^/]+/code/.*\.py", name)]
        if not code or len(names) != len(set(names)):
            raise ValueError("an archive of another format")
        if sum(archive.getinfo(name).file_size for name in code) > _MAX_SCRIPT_BYTES:
            raise ValueError("an archive with more code than a network has")
        for name in code:
            text = archive.read(name).decode("utf-8")
            found = _FORBIDDEN_IN_SCRIPTS.search(text)
            if found is None and len(re.findall(r"\bgetattr\b", text)) == len(_PLAIN_GETATTR.findall(text)):
                continue
            raise ValueError(f"one that does more than compute ({found[0] if found else 'getattr'!r} in {name})")


def load_from_transformers(option: str, source: str, model_class: str, processor_class: str | None) -> tuple[Any, Any]:
    """A model of transformers and its processor, on the CPU in evaluation mode.

    Args:
        option: the command line's name for it, for messages.
        source: a folder, from which alone everything is read, or a hub id.
        model_class: name of a class of transformers.
        processor_class: likewise; None: there is no processor.

    Returns:
        Model and processor.

    Raises:
        UserError: there is none, or it brings code of its own, which is never run.
    """
    try:
        import transformers
    except ImportError:
        raise missing_extra("transformers", "stages") from None
    what = "a file, a folder or a hub id such as owner/name"
    origin, is_local = _origin(option, source, what, f"none of these{near(source)}")
    safe = {"trust_remote_code": False, "local_files_only": is_local}
    formats, has_code = FORMATS if processor_class else _MODEL, False
    try:
        settings, _ = transformers.PretrainedConfig.get_config_dict(origin, local_files_only=is_local)
        has_code = "auto_map" in settings
        _check_settings(settings)
        model = getattr(transformers, model_class).from_pretrained(origin, weights_only=True, **safe)
        processor = getattr(transformers, processor_class).from_pretrained(origin, **safe) if processor_class else None
    except Exception as error:  # the hub client and each model class raise their own
        why = "it is code of its own, which is never run" if has_code else first_line(error)
        raise UserError(f"{option} {source}: cannot be loaded ({why}); expected {formats}") from error
    return model.eval(), processor


def load_processor(option: str, source: str) -> Any:
    """A processor of transformers alone, for a model whose own files have none.

    Args:
        option: the command line's name for it, for messages.
        source: a folder, from which alone everything is read, or a hub id.

    Raises:
        UserError: there is none, or it brings code of its own, which is never run.
    """
    try:
        import transformers
    except ImportError:
        raise missing_extra("transformers", "stages") from None
    origin, is_local = _origin(option, source, "a folder or a hub id such as owner/name", "neither")
    try:
        return transformers.AutoProcessor.from_pretrained(origin, trust_remote_code=False, local_files_only=is_local)
    except Exception as error:  # the hub client and each processor's class raise their own
        raise UserError(f"{option} {source}: cannot be loaded ({first_line(error)}); expected a processor") from error


def _origin(option: str, source: str, what: str, got: str) -> tuple[str, bool]:
    """What transformers loads a source from, and whether it is a folder; `what` was expected where `got` came."""
    folder = Path(os.path.expanduser(source))  # not Path's own, which raises for a user who is not there
    if not folder.is_dir() and not is_hub_id(source):
        raise UserError(expected(f"{option} {source}", what, got))
    return (str(folder), True) if folder.is_dir() else (source, False)


def _check_settings(settings: Any, key: str = "") -> None:
    """Refuse a model's config.json that starts other programs' code or asks for a network without bounds."""
    if isinstance(settings, dict):
        if settings.get("quantization_config"):
            raise ValueError("it is quantised, which needs code of other packages")
        for name, value in settings.items():
            _check_settings(value, name)
    elif isinstance(settings, list):
        for value in settings:
            _check_settings(value, key)
    elif isinstance(settings, str):
        if "attn_implementation" in key and not re.fullmatch(r"\w*", settings):
            raise ValueError(f"{key} names code from elsewhere: {settings!r}")
    elif isinstance(settings, int):
        limit = _MAX_LAYERS if re.search("layer|depth|block|stage", key) else _MAX_SIZE
        if settings > limit:
            raise ValueError(f"{key}: expected at most {limit}, got {settings}")
