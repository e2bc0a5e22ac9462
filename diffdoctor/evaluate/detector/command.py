"""`diffdoctor evaluate detector`: all measures, curves, and the worst misses and false positives, in one report."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from diffdoctor.detector.predict import Diagnosed, diagnose_data
from diffdoctor.evaluate.detector.measure import measure_statistics
from diffdoctor.measures.curves import PixelCurves
from diffdoctor.measures.pixels import FLAG_SHARE
from diffdoctor.measures.statistics import PictureStatistics, slices
from diffdoctor.runs.errors import UserError, check_least, missing_extra
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.lock import held
from diffdoctor.training.weights import weights_digest
from diffdoctor.viz.draw import enlarge, grid, heat_colours, overlay, png_bytes
from diffdoctor.viz.report import Report, new_figure

# Hidden: a folder of this command's own, which it removes.
PARTS = ".parts"


@dataclasses.dataclass
class EvaluateDetectorConfig:
    """Options of `diffdoctor evaluate detector`.

    Attributes:
        detector: the detector's folder or hub id, or the published checkpoint's .bin file.
        data: folders of labelled shards, as `diffdoctor inject` makes them.
        output: the folder to make: report.html, metrics.json, config.yaml. Interrupted and run again, it goes on with
            the pictures that were not done yet.
        batch_size: pictures that are diagnosed together.
        size: side in pixels to which pictures are brought where they differ in size; null: they must agree.
        bootstrap: resamplings for the intervals; 0: none.
        examples: pictures shown of the worst misses and of the worst false positives, each.
        seed: of the resampling.
        device: such as cpu or cuda:1; null: the fastest there is.
        strict: stop at the first broken picture instead of leaving it out and counting it.
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

    def __post_init__(self):
        check_least(self, batch_size=1, size=1, bootstrap=0, examples=0, seed=0)


def run_evaluate_detector(config: EvaluateDetectorConfig) -> dict:
    """Run `diffdoctor evaluate detector`; returns what metrics.json holds (nothing on other than the main process)."""
    try:
        from accelerate import PartialState
    except ImportError:
        raise missing_extra("accelerate", "stages") from None
    import torch

    from diffdoctor.data.shards import ShardData, one_size
    from diffdoctor.detector.models.load import open_detector
    from diffdoctor.training.devices import open_device

    state = PartialState(cpu=not torch.accelerator.is_available())
    output = Path(config.output)
    sets = [ShardData(folder) for folder in config.data]
    if not sum(map(len, sets)):
        raise UserError("data: expected labelled pictures, got none")
    if config.size is None:
        one_size(sets, "size")
    detector = open_detector(config.detector)
    detector.to(open_device(config.device, state.device))
    with held(output, main=state.is_main_process):
        return _evaluate(config, detector, sets, state)


def _evaluate(config: EvaluateDetectorConfig, detector, sets: list, state) -> dict:
    from diffdoctor.data.sources import finite, tell, versions, write_config
    from diffdoctor.detector.samples import JoinedData, resize_pair
    from diffdoctor.evaluate.detector.parts import evaluate_in_parts

    output, data = Path(config.output), JoinedData(sets)
    settings = {"weights": weights_digest(detector)}
    options = {"batch_size": config.batch_size, "size": config.size, "strict": config.strict}
    try:
        found = evaluate_in_parts(detector, sets, output / PARTS, settings, state, **options)
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    if found is None:
        return {}
    names = (found.categories, found.generators, found.auprc)
    result = finite(measure_statistics(found.statistics, *names, bootstrap=config.bootstrap, seed=config.seed))
    result |= {"skipped": found.skipped, "versions": versions()}
    write_config(output, config)
    atomic_write_json(output / "metrics.json", result)

    def views(index):
        place = int(found.indices[index])
        again = diagnose_data(detector, data, size=config.size, chosen=[place])
        sample = data[place]
        picture = sample["picture"]
        if picture.shape[:2] != again.masks.shape[1:]:
            picture = resize_pair(picture, sample["mask"], config.size)[0]
        return picture, again.masks[0], again.confidence[0]

    worst = found.statistics.worst(config.examples)
    _write_page(output / "report.html", result, found.curves.result(), worst, views)
    shutil.rmtree(output / PARTS)
    overall = result["overall"]
    rates = f"mAP@0.5 {_number(overall['map50'])}, {_percent(overall['false_positive_rate'])} of the clean flagged"
    tell(f"{rates}: {output / 'report.html'}", found.skipped)
    return result


def write_report(path: Path, result: dict, found: Diagnosed, picture, examples: int = 12) -> None:
    """Write the report on measured maps.

    Args:
        path: of the HTML file.
        result: what `evaluate.detector.measure` returned.
        found: the maps and masks.
        picture: function from an index to the picture (H, W, 3) uint8.
        examples: pictures of each kind of error.
    """
    worst = PictureStatistics.of(found.confidence, found.masks).worst(examples)

    def views(index):
        return picture(index), found.masks[index], found.confidence[index]

    _write_page(path, result, curves(found.confidence, found.masks), worst, views)


def _write_page(path: Path, result: dict, curve: dict[str, np.ndarray], worst, views) -> None:
    # worst: indices (of misses, of false positives); views: from an index to (picture, mask, confidence).
    overall = result["overall"]
    report = Report("Detector")
    report.lead(
        f"mAP@0.5 {_number(overall['map50'])}, IoU {_number(overall['iou'])}; "
        f"{_percent(overall['false_positive_rate'])} of the clean pictures are flagged, "
        f"{_percent(overall['hit_rate'])} of the damaged ones."
    )
    report.heading("Measures")
    names = [name for name in overall if not name.endswith("_interval")]
    rows = [(name, (_number(overall[name]), "number"), _interval(overall.get(f"{name}_interval"))) for name in names]
    report.table(("measure", "value", "95 % interval"), rows)
    for title, key in (("Per category", "per_category"), ("Per generator", "per_generator")):
        if len(result[key]) > 1:
            report.heading(title)
            _group_table(report, result[key])
    _category_statistics(report, result["categories"])
    report.heading("Curves")
    report.figure(_curves(curve), "Pixels: precision against recall; share of artifact pixels against confidence.")
    titles = (
        "Worst misses: damaged pictures by the area that was overlooked",
        f"Worst false positives: clean pictures, flagged from {FLAG_SHARE:.0%} on",
    )
    for title, indices in zip(titles, worst, strict=True):
        _examples(report, title, indices, views)
    report.write(path)


def _group_table(report: Report, groups: dict[str, dict]) -> None:
    names = ("pictures", "damaged", "map50", "iou", "f1", "auprc", "false_positive_rate", "hit_rate")
    rows = [(name or "(none)", *((_number(group[m]), "number") for m in names)) for name, group in groups.items()]
    report.table(("", *names), rows)


def _category_statistics(report: Report, statistics: list[dict]) -> None:
    if len(statistics) < 2:
        return
    report.heading("Class balance: clean pictures by category")
    abnormal = [entry["category"] for entry in statistics if entry["verdict"]]
    report.text(
        "Categories that need new pictures: "
        + (", ".join(abnormal) if abnormal else "none")
        + ". A category is abnormal "
        "when its mean confidence lies at least 3 robust deviations from the categories' median."
    )
    rows = [
        (
            entry["category"],
            (entry["pictures"], "number"),
            (f"{entry['mean_confidence']:.4f}", "number"),
            (f"{entry['flagged']:.1%}", "number"),
            (f"{entry['z']:+.1f}", "number"),
            (entry["verdict"], "bad" if entry["verdict"] else ""),
        )
        for entry in statistics
    ]
    report.table(("category", "pictures", "mean confidence", "flagged", "z", ""), rows)
    figure, (axes,) = new_figure(1, width=7)
    names = [entry["category"] or "(none)" for entry in statistics]
    colours = ["tab:red" if entry["verdict"] else "tab:blue" for entry in statistics]
    axes.bar(names, [entry["mean_confidence"] for entry in statistics], color=colours)
    axes.set_ylabel("mean confidence, clean pictures")
    axes.tick_params(axis="x", rotation=60)
    report.figure(figure)


def curves(confidence: np.ndarray, mask: np.ndarray, bins: int = 10) -> dict[str, np.ndarray]:
    """Pixel precision-recall and calibration curves.

    Args:
        confidence, mask: (N, H, W) in [0, 1].
        bins: of confidence, of equal width, for the calibration.

    Returns:
        `recall`, `precision` (101,) at the thresholds 1.00, 0.99 ... 0.00; `mean_confidence`, `artifact_share`,
        `pixels` (bins,), NaN where a bin is empty; `expected_calibration_error` (), the mean distance of the two
        weighted by pixels.
    """
    result = PixelCurves(bins)
    for part in slices(confidence):
        result.add(confidence[part], mask[part])
    return result.result()


def _curves(values: dict[str, np.ndarray]):
    figure, (left, right) = new_figure(2)
    left.plot(values["recall"], values["precision"])
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    right.plot([0, 1], [0, 1], color="0.7")
    right.plot(values["mean_confidence"], values["artifact_share"], marker="o")
    right.set(xlabel="mean confidence", ylabel="share of artifact pixels", xlim=(0, 1), ylim=(0, 1))
    right.set_title(f"expected calibration error {values['expected_calibration_error']:.3f}", fontsize=9)
    return figure


def _examples(report: Report, title: str, indices: np.ndarray, views) -> None:
    rows = []
    for index in indices:
        original, mask, confidence = views(int(index))
        scale = max(1, 96 // max(original.shape[:2]))
        grey = np.repeat(np.rint(mask[..., None] * 255).astype(np.uint8), 3, axis=2)
        shown = (original, grey, heat_colours(confidence), overlay(original, confidence))
        rows.append([enlarge(view, scale) for view in shown])
    if rows:
        report.heading(title)
        report.image(png_bytes(grid(rows)), "Each row: picture, truth, confidence, both.")


def _number(value) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _percent(value) -> str:
    return "–" if value is None else f"{value:.1%}"


def _interval(bounds) -> str:
    return "" if not bounds or bounds[0] is None else f"{bounds[0]:.4f} … {bounds[1]:.4f}"
