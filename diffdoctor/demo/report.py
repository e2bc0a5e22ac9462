"""The demo's page: what was wrong, where, and what the treatment made of it."""

from pathlib import Path

import numpy as np
import yaml

from diffdoctor.demo.acceptance import acceptance_checks
from diffdoctor.evaluate.model.report import verdict
from diffdoctor.runs.files import atomic_path, atomic_write_bytes
from diffdoctor.viz.draw import as_hwc, enlarge, grid, overlay, png_bytes
from diffdoctor.viz.report import Report, new_figure

SCALE = 5
COLUMNS = 12
BLOCKS = 3
MARGIN = 108
ROWS = ("before", "… where", "after", "… where")


def before_after_sheet(before, after, judge_before, judge_after, chosen, columns=COLUMNS):
    """Chosen pictures in blocks of four rows: before, before with the judge's map, after, after with the map.

    Args:
        before: uint8 (N, 3, H, W), drawn by the untreated pipeline.
        after: likewise, by the treated one.
        judge_before: (N, 1, H, W), the judge's maps of `before`.
        judge_after: likewise, of `after`.
        chosen: indices of the pictures, in the order to be shown.
        columns: pictures per row.

    Returns:
        uint8 (height, width, 3).
    """
    rows = []
    for start in range(0, len(chosen), columns):
        part = chosen[start : start + columns]
        for pictures, maps in ((before, judge_before), (after, judge_after)):
            large = [enlarge(picture, SCALE) for picture in as_hwc(pictures[part])]
            heat = [enlarge(one, SCALE) for one in maps[part, 0].numpy()]
            rows.append(large)
            rows.append([overlay(picture, one) for picture, one in zip(large, heat, strict=True)])
    return _with_labels(grid(rows), len(rows))


def _with_labels(sheet, rows):
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.new("RGB", (sheet.shape[1] + MARGIN, sheet.shape[0]), "white")
    canvas.paste(Image.fromarray(sheet), (MARGIN, 0))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=18)
    height = sheet.shape[0] / rows
    for i in range(rows):
        pen.text((10, (i + 0.5) * height), ROWS[i % 4], fill="black", font=font, anchor="lm")
    return np.asarray(canvas)


def write_pictures(folder, before, after, comparison):
    """Write the drawn pictures as PNG: two contact sheets sorted alike, the before/after sheet, the hundred worst."""
    folder = Path(folder)
    order = comparison.severity_before.argsort(descending=True)
    for name, pictures in (("before", before), ("after", after)):
        tiles = [enlarge(picture, 2) for picture in as_hwc(pictures[order])]
        sheet = grid([tiles[i : i + 50] for i in range(0, len(tiles), 50)], gap=2)
        atomic_write_bytes(folder / f"{name}.png", png_bytes(sheet))
        for rank, picture in enumerate(as_hwc(pictures[order[:100]])):
            with atomic_path(folder / f"worst_{rank:03d}_{name}.png") as path:
                path.write_bytes(png_bytes(picture))
    sheet = before_after_sheet(
        before, after, comparison.judge_before, comparison.judge_after, order[: COLUMNS * BLOCKS]
    )
    atomic_write_bytes(folder / "before_after.png", png_bytes(sheet))
    return sheet


def write_report(
    path, *, metrics, settings, comparison, before, after, sheet, detector_history, treat_history, measurements
):
    """Write the page.

    Args:
        path: of the HTML file.
        metrics: the content of metrics.json.
        settings: the options that were asked for.
        comparison: `diffdoctor.evaluate.model.Comparison` of the untreated and the treated pipeline.
        before: uint8 (N, 3, H, W), what the untreated pipeline drew.
        after: likewise, the treated one.
        sheet: the before/after sheet of `write_pictures`.
        detector_history: {name: [value per recorded step]}, with the steps under "step".
        treat_history: likewise, of the treatment.
        measurements: likewise, of the fixed pictures.
    """
    report = Report("diffdoctor demo: handwritten digits, before and after treatment")
    report.lead(verdict(metrics))
    report.text(
        "A small Stable Diffusion pipeline was trained on handwritten digits of which half had been damaged, and "
        "learnt to draw the damage. A detector that marks damaged pixels then steered the tuning of a LoRA. The "
        "treatment saw no clean originals of the damaged pictures."
    )
    report.heading("The worst pictures before, and the same after")
    report.image(
        png_bytes(sheet),
        f"The {COLUMNS * BLOCKS} pictures with the largest damaged area before the treatment, worst first, enlarged "
        f"{SCALE} times; red is where the judge sees damage.",
        "Digits before and after treatment with the judge's maps",
    )
    still = comparison.severity_after.argsort(descending=True)[:COLUMNS]
    report.image(
        png_bytes(before_after_sheet(before, after, comparison.judge_before, comparison.judge_after, still)),
        "What is still wrong: the pictures with the largest damaged area after the treatment.",
    )
    report.heading("Measures")
    report.table(["measure", "before", "after", "note"], _measure_rows(metrics))
    report.heading("Acceptance checks")
    rows = [
        [check.name, (check.value, "number"), check.limit, ("holds", "good") if check.holds else ("missed", "bad")]
        for check in acceptance_checks(metrics)
    ]
    report.table(["figure", "value", "must be", ""], rows)
    report.heading("Curves")
    for title, history in (
        ("The detector's training.", detector_history),
        ("The treatment's steps.", treat_history),
        ("Fixed pictures, measured during the treatment by the detector.", measurements),
    ):
        for figure in _curves(history):
            report.figure(figure, title)
    report.heading("Time")
    report.table(["stage", "seconds"], [[name, (f"{s:.1f}", "number")] for name, s in metrics["stage_seconds"].items()])
    report.heading("Settings")
    report.code(yaml.safe_dump(settings, sort_keys=False))
    report.write(path)


def _measure_rows(metrics):
    def percent(value):
        return f"{100 * value:.2f} %", "number"

    def number(value):
        return f"{value:.2f}", "number"

    rates, fid, accuracy = metrics["artifact_rate"], metrics["fid"], metrics["digit_accuracy"]
    rows = [
        ["artifact rate, judge", percent(rates["judge"]["before"]), percent(rates["judge"]["after"]),
         f"flagged: at least 2 % of the pixels at confidence 0.5; ratio {rates['judge']['ratio']:.3f}, 95 % interval "
         f"{rates['judge']['ratio_interval'][0]:.3f} to {rates['judge']['ratio_interval'][1]:.3f}"],
        ["artifact rate, detector", percent(rates["detector"]["before"]), percent(rates["detector"]["after"]),
         "the detector that steered the treatment: not independent"],
        ["FID", number(fid["before"]), number(fid["after"]),
         f"features of the digit classifier; floor {fid['floor']:.2f} (two halves of the real digits), "
         f"clean against damaged {fid['ceiling']:.2f}"],
        ["digit accuracy", percent(accuracy["before"]), percent(accuracy["after"]),
         "is the digit that the prompt asked for still there?"],
        ["within-class variance", number(metrics["variance"]["before"]), number(metrics["variance"]["after"]),
         "a collapsed model has little"],
    ]  # fmt: skip
    if "clean_before" in accuracy:
        unflagged = percent(accuracy["clean_before"]), percent(accuracy["clean_after"])
        rows.append(["digit accuracy, clean before", *unflagged, "pictures that the judge did not flag before"])
    for name, control in metrics["control"].items():
        title = f"control, {name.replace('_', ' ')}: artifact rate, judge"
        rows.append([title, percent(control["before"]), percent(control["after"]), "same steps, without diagnosis"])
    return rows


def _curves(history):
    """Figures of three curves each; what is a schedule rather than a measurement is left out."""
    names = [name for name, values in history.items() if name not in ("step", "learning_rate") and len(values) > 1]
    for start in range(0, len(names), 3):
        figure, axes = new_figure(3, width=3.8, height=2.6)
        for axis, name in zip(axes, names[start : start + 3], strict=False):
            axis.plot(history.get("step", range(len(history[name]))), history[name], linewidth=1)
            axis.set_title(name.replace("_", " "), fontsize=10)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
        for axis in axes[len(names) - start :]:
            axis.set_visible(False)
        yield figure
