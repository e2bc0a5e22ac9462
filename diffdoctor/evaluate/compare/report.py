"""The page of a comparison's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.evaluate.compare.answers import Answers
from diffdoctor.evaluate.compare.pairs import Pair
from diffdoctor.evaluate.compare.summary import counts_of, verdict_of
from diffdoctor.evaluate.model.report import LARGE, SMALL, sized
from diffdoctor.runs.errors import UserError
from diffdoctor.viz.draw import grid, jpeg_bytes, png_bytes
from diffdoctor.viz.report import Report

_EXAMPLES = 12


def verdict(found: dict[str, Any]) -> str:
    """The result in a sentence; `found` is the content of compare.json."""
    a, b = found["names"]
    preference = found["preference"]
    if not found["answered"]:
        return f"No pair of the {found['pairs']:,} has been judged yet."
    low, high = preference["interval"]
    words = "no preference is shown" if low <= 0.5 <= high else f"{b if low > 0.5 else a} is preferred"
    return (
        f"{b} against {a}: {preference['rate']:.1%} (95 % interval {low:.1%} to {high:.1%}) over "
        f"{found['answered']:,} pairs, ties as half; {words}."
    )


def write_report(path: Path, found: dict[str, Any], pairs: Sequence[Pair], answers: Answers, question: str) -> None:
    """Write report.html.

    Args:
        path: of the file.
        found: the content of compare.json.
        pairs: that were shown.
        answers: of the raters.
        question: that they were asked.
    """
    a, b = found["names"]
    report = Report(f"{a} or {b}: what people prefer")
    report.lead(verdict(found))
    for doubt in found["doubts"]:
        report.warning(f"{doubt[0].upper()}{doubt[1:]}.")
    report.text(
        f"“{question}” Raters: {len(found['raters'])}. Answers: {found['answers']:,}, to {found['answered']:,} of "
        f"{found['pairs']:,} pairs, in an order and on sides by lot, without knowing which picture is whose. A pair's "
        "verdict is what more of its raters chose; otherwise it is a tie. docs/evaluate.md explains each measure."
    )
    report.table(["measure", "", "95 % interval", "note"], _measures(found))
    if found["scores"]:
        report.heading("Scores against people")
        report.text(
            "How often the better score is people's choice, of the pairs with a verdict and two scores that differ."
        )
        header = ["score", "agreement", "95 % interval", "pairs", "equal scores", "better is"]
        report.table(header, [_score(name, values) for name, values in found["scores"].items()])
    if "per_category" in found:
        report.heading("Per category")
        header = ["category", f"preference for {b}", "95 % interval", a, b, "ties"]
        report.table(header, [_category(name, values) for name, values in found["per_category"].items()])
    report.heading("Raters")
    header = ["rater", a, b, "neither", "left", "median seconds"]
    report.table(header, [_rater(name, values) for name, values in found["raters"].items()])
    for title, side in ((f"{b} preferred", 1), (f"{a} preferred", -1)):
        chosen = [pair for pair in pairs if verdict_of(counts_of(answers.of_pair(pair.name).values())) == side]
        _pictures(report, title, (a, b), chosen[:_EXAMPLES])
    report.write(path)


def _measures(found: dict[str, Any]) -> list[list]:
    a, b = found["names"]
    preference, left, agreement = found["preference"], found["left"], found["agreement"]
    counts = f"{b} {preference['b']}, {a} {preference['a']}, ties {preference['ties']}"
    rows = [[f"preference for {b}", _percent(preference["rate"]), _interval(preference["interval"]), counts]]
    sign = preference["p_value"]
    rows.append(["sign test", (_plain(sign), "number"), "", "p of no preference, by the pairs that are no ties"])
    note = f"of {left['answers']:,} answers; 50 % without a habit, since sides are dealt by lot"
    rows.append(["left chosen", _percent(left["rate"]), _interval(left["interval"]), note])
    pairs = f"{agreement['pairs']:,} pairs with two raters or more"
    rows.append(["same answer", _percent(agreement["same"]), "", f"of two raters to a pair; {pairs}"])
    low, high = agreement["alpha_interval"]
    shown = "" if low is None else f"{low:.2f} to {high:.2f}"
    note = "Krippendorff's, of a, b and neither: 1 is full agreement, 0 that of chance"
    rows.append(["alpha", (_plain(agreement["alpha"]), "number"), (shown, "number"), note])
    return rows


def _score(name: str, values: dict[str, Any]) -> list:
    better = "lower" if values["lower_is_better"] else "higher"
    counts = [(f"{values[key]:,}", "number") for key in ("pairs", "equal")]
    return [name, _percent(values["agreement"]), _interval(values["interval"]), *counts, better]


def _category(name: str, values: dict[str, Any]) -> list:
    counts = [(f"{values[key]:,}", "number") for key in ("a", "b", "ties")]
    return [name or "(none)", _percent(values["rate"]), _interval(values["interval"]), *counts]


def _rater(name: str, values: dict[str, Any]) -> list:
    counts = [(f"{values[key]:,}", "number") for key in ("a", "b", "neither")]
    return [name, *counts, _percent(values["left"]), (f"{values['seconds']:.1f}", "number")]


def _pictures(report: Report, title: str, names: tuple[str, str], pairs: Sequence[Pair]) -> None:
    if not pairs:
        return
    report.heading(title)
    report.text(f"Each strip: {names[0]}, then {names[1]}.")
    with report.tiles(2 * LARGE):
        for pair in pairs:
            try:
                views = [sized(place.read()) for place in (pair.a, pair.b)]
            except UserError:
                continue
            small = max(views[0].shape[:2]) <= 2 * SMALL
            height, width = (max(view.shape[axis] for view in views) for axis in (0, 1))
            sheet = grid([[_padded(view, height, width) for view in views]])
            caption = f"{pair.name}{f': {pair.prompt}' if pair.prompt else ''}"
            report.image(png_bytes(sheet) if small else jpeg_bytes(sheet), caption, pixels=small)


def _padded(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    missing = height - picture.shape[0], width - picture.shape[1]
    return np.pad(picture, ((0, missing[0]), (0, missing[1]), (0, 0)), constant_values=255)


def _percent(value: float | None) -> tuple[str, str]:
    return ("–" if value is None else f"{100 * value:.1f} %"), "number"


def _interval(bounds: Sequence[float]) -> tuple[str, str]:
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %", "number"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
