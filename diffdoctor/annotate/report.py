"""The pages of `diffdoctor annotate status` and `agreement`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffdoctor.annotate.agreement import MEASURES
from diffdoctor.annotate.project import Project
from diffdoctor.viz.report import Report

_TITLES = {
    "pixel_alpha": "pixel alpha",
    "picture_alpha": "picture alpha",
    "iou_where_marked": "IoU where marked",
    "tolerant_iou": "tolerant IoU",
    "component_f1": "component F1",
}


def write_status(project: Project, status: dict[str, Any]) -> Path:
    """Write status.html into a project's folder; returns its path.

    Args:
        project: the project.
        status: see `status.status_of`.
    """
    report = Report("Annotation: status")
    labels = status["labels"]
    report.lead(f"{labels['done']:,} of {labels['wanted']:,} labels are there.")
    for fault in status["faults"]:
        report.warning(f"The record was tampered with: {fault}.")
    if not status["faults"]:
        report.text("The chain of events is whole: every answer and decision is as it was written.")
    report.heading("Tasks")
    rows = [(row["round"], row["kind"], row["state"], (row["tasks"], "number")) for row in status["tasks"]]
    report.table(["round", "kind", "state", "tasks"], rows)
    report.heading("Raters")
    report.table(
        ["name", "role", "labelled", "minutes", "seconds a picture", "late", "known truth: hits", "state"],
        [_rater(row) for row in status["raters"]],
    )
    report.heading("Answers")
    report.table(["verdict", "answers"], [(name, (count, "number")) for name, count in status["verdicts"].items()])
    path = project.folder / "status.html"
    report.write(path)
    return path


def _rater(row: dict[str, Any]) -> tuple:
    each = row["active_seconds"] / row["labelled"] if row["labelled"] else None
    gold = row["gold"] and f"{row['gold']['hits']} of {row['gold']['of']}"
    state = "shut out" if row["disabled"] else f"paused: {row['paused']}" if row["paused"] else ""
    return (
        row["name"],
        row["role"],
        (row["labelled"], "number"),
        (f"{row['active_seconds'] / 60:.1f}", "number"),
        ("" if each is None else f"{each:.1f}", "number"),
        (row["late"], "number"),
        gold or "",
        (state, "bad") if state else "",
    )


def write_agreement(project: Project, found: dict[str, Any]) -> Path:
    """Write agreement.html into a project's folder; returns its path.

    Args:
        project: the project.
        found: see `agreement.measure_agreement`.
    """
    report = Report("Annotation: agreement")
    total = found["all"]
    report.lead(
        f"Pixel alpha {_number(total['pixel_alpha'])} over {total['pictures']} pictures with two answers or more."
    )
    report.text(
        "Alpha is Krippendorff's: 1 is full agreement, 0 what chance gives; of pixels it sees where raters mark, of "
        "pictures whether they find anything at all. IoU is averaged over the pairs of raters of whom at least one "
        "marked something; the tolerant one forgives outlines that differ by 1 % of the diagonal. Intervals of 95 % "
        "come from resampling the pictures."
    )
    if found["conflicts"]:
        report.warning(f"{found['conflicts']} tasks wait for a reviewer.")
    header = ["", "pictures", *(_TITLES[name] for name in MEASURES)]
    report.table(header, [_row("all", total)])
    report.heading("By category")
    report.table(header, [_row(each["name"] or "(none)", each) for each in found["categories"]])
    report.heading("By pair of raters")
    report.table(header, [_row(" and ".join(each["raters"]), each) for each in found["pairs"]])
    report.heading("What showing the detector's map does")
    report.text(_anchoring(found["anchoring"]))
    path = project.folder / "agreement.html"
    report.write(path)
    return path


def _anchoring(found: dict[str, Any]) -> str:
    blind, assisted = found["blind"], found["assisted"]
    if found["difference"] is None:
        return "It takes answers both with the map and, by lot, without it to say."
    low, high = found["difference_interval"]
    interval = "" if low is None else f" (95 % from {low:.2f} to {high:.2f})"
    return (
        f"Regions a picture that the detector did not propose: {blind['unproposed']:.2f} in {blind['answers']} answers "
        f"given without its map, {assisted['unproposed']:.2f} in {assisted['answers']} given with it. The difference, "
        f"{found['difference']:.2f}{interval}, is what raters overlook because they rely on the map."
    )


def _row(name: str, found: dict[str, Any]) -> tuple:
    return (name, (found["pictures"], "number"), *((_with_interval(found, each), "number") for each in MEASURES))


def _with_interval(found: dict[str, Any], name: str) -> str:
    low, high = found.get(f"{name}_interval", (None, None))
    return _number(found[name]) + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
