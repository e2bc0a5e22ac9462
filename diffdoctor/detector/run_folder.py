"""A training's output folder: what its results depend on, and what belongs there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from diffdoctor.data.stream import ShardStream
from diffdoctor.detector.config import DetectorTrainingConfig
from diffdoctor.detector.models.base import CONFIG_NAME, WEIGHTS_NAME, Detector
from diffdoctor.detector.samples import DetectorData, fingerprint_of
from diffdoctor.runs.record import RunFolder

_DETECTOR = (CONFIG_NAME, WEIGHTS_NAME)
RESULTS = {"checkpoints": None, "detector": _DETECTOR, "best": _DETECTOR}


def training_folder(folder: str | Path, identity: dict, *, main: bool) -> RunFolder:
    """The output folder of the training of this identity, to be written by the `main` process."""
    advice = "choose another output folder (--initial begins with the weights of a finished training) or remove it"
    return RunFolder(folder, "train-detector", identity, RESULTS, advice=advice, main=main)


def identity_of(
    config: DetectorTrainingConfig,
    data: DetectorData | ShardStream,
    detector: nn.Module,
    validation: DetectorData | None,
    processes: int,
) -> dict[str, Any]:
    """All that a training's result depends on, by name.

    Args:
        config: the options.
        data: the labelled pictures.
        detector: the network to train.
        validation: labelled pictures that are measured during training.
        processes: number of processes that split each batch.
    """
    identity = dataclasses.asdict(config) | {"detector": type(detector).__name__}
    if isinstance(detector, Detector):
        identity |= dataclasses.asdict(detector.preprocess_config) | {"network": detector.config_dict()}
    # Neither `strict` nor, without a stream, the number of workers changes the result.
    del identity["strict"]
    # as it was before there was another order
    if identity["order"] == "shuffled":
        del identity["order"]
    if isinstance(data, ShardStream):
        identity |= {"shards": len(data.paths), "buffer": data.buffer, "processes": processes}
    else:
        identity |= {"pictures": len(data)}
        del identity["workers"]
    identity["data"] = fingerprint_of(data)
    identity["validation"] = None if validation is None else fingerprint_of(validation)
    return identity
