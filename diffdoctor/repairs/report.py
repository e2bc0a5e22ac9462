"""The page of `diffdoctor repair`, on which a slider uncovers each picture's repair, and its figures."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from diffdoctor.data.codec import decode
from diffdoctor.runs.files import file_name
from diffdoctor.viz.draw import jpeg_bytes, png_bytes
from diffdoctor.viz.report import Report

TILE = 300  # smallest width of a picture on the page, in pixels
_LONGEST = 768  # of a picture in the page, in pixels
_EXACT = 128  # up to this many pixels a picture stands in the page as it is


def thumbnail(rgb: np.ndarray) -> bytes:
    """A picture (H, W, 3) uint8 for the page, as PNG or JPEG."""
    from PIL import Image

    if max(rgb.shape[:2]) <= _EXACT:
        return png_bytes(rgb)
    small = Image.fromarray(rgb)
    small.thumbnail((_LONGEST, _LONGEST))
    return jpeg_bytes(np.asarray(small))


def summarise(records: Iterable[dict]) -> dict:
    """The figures of a run, of the records of its pictures.

    Returns:
        pictures, flagged_before, flagged_after, regions, kept, tries, changed_pixels, changed_outside, without_prompt
        (with a region), and seam_before and seam_after, the gradient energy along the rims of what was kept; None
        without any.
    """
    names = ("flagged_before", "flagged_after", "changed_pixels", "changed_outside", "regions", "kept", "tries")
    totals = dict.fromkeys(("pictures", *names, "without_prompt"), 0)
    before = after = pairs = 0.0
    for record in records:
        regions, seam = record["regions"], record["seam"]
        totals["pictures"] += 1
        totals["changed_pixels"] += record["changed"]
        for name in ("flagged_before", "flagged_after", "changed_outside"):
            totals[name] += record[name]
        totals["regions"] += len(regions)
        totals["kept"] += sum(region["kept"] for region in regions)
        totals["tries"] += sum(len(region["tries"]) for region in regions)
        totals["without_prompt"] += bool(regions) and not record["prompt"].strip()
        pairs += seam["pairs"]
        before += seam["before"] * seam["pairs"]
        after += seam["after"] * seam["pairs"]
    seams = (before / pairs, after / pairs) if pairs else (None, None)
    return totals | dict(zip(("seam_before", "seam_after"), seams, strict=True))


def write_page(path: Path, records: list[dict], metrics: dict) -> None:
    """Write before_after.html.

    Args:
        path: of the page, in the run's output folder, from whose files it takes the pictures.
        records: of the pictures to show, see `command.describe`, in their order.
        metrics: see `summarise`.
    """
    report = Report("Repair")
    report.lead(
        f"{metrics['kept']} of {metrics['regions']} regions were repaired. Flagged pictures: "
        f"{metrics['flagged_before']} before, {metrics['flagged_after']} after, of {metrics['pictures']}."
    )
    report.text(
        "Drag over a picture, or use the arrow keys: left of the line it is as it was, right of it as it is now. A box "
        "is a region that was redrawn; outside of the masks in masks/ not a bit of a pixel changed."
    )
    with report.tiles(TILE):
        for record in records:
            _add_picture(report, path.parent, record)
    report.heading("Regions")
    header = ("picture", "box", "confidence before", "after", "tries", "what became of it")
    rows = [_row(record["name"], region) for record in records for region in record["regions"]]
    report.table(header, rows)
    report.write(path)


def _add_picture(report: Report, output: Path, record: dict) -> None:
    file = file_name(record["name"], ".png")
    before, after = output / "before" / file, output / "pictures" / file
    if not (before.is_file() and after.is_file()):
        return
    kept = sum(region["kept"] for region in record["regions"])
    report.slider(
        before.read_bytes(),
        thumbnail(decode(after, "RGB")),
        f"{record['name']}: {kept} of {len(record['regions'])} regions repaired, "
        f"mean confidence {record['mean_before']:.3f} → {record['mean_after']:.3f}",
        pixels=max(record["height"], record["width"]) < TILE,
        link=urllib.parse.quote(f"pictures/{file}"),
        boxes=[region["box"] for region in record["regions"]],
        size=(record["height"], record["width"]),
    )


def _row(name: str, region: dict) -> tuple:
    why = list(dict.fromkeys(attempt["why_not"] for attempt in region["tries"]))
    fate = ("kept", "good") if region["kept"] else (f"left as it was: {'; '.join(why)}", "bad")
    x, y, width, height = region["box"]
    box = f"{width}×{height} at {x}, {y}"
    scores = [(f"{region[score]:.3f}", "number") for score in ("score_before", "score_after")]
    return (name, box, *scores, (len(region["tries"]), "number"), fate)
