"""`diffdoctor train-detector`: labelled shards in, a trained detector out."""

import dataclasses
from pathlib import Path

import numpy as np

from diffdoctor.data.mapped import open_set
from diffdoctor.data.shards import require_uniform_size
from diffdoctor.data.stream import ShardStream
from diffdoctor.detector.models.base import Detector
from diffdoctor.detector.models.files import ARCHITECTURES
from diffdoctor.detector.models.load import new_detector, open_detector
from diffdoctor.detector.samples import JoinedData
from diffdoctor.detector.train import DetectorTrainingConfig, TrainedDetector, prepared_run
from diffdoctor.measures.blindness import blindness
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.record import METRICS, versions, write_config
from diffdoctor.runs.strict_json import nan_to_none
from diffdoctor.runs.summary import print_doubts, print_summary
from diffdoctor.training.processes import process_state
from diffdoctor.training.seeds import seeded
from diffdoctor.training.weights import weights_digest


@dataclasses.dataclass
class TrainDetectorConfig:
    """Options of `diffdoctor train-detector`.

    Attributes:
        data: folders of shards with a manifest, as `diffdoctor inject` makes them; joined.
        output: the folder to make: detector, best, checkpoints, config.yaml, metrics.json. Run again with the same
            options, it resumes from the last checkpoint.
        validation: folders of shards to validate on during training; none: `validation_share` is held out.
        validation_share: share of the data that is held out where no validation folders are given; all versions of one
            picture stay on the same side.
        architecture: tiny, b0 ... b5 (SegFormer) or conv.
        initial: a detector's folder or hub id, or the published checkpoint's .bin file, whose weights the training
            starts from; its own architecture and sizes are kept.
        encoder: a folder or hub id of transformers' SegFormer weights for the encoder, such as nvidia/mit-b2.
        resampled: stream the data instead: shards are drawn with replacement, without end, and the set is not held in
            memory. For sets that are too large to index. Another number of processes or workers then sees other
            pictures, and class balance and `validation_share` are not available: give `validation`.
        shuffle_buffer: pictures that a worker shuffles among when resampled, held as the bytes of their files.
        strict: stop at the first broken picture instead of replacing it by another and counting it, and end with exit
            code 3 where the trained detector is blind on the validation data.
        min_side: a new network enlarges pictures whose short side is smaller to this side, in pixels.
        device: such as cpu or cuda:1, for a single process; null: the fastest there is.
        training: the training itself, see `DetectorTrainingConfig`.
        shares: in which proportion pictures are drawn from the folders of `data`, a positive number each, such as 1 1
            for a few labelled pictures beside many clean ones; none: each folder counts as much as it has pictures.
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
    device: str | None = None
    training: DetectorTrainingConfig = dataclasses.field(
        default_factory=lambda: DetectorTrainingConfig(checkpoint_every=100, validate_every=100)
    )
    shares: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if self.min_side < 1:
            raise UserError(expected("min_side", ">= 1 pixels", self.min_side))
        if self.architecture not in ARCHITECTURES:
            raise UserError(expected("architecture", f"one of {', '.join(ARCHITECTURES)}", repr(self.architecture)))
        if self.shares and self.resampled:
            raise UserError(expected("shares", "none with resampled, which draws from all shards alike", self.shares))


def run_train_detector(config: TrainDetectorConfig) -> dict:
    """Run `diffdoctor train-detector`.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: an option or a file does not fit or cannot be read, or the loss is not finite.
        DoubtfulResult: with `strict`, the trained detector is blind.
    """
    training = dataclasses.replace(config.training, strict=config.strict or config.training.strict)
    config = dataclasses.replace(config, training=training)
    output = Path(config.output)
    data, validation = _data(config)
    detector = _network(config)
    state = process_state(config.device)
    options = {"detector": detector, "validation": validation, "output_dir": output, "device": config.device}
    with prepared_run(config.training, data, **options, identity={"weights": weights_digest(detector)}) as run:
        if state.is_main_process:
            write_config(output, config)
        result = run.train(True, "detector")
        metrics = _metrics(config, data, validation, result)
        if state.is_main_process:
            atomic_write_json(output / METRICS, nan_to_none(metrics))
            print_summary(f"trained for {metrics['steps']} steps: {output / 'detector'}", metrics["skipped"])
            print_doubts(metrics["doubts"], strict=config.training.strict)
    return metrics


def doubts_of(result: TrainedDetector) -> list[str]:
    """What its last validation says against a detector that was trained, in a sentence; empty without one."""
    if not result.validations:
        return []
    rates = {name: result.validations[-1][name] for name in ("hit_rate", "false_positive_rate")}
    of = "of the validation set"
    sentence = blindness("the detector", **rates, damaged=f"the damaged pictures {of}", clean=f"the clean ones {of}")
    return [] if sentence is None else [f"{sentence}; train longer (training.steps), or look at the data"]


def _metrics(
    config: TrainDetectorConfig,
    data: JoinedData | ShardStream,
    validation: JoinedData | None,
    result: TrainedDetector,
) -> dict:
    reasons = list(result.broken.values())
    return {
        "steps": len(result.history),
        "loss": result.history[-1]["loss"],
        "pictures": None if config.resampled else len(data),
        "validation_pictures": len(validation) if validation is not None else 0,
        "validation": result.validations,
        "doubts": doubts_of(result),
        "skipped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "skipped_examples": {reason: where for where, reason in sorted(result.broken.items(), reverse=True)},
        "parameters": sum(p.numel() for p in result.detector.parameters()),
        "versions": versions(),
    }


def _data(config: TrainDetectorConfig) -> tuple[JoinedData | ShardStream, JoinedData | None]:
    """The data to train on, and the data to validate on or None."""
    if not config.data:
        raise UserError(expected("data", "at least one folder of shards", "none"))
    if not 0 <= config.validation_share < 1:
        raise UserError(expected("validation_share", "a share in [0, 1)", config.validation_share))
    validation = _opened(config.validation, config) if config.validation else None
    if config.resampled:
        return _stream(config, validation), validation
    data = _opened(config.data, config, config.shares)
    if validation is not None or not config.validation_share:
        return data, validation
    # `inject` names its samples "<picture>-<version>"; all versions of a picture belong to the same side of the split.
    keys = data.keys
    pictures = np.empty(len(keys), keys.dtype)
    for begin in range(0, len(keys), 2**16):
        pictures[begin : begin + 2**16] = [key.partition("-")[0] for key in keys[begin : begin + 2**16].tolist()]
    del keys
    names = np.unique(pictures)
    shuffled = names[np.random.default_rng([config.training.seed, 5]).permutation(len(names))]
    held_out = np.isin(pictures, shuffled[: round(config.validation_share * len(names))])
    if held_out.all():
        what = "a share that leaves pictures for training"
        raise UserError(expected("validation_share", what, config.validation_share))
    return data.where(~held_out), data.where(held_out) if held_out.any() else None


def _opened(folders: list[str], config: TrainDetectorConfig, shares: list[float] | None = None) -> JoinedData:
    sets = [open_set(folder) for folder in folders]
    if not sum(map(len, sets)):
        raise UserError(expected(", ".join(folders), "labelled pictures", "none"))
    if config.training.size is None:
        require_uniform_size(sets, "training.size")
    try:
        return JoinedData(sets, shares=shares or None)
    except ValueError as error:
        raise UserError(str(error)) from None


def _stream(config: TrainDetectorConfig, validation: JoinedData | None) -> ShardStream:
    if validation is None and config.validation_share:
        what = "folders of shards with resampled (or validation_share 0 for no validation)"
        raise UserError(expected("validation", what, "none"))
    if config.training.balance:
        raise UserError(expected("balance", "false with resampled, which does not count the categories", "true"))
    if config.training.order != "shuffled":
        raise UserError(expected("order", "shuffled with resampled, which has an order of its own", "blocks"))
    if config.shuffle_buffer < 1:
        raise UserError(expected("shuffle_buffer", ">= 1 pictures", config.shuffle_buffer))
    options = {"buffer": config.shuffle_buffer, "seed": config.training.seed, "strict": config.training.strict}
    return ShardStream([*config.data], resampled=True, **options)


def _network(config: TrainDetectorConfig) -> Detector:
    if config.encoder is not None and config.initial is not None:
        raise UserError(expected("encoder", "none with initial", repr(config.encoder)))
    if config.initial is not None:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name in ("architecture", "min_side") and value != field.default:
                raise UserError(expected(field.name, "none with initial, whose own is kept", repr(value)))
        return open_detector(config.initial)
    with seeded(config.training.seed):
        detector = new_detector(config.architecture, min_side=config.min_side)
        if config.encoder is not None:
            if not hasattr(detector, "load_encoder"):
                what = f"none with architecture {config.architecture}"
                raise UserError(expected("encoder", what, repr(config.encoder)))
            detector.load_encoder(config.encoder)
        return detector
