"""Stage 1: where is a picture broken, pixel by pixel?"""

from typing import TYPE_CHECKING

from diffdoctor.lazy import lazy_names

if TYPE_CHECKING:  # what an editor sees; tests/packaging/test_lazy_names.py holds it equal to the table below
    from diffdoctor.data.shard_writer import write_shards as write_shards
    from diffdoctor.data.shards import ShardData as ShardData
    from diffdoctor.data.shards import read_shards as read_shards
    from diffdoctor.data.stream import ShardStream as ShardStream
    from diffdoctor.detector.config import AugmentConfig as AugmentConfig
    from diffdoctor.detector.config import DetectorTrainingConfig as DetectorTrainingConfig
    from diffdoctor.detector.damage.benign import benign as benign
    from diffdoctor.detector.damage.injection import Injected as Injected
    from diffdoctor.detector.damage.injection import inject as inject
    from diffdoctor.detector.damage.kinds import damage_kinds as damage_kinds
    from diffdoctor.detector.damage.registry import damage_kind as damage_kind
    from diffdoctor.detector.exchange import coco_pictures as coco_pictures
    from diffdoctor.detector.exchange import masked_pictures as masked_pictures
    from diffdoctor.detector.exchange import write_coco as write_coco
    from diffdoctor.detector.external import FunctionDetector as FunctionDetector
    from diffdoctor.detector.external import HttpDetector as HttpDetector
    from diffdoctor.detector.external import from_boxes as from_boxes
    from diffdoctor.detector.models.base import Detector as Detector
    from diffdoctor.detector.models.conv import ConvDetector as ConvDetector
    from diffdoctor.detector.models.load import load_detector as load_detector
    from diffdoctor.detector.models.preprocess import PreprocessConfig as PreprocessConfig
    from diffdoctor.detector.models.segformer import ArtifactDetector as ArtifactDetector
    from diffdoctor.detector.samples import ArrayData as ArrayData
    from diffdoctor.detector.samples import JoinedData as JoinedData
    from diffdoctor.detector.train import TrainedDetector as TrainedDetector
    from diffdoctor.detector.train import train_detector as train_detector

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ArrayData": "diffdoctor.detector.samples",
        "ArtifactDetector": "diffdoctor.detector.models.segformer",
        "AugmentConfig": "diffdoctor.detector.config",
        "benign": "diffdoctor.detector.damage.benign",
        "coco_pictures": "diffdoctor.detector.exchange",
        "ConvDetector": "diffdoctor.detector.models.conv",
        "damage_kind": "diffdoctor.detector.damage.registry",
        "damage_kinds": "diffdoctor.detector.damage.kinds",
        "Detector": "diffdoctor.detector.models.base",
        "DetectorTrainingConfig": "diffdoctor.detector.config",
        "from_boxes": "diffdoctor.detector.external",
        "FunctionDetector": "diffdoctor.detector.external",
        "HttpDetector": "diffdoctor.detector.external",
        "inject": "diffdoctor.detector.damage.injection",
        "Injected": "diffdoctor.detector.damage.injection",
        "JoinedData": "diffdoctor.detector.samples",
        "load_detector": "diffdoctor.detector.models.load",
        "masked_pictures": "diffdoctor.detector.exchange",
        "PreprocessConfig": "diffdoctor.detector.models.preprocess",
        "read_shards": "diffdoctor.data.shards",
        "ShardData": "diffdoctor.data.shards",
        "ShardStream": "diffdoctor.data.stream",
        "train_detector": "diffdoctor.detector.train",
        "TrainedDetector": "diffdoctor.detector.train",
        "write_coco": "diffdoctor.detector.exchange",
        "write_shards": "diffdoctor.data.shard_writer",
    },
)
