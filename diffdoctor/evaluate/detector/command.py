"""`diffdoctor evaluate detector`: all measures, curves, and the worst misses and false positives, in one report."""

import dataclasses
import os
from pathlib import Path
from typing import ClassVar

from diffdoctor.data.store_path import absolute
from diffdoctor.detector.predict import diagnose_data
from diffdoctor.engine.options import EngineConfig
from diffdoctor.engine.units import Place, Worker, check_unchanged
from diffdoctor.evaluate.detector.measure import measure_statistics
from diffdoctor.evaluate.detector.report import by_kind, doubts, verdict, write_page
from diffdoctor.runs.errors import UserError, check_least, expected
from diffdoctor.runs.files import atomic_write_json, clear_leftovers
from diffdoctor.runs.lock import locked_folder
from diffdoctor.runs.record import CONFIG, METRICS, refuse_url, versions, write_config
from diffdoctor.training.processes import process_state
from diffdoctor.training.weights import weights_digest

# A hidden folder in the output, which the command removes at the end.
PARTS = ".parts"
REPORT = "report.html"


@dataclasses.dataclass
class EvaluateDetectorConfig:
    """Options of `diffdoctor evaluate detector`.

    Attributes:
        detector: the detector's folder or hub id, or the published checkpoint's .bin file.
        data: folders of labelled shards, as `diffdoctor inject` makes them.
        output: the folder to make: report.html, metrics.json, config.yaml. Interrupted and run again, it resumes with
            the pictures that were not done yet.
        batch_size: pictures that are diagnosed together.
        size: side in pixels to which pictures are resized where they differ in size; null: they must agree.
        bootstrap: number of resamples for the intervals; 0: none.
        examples: number of worst misses, and of worst false positives, in the report.
        seed: of the resampling.
        device: such as cpu or cuda:1; null: the fastest there is.
        strict: stop at the first broken picture instead of skipping and counting it, and end with exit code 3 where the
            detector is blind.
        engine: where the pictures are diagnosed; the results are the same.
    """

    detector: str
    data: list[str]
    output: str
    batch_size: int = 64
    size: int | None = None
    bootstrap: int = 1000
    examples: int = 12
    seed: int = 0
    device: str | None = None
    strict: bool = False
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)

    def __post_init__(self):
        check_least(self, batch_size=1, size=1, bootstrap=0, examples=0, seed=0)


def run_evaluate_detector(config: EvaluateDetectorConfig) -> dict:
    """Run `diffdoctor evaluate detector`.

    Returns:
        What metrics.json holds; nothing on other than the main process.

    Raises:
        UserError: an option or a file does not fit or cannot be read.
        DoubtfulResult: with `strict`, the detector is blind.
    """
    from diffdoctor.data.shards import ShardData, require_uniform_size
    from diffdoctor.detector.models.load import open_detector
    from diffdoctor.training.devices import open_device

    refuse_url(config.output)
    state = process_state(config.device)
    output = Path(config.output)
    if any(os.path.realpath(folder) == os.path.realpath(output) for folder in config.data):
        raise UserError(expected("output", "another folder than a set's", config.output))
    sets = [ShardData(folder) for folder in config.data]
    if not sum(map(len, sets)):
        raise UserError(expected("data", "labelled pictures", "none"))
    if config.size is None:
        require_uniform_size(sets, "size")
    detector = open_detector(config.detector)
    detector.to(open_device(config.device, state.device))
    with locked_folder(output, main=state.is_main_process):
        return _evaluate(config, detector, sets, state)


def _evaluate(config: EvaluateDetectorConfig, detector, sets: list, state) -> dict:
    from diffdoctor.data.pictures import resize_pair
    from diffdoctor.detector.samples import JoinedData
    from diffdoctor.evaluate.detector.parts import evaluate_in_parts, remove_parts
    from diffdoctor.runs.strict_json import nan_to_none
    from diffdoctor.runs.summary import print_doubts, print_summary

    output, data = Path(config.output), JoinedData(sets)
    identity = {"weights": weights_digest(detector)}
    options = {"batch_size": config.batch_size, "size": config.size, "strict": config.strict}
    places = {"output": absolute(config.output), "data": [absolute(folder) for folder in config.data]}
    spec = EvaluateWorkerSpec(dataclasses.replace(config, **places), identity["weights"])
    try:
        found = evaluate_in_parts(
            detector, sets, output / PARTS, identity, state, engine=config.engine, spec=spec, **options
        )
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    if found is None:
        return {}
    names = (found.categories, found.generators, found.kinds, found.auprc)
    result = nan_to_none(measure_statistics(found.statistics, *names, bootstrap=config.bootstrap, seed=config.seed))
    result |= {"doubts": doubts(result), "skipped": found.skipped, "versions": versions()}
    for name in (CONFIG, METRICS, REPORT):
        clear_leftovers(output, name)
    write_config(output, config)
    atomic_write_json(output / METRICS, result)

    def views(index):
        data_index = int(found.indices[index])
        again = diagnose_data(detector, data, size=config.size, chosen=[data_index])
        sample = data[data_index]
        picture, _ = resize_pair(sample["picture"], sample["mask"], config.size)
        return picture, again.masks[0], again.confidence[0]

    worst = found.statistics.worst(config.examples)
    write_page(output / REPORT, result, found.curves.result(), worst, views)
    remove_parts(output / PARTS)
    print_summary(f"{verdict(result)}: {output / REPORT}", found.skipped)
    if kinds := by_kind(result):
        print_summary(kinds)
    print_doubts(result["doubts"], strict=config.strict)
    return result


@dataclasses.dataclass(frozen=True)
class EvaluateWorkerSpec:
    """How a worker is made that diagnoses a part of the pictures.

    Attributes:
        config: the command's options.
        weights: digest of the detector with which the command began.
    """

    uses_accelerator: ClassVar[bool] = True

    config: EvaluateDetectorConfig
    weights: str

    def build(self, place: Place) -> Worker:
        """Load the detector and open the sets.

        Raises:
            UserError: one is not there, or the detector is not the one with which the command began.
        """
        from diffdoctor.data.shards import ShardData
        from diffdoctor.detector.models.load import open_detector
        from diffdoctor.detector.samples import JoinedData
        from diffdoctor.evaluate.detector.parts import Parts
        from diffdoctor.training.devices import open_device_at

        config, detector = self.config, open_detector(self.config.detector)
        check_unchanged(f"detector {config.detector}: other weights", weights_digest(detector), self.weights)
        detector.to(open_device_at(config.device, place.number))
        options = {"batch_size": config.batch_size, "size": config.size, "strict": config.strict}
        data = JoinedData([ShardData(folder) for folder in config.data])
        parts = Parts(data, Path(config.output) / PARTS, **options)
        return lambda unit, attempt: {"records": parts.write(detector, unit)}
