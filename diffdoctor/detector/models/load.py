"""Detectors by name: new ones, those of the command line, and those of a folder."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from diffdoctor.detector.models.base import Detector
from diffdoctor.detector.models.files import ARCHITECTURES, CONFIG_NAME, REGISTRY, WEIGHTS_NAME, class_of
from diffdoctor.runs.errors import expected
from diffdoctor.runs.hub import local_path


def new_detector(architecture: str, **options) -> Detector:
    """A detector with fresh weights.

    Args:
        architecture: one of `ARCHITECTURES`.
        **options: of the class's `of_size`.

    Raises:
        ValueError: there is no such architecture.
    """
    for kind, (_, sizes) in REGISTRY.items():
        if architecture in sizes:
            return class_of(kind).of_size(architecture, **options)
    raise ValueError(expected("architecture", f"one of {', '.join(ARCHITECTURES)}", repr(architecture)))


def open_detector(source: str) -> nn.Module:
    """A detector of the command line: a folder, a hub id, the published checkpoint's file, FILE.py:FUNCTION or a URL.

    Raises:
        UserError: no detector is there, or it cannot be loaded.
    """
    from diffdoctor.detector.external import HttpDetector, detector_from_file

    if source.startswith(("http://", "https://")):
        return HttpDetector(source)
    file, _, function = source.rpartition(":")
    if file.endswith(".py") and function.isidentifier():
        return detector_from_file(source)
    path = local_path(source)
    if path.is_file() and path.name not in (CONFIG_NAME, WEIGHTS_NAME):
        return class_of("segformer").from_official(path)
    return load_detector(source)


def load_detector(source: str | Path) -> Detector:
    """Load a detector of any class, which its own files name.

    Args:
        source: a detector's folder, the output folder of a training, or a hub id such as owner/name.

    Returns:
        The detector, frozen (its parameters require no gradient, so that its confidences can be weights of a loss), in
        evaluation mode on the CPU. `train_detector` unfreezes it.

    Raises:
        UserError: no detector is there, its weights do not fit its configuration, or one is not finite.
    """
    return Detector.from_pretrained(source)
