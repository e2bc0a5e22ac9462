"""A training's output folder: what its results depend on, and what belongs there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from diffdoctor.data.stream import ShardStream
from diffdoctor.detector.models.base import CONFIG_NAME, WEIGHTS_NAME, Detector
from diffdoctor.detector.samples import fingerprint_of
from diffdoctor.runs.record import RunFolder

_DETECTOR = (CONFIG_NAME, WEIGHTS_NAME)
RESULTS = {"checkpoints": None, "detector": _DETECTOR, "best": _DETECTOR}


def training_folder(folder: str | Path, identity: dict, *, main: bool) -> RunFolder:
    """The output folder of the training of this identity, to be written by the `main` process."""
    return RunFolder(folder, "train-detector", identity, RESULTS, main=main)


def identity_of(config, data, detector: nn.Module, validation, processes: int) -> dict:
    """What a training's result depends on, by name.

    Args:
        config: a `DetectorTrainingConfig`.
        data, validation: sets, or for `data` a `ShardStream`; see `samples.fingerprint_of`.
        detector: the network to train.
        processes: that share the work.
    """
    identity = dataclasses.asdict(config) | {"detector": type(detector).__name__}
    if isinstance(detector, Detector):
        identity |= dataclasses.asdict(detector.preprocess_config) | {"network": detector.config_dict()}
    # A picture that turns up broken makes no other run, and neither do workers, unless they draw the stream.
    del identity["strict"]
    if isinstance(data, ShardStream):
        identity |= {"shards": len(data.paths), "buffer": data.buffer, "processes": processes}
    else:
        identity |= {"pictures": len(data)}
        del identity["workers"]
    identity["data"] = fingerprint_of(data)
    identity["validation"] = None if validation is None else fingerprint_of(validation)
    return identity
