"""Stage 1: where is a picture broken, pixel by pixel?"""

from diffdoctor.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ArtifactDetector": "diffdoctor.detector.models.segformer",
        "ConvDetector": "diffdoctor.detector.models.conv",
        "Detector": "diffdoctor.detector.models.base",
        "PreprocessConfig": "diffdoctor.detector.models.preprocess",
        "load_detector": "diffdoctor.detector.models.load",
        "DetectorTrainingConfig": "diffdoctor.detector.config",
        "TrainedDetector": "diffdoctor.detector.train",
        "train_detector": "diffdoctor.detector.train",
        "Injected": "diffdoctor.detector.damage.injection",
        "benign": "diffdoctor.detector.damage.benign",
        "damage_kind": "diffdoctor.detector.damage.registry",
        "damage_kinds": "diffdoctor.detector.damage.kinds",
        "inject": "diffdoctor.detector.damage.injection",
        "read_shards": "diffdoctor.data.shards",
        "write_shards": "diffdoctor.data.shard_writer",
    },
)
