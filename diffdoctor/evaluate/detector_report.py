"""`diffdoctor evaluate detector`: all measures, curves, and the worst misses and false positives, in one report."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from diffdoctor._errors import UserError, missing_extra
from diffdoctor._io import atomic_write_json
from diffdoctor._weights import weights_digest
from diffdoctor.evaluate.detector import Diagnosed, measure
from diffdoctor.evaluate.draw import enlarge, grid, heat_colours, overlay, png_bytes
from diffdoctor.evaluate.pixel import FLAG_SHARE, flagged_share
from diffdoctor.evaluate.report import Report, new_figure


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
        for name, least in (("batch_size", 1), ("bootstrap", 0), ("examples", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: expected >= {least}, got {getattr(self, name)}")


def run_evaluate_detector(config: EvaluateDetectorConfig) -> dict:
    """Run `diffdoctor evaluate detector`; returns what metrics.json holds (nothing on other than the main process)."""
    try:
        from accelerate import PartialState
    except ImportError:
        raise missing_extra("accelerate", "stages") from None
    import torch

    from diffdoctor.detector.diagnosing import open_detector, open_device
    from diffdoctor.detector.pictures import finite, tell, versions, write_config
    from diffdoctor.detector.samples import JoinedData, resize_pair
    from diffdoctor.detector.shards import ShardData
    from diffdoctor.evaluate.detector_parts import diagnose_in_parts

    state = PartialState(cpu=not torch.accelerator.is_available())
    output = Path(config.output)
    sets = [ShardData(folder) for folder in config.data]
    data = JoinedData(sets)
    if not len(data):
        raise UserError("data: expected labelled pictures, got none")
    detector = open_detector(config.detector)
    detector.to(open_device(config.device, state.device))
    settings = {"weights": weights_digest(detector)}
    options = {"batch_size": config.batch_size, "size": config.size, "strict": config.strict}
    try:
        found = diagnose_in_parts(detector, sets, output / "parts", settings, state, **options)
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    if found is None:
        return {}
    result = finite(measure(found, bootstrap=config.bootstrap, seed=config.seed))
    result |= {"skipped": found.skipped, "versions": versions()}
    write_config(output, config)
    atomic_write_json(output / "metrics.json", result)

    def picture(index):
        sample = data[int(found.indices[index])]
        if config.size is None or sample["picture"].shape[:2] == (config.size, config.size):
            return sample["picture"]
        return resize_pair(sample["picture"], sample["mask"], config.size)[0]

    write_report(output / "report.html", result, found, picture, config.examples)
    shutil.rmtree(output / "parts")
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
    report.figure(_curves(found), "Pixels: precision against recall; share of artifact pixels against confidence.")
    _examples(report, found, picture, examples)
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
    scores, labels = confidence.ravel(), mask.ravel() >= 0.5
    level = np.minimum((scores * 100).astype(int), 100)
    found = np.cumsum(np.bincount(level, minlength=101)[::-1])
    right = np.cumsum(np.bincount(level[labels], minlength=101)[::-1])
    place = np.minimum((scores * bins).astype(int), bins - 1)
    pixels = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(place, weights=scores, minlength=bins) / pixels
        share = np.bincount(place, weights=labels, minlength=bins) / pixels
        recall, precision = right / right[-1], right / found
    return {
        "recall": recall,
        "precision": precision,
        "mean_confidence": mean,
        "artifact_share": share,
        "pixels": pixels,
        "expected_calibration_error": np.nansum(np.abs(mean - share) * pixels) / max(1, pixels.sum()),
    }


def _curves(found: Diagnosed):
    values = curves(found.confidence, found.masks)
    figure, (left, right) = new_figure(2)
    left.plot(values["recall"], values["precision"])
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    right.plot([0, 1], [0, 1], color="0.7")
    right.plot(values["mean_confidence"], values["artifact_share"], marker="o")
    right.set(xlabel="mean confidence", ylabel="share of artifact pixels", xlim=(0, 1), ylim=(0, 1))
    right.set_title(f"expected calibration error {values['expected_calibration_error']:.3f}", fontsize=9)
    return figure


def _examples(report: Report, found: Diagnosed, picture, examples: int) -> None:
    damaged = (found.masks >= 0.5).any(axis=(1, 2))
    share = flagged_share(found.confidence)
    missed = np.where(damaged, ((found.masks >= 0.5) & (found.confidence < 0.5)).mean(axis=(1, 2)), -1)
    groups = {
        "Worst misses: damaged pictures by the area that was overlooked": np.argsort(-missed)[: int(damaged.sum())],
        f"Worst false positives: clean pictures, flagged from {FLAG_SHARE:.0%} on": np.argsort(
            -np.where(damaged, -1, share)
        )[: int((~damaged).sum())],
    }
    for title, order in groups.items():
        rows = []
        for index in order[:examples]:
            original = picture(int(index))
            scale = max(1, 96 // max(original.shape[:2]))
            mask = np.repeat(np.rint(found.masks[index][..., None] * 255).astype(np.uint8), 3, axis=2)
            heat = heat_colours(found.confidence[index])
            views = (original, mask, heat, overlay(original, found.confidence[index]))
            rows.append([enlarge(view, scale) for view in views])
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
