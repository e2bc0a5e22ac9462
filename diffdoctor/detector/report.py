"""The gallery of `diffdoctor diagnose`: the worst pictures on one page."""

from __future__ import annotations

import urllib.parse
from itertools import groupby
from pathlib import Path

import numpy as np

from diffdoctor.data.codec import UnreadablePicture, decode
from diffdoctor.data.pictures import shrink_to
from diffdoctor.data.video import frame_name
from diffdoctor.measures.pixels import FLAG_CONFIDENCE, FLAG_SHARE
from diffdoctor.runs.files import file_name
from diffdoctor.viz.draw import png_bytes
from diffdoctor.viz.report import Report
from diffdoctor.viz.video import film, film_indices

TILE = 240  # smallest width of a picture, in pixels
_EMBEDDED = 2**20  # bytes of an animation that the page holds itself


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
    if "frames" in record:
        _add_video(report, output, record, folders)
        return
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


def _add_video(report: Report, output: Path, record: dict, folders: tuple[str, ...]) -> None:
    """Some frames side by side, with a link to the animation where there is one."""
    name, count = record["name"], record["frames"]
    moving, strip = (output / "overlays" / file_name(name, ending) for ending in (".webp", ".png"))
    maps = output / "maps" / file_name(name, "")
    try:
        if folders[0] == "overlays":
            shown = decode(strip, "RGB")
        else:
            shown = film([decode(maps / frame_name(number), "RGB") for number in film_indices(count)])
    except UnreadablePicture:
        return
    links = {"animation": moving} if folders[0] == "overlays" else {}
    urls = {text: urllib.parse.quote(path.relative_to(output).as_posix()) for text, path in links.items()}
    if Path(record.get("path", "")).is_absolute():
        urls = {"video": Path(record["path"]).as_uri(), **urls}
    report.image(
        png_bytes(shrink_to(shown, 4 * TILE)),
        f"{name}: {count} frames, {record['flagged_share']:.1%} flagged, largest confidence {record['max']:.2f}, worst "
        f"in frame {record['worst_frame']}",
        pixels=max(shown.shape[:2]) < TILE,
        link=urls.get("animation"),
        links=urls,
    )
    if links and moving.is_file() and moving.stat().st_size <= _EMBEDDED:
        report.image(moving.read_bytes(), f"{name}, moving", pixels=False, link=urls["animation"])
