"""Signs: artifacts that nobody injected, and a rule that sees them.

Two small pipelines learn clean signs, and scramble letters by themselves. A simulated person marks some of what they
draw, a detector learns from the marks, the pipelines are treated with it, and an exact oracle compares before, after,
and training on for the same CPU seconds. Stopped and started again, it resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.ops import machine
from benchmarks.studies.signs import pipelines
from benchmarks.studies.signs.page import SHOWN, rows_compared, worst, write_page
from benchmarks.studies.signs.recipes import QUICK, RECIPES
from benchmarks.studies.signs.study import Settings, Study
from benchmarks.studies.signs.table import END, START, markdown, pooled, row
from benchmarks.studies.treatment.table import put_into
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from diffdoctor.runs.lock import locked_folder
from diffdoctor.runs.progress import quiet_loaders
from diffdoctor.training.cpu_settings import cpu_settings

# The pipeline is the whole study's: one that has learnt less scrambles everything, and training on is what it needs.
QUICK_SETTINGS = {
    "pictures": 300,
    "held_out": 200,
    "calibration": 300,
    "treat": {"steps": 60, "evaluate_pictures": 32},
}

MARGIN = 0.05
"""By how much a treatment must lower the rate more than training on for as long does."""


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m benchmarks.studies.signs", description=__doc__)
    command.add_argument("--output", type=Path, default=Path("runs/signs"), help="folder (runs/signs)")
    command.add_argument("--seeds", type=int, nargs="+", default=[0], help="of everything (0)")
    command.add_argument("--pipelines", nargs="+", choices=pipelines.KINDS, default=list(pipelines.KINDS), help="both")
    command.add_argument("--rows", nargs="+", choices=list(RECIPES), help="of the table, besides before (all)")
    command.add_argument(
        "--split", choices=("development", "test"), default="test", help="seeds of the pictures (test)"
    )
    command.add_argument("--pictures", type=int, default=2000, help="of each row (2000)")
    command.add_argument("--quick", action="store_true", help="the U-Net alone, shorter, three rows: ten minutes")
    command.add_argument("--settings", type=json.loads, default={}, help="JSON: other fields of study.Settings")
    command.add_argument("--docs", help="page whose table is replaced as well, such as docs/signs.md")
    command.add_argument("--table", default="seeds", help="name of that table, in the lines around it (seeds)")
    command.add_argument(
        "--strict", action="store_true", help="exit code 1 where no treatment does better than training on"
    )
    command.add_argument("--threads", type=int, default=None, help="CPU threads (PyTorch's choice)")
    return command


def run(options) -> dict:
    """Do what is left to do, write the table and the page, and return the record."""
    settings = {"split": options.split, "pictures": options.pictures}
    rows, kinds = options.rows or list(RECIPES), tuple(options.pipelines)
    if options.quick:
        settings |= QUICK_SETTINGS
        rows, kinds = options.rows or list(QUICK), kinds[:1]
    settings |= options.settings
    chosen = {name: recipe for name, recipe in RECIPES.items() if name in {"before", *rows, *_needed(rows)}}
    studies = [Study(options.output, Settings(seed=seed, **settings), chosen) for seed in options.seeds]
    found = [row(study, kind, name) for study in studies for kind in kinds for name in chosen]
    together = [
        pooled(studies, kind, name, [each for each in found if (each["kind"], each["name"]) == (kind, name)])
        for kind in kinds
        for name in chosen
    ]
    text = markdown(together)
    record = {
        "rows": found,
        "pooled": together,
        "calibration": [study.calibration() for study in studies],
        "detectors": [study.detector_measures(kind, study.detector(kind)) for study in studies for kind in kinds],
        "threads": torch.get_num_threads(),
        "cpu": machine.cpu_name(),
        "versions": machine.versions(),
        **machine.commit(),
    }
    atomic_write_json(options.output / "signs.json", record)
    atomic_write_text(options.output / "signs.md", text + "\n")
    for kind in kinds:
        _pictures(options.output, studies[0], kind)
    write_page(options.output / "signs.html", studies, kinds, found, together)
    if options.docs:
        put_into(options.docs, f"{text}\n\n{_caption(record, options)}", START.format(options.table), END)
    print(text)
    return record


def _caption(record, options) -> str:
    seeds = ", ".join(map(str, options.seeds))
    return (
        f"{record['rows'][0]['pictures']} pictures a seed, {record['rows'][0]['split']} seeds; "
        f"{'seeds' if len(options.seeds) > 1 else 'seed'} {seeds}; "
        f"{record['cpu']}, CPU threads: {record['threads']}; torch {record['versions']['torch']}."
    )


def _needed(rows) -> set[str]:
    """The rows that others are made from."""
    needed = {
        name
        for row in rows
        for name in (RECIPES[row].after, RECIPES[row].trained_on, RECIPES[row].before)
        if name not in (None, row)
    }
    return needed | _needed(needed) if needed else set()


def _pictures(folder: Path, study: Study, kind: str) -> None:
    """The worst signs before, and after the last treatment without guidance and repair; and as drawn in more steps."""
    treated = {name: recipe for name, recipe in study.recipes.items() if name.startswith("nft") and recipe.is_tuned}
    for steps in {recipe.steps: None for recipe in treated.values()}:
        name = [name for name, recipe in treated.items() if recipe.steps == steps][-1]
        names = treated[name].before, name
        chosen = worst(study.reading(kind, names[0]), SHOWN)
        number = "" if steps is None else f"-{steps}-steps"
        atomic_write_bytes(folder / f"signs-{kind}{number}.png", rows_compared(study, kind, names, chosen))


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; with --strict 1 where training on does as well; 2 for a folder that cannot be used."""
    options = parser().parse_args(arguments)
    quiet_loaders()
    try:
        with cpu_settings(options.threads), locked_folder(options.output):
            record = run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote signs.md, signs.json and signs.html in {options.output}")
    faults = worse_than_training_on(record["rows"])
    for fault in faults if options.strict else ():
        print(fault, file=sys.stderr)
    return int(options.strict and bool(faults))


def worse_than_training_on(rows: list[dict]) -> list[str]:
    """What says that a treatment lowers the oracle's rate by less than 5 points more than training on does."""
    found = []
    for line in rows:
        compared = line.get("against_control")
        if compared is not None and compared["difference"] > -MARGIN:
            points = f"{100 * compared['difference']:+.1f} points"
            found.append(f"{line['kind']}, seed {line['seed']}: {line['name']} against {compared['name']}: {points}")
    return found


if __name__ == "__main__":
    sys.exit(main())
