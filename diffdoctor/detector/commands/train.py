"""`diffdoctor train-detector`: labelled shards in, a trained detector out."""

import dataclasses
from pathlib import Path

import numpy as np

from diffdoctor.data.shards import ShardData, one_size
from diffdoctor.data.sources import finite, tell
from diffdoctor.data.stream import ShardStream
from diffdoctor.detector.models.base import Detector
from diffdoctor.detector.models.load import ARCHITECTURES, new_detector, open_detector
from diffdoctor.detector.samples import JoinedData
from diffdoctor.detector.train import DetectorTrainingConfig, TrainedDetector, prepared_run
from diffdoctor.runs.errors import UserError, missing_extra
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.record import METRICS, versions, write_config
from diffdoctor.training.weights import weights_digest


@dataclasses.dataclass
class TrainDetectorConfig:
    """Options of `diffdoctor train-detector`.

    Attributes:
        data: folders of shards with a manifest, as `diffdoctor inject` makes them; joined.
        output: the folder to make: detector, best, checkpoints, config.yaml, metrics.json. Run again with the same
            options, it resumes from the last checkpoint.
        validation: folders of shards to measure on during training; none: `validation_share` is held out.
        validation_share: share of the data that is held out where no validation folders are given; all versions of one
            picture stay on the same side.
        architecture: tiny, b0 ... b5 (SegFormer) or conv.
        initial: a detector's folder or hub id, or the published checkpoint's .bin file, to go on from instead of a
            fresh network; its own architecture and sizes are kept.
        encoder: a folder or hub id of transformers' SegFormer weights for the encoder, such as nvidia/mit-b2.
        resampled: stream the data instead: shards are drawn with replacement, without end, and nothing of the set is
            held in memory. For sets that are too large to index. Then another number of processes or workers sees other
            pictures, and class balance and `validation_share` are not to be had: give `validation`.
        shuffle_buffer: pictures that a worker shuffles among when resampled, held as the bytes of their files.
        strict: stop at the first broken picture instead of taking another in its place and counting it.
        min_side: pictures whose short side is smaller are enlarged to it before a fresh network, in pixels.
        training: the training itself, see `DetectorTrainingConfig`.
    """

    data: list[str]
    output: str
    validation: list[str] = dataclasses.field(default_factory=list)
    validation_share: float = 0.1
    architecture: str = "tiny"
    initial: str | None = None
    encoder: str | None = None
    resampled: bool = False
    shuffle_buffer: int = 1000
    strict: bool = False
    min_side: int = 64
    training: DetectorTrainingConfig = dataclasses.field(
        default_factory=lambda: DetectorTrainingConfig(checkpoint_every=100, validate_every=100)
    )

    def __post_init__(self):
        if self.min_side < 1:
            raise UserError(f"min_side: expected >= 1 pixels, got {self.min_side}")
        if self.architecture not in ARCHITECTURES:
            raise UserError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")


def run_train_detector(config: TrainDetectorConfig) -> dict:
    """Run `diffdoctor train-detector`; returns what metrics.json holds."""
    try:
        from accelerate import PartialState
    except ImportError:
        raise missing_extra("accelerate", "stages") from None
    import torch

    training = dataclasses.replace(config.training, strict=config.strict or config.training.strict)
    config = dataclasses.replace(config, training=training)
    output = Path(config.output)
    data, validation = _data(config)
    detector = _network(config)
    state = PartialState(cpu=not torch.accelerator.is_available())
    options = {"detector": detector, "validation": validation, "output_dir": output}
    with prepared_run(config.training, data, **options, identity={"weights": weights_digest(detector)}) as run:
        if state.is_main_process:
            write_config(output, config)
        result = run.train(True, "detector")
        metrics = _metrics(config, data, validation, result)
        if state.is_main_process:
            atomic_write_json(output / METRICS, finite(metrics))
            tell(f"trained for {metrics['steps']} steps: {output / 'detector'}", metrics["skipped"])
    return metrics


def _metrics(config: TrainDetectorConfig, data, validation, result: TrainedDetector) -> dict:
    reasons = list(result.broken.values())
    return {
        "steps": len(result.history),
        "loss": result.history[-1]["loss"],
        "pictures": None if config.resampled else len(data),
        "validation_pictures": len(validation) if validation is not None else 0,
        "validation": result.validations,
        "skipped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "skipped_examples": {reason: where for where, reason in sorted(result.broken.items(), reverse=True)},
        "parameters": sum(p.numel() for p in result.detector.parameters()),
        "versions": versions(),
    }


def _data(config: TrainDetectorConfig):
    """The set to train on and the one to measure on, None for none."""
    if not config.data:
        raise UserError("data: expected at least one folder of shards")
    if not 0 <= config.validation_share < 1:
        raise UserError(f"validation_share: expected within [0, 1), got {config.validation_share}")
    validation = _opened(config.validation, config) if config.validation else None
    if config.resampled:
        return _stream(config, validation), validation
    data = _opened(config.data, config)
    if validation is not None or not config.validation_share:
        return data, validation
    # `inject` names its pictures "<number>-<version>": one number's versions must not straddle the split.
    groups = np.array([key.split("-")[0] for key in data.keys])
    names = np.unique(groups)
    held = names[np.random.default_rng([config.training.seed, 5]).permutation(len(names))]
    held = held[: round(config.validation_share * len(names))]
    inside = np.isin(groups, held)
    if inside.all():
        raise UserError("validation_share: leaves no picture for training")
    return data.where(~inside), data.where(inside) if inside.any() else None


def _opened(folders: list[str], config: TrainDetectorConfig) -> JoinedData:
    parts = [ShardData(folder) for folder in folders]
    if not sum(map(len, parts)):
        raise UserError(f"{', '.join(folders)}: expected labelled pictures, found none")
    if config.training.size is None:
        one_size(parts, "training.size")
    return JoinedData(parts)


def _stream(config: TrainDetectorConfig, validation) -> ShardStream:
    if validation is None and config.validation_share:
        raise UserError("validation: expected folders of shards with resampled (or validation_share 0 for none)")
    if config.training.balance:
        raise UserError("balance: a stream does not know how many pictures a category has; leave it out with resampled")
    if config.shuffle_buffer < 1:
        raise UserError(f"shuffle_buffer: expected >= 1 pictures, got {config.shuffle_buffer}")
    options = {"buffer": config.shuffle_buffer, "seed": config.training.seed, "strict": config.training.strict}
    return ShardStream([*config.data], resampled=True, **options)


def _network(config: TrainDetectorConfig) -> Detector:
    import torch

    if config.encoder is not None and (config.initial is not None or config.architecture == "conv"):
        other = "initial" if config.initial is not None else "architecture conv"
        raise UserError(f"encoder: expected none with {other}, got {config.encoder!r}")
    if config.initial is not None:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name in ("architecture", "min_side") and value != field.default:
                raise UserError(f"{field.name}: expected none with initial, whose own is kept; got {value!r}")
        return open_detector(config.initial)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        detector = new_detector(config.architecture, min_side=config.min_side)
        if config.encoder is not None:
            detector.load_encoder(config.encoder)
        return detector
