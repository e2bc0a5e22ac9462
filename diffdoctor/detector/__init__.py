"""Stage 1: where is a picture broken, pixel by pixel?"""

import importlib

_PUBLIC = {
    "ArtifactDetector": "segformer",
    "ConvDetector": "conv",
    "Detector": "base",
    "PreprocessConfig": "base",
    "load_detector": "base",
    "DetectorTrainingConfig": "train",
    "TrainedDetector": "train",
    "train_detector": "train",
    "Injected": "inject",
    "benign": "inject",
    "damage_kind": "inject",
    "damage_kinds": "inject",
    "read_shards": "shards",
    "write_shards": "shards",
}
# `inject` is left out: the module of that name must stay importable as an attribute of the package.

__all__ = [*_PUBLIC]  # noqa: PLE0604


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"diffdoctor.detector.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'diffdoctor.detector' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_PUBLIC})
