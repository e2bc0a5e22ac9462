"""The study as one page to look at: the table, signs before and after, the oracle's calibration, the detectors."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from benchmarks.studies.signs.oracle import TAUS, Reading
from benchmarks.studies.signs.table import HEADER, NAMES, cells
from diffdoctor.viz.draw import as_hwc, enlarge, grid, overlay, png_bytes
from diffdoctor.viz.report import Report

SHOWN = 24
_COLUMNS, _SCALE, _GAP = 6, 4, 6
_COLUMNS_SAY = (
    "A picture is broken where the rule, called the oracle, finds a broken letter in it; in brackets stand 95 % "
    "intervals. Of before: as a share of what the untreated pipeline draws from the same seeds. Of trained on: as a "
    "share of what it draws after ordinary training on clean signs for as long. Mended: of the letters broken "
    "before, those sound now; broke: of the sound ones, those broken now; kept: of those sound both times, those "
    "that are the same letter. Entropy: of the sound letters, in bits, at most 2.585. Its fall / the oracle's: near "
    "1 the detector that steers the treatment tells the truth, far above it was fooled."
)
_ROWS_SAY = (
    "Rows: draft_k, draft_lv, drtune, full, leap, nft, grpo and weighted are methods of diffdoctor treat, which train "
    "a LoRA; guide and repair redraw what the detector flags; autoguided is drawn with what the LoRA changed taken "
    "further. docs/signs.md explains them."
)


def worst(before: Reading, count: int = SHOWN) -> np.ndarray:
    """Indices of the pictures of which most letters are broken, the most badly broken ones first."""
    order = np.lexsort((-before.severity.sum(1), -before.broken_letters().sum(1)))
    return order[:count]


def before_and_after(pictures: list, columns: int = _COLUMNS) -> bytes:
    """PNG bytes: the same signs in each of several (n, H, W, 3) uint8 stacks, below each other, `columns` in a row."""
    width = pictures[0].shape[2]
    tiles = []
    for versions in zip(*pictures, strict=True):
        gap = np.full((1, width, 3), 255, np.uint8)
        tile = [part for version in versions for part in (version, gap)][:-1]
        tiles.append(enlarge(np.concatenate(tile), _SCALE))
    lines = [tiles[first : first + columns] for first in range(0, len(tiles), columns)]
    return png_bytes(grid(lines, gap=_GAP))


def rows_compared(study, kind: str, names: tuple[str, str], chosen: np.ndarray) -> bytes:
    """PNG bytes: the same chosen signs of two rows of the table, the second's below the first's."""
    return before_and_after([as_hwc(study.pictures(kind, name))[chosen] for name in names])


def marked_sheet(pictures, reading: Reading, chosen: np.ndarray) -> bytes:
    """PNG bytes: chosen signs, each above itself with what the oracle marks in red."""
    signs = as_hwc(pictures)[chosen]
    marks = reading.where(chosen).marked()
    return before_and_after([signs, np.stack([overlay(sign, mark) for sign, mark in zip(signs, marks, strict=True)])])


def write_page(path: Path, studies: list, kinds: tuple[str, ...], rows: list[dict], together: list[dict]) -> None:
    """Write the page of all seeds; pictures are those of the first seed.

    Args:
        path: of the HTML file.
        studies: a `Study` per seed.
        kinds: of pipelines.
        rows: of `table.row`.
        together: of `table.pooled`.
    """
    study, report = studies[0], Report("Signs: artifacts that nobody injected")
    report.lead(
        "Small pipelines that have seen clean signs alone scramble letters by themselves. A rule, not a network, says "
        "which letters are broken, before and after."
    )
    report.text(_COLUMNS_SAY)
    report.text(_ROWS_SAY)
    if len(studies) > 1:
        report.heading("All seeds; behind a colon each of them")
        report.table(HEADER, map(cells, together))
    for number in dict.fromkeys(row["seed"] for row in rows):
        report.heading(f"Seed {number}")
        report.table(HEADER, [cells(row) for row in rows if row["seed"] == number])
    for kind in kinds:
        reading = study.reading(kind, "before")
        for base in dict.fromkeys(recipe.before for recipe in study.recipes.values()):
            chosen = worst(study.reading(kind, base))
            report.heading(f"{NAMES[kind]}: the {SHOWN} worst of {len(reading)} signs of “{base}”, and the same after")
            for name in (name for name, recipe in study.recipes.items() if recipe.before == base != name):
                both = rows_compared(study, kind, (base, name), chosen)
                report.image(both, f"Above: {base}. Below: {name}. The same seeds.")
        some = np.flatnonzero(reading.broken())[:SHOWN]
        caption = "Drawn, not chosen: the first broken signs of the untreated pipeline, and what the oracle marks."
        report.image(marked_sheet(study.pictures(kind, "before"), reading, some), caption)
        near = np.argsort(np.abs(reading.severity.max(1) - TAUS[1]))[:SHOWN]
        caption = "Where the oracle is nearest to the limit; people would differ."
        report.image(marked_sheet(study.pictures(kind, "before"), reading, near), caption)
    _tolerance(report, rows)
    _detectors(report, study, kinds)
    _calibration(report, study.calibration())
    report.write(path)


def _tolerance(report, rows) -> None:
    report.heading("Broken pictures by the oracle's tolerance")
    lines = [
        (
            NAMES[row["kind"]],
            row["seed"],
            row["name"],
            *(f"{100 * row['rates'][f'{tau:.2f}']['rate']:.1f} %" for tau in TAUS),
        )
        for row in rows
    ]
    report.table(("pipeline", "seed", "what was done", *(f"tau {tau:.2f}" for tau in TAUS)), lines)


def _detectors(report, study, kinds) -> None:
    report.heading("Detectors, on held-out signs against the oracle's marks")
    names = ("map50", "iou", "auroc", "letters_auroc", "false_positive_rate", "hit_rate")
    lines = []
    for kind, observer in itertools.product(kinds, (False, True)):
        found = study.detector_measures(kind, study.detector(kind, observer=observer))
        who = "observer" if observer else "steers"
        lines.append((NAMES[kind], who, *("–" if found[name] is None else f"{found[name]:.3f}" for name in names)))
    report.table(("pipeline", "detector", *names), lines)


def _calibration(report, found: dict) -> None:
    report.heading("The oracle on clean signs, and on signs broken by construction")
    names = list(found["clean"])
    report.table(
        ("", *names), [(which, *(f"{found[which][name]:.4f}" for name in names)) for which in ("clean", "autoencoder")]
    )
    lines = []
    for (kind, degree), group in itertools.groupby(found["misses"], key=lambda row: (row["kind"], row["degree"])):
        lines.append((kind, degree, *(f"{100 * row['missed']:.1f} %" for row in group)))
    report.table(("one letter of each sign", "degree", *(f"missed at {tau:.2f}" for tau in TAUS)), lines)
