"""The results of `diffdoctor evaluate model`: a page with the pictures side by side, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffdoctor.data.pictures import shrink_to
from diffdoctor.detector.predict import diagnose_pictures
from diffdoctor.measures.blindness import blindness
from diffdoctor.measures.pixels import FLAG_CONFIDENCE, FLAG_SHARE
from diffdoctor.viz.draw import as_hwc, enlarge, grid, jpeg_bytes, overlay, png_bytes
from diffdoctor.viz.report import Report, new_figure
from diffdoctor.viz.video import film, film_indices

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from diffdoctor.data.prompts import Prompt
    from diffdoctor.evaluate.model.config import EvaluateModelConfig
    from diffdoctor.evaluate.model.store import EvaluationFolder
    from diffdoctor.evaluate.model.summary import PictureMeasures

SMALL, LARGE = 128, 288


def verdict(metrics: dict) -> str:
    """The judge's rates before and after, in a sentence; `metrics` is the content of a metrics.json."""
    rate = metrics["artifact_rate"]["judge"]
    return (
        f"A judge that had no part in the treatment flags {_rate(rate, 'before')} of {metrics['pictures']} pictures "
        f"before it and {_rate(rate, 'after')} after it, generated from the same prompts, seeds and latents."
    )


def doubts(metrics: dict) -> list[str]:
    """What the measures say against the judge and the detector, a sentence each."""
    found = []
    for name, rate in metrics["artifact_rate"].items():
        rates = {"hit_rate": rate.get("damaged"), "false_positive_rate": rate.get("real")}
        sentence = blindness(f"the {name}", **rates, clean="the real pictures")
        if sentence is None and name == "judge" and rate["before"] == rate["after"] == 0 and "damaged" not in rate:
            sentence = (
                "the judge flags no picture at all, before or after, and nothing shows that it sees artifacts: give "
                "--real, whose pictures it is then tried on, clean and damaged"
            )
        found += [sentence] if sentence else []
    return found


def write_report(
    config: EvaluateModelConfig,
    folder: EvaluationFolder,
    judge: nn.Module,
    prompt: Callable[[int], Prompt],
    metrics: dict,
    before: PictureMeasures,
    after: PictureMeasures,
) -> None:
    """Write report.html into the evaluation's folder.

    Args:
        config: of the evaluation.
        folder: with all pictures.
        judge: whose maps are shown.
        prompt: callable from a picture's index to its prompt.
        metrics: the content of metrics.json.
        before: measures of the pictures before the treatment.
        after: measures of the same pictures after it.
    """
    import yaml

    report = Report("Treatment: before and after")
    report.lead(verdict(metrics))
    for doubt in metrics["doubts"]:
        report.warning(f"{doubt[0].upper()}{doubt[1:]}.")
    report.text(
        f"A picture is flagged when at least {FLAG_SHARE:.0%} of its pixels have a confidence of at least "
        f"{FLAG_CONFIDENCE}. docs/evaluate.md explains each measure."
    )
    if metrics["features"]["note"] and ("fid" in metrics or "variance" in metrics):
        report.text(metrics["features"]["note"])
    report.heading("Measures")
    report.table(["measure", "before", "after", "note"], measure_rows(metrics))
    if "per_category" in metrics:
        report.heading("Per category")
        report.text("The share that the judge flags and its difference in points, in brackets the 95 % intervals.")
        report.table(*_category_table(metrics["per_category"]))
    report.heading("Severity")
    severities = _severities(before.judge.numpy(), after.judge.numpy())
    report.figure(severities, "By the judge; before and after sorted separately.")

    def strip(index):
        area = f"flagged area {float(before.judge[index]):.1%} before, {float(after.judge[index]):.1%} after"
        return _strip(folder, judge, index), _caption(prompt(index), f"seed {config.seed + index}; {area}")

    first = list(range(min(config.examples, len(before.judge))))
    _strips(report, "The first pictures, whatever they show", strip, first)
    growth = after.judge - before.judge
    for title, severity in (
        ("The worst before, and the same after", before.judge),
        ("Still wrong: the worst after", after.judge),
        ("Made worse: the largest growth of the flagged area", growth),
    ):
        worst = severity.argsort(descending=True, stable=True)[: config.examples].tolist()
        chosen = [index for index in worst if severity[index] > 0]
        _strips(report, title, strip, chosen)
    report.heading("Settings")
    options = {name: value for name, value in vars(config).items() if name not in ("output", "overwrite", "engine")}
    settings = {"options": options, "sampling": metrics["sampling"], "versions": metrics["versions"]}
    report.code(yaml.safe_dump(settings, sort_keys=False))
    report.write(folder.path / "report.html")


def print_measures(metrics: dict, output: Path) -> None:
    """Print the measures to the terminal.

    Args:
        metrics: the content of metrics.json.
        output: the folder with report.html.
    """
    for name, before, after, note in measure_rows(metrics):
        print(f"{name:<34} {before[0]:>10} -> {after[0]:<10} {note}".rstrip())
    print(f"report: {output / 'report.html'}")


def measure_rows(metrics: dict) -> list[list]:
    """Rows (measure, before, after, note) of all measures that were taken; before and after as (text, "number")."""
    rows = []
    for name, title in (("judge", "artifact rate, judge"), ("detector", "artifact rate, detector")):
        rate = metrics["artifact_rate"][name]
        rows.append([title, _percent(rate["before"]), _percent(rate["after"]), _rate_note(rate, name)])
    for name, area in metrics["flagged_area"].items():
        rows.append([f"flagged area, {name}", _percent(area["before"]), _percent(area["after"]), "share of all pixels"])
    if "fid" in metrics:
        fid = metrics["fid"]
        ceiling = f", clean against damaged {_plain(fid['ceiling'])}" if "ceiling" in fid else ""
        note = f"{metrics['features']['name']}; two halves of the real pictures {_plain(fid['floor'])}{ceiling}"
        rows.append(["FID", _number(fid["before"]), _number(fid["after"]), note])
    elif "no_fid" in metrics:
        rows.append(["FID", _number(None), _number(None), metrics["no_fid"]])
    for name, form in (("kid", _plain), ("mmd", _plain), ("precision", _share), ("recall", _share)):
        if name in metrics:
            title = name if name in ("precision", "recall") else name.upper()
            values = [(form(metrics[name][when]), "number") for when in ("before", "after")]
            rows.append([title, *values, _of_few_note(metrics[name], name)])
    if "variance" in metrics:
        variance = metrics["variance"]
        note = f"{metrics['features']['name']}; a collapsed model has little"
        if variance["before"] is None:
            note = "no prompt was used twice: generate more pictures than there are prompts"
        rows.append(["within-class variance", _number(variance["before"]), _number(variance["after"]), note])
    for key, title, form, note in (
        ("clip_score", "CLIP score", _number, "similarity of picture and prompt"),
        ("preference", "preference score", _number, "how much people would like it, by a model"),
        ("vqa", "questions", _number, "chance of yes to whether it shows what the prompt asks for, geometric mean"),
        ("accuracy", "accuracy", _percent, "share in which the classifier finds the prompt's label"),
    ):
        if key in metrics:
            values = metrics[key]
            rows.append([title, form(values["before"]), form(values["after"]), note])
            if "clean_before" in values:
                clean = form(values["clean_before"]), form(values["clean_after"])
                rows.append([f"{title}, clean before", *clean, "pictures that the judge did not flag before"])
    return rows


def _rate_note(rate: dict, name: str) -> str:
    parts = ["independent" if name == "judge" else "steered the treatment: not independent"]
    if rate["ratio"] is not None:
        low, high = rate["ratio_interval"]
        parts.append(f"ratio {rate['ratio']:.3f} ({low:.3f} to {high:.3f})")
    low, high = (100 * bound for bound in rate["difference_interval"])
    parts.append(f"difference {100 * rate['difference']:+.2f} points ({low:+.2f} to {high:+.2f})")
    if "real" in rate:
        parts.append(f"flags {rate['real']:.1%} of the real pictures")
    if "damaged" in rate:
        parts.append(f"{rate['damaged']:.1%} of the damaged ones")
    return ", ".join(parts)


def _of_few_note(values: dict, name: str) -> str:
    if name in ("precision", "recall"):
        low, high = values["after_interval"]
        of = {"precision": "generated pictures near real ones", "recall": "real pictures near generated ones"}[name]
        return f"share of {of}; after, 95 % interval {low:.1%} to {high:.1%}"
    if values["difference"] is None:
        return "not a number: some features are not finite"
    low, high = values["difference_interval"]
    note = f"unbiased, 0 for the same distribution; difference {values['difference']:+.3g} ({low:+.3g} to {high:+.3g})"
    return f"{note}, clean against damaged {_plain(values['ceiling'])}" if "ceiling" in values else note


def _category_table(groups: dict) -> tuple[list, list]:
    header = ["category", "pictures", "judge before", "judge after", "difference"]
    names = ("clip_score", "preference", "vqa", "accuracy")
    extra = [name for name in names if all(name in group for group in groups.values())]
    for name in extra:
        header += [f"{name.replace('_', ' ')} before", "after"]
    rows = []
    for name, group in groups.items():
        rate = group["artifact_rate"]["judge"]
        low, high = (100 * bound for bound in rate["difference_interval"])
        row = [
            name or "(none)",
            (group["pictures"], "number"),
            *((_rate(rate, when, ""), "number") for when in ("before", "after")),
            (f"{100 * rate['difference']:+.2f} ({low:+.2f} to {high:+.2f})", "number"),
        ]
        for key in extra:
            form = _percent if key == "accuracy" else _number
            row += [form(group[key]["before"]), form(group[key]["after"])]
        rows.append(row)
    return header, rows


def _severities(before: np.ndarray, after: np.ndarray) -> Figure:
    figure, (left, right) = new_figure(2, width=4.6, height=2.8)
    for values, label, colour in ((before, "before", "tab:red"), (after, "after", "tab:green")):
        left.plot(np.linspace(0, 100, len(values)), 100 * np.sort(values)[::-1], label=label, color=colour)
    left.axhline(100 * FLAG_SHARE, color="0.6", linewidth=0.8, linestyle="--")
    left.set(xlabel="pictures, % (worst first)", ylabel="flagged area, % of pixels")
    left.legend()
    top = 100 * max(before.max(), after.max(), FLAG_SHARE)
    right.plot([0, top], [0, top], color="0.7", linewidth=0.8)
    right.scatter(100 * before, 100 * after, s=6, alpha=0.4)
    right.set(xlabel="flagged area before, %", ylabel="after, %")
    return figure


def _strips(
    report: Report, title: str, strip: Callable[[int], tuple[tuple[np.ndarray, bool], str]], indices: list[int]
) -> None:
    """Add the strips of pictures, given what `_strip` returns and the caption of each."""
    if not indices:
        return
    report.heading(title)
    report.text("Each strip: before, before with the judge's map in red, after, after with the map.")
    strips = [strip(index) for index in indices]
    with report.tiles(480 if strips[0][0][1] else 4 * LARGE):
        for (sheet, small), caption in strips:
            report.image(png_bytes(sheet) if small else jpeg_bytes(sheet), caption, pixels=small)


def _strip(folder: EvaluationFolder, judge: nn.Module, index: int) -> tuple[np.ndarray, bool]:
    """Before, before with the judge's map, after, after with the map, side by side; whether the pictures are small.

    Of videos some frames each, one of the four below the other.
    """
    views = []
    for side in ("before", "after"):
        picture = folder.pictures(side).load([index])
        if picture.ndim == 5:
            picture = picture[:, :, film_indices(picture.shape[2])]
        maps = diagnose_pictures(judge, picture, name="judge")[0, 0].numpy()
        frames = as_hwc(picture if picture.ndim == 4 else picture[0].transpose(0, 1))
        maps = maps.reshape(len(frames), *maps.shape[-2:])
        views.append(film([sized(frame) for frame in frames]))
        views.append(film([sized(overlay(*pair)) for pair in zip(frames, maps, strict=True)]))
    rows = [views] if len(frames) == 1 else [[view] for view in views]
    return grid(rows), max(frames.shape[1:3]) <= SMALL


def _caption(prompt: Prompt, rest: str) -> str:
    return f"{prompt.text}{f' [{prompt.category}]' if prompt.category else ''}; {rest}"


def sized(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 for a report: up to `SMALL` pixels a side enlarged, each to a square, else shrunk to
    `LARGE`."""
    longest = max(picture.shape[:2])
    return enlarge(picture, max(1, SMALL // longest)) if longest <= SMALL else shrink_to(picture, LARGE)


def _rate(rate: dict, when: str, what: str = "95 % interval ") -> str:
    low, high = rate[f"{when}_interval"]
    return f"{100 * rate[when]:.2f} % ({what}{100 * low:.2f} to {100 * high:.2f})"


def _percent(value: float | None) -> tuple[str, str]:
    return ("–" if value is None else f"{100 * value:.2f} %"), "number"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: float | None) -> tuple[str, str]:
    return _plain(value), "number"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
