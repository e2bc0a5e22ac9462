"""Which pictures are worth a person's time? `python -m benchmarks.studies.label_efficiency --output runs/labels`.

A detector that knows injected damage alone meets a pool of pictures that are damaged in other ways: digits, a quarter
of them, or with `--world signs` what a small pipeline draws and breaks by itself. A simulated rater, careful or noisy,
labels what each strategy of `annotate add` asks for; the detector learns from the labels beside what it knew, and
chooses the next ones. Measured on held-out pictures, against labels and against the rater's seconds; with `--treat`
also by what becomes of the signs' pipeline. Writes table.md, labels.png and results.json; stopped and started again,
it resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

from benchmarks.studies.label_efficiency.arms import arm
from benchmarks.studies.label_efficiency.design import DIGITS, RATERS, SIGNS, Settings, World
from benchmarks.studies.label_efficiency.digits import Digits
from benchmarks.studies.label_efficiency.signs import Signs
from benchmarks.studies.label_efficiency.tables import plot, text
from benchmarks.studies.treatment.table import put_into
from diffdoctor.annotate.select import STRATEGIES
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.files import atomic_write_json, atomic_write_text
from diffdoctor.runs.lock import locked_folder
from diffdoctor.runs.progress import quiet_loaders
from diffdoctor.runs.record import RunFolder, versions
from diffdoctor.runs.units import Units

DESIGNS = {"digits": DIGITS, "signs": SIGNS}


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog="python -m benchmarks.studies.label_efficiency", description=__doc__)
    command.add_argument("--output", type=Path, default=Path("runs/labels"), help="folder (runs/labels)")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="0 1 2 3 4")
    command.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="all")
    command.add_argument("--raters", nargs="+", choices=list(RATERS), default=list(RATERS), help="both")
    command.add_argument("--world", choices=list(DESIGNS), default="digits", help="of the pictures (digits)")
    command.add_argument(
        "--signs",
        type=Path,
        default=Path("runs/signs"),
        help="folder of the study of signs, for its pipeline (runs/signs)",
    )
    command.add_argument("--signs_settings", type=json.loads, default={}, help="JSON: other settings of that study")
    command.add_argument(
        "--treat", type=int, nargs="+", default=[], metavar="LABELS",
        help="of the signs: treat the pipeline with what the noisy rater's random and paper's labels taught, so many",
    )  # fmt: skip
    command.add_argument("--settings", type=json.loads, default={}, help="JSON: other values of Settings")
    command.add_argument("--docs", help="page whose table is replaced as well, such as docs/detector.md")
    return command


def run(options) -> dict[str, dict]:
    """Do what is left to do; returns {arm: rater, strategy, seed, points}."""
    design = DESIGNS[options.world]
    settings = dataclasses.replace(design.settings, **options.settings)
    identity = {**dataclasses.asdict(settings), "raters": {name: dataclasses.asdict(r) for name, r in RATERS.items()}}
    if options.world != "digits":
        identity |= {"world": options.world, "treat": sorted(options.treat), **options.signs_settings}
    folder = RunFolder(options.output, "label efficiency", identity, {"arms": None, "detectors": None})
    pipeline = contextlib.nullcontext() if options.world == "digits" else locked_folder(options.signs)
    with folder, pipeline:
        folder.check()
        folder.begin()
        units = Units(options.output / "arms", ".json")
        for seed in options.seeds:
            names = {f"{r}-{s}-{seed}": (r, s) for r in options.raters for s in options.strategies}
            if not (missing := units.missing(names)):
                continue
            world = _world(options, seed, settings)
            for name in missing:
                rater, strategy = names[name]
                points = arm(world, rater, strategy, design.budgets[strategy])
                found = {"rater": rater, "strategy": strategy, "seed": seed, "points": points}
                atomic_write_json(units.path(name), found)
                line = " ".join(format(point["map50"], ".2f") for point in points)
                print(f"{name}: mAP@0.5 {line}", file=sys.stderr, flush=True)
        results = {name: json.loads(units.path(name).read_text(encoding="utf-8")) for name in units.done()}
        atomic_write_json(options.output / "results.json", {"arms": results, "versions": versions()})
        atomic_write_text(options.output / "table.md", text(results, design) + "\n")
        plot(results, options.output / "labels.png")
    return results


def _world(options, seed: int, settings: Settings) -> World:
    if options.world == "digits":
        return Digits(seed, settings, options.output / "detectors" / str(seed))
    # of the first seed alone: a treatment takes as long as all of an arm's trainings
    chosen = options.treat if seed == options.seeds[0] else ()
    treated = frozenset(("noisy", strategy, labels) for strategy in ("random", "paper") for labels in chosen)
    return Signs(seed, settings, options.signs, treated, options.signs_settings)


def _marks(world: str) -> tuple[str, str]:
    """Between which the world's tables stand in a page."""
    name = "labels" if world == "digits" else f"labels of {world}"
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def main(argv: list[str] | None = None) -> int:
    """Exit code 2 for a folder that cannot be used."""
    options = parser().parse_args(argv)
    quiet_loaders()
    try:
        results = run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if options.docs:
        put_into(options.docs, text(results, DESIGNS[options.world]), *_marks(options.world))
    print(text(results, DESIGNS[options.world]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
