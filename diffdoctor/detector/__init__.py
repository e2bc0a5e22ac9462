"""Stage 1: where is a picture broken, pixel by pixel?"""

from diffdoctor._lazy import lazy_names

# `inject` is left out: the module of that name must stay importable as an attribute of the package.
__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
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
    },
)
