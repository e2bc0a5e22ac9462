"""The gallery of `diffdoctor diagnose`: the worst pictures on one page."""

from __future__ import annotations

import urllib.parse
from pathlib import Path

import numpy as np

from diffdoctor.runs.files import file_name
from diffdoctor.viz.draw import png_bytes
from diffdoctor.viz.report import Report

TILE = 240  # smallest width of a picture, in pixels


def write_gallery(output: Path, records: list[dict], metrics: dict, folder: str) -> None:
    """Write gallery.html into a diagnosis' output folder.

    Args:
        output: the folder.
        records: of the pictures to show, in their order; see `predict.describe_map`.
        metrics: the content of metrics.json.
        folder: the one inside `output` whose pictures are shown.
    """
    from PIL import Image

    report = Report("Diagnosis")
    report.lead(f"{metrics['flagged']} of {metrics['pictures']} pictures are flagged, the worst first.")
    with report.tiles(TILE):
        for record in records:
            file = file_name(record["name"], ".png")
            path = output / folder / file
            if not path.is_file():
                continue
            with Image.open(path) as picture:
                small = picture.convert("RGB")
                small.thumbnail((384, 384))
            caption = f"{record['name']}: {record['flagged_share']:.1%} flagged, largest confidence {record['max']:.2f}"
            # Small pictures are enlarged by the page, in sharp pixels.
            link = urllib.parse.quote(f"{folder}/{file}")
            report.image(png_bytes(np.asarray(small)), caption, pixels=max(small.size) < TILE, link=link)
    report.write(output / "gallery.html")
