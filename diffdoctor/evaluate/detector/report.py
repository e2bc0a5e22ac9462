"""The report of `diffdoctor evaluate detector`: measures, curves, the worst misses and false positives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffdoctor.detector.predict import Diagnosed
from diffdoctor.measures.blindness import blindness
from diffdoctor.measures.curves import pixel_curves
from diffdoctor.measures.pixels import FLAG_SHARE
from diffdoctor.measures.statistics import PictureStatistics
from diffdoctor.viz.draw import enlarge, grid, heat_colours, overlay, png_bytes
from diffdoctor.viz.report import Report, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_KIND = "(not known)"


def verdict(result: dict) -> str:
    """The most important measures on a line; `result` is the content of a metrics.json."""
    overall = result["overall"]
    return f"mAP@0.5 {_number(overall['map50'])}, {_percent(overall['false_positive_rate'])} of the clean flagged"


def by_kind(result: dict) -> str:
    """The share of each kind of damage that is found, the least found first, on a line; "" where no kind is known."""
    found = [f"{kind or NO_KIND} {_percent(of['hit_rate'])}" for kind, of in _least_found(result)]
    return f"flagged of each kind of damage: {', '.join(found)}" if found else ""


def doubts(result: dict) -> list[str]:
    """What the measures say against the detector as a whole, a sentence each."""
    rates = {name: result["overall"][name] for name in ("hit_rate", "false_positive_rate")}
    sentence = blindness("the detector", **rates)
    return [] if sentence is None else [sentence]


def write_report(
    path: Path, result: dict, found: Diagnosed, picture: Callable[[int], np.ndarray], examples: int = 12
) -> None:
    """Write the report on maps that are in memory.

    Args:
        path: of the HTML file.
        result: what `measure.measure` returned.
        found: the maps and masks.
        picture: callable from an index to the picture (H, W, 3) uint8.
        examples: number of worst misses, and of worst false positives.
    """
    worst = PictureStatistics.of(found.confidence, found.masks).worst(examples)

    def views(index):
        return picture(index), found.masks[index], found.confidence[index]

    write_page(path, result, pixel_curves(found.confidence, found.masks), worst, views)


def write_page(
    path: Path,
    result: dict,
    curve: dict[str, np.ndarray],
    worst: tuple[np.ndarray, np.ndarray],
    views: Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> None:
    """Write the report.

    Args:
        path: of the HTML file.
        result: what `measure.measure_statistics` returned.
        curve: what `measures.curves.pixel_curves` returned.
        worst: indices of the worst misses, and of the worst false positives.
        views: callable from an index to picture (H, W, 3) uint8, mask (H, W) and confidence (H, W) in [0, 1].
    """
    overall = result["overall"]
    report = Report("Detector")
    report.lead(
        f"mAP@0.5 {_number(overall['map50'])}, IoU {_number(overall['iou'])}; "
        f"{_percent(overall['false_positive_rate'])} of the clean pictures are flagged, "
        f"{_percent(overall['hit_rate'])} of the damaged ones."
    )
    for doubt in doubts(result):
        report.warning(f"{doubt[0].upper()}{doubt[1:]}.")
    report.heading("Measures")
    names = [name for name in overall if not name.endswith("_interval")]
    rows = [(name, (_number(overall[name]), "number"), _interval(overall.get(f"{name}_interval"))) for name in names]
    report.table(("measure", "value", "95 % interval"), rows)
    for title, key in (("Per category", "per_category"), ("Per generator", "per_generator")):
        if len(result[key]) > 1:
            report.heading(title)
            _group_table(report, result[key])
    _kind_tables(report, result)
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


def _least_found(result: dict) -> list[tuple[str, dict]]:
    return sorted(result["per_kind"].items(), key=lambda entry: entry[1]["hit_rate"])


def _kind_tables(report: Report, result: dict) -> None:
    def numbers(*texts):
        return [(text, "number") for text in texts]

    if result["per_kind"]:
        report.heading("Per kind of damage")
        report.text(
            f"Damaged pictures, the least found kind first. A picture is flagged if at least {FLAG_SHARE:.0%} of its "
            "pixels are; IoU, precision and recall count the pixels of a kind's pictures, at confidence 0.5."
        )
        rows = []
        for kind, of in _least_found(result):
            rates = (_percent(of["hit_rate"]), _percents(of["hit_rate_interval"]))
            measures = (_number(of[name]) for name in ("map50", "iou", "precision", "recall"))
            rows.append((kind or NO_KIND, *numbers(of["pictures"], *rates, *measures)))
        report.table(("kind", "pictures", "flagged", "95 % interval", "mAP@0.5", "IoU", "precision", "recall"), rows)
    if result["clean_per_kind"]:
        report.heading("Clean pictures by what was done to them")
        report.text("What is flagged here is a false alarm.")
        rows = []
        for kind, of in result["clean_per_kind"].items():
            rates = (_percent(of["false_positive_rate"]), _percents(of["false_positive_rate_interval"]))
            rows.append((kind.removeprefix("benign:") or "nothing", *numbers(of["pictures"], *rates)))
        report.table(("change", "pictures", "flagged", "95 % interval"), rows)


def _category_statistics(report: Report, statistics: list[dict]) -> None:
    if len(statistics) < 2:
        return
    report.heading("Class balance: clean pictures by category")
    abnormal = [entry["category"] for entry in statistics if entry["verdict"]]
    report.text(
        f"Categories that need new pictures: {', '.join(abnormal) or 'none'}. A category is abnormal when its mean "
        "confidence lies at least 3 robust deviations from the categories' median."
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


def _curves(values: dict[str, np.ndarray]) -> Figure:
    figure, (left, right) = new_figure(2)
    left.plot(values["recall"], values["precision"])
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    right.plot([0, 1], [0, 1], color="0.7")
    right.plot(values["mean_confidence"], values["artifact_share"], marker="o")
    right.set(xlabel="mean confidence", ylabel="share of artifact pixels", xlim=(0, 1), ylim=(0, 1))
    right.set_title(f"expected calibration error {values['expected_calibration_error']:.3f}", fontsize=9)
    return figure


def _examples(report: Report, title: str, indices: np.ndarray, views: Callable) -> None:
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


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _percents(bounds: list[float]) -> str:
    return f"{bounds[0]:.1%} … {bounds[1]:.1%}"


def _interval(bounds: list[float | None] | None) -> str:
    return "" if not bounds or bounds[0] is None else f"{bounds[0]:.4f} … {bounds[1]:.4f}"
