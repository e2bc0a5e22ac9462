"""The gallery of `diffdoctor diagnose`: the worst pictures on one page."""

from __future__ import annotations

import urllib.parse
from itertools import groupby
from pathlib import Path

import numpy as np

from diffdoctor.measures.pixels import FLAG_CONFIDENCE, FLAG_SHARE
from diffdoctor.runs.files import file_name
from diffdoctor.viz.draw import png_bytes
from diffdoctor.viz.report import Report

TILE = 240  # smallest width of a picture, in pixels


def write_gallery(output: Path, records: list[dict], metrics: dict, folders: tuple[str, ...], settings: dict) -> None:
    """Write gallery.html into a diagnosis' output folder.

    Args:
        output: the folder.
        records: of the pictures to show, the flagged ones first; see `predict.describe_map`.
        metrics: the content of metrics.json.
        folders: those inside `output` that hold a file of each picture; those of the first are shown.
        settings: the command's options, shown at the end.
    """
    report = Report("Diagnosis")
    report.lead(f"{metrics['flagged']} of {metrics['pictures']} pictures are flagged, the worst first.")
    report.text(_legend(folders[0]))
    left = {True: metrics["flagged"], False: metrics["pictures"] - metrics["flagged"]}
    for flagged, group in groupby(records, key=lambda record: record["flagged"]):
        shown = list(group)
        count = f"{left[flagged]}" if len(shown) == left[flagged] else f"{len(shown)} of {left[flagged]}"
        report.heading(f"{'Flagged' if flagged else 'Not flagged'}: {count}")
        with report.tiles(TILE):
            for record in shown:
                _add_picture(report, output, record, folders)
    report.heading("Settings")
    report.code("\n".join(f"{name}: {value}" for name, value in settings.items()))
    report.write(output / "gallery.html")


def _legend(folder: str) -> str:
    shown = "Red is the detector's confidence" if folder == "overlays" else "Brightness is the detector's confidence"
    return (
        f"{shown}; each box is a region that it found, at a confidence of at least {FLAG_CONFIDENCE:g}. A picture is "
        f"flagged if at least {FLAG_SHARE:.0%} of its pixels have that confidence. A click opens it at full size."
    )


def _add_picture(report: Report, output: Path, record: dict, folders: tuple[str, ...]) -> None:
    from PIL import Image

    file = file_name(record["name"], ".png")
    if not (output / folders[0] / file).is_file():
        return
    with Image.open(output / folders[0] / file) as picture:
        small = picture.convert("RGB")
        small.thumbnail((384, 384))
    links = {folder.removesuffix("s"): urllib.parse.quote(f"{folder}/{file}") for folder in folders[1:]}
    source = Path(record.get("path", ""))
    if source.suffix.lower() != ".tar" and source.is_absolute():
        links = {"picture": source.as_uri(), **links}
    report.image(
        png_bytes(np.asarray(small)),
        f"{record['name']}: {record['flagged_share']:.1%} flagged, largest confidence {record['max']:.2f}",
        # small pictures are enlarged by the page, in sharp pixels
        pixels=max(small.size) < TILE,
        link=urllib.parse.quote(f"{folders[0]}/{file}"),
        links=links,
        boxes=[component["box"] for component in record["components"]],
        size=(record["height"], record["width"]),
    )
