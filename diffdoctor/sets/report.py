"""The page of `diffdoctor set stats`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffdoctor.data.shards import BrokenSample, ShardData
from diffdoctor.engine.sets import AREAS
from diffdoctor.sets.opened import OpenSet
from diffdoctor.viz.draw import jpeg_bytes, overlay
from diffdoctor.viz.report import Report, new_figure

PAGE = "quality.html"
_TILE = 120  # smallest width of a picture on the page, in pixels
_ROWS = 200  # of a table


def write_quality(path: Path, sets: Sequence[OpenSet], metrics: dict[str, Any], samples: int) -> None:
    """Write quality.html.

    Args:
        path: of the page.
        sets: that it is about.
        metrics: see `stats.describe`; with `drift` and `duplicates` where these are known.
        samples: pictures to show.
    """
    report = Report("Set quality")
    many = f"{len(sets)} set{'s' if len(sets) > 1 else ''}"
    report.lead(f"{metrics['pictures']:,} pictures in {many}, {metrics['flagged']:,} of them flagged.")
    for unit, reason in metrics["failed_units"].items():
        report.warning(f"A unit was given up: {unit}: {reason}.")
    if duplicates := metrics.get("duplicates"):
        _add_duplicates(report, duplicates)
    report.heading("Counts")
    for title in ("labels", "generators", "sizes"):
        rows = [(name, (f"{count:,}", "number")) for name, count in list(metrics[title].items())[:_ROWS]]
        report.table([title.removesuffix("s"), "pictures"], rows)
    _add_categories(report, metrics["categories"])
    if any(metrics["areas"]):
        _add_areas(report, metrics["areas"])
    if "drift" in metrics:
        _add_drift(report, metrics["drift"])
    if samples:
        report.heading("Samples")
        with report.tiles(_TILE):
            for picture, caption in _samples(sets, samples):
                report.image(picture, caption, pixels=False)
    report.write(path)


def _add_duplicates(report: Report, found: dict[str, Any]) -> None:
    if found["leaks"]:
        report.warning(f"{found['leaks']:,} pictures are in the test sets, too, or nearly.")
    shares = f"{found['superfluous']:,} of {found['pictures']:,} pictures are superfluous"
    report.text(f"{shares}: {found['equal']:,} equal others, the rest nearly. The largest cluster has "
                f"{found['largest_cluster']:,}.")  # fmt: skip


def _add_categories(report: Report, categories: list[dict[str, Any]]) -> None:
    report.heading("Categories")
    report.text(
        "z is the distance of a category's mean confidence from the median of all, in robust deviations. One that is "
        "flagged too often may be flagged for what it shows, one too rarely may be overlooked."
    )
    report.table(
        ["category", "pictures", "flagged", "mean confidence", "z", ""],
        [
            (
                each["category"] or "–",
                (f"{each['pictures']:,}", "number"),
                (f"{each['flagged']:.1%}", "number"),
                (f"{each['mean_confidence']:.3f}", "number"),
                (f"{each['z']:+.1f}", "number"),
                (each["verdict"], "bad"),
            )
            for each in categories[:_ROWS]
        ],
    )


def _add_areas(report: Report, areas: list[int]) -> None:
    figure, (axes,) = new_figure(1, width=6.0)
    axes.bar((np.arange(AREAS) + 0.5) / AREAS, areas, 0.9 / AREAS)
    axes.set_yscale("symlog")
    axes.set_xlabel("share of broken pixels")
    axes.set_ylabel("pictures")
    report.heading("Broken areas")
    report.figure(figure)


def _add_drift(report: Report, rows: list[dict[str, Any]]) -> None:
    forms = {"pictures": ",", "flagged": ".1%", "mean_confidence": ".3f"}

    def cell(row: dict[str, Any], name: str) -> tuple[str, str]:
        before, now = ("–" if value is None else format(value, forms[name]) for value in row[name])
        return f"{before} → {now}", "number"

    report.heading("Since the round before")
    table = [(row["category"] or "–", *(cell(row, name) for name in forms)) for row in rows[:_ROWS]]
    report.table(["category", "pictures", "flagged", "mean confidence"], table)


def _samples(sets: Sequence[OpenSet], count: int):
    """Pictures, evenly from all sets together, reddened where they are labelled as broken; (JPEG, caption)."""
    from PIL import Image

    opened = [ShardData(each.folder) for each in sets]
    ends = np.cumsum([len(data) for data in opened])
    total = int(ends[-1])
    for index in np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64)) if total else ():
        number = int(np.searchsorted(ends, index, side="right"))
        data, row = opened[number], int(index - (ends[number - 1] if number else 0))
        try:
            picture = data.picture(row) if data.labels[row] == "" else None
            sample = {"picture": picture} if picture is not None else data[row]
        except BrokenSample:
            continue
        picture = sample["picture"] if sample.get("mask") is None else overlay(sample["picture"], sample["mask"])
        image = Image.fromarray(picture)
        image.thumbnail((2 * _TILE, 2 * _TILE))
        yield jpeg_bytes(np.asarray(image)), f"{data.keys[row]} {data.labels[row]} {data.categories[row]}".strip()
